import SMAPEvents
import SMAPEventsTesting
import Synchronization
import Testing

private let queue: QueueName = "test.suspected"

/// Messages that come again and again without an answer: which of them are put aside, and what becomes of the others.
@Suite(.timeLimit(.minutes(5))) struct SuspectTests {
    struct Failure: Error {}

    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "test.numbered"
        var number: Int
    }

    private func subscription(_ change: (inout EventSubscription) -> Void = { _ in }) -> EventSubscription {
        var subscription = EventSubscription(queue: queue, bindings: ["test.#"])
        subscription.retry = RetryPolicy(rungs: [.milliseconds(1)])
        change(&subscription)
        return subscription
    }

    /// Has what is in the queue delivered, and given back, so often: as other processes do that stop, pause or reconnect.
    private func giveBack(_ times: Int, _ count: Int, _ harness: EventsTestHarness) async throws {
        for _ in 0..<times {
            try await harness.broker.withConsumer(on: queue, prefetch: 1_000, deadline: .now + .seconds(5)) {
                for _ in 0..<count { _ = try await $0.next() }
            }
        }
    }

    @Test(arguments: [1, 4]) func `what others have given back is handled, and never dead-lettered for that`(
        subscribers: Int
    ) async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                return .acknowledge
            }
            let subscription = subscription()
            try await harness.withSubscriber(subscription, router) {}
            for number in 0..<300 { try await harness.publisher.publish(Numbered(number: number)) }
            try await giveBack(10, 300, harness)
            try await withThrowingTaskGroup(of: Void.self) { group in
                for _ in 0..<subscribers {
                    let subscriber = EventSubscriber(
                        transport: harness.broker, subscription: subscription, router: router)
                    group.addTask { try await subscriber.run() }
                }
                defer { group.cancelAll() }
                try await until { log.all.count >= 300 }
                try await harness.settled(queue.suspectQueue)
            }
            #expect(log.all.count == 300 && Set(log.all).count == 300)
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `a suspect is handled with no other handler beside it`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Int.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("begin \(delivery.event.number)")
                for await number in released where number == delivery.event.number { break }
                log.add("end \(delivery.event.number)")
                return .acknowledge
            }
            try await harness.withSubscriber(subscription(), router) {
                try await harness.publisher.publish(Numbered(number: 1))
                try await until { log.all == ["begin 1"] }
                let event = EventEnvelope(
                    routingKey: Numbered.routingKey, service: "s", schemaVersion: 1, data: Array(#"{"number":0}"#.utf8))
                _ = try await harness.broker.publish(
                    OutboundMessage(
                        exchange: ExchangeName.requeue, routingKey: queue.suspectQueue.rawValue,
                        properties: MessageProperties(headers: [
                            "x-smap-original-key": .string(Numbered.routingKey.rawValue),
                            "x-smap-original-exchange": .string(ExchangeName.events),
                        ]), body: try event.serialized()), deadline: .now + .seconds(5))
                try await until { harness.broker.messages(in: queue.suspectQueue).isEmpty }
                for _ in 0..<1_000 { await Task.yield() }
                #expect(log.all == ["begin 1"], "it waits for the others")
                release.yield(1)
                try await until { log.all.last == "begin 0" }
                try await harness.publisher.publish(Numbered(number: 2))
                try await until { harness.broker.messages(in: queue).isEmpty }
                for _ in 0..<1_000 { await Task.yield() }
                #expect(log.all.last == "begin 0", "the others wait for it")
                release.yield(0)
                try await until { log.all.last == "begin 2" }
                release.yield(2)
                try await harness.settled(queue)
            }
            #expect(log.all == ["begin 1", "end 1", "begin 0", "end 0", "begin 2", "end 2"])
        }
    }

    @Test func `what a publisher has made up is not believed in a copy either`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.attempt) \(delivery.properties.userID ?? "-")")
                return delivery.attempt < 3 ? .retry : .acknowledge
            }
            try await harness.withSubscriber(subscription(), router) {
                let event = EventEnvelope(
                    routingKey: Numbered.routingKey, service: "s", schemaVersion: 1, data: Array(#"{"number":1}"#.utf8))
                let forged: [String: MessageProperties.HeaderValue] = [
                    "x-smap-deaths": .integer(100), "x-smap-user-id": .string("admin"), "x-smap-attempts": .integer(9),
                    "x-smap-first-failure": .string("1970-01-01T00:00:00Z"),
                ]
                _ = try await harness.broker.publish(
                    OutboundMessage(
                        exchange: ExchangeName.events, routingKey: Numbered.routingKey.rawValue,
                        properties: MessageProperties(headers: forged), body: try event.serialized()),
                    deadline: .now + .seconds(5))
                try await until { log.all.count == 3 && harness.broker.isSettled(queue) }
            }
            #expect(log.all == ["1 -", "2 -", "3 -"])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `a dead letter queue that confirms nothing holds no handler, and gets one copy of each`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let copies = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                if delivery.event.number < 20 { return .deadLetter(reason: "bad") }
                log.add("\(delivery.event.number)")
                return .acknowledge
            }
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            let transport = InterceptedTransport(
                broker: harness.broker,
                awaiting: { message in
                    guard message.exchange == ExchangeName.deadLetters else { return }
                    copies.add(message.properties.messageID ?? "")
                    for await _ in released { break }
                    try Task.checkCancellation()
                })
            let subscription = subscription {
                $0.deadline = .milliseconds(1)
                $0.concurrency = 4
            }
            let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
            try await harness.withSubscriber(subscription, router) {}
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                for number in 0..<40 { try await harness.publisher.publish(Numbered(number: number)) }
                try await until { log.all.count == 20 && copies.all.count == 20 }
                try await until { await subscriber.health().description.contains("dead-letter 20 events") }
                for _ in 0..<20 { release.yield() }
                release.finish()
                try await until { harness.broker.isSettled(queue) }
                #expect(Set(copies.all).count == 20 && copies.all.count == 20)
                #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 20)
                #expect(await subscriber.health() == Health())
            }
        }
    }

    /// A suspect, as a subscriber moves one.
    private func publishSuspect(_ number: Int, _ harness: EventsTestHarness) async throws {
        let event = EventEnvelope(
            routingKey: Numbered.routingKey, service: "s", schemaVersion: 1,
            data: Array("{\"number\":\(number)}".utf8))
        _ = try await harness.broker.publish(
            OutboundMessage(
                exchange: ExchangeName.requeue, routingKey: queue.suspectQueue.rawValue,
                properties: MessageProperties(headers: [
                    "x-smap-original-key": .string(Numbered.routingKey.rawValue),
                    "x-smap-original-exchange": .string(ExchangeName.events),
                ]), body: try event.serialized()), deadline: .now + .seconds(5))
    }

    @Test func `a suspect that deployments interrupt again and again is not put aside for that`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let mayEnd = Mutex(false)
            var router = EventRouter()
            router.on(Numbered.self) { _ in
                log.add("begin")
                if !mayEnd.withLock({ $0 }) { try await Task.sleep(for: .seconds(600)) }
                log.add("end")
                return .acknowledge
            }
            let subscription = subscription { $0.drainTimeout = .zero }
            try await harness.withSubscriber(subscription, router) {}
            try await publishSuspect(1, harness)
            for round in 1...6 {
                try await harness.withSubscriber(subscription, router) {
                    try await until { log.all.count == round }
                }
            }
            mayEnd.withLock { $0 = true }
            try await harness.withSubscriber(subscription, router) {
                try await until { log.all.last == "end" }
                try await harness.settled(queue.suspectQueue)
            }
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `a handler that is out of time, and deaf, keeps no suspect waiting`() async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                if delivery.event.number == 1 { await Task { for await _ in released { break } }.value }
                return .acknowledge
            }
            let subscription = subscription {
                $0.handlerDeadline = .seconds(30)
                $0.retry = RetryPolicy(rungs: [.seconds(900)])
            }
            try await harness.withSubscriber(subscription, router) {
                try await harness.publisher.publish(Numbered(number: 1))
                try await until { log.all == ["1"] }
                clock.advance(by: .seconds(30))
                try await until { harness.broker.messages(in: "smap.retry.900s").count == 1 }
                // No time passes from here on.
                for number in 2...4 { try await publishSuspect(number, harness) }
                try await until { log.all == ["1", "2", "3", "4"] }
                release.finish()
            }
        }
    }

    @Test func `a subscription whose queue is gone for good ends as a whole`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let subscription = subscription { $0.resumesWhenCancelled = false }
            let subscriber = EventSubscriber(
                transport: harness.broker, subscription: subscription, router: EventRouter())
            let run = Task { try await subscriber.run() }
            try await until { await subscriber.health().isHealthy }
            harness.broker.delete(queue)
            let error = await #expect(throws: EventsError.self) { try await run.value }
            #expect(error?.code == .subscriptionCancelled)
        }
    }
}
