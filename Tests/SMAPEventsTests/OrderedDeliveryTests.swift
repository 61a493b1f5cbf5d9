import Logging
import SMAPEvents
import SMAPEventsTesting
import ServiceLifecycle
import Synchronization
import Testing

private let queue: QueueName = "test.ordered"

/// Deliveries that are ordered by a key, in memory and with time that passes by hand.
@Suite(.timeLimit(.minutes(5))) struct OrderedDeliveryTests {
    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "test.numbered"
        var projectID: ProjectID?
        var number: Int
    }

    private func subscription(_ change: (inout EventSubscription) -> Void = { _ in }) -> EventSubscription {
        var subscription = EventSubscription(queue: queue, bindings: ["test.#"])
        subscription.orderingKey = .project
        subscription.retry = RetryPolicy(rungs: [.seconds(1)])
        subscription.retryDelay = .milliseconds(1)
        change(&subscription)
        return subscription
    }

    private func publish(_ project: String?, _ number: Int, _ harness: EventsTestHarness) async throws {
        try await harness.publisher.publish(Numbered(projectID: project.map { try ProjectID($0) }, number: number))
    }

    @Test func `the order of a project is kept through retries, and projects do not wait for each other`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                let name = "\(delivery.projectID?.rawValue ?? "-") \(delivery.event.number)"
                if name == "slow 1" { for await _ in released { break } }
                log.add("\(name) \(delivery.attempt)")
                return name == "failing 2" && delivery.attempt < 3 ? .retry : .acknowledge
            }
            let subscription = subscription {
                $0.orderingKey = .project
                $0.retry = RetryPolicy(rungs: [.seconds(1)])
            }
            try await harness.withSubscriber(subscription, router) {
                for number in 1...4 {
                    for project in ["slow", "failing", "fast"] {
                        try await harness.publisher.publish(
                            Numbered(projectID: try ProjectID(project), number: number))
                    }
                }
                try await until { log.all.contains("fast 4 1") && log.all.contains("failing 2 1") }
                #expect(!log.all.contains { $0.hasPrefix("slow") || $0.hasPrefix("failing 3") })
                for attempt in 2...3 {
                    try await until { clock.sleeperCount >= 2 }
                    clock.advance(by: .seconds(1))
                    try await until { log.all.contains("failing 2 \(attempt)") }
                }
                release.yield()
                try await harness.settled(queue)
            }
            func order(_ project: String) -> [String] { log.all.filter { $0.hasPrefix(project) } }
            #expect(order("slow") == (1...4).map { "slow \($0) 1" })
            #expect(order("fast") == (1...4).map { "fast \($0) 1" })
            #expect(
                order("failing") == [
                    "failing 1 1", "failing 2 1", "failing 2 2", "failing 2 3", "failing 3 1", "failing 4 1",
                ])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test(arguments: [false, true])
    func `a handler that outlives its consumer keeps its key`(isSingleActive: Bool) async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            let held = Mutex(false)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("begin \(delivery.event.number)")
                let isFirst = held.withLock { held in
                    guard delivery.event.number == 1, !held else { return false }
                    held = true
                    return true
                }
                if isFirst { for await _ in released { break } }
                log.add("end \(delivery.event.number)")
                return .acknowledge
            }
            let subscription = subscription { $0.isSingleActive = isSingleActive }
            try await harness.withSubscriber(subscription, router) {
                if isSingleActive {
                    // It fetches more than one only after the first one has been handled.
                    try await publish("b", 9, harness)
                    try await harness.settled(queue)
                }
                for number in 1...3 { try await publish("a", number, harness) }
                try await until { log.all.last == "begin 1" }
                harness.broker.interrupt()
                // The next consumer has taken up its work.
                try await publish("b", 8, harness)
                try await until { log.all.contains("end 8") }
                #expect(
                    log.all.filter { !$0.hasSuffix("9") && !$0.hasSuffix("8") } == ["begin 1"],
                    "none of its key begins beside it")
                release.yield()
                try await harness.settled(queue)
            }
            #expect(
                log.all.filter { !$0.hasSuffix("9") && !$0.hasSuffix("8") } == [
                    "begin 1", "end 1", "begin 1", "end 1", "begin 2", "end 2", "begin 3", "end 3",
                ])
        }
    }

    @Test func `a handler past its deadline that does not end keeps its key`() async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                let name = "\(delivery.event.number) \(delivery.attempt)"
                log.add("begin \(name)")
                if name == "1 1" {
                    // Deaf to cancellation: it waits in a task of its own.
                    await Task { for await _ in released { break } }.value
                }
                log.add("end \(name)")
                return .acknowledge
            }
            let subscription = subscription { $0.handlerDeadline = .seconds(30) }
            try await harness.withSubscriber(subscription, router) {
                for number in 1...2 { try await publish("a", number, harness) }
                try await until { log.all == ["begin 1 1"] }
                clock.advance(by: .seconds(30))
                // The watch and the pause before the next attempt.
                try await until { clock.sleeperCount >= 2 }
                clock.advance(by: .seconds(1))
                try await publish("b", 3, harness)
                try await until { log.all.contains("end 3 1") }
                #expect(log.all == ["begin 1 1", "begin 3 1", "end 3 1"])
                release.yield()
                try await harness.settled(queue)
            }
            #expect(
                log.all.dropFirst(3) == ["end 1 1", "begin 1 2", "end 1 2", "begin 2 1", "end 2 1"])
        }
    }

    @Test func `a failing key with many events behind it does not hold up another, and the count of attempts goes on`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                let project = delivery.projectID?.rawValue ?? "-"
                if project != "a" || delivery.event.number == 1 { log.add("\(project) \(delivery.attempt)") }
                return project == "a" && delivery.event.number == 1 ? .retry : .acknowledge
            }
            let subscription = subscription {
                $0.prefetch = 16
                $0.orderedBacklog = 300
                $0.retry = RetryPolicy(maximumAttempts: 3, rungs: [.seconds(1)])
            }
            let subscriber = EventSubscriber(
                transport: harness.broker, subscription: subscription, router: router, clock: clock)
            try await subscriber.declare()
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                for number in 1...301 { try await publish("a", number, harness) }
                try await publish("b", 1, harness)
                try await until { log.all == ["a 1", "b 1"] }
                #expect(await subscriber.health().warnings.isEmpty == false, "hardly any room is left")

                // Its connection is lost twice, and all comes again: what has failed is known by its id.
                for attempt in 2...3 {
                    harness.broker.interrupt()
                    try await until { log.all.last == "a \(attempt + attempt - 1)" }
                }
                try await until { harness.broker.isSettled(queue) }
                #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 1, "after three attempts")
                #expect(await subscriber.health() == Health())
            }
        }
    }

    @Test func `what has no key waits for nothing`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                if delivery.event.number == 1 { for await _ in released { break } }
                log.add("\(delivery.event.number)")
                return .acknowledge
            }
            try await harness.withSubscriber(subscription(), router) {
                for number in 1...2 { try await publish(nil, number, harness) }
                try await until { log.all == ["2"] }
                release.yield()
                try await harness.settled(queue)
            }
        }
    }

    @Test func `one that shuts down leaves nothing to the next process while it holds what comes before`() async throws
    {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            func router(_ name: String) -> EventRouter {
                var router = EventRouter()
                router.on(Numbered.self) { delivery in
                    log.add("\(name) \(delivery.event.number)")
                    if delivery.event.number == 1 { for await _ in released { break } }
                    return .acknowledge
                }
                return router
            }
            let subscription = subscription { $0.isSingleActive = true }
            let subscribers = ["a", "b"].map {
                EventSubscriber(transport: harness.broker, subscription: subscription, router: router($0))
            }
            let group = ServiceGroup(
                services: [subscribers[0]], logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
            try await subscribers[0].declare()
            try await withThrowingTaskGroup(of: Void.self) { tasks in
                tasks.addTask { try await group.run() }
                defer { tasks.cancelAll() }
                // It is the active one, and has more than one delivery at a time.
                try await publish("a", 0, harness)
                try await until { log.all == ["a 0"] && harness.broker.isSettled(queue) }
                for number in 1...7 { try await publish("a", number, harness) }
                try await until { log.all.last == "a 1" && harness.broker.messages(in: queue).isEmpty }
                tasks.addTask { try await subscribers[1].run() }
                try await until {
                    (try? await harness.broker.status(of: queue, deadline: .now + .seconds(5)))?.consumers == 2
                }
                await group.triggerGracefulShutdown()
                try await until { await subscribers[0].health().description.contains("shutting down") }
                for number in 8...9 { try await publish("a", number, harness) }
                // Long enough for the next process to begin with them, if they are given to it.
                for _ in 0..<1_000 { await Task.yield() }
                release.yield()
                release.finish()
                try await until { log.all.contains("b 7") && harness.broker.isSettled(queue) }
            }
            #expect(log.all == ["a 0", "a 1"] + (2...9).map { "b \($0)" })
        }
    }

    @Test(arguments: [false, true])
    func `a first handler that is out of time, and deaf, holds up no other key`(isSingleActive: Bool) async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                // Deaf to cancellation: it waits in a task of its own.
                if delivery.event.number == 1 { await Task { for await _ in released { break } }.value }
                return .acknowledge
            }
            let subscription = subscription {
                $0.isSingleActive = isSingleActive
                $0.handlerDeadline = .seconds(30)
            }
            try await harness.withSubscriber(subscription, router) {
                try await publish("a", 1, harness)
                try await until { log.all == ["1"] }
                for number in 2...4 { try await publish("b", number, harness) }
                try await until {
                    clock.advance(by: .seconds(1))
                    return Set(log.all) == ["1", "2", "3", "4"]
                }
                release.finish()
                try await until {
                    clock.advance(by: .seconds(1))
                    return harness.broker.isSettled(queue)
                }
            }
        }
    }

    @Test func `the key of a message that may have killed its consumers is not asked for`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("handled \(delivery.event.number)")
                return .acknowledge
            }
            let subscription = subscription {
                $0.orderingKey = .init { envelope in
                    log.add("asked")
                    return envelope.projectID?.rawValue
                }
            }
            try await harness.withSubscriber(subscription, router) {}
            try await publish("a", 1, harness)
            for _ in 0..<20 {
                try await harness.broker.withConsumer(on: queue, prefetch: 1, deadline: .now + .seconds(5)) {
                    _ = try await $0.next()
                }
            }
            try await harness.withSubscriber(subscription, router) {
                try await until { log.all.contains("handled 1") }
                try await harness.settled(queue.suspectQueue)
            }
            #expect(log.all == ["handled 1"])
        }
    }
}
