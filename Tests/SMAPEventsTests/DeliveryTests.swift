import SMAPEvents
import SMAPEventsTesting
import Synchronization
import Testing

private let queue: QueueName = "test.deliveries"

/// What becomes of deliveries whose handlers fail, in memory and with time that passes by hand.
@Suite(.timeLimit(.minutes(5))) struct DeliveryTests {
    struct Failure: Error {}

    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "test.numbered"
        var projectID: ProjectID?
        var number: Int
    }

    private func subscription(_ change: (inout EventSubscription) -> Void = { _ in }) -> EventSubscription {
        var subscription = EventSubscription(queue: queue, bindings: ["test.#"])
        change(&subscription)
        return subscription
    }

    // MARK: Retry

    @Test func `a handler that always throws has just the configured attempts, on the ladder, then one dead letter`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(clock.now.offset) attempt \(delivery.attempt) by \(delivery.routingKey)")
                throw Failure()
            }
            let subscription = subscription { $0.retry = RetryPolicy(maximumAttempts: 4, hasJitter: false) }
            try await harness.withSubscriber(subscription, router) {
                try await harness.publisher.publish(Numbered(number: 1))
                for (attempt, pause) in [1, 2, 2].enumerated() {
                    let place = try QueueName("smap.retry.\(pause)s")
                    try await until { harness.broker.messages(in: place).count == 1 }
                    // Not a moment too soon.
                    clock.advance(by: .seconds(pause) - .milliseconds(1))
                    #expect(log.all.count == attempt + 1)
                    clock.advance(by: .milliseconds(1))
                    try await until { log.all.count == attempt + 2 }
                }
                try await until { !harness.broker.messages(in: queue.deadLetterQueue).isEmpty }
                try await harness.settled(queue)
            }
            #expect(
                log.all == [
                    "0.0 seconds attempt 1 by test.numbered", "1.0 seconds attempt 2 by test.numbered",
                    "3.0 seconds attempt 3 by test.numbered", "5.0 seconds attempt 4 by test.numbered",
                ])
            let dead = harness.broker.messages(in: queue.deadLetterQueue)
            #expect(dead.count == 1)
            let headers = try #require(dead.first).properties.headers
            #expect(headers["x-smap-attempts"] == .integer(4))
            #expect(headers["x-smap-error-type"] == .string("Failure"))
            #expect(headers["x-smap-original-exchange"] == .string("smap.events"))
            #expect(headers["x-smap-original-key"] == .string("test.numbered"))
            #expect(headers["x-smap-reason"] == .string("gave up after 4 attempts: Failure"))
            #expect(headers["x-smap-first-failure"] != nil && headers["x-smap-last-failure"] != nil)
        }
    }

    @Test
    func `a handler says how long to wait, what is no use retrying is not, and a long pause holds up no short one`()
        async throws
    {
        let clock = ManualClock()
        struct Hopeless: Error {}
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                if delivery.event.number == 3 { throw Hopeless() }
                if delivery.attempt > 1 { return .acknowledge }
                return .retry(after: .seconds(delivery.event.number == 1 ? 100 : 4))
            }
            let subscription = subscription { $0.retry.isRetriable = { !($0 is Hopeless) } }
            try await harness.withSubscriber(subscription, router) {
                for number in 1...3 { try await harness.publisher.publish(Numbered(number: number)) }
                try await until {
                    harness.broker.messages(in: "smap.retry.120s").count == 1
                        && harness.broker.messages(in: "smap.retry.5s").count == 1
                        && harness.broker.messages(in: queue.deadLetterQueue).count == 1
                }
                clock.advance(by: .seconds(5))
                try await until { log.all.count == 4 }
                #expect(log.all.last == "2")
                clock.advance(by: .seconds(115))
                try await until { log.all.count == 5 }
                #expect(log.all.last == "1")
                try await harness.settled(queue)
            }
            #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 1)
        }
    }

    @Test func `a retry that cannot be parked keeps the message in hand, and its queue is declared again`() async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.attempt) \(delivery.isRedelivered)")
                return delivery.attempt > 1 ? .acknowledge : .retry
            }
            let subscription = subscription { $0.retry = RetryPolicy(rungs: [.seconds(1)]) }
            try await harness.withSubscriber(subscription, router) {
                try await until {
                    (try? await harness.broker.status(of: queue, deadline: .now + .seconds(5)))?.consumers == 1
                }
                // An operator's mistake.
                harness.broker.delete("smap.retry.1s")
                try await harness.publisher.publish(Numbered(number: 1))
                try await until {
                    // The pause before it is tried again, and the retry's own.
                    if clock.sleeperCount > 1 { clock.advance(by: .seconds(1)) }
                    return log.all.count == 2
                }
                try await harness.settled(queue)
            }
            #expect(log.all == ["1 false", "2 false"], "it was not given back")
        }
    }

    @Test func `killed between the confirm of a retry and the acknowledgement, a message is doubled and not lost`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            for hasInbox in [false, true] {
                let log = Log()
                let isFirst = Flag()
                var router = EventRouter()
                router.on(Numbered.self) { delivery in
                    log.add("\(delivery.attempt)")
                    return isFirst.lower() ? .retry : .acknowledge
                }
                var subscription = subscription {
                    $0.retry = RetryPolicy(rungs: [.seconds(1)])
                    $0.retryDelay = .milliseconds(1)
                }
                subscription.inbox.scope = "\(hasInbox)"
                // The acknowledgement does not go out any more.
                let dies = Flag()
                let dying = InterceptedTransport(broker: harness.broker) { [broker = harness.broker] message in
                    if message.exchange.hasPrefix("smap.retry"), dies.lower() { broker.interrupt() }
                }
                let subscriber = EventSubscriber(
                    transport: dying, subscription: subscription, router: router,
                    inbox: hasInbox ? harness.inbox : nil, clock: clock)
                try await subscriber.declare()
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await subscriber.run() }
                    defer { group.cancelAll() }
                    try await harness.publisher.publish(Numbered(number: 1))
                    try await until {
                        log.all.count == 2 && harness.broker.messages(in: "smap.retry.1s").count == 1
                            && harness.broker.isSettled(queue)
                    }
                    clock.advance(by: .seconds(1))
                    try await until {
                        harness.broker.messages(in: "smap.retry.1s").isEmpty && harness.broker.isSettled(queue)
                            && log.all.count == (hasInbox ? 2 : 3)
                    }
                }
                // It came again after the interruption, and by its copy.
                #expect(log.all.count == (hasInbox ? 2 : 3))
            }
        }
    }

    /// True once.
    private final class Flag: Sendable {
        private let isUp = Mutex(true)
        func lower() -> Bool {
            isUp.withLock { isUp in
                defer { isUp = false }
                return isUp
            }
        }
    }

    @Test func `a policy tells its worst case, and one that cannot work is refused`() async throws {
        let policy = RetryPolicy(maximumAttempts: 5, firstDelay: .milliseconds(500), rungs: [.milliseconds(500)])
        #expect(policy.description == "5 attempts, after at most 500ms, 500ms, 500ms, 500ms: 2s in all")
        #expect(RetryPolicy(maximumAttempts: 1).description == "1 attempt")
        #expect(
            RetryPolicy().description
                == "10 attempts, after at most 1s, 2s, 2s, 5s, 10s, 30s, 60s, 120s, 120s: 350s in all")
        let wrong: [(inout EventSubscription) -> Void] = [
            { $0.retry.maximumAttempts = 0 }, { $0.retry.rungs = [] }, { $0.retry.rungs = [.seconds(2), .seconds(1)] },
            { $0.retry.rungs = [.microseconds(1)] }, { $0.retry.multiplier = 0.5 }, { $0.handlerDeadline = .zero },
            { $0.circuitBreaker = CircuitBreakerPolicy(window: 0) }, { $0.inbox.timeToLive = .seconds(60) },
            {
                $0.orderingKey = .project; $0.retry.maximumDelay = .seconds(3_600)
            },
        ]
        for change in wrong {
            let subscriber = EventSubscriber(
                transport: InMemoryBroker(), subscription: subscription(change), router: EventRouter(),
                inbox: InMemoryInbox())
            let error = await #expect(throws: EventsError.self) { try await subscriber.run() }
            #expect(error?.code == .invalidConfiguration)
        }
    }

    @Test func `a message is retried and dead-lettered with its history, whatever is in its headers`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.attempt)")
                throw Failure()
            }
            let subscription = subscription {
                $0.retry = RetryPolicy(maximumAttempts: 3, rungs: [.milliseconds(1)], hasJitter: false)
            }
            try await harness.withSubscriber(subscription, router) {
                let event = EventEnvelope(
                    routingKey: Numbered.routingKey, service: "s", schemaVersion: 1, data: Array(#"{"number":1}"#.utf8))
                // As another client may send it: ours does not.
                let delivery = InboundDelivery(
                    tag: 1, exchange: ExchangeName.events, routingKey: Numbered.routingKey.rawValue,
                    isRedelivered: false,
                    properties: MessageProperties(
                        messageID: "line\nbreak",
                        headers: ["trace": .string("at a\n\tat b"), "x-request-id": .string("r"), "cc": .string("q")]),
                    body: try event.serialized())
                _ = try await harness.broker.publish(
                    delivery.copy(to: ExchangeName.requeue, queue: queue, headers: [:]), deadline: .now + .seconds(5))
                try await until { harness.broker.messages(in: queue.deadLetterQueue).count == 1 }
            }
            #expect(log.all == ["1", "2", "3"])
            let properties = harness.broker.messages(in: queue.deadLetterQueue).first?.properties
            #expect(properties?.headers["x-smap-error-type"] == .string("Failure"))
            #expect(properties?.headers["x-smap-attempts"] == .integer(3))
            #expect(properties?.headers["trace"] == .string("at a\n\tat b"))
            #expect(properties?.headers["x-request-id"] == .string("r"))
            #expect(properties?.headers["cc"] == nil)
            #expect(properties?.messageID == "line\nbreak")
        }
    }

    @Test func `the broker's key chooses the handler, and the payload's only where none takes that`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(matching: "user.registered") { _ in
                log.add("user")
                return .acknowledge
            }
            router.on(matching: "email.#") { _ in
                log.add("email")
                return .acknowledge
            }
            var subscription = subscription { _ in }
            subscription.bindings = ["#"]
            try await harness.withSubscriber(subscription, router) {
                let body = Array(#"{"event_id":"e","payload":{"routing_key":"user.registered","data":{}}}"#.utf8)
                for key in ["email.sent", "moved.by.hand"] {
                    _ = try await harness.broker.publish(
                        OutboundMessage(
                            exchange: ExchangeName.events, routingKey: key, properties: MessageProperties(), body: body),
                        deadline: .now + .seconds(5))
                    try await until { log.all.count == (key == "email.sent" ? 1 : 2) }
                }
            }
            #expect(log.all == ["email", "user"])
        }
    }

    @Test(arguments: [EventsError.Code.undecodable, .unhandled])
    func `a handler's own error is a failure of the handler, whatever its code`(code: EventsError.Code) async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.attempt)")
                if delivery.attempt == 1 { throw EventsError(code, "another service's reply", operation: "ask") }
                return .acknowledge
            }
            let subscription = subscription { $0.retry = RetryPolicy(rungs: [.milliseconds(1)]) }
            try await harness.withSubscriber(subscription, router) {
                try await harness.publisher.publish(Numbered(number: 1))
                try await until { log.all.count == 2 && harness.broker.isSettled(queue) }
            }
            #expect(log.all == ["1", "2"])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    /// A transport through which a dead process publishes nothing any more.
    private final class MortalTransport: Sendable {
        private let isDead = Atomic<Bool>(false)
        private let broker: InMemoryBroker
        init(_ broker: InMemoryBroker) { self.broker = broker }

        var transport: InterceptedTransport {
            InterceptedTransport(
                broker: broker,
                publishing: { [self] _ in
                    guard isDead.load(ordering: .relaxed) else { return }
                    throw EventsError(.connectionLost, "the process is dead", operation: "publish")
                })
        }

        func die() { isDead.store(true, ordering: .relaxed) }
    }

    /// A process that dies takes its subscriber with it: the next one knows nothing of it.
    private func crash(
        _ harness: EventsTestHarness, _ subscription: EventSubscription, _ router: EventRouter,
        when isOver: @escaping @Sendable () async -> Bool
    ) async throws {
        let mortal = MortalTransport(harness.broker)
        let subscriber = EventSubscriber(transport: mortal.transport, subscription: subscription, router: router)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            try await until(isOver)
            // What it had in hand goes back, unanswered.
            mortal.die()
            group.cancelAll()
        }
    }

    @Test func `a message that kills its process is the only one to be dead-lettered`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let deaths = Atomic<Int>(0)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                guard delivery.event.number > 0 else {
                    deaths.add(1, ordering: .relaxed)
                    try await Task.sleep(for: .seconds(600))
                    return .acknowledge
                }
                // The others are as good as never done when the process dies.
                if deaths.load(ordering: .relaxed) < 3 { try await Task.sleep(for: .seconds(600)) }
                log.add("\(delivery.event.number)")
                return .acknowledge
            }
            let subscription = subscription { _ in }
            try await harness.withSubscriber(subscription, router) {}
            for number in 0..<200 { try await harness.publisher.publish(Numbered(number: number)) }
            for death in 1...6 {
                try await crash(harness, subscription, router) {
                    guard deaths.load(ordering: .relaxed) >= death else { return false }
                    // The first time the others have been fetched with it, and then it dies alone; later in a queue of its own.
                    let ready = harness.broker.messages(in: queue).count
                    return death == 1 ? ready == 0 : death > 3 || ready == 199
                }
            }
            #expect(deaths.load(ordering: .relaxed) == 6)
            try await harness.withSubscriber(subscription, router) {
                try await until { Set(log.all).count >= 199 }
                try await harness.settled(queue)
                try await harness.settled(queue.suspectQueue)
            }
            #expect(Set(log.all).count == 199)
            #expect(deaths.load(ordering: .relaxed) == 6)
            let dead = harness.broker.messages(in: queue.deadLetterQueue)
            #expect(dead.count == 1)
            #expect(dead.first?.properties.headers["x-smap-error-type"] == .string("poison"))
        }
    }

    @Test func `a message that kills its process is found although it waits for its lease in between`() async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let deaths = Atomic<Int>(0)
            var router = EventRouter()
            router.on(Numbered.self) { _ in
                deaths.add(1, ordering: .relaxed)
                try await Task.sleep(for: .seconds(600))
                return .acknowledge
            }
            let subscription = subscription { $0.retry = RetryPolicy(rungs: [.seconds(1)]) }
            try await harness.withSubscriber(subscription, router) {}
            try await harness.publisher.publish(Numbered(number: 1))
            // A lease that outlives its process, as one in Redis does.
            let inbox = InMemoryInbox(clock: clock)
            for death in 1...7 {
                let mortal = MortalTransport(harness.broker)
                let subscriber = EventSubscriber(
                    transport: mortal.transport, subscription: subscription, router: router,
                    inbox: LeakingInbox(inbox: inbox), clock: clock)
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await subscriber.run() }
                    try await until {
                        clock.advance(by: .seconds(1))
                        return deaths.load(ordering: .relaxed) == death
                            || !harness.broker.messages(in: queue.deadLetterQueue).isEmpty
                    }
                    mortal.die()
                    group.cancelAll()
                }
            }
            #expect(deaths.load(ordering: .relaxed) == 6)
            let dead = harness.broker.messages(in: queue.deadLetterQueue)
            #expect(dead.first?.properties.headers["x-smap-error-type"] == .string("poison"))
        }
    }

    /// A process that dies releases nothing.
    private struct LeakingInbox: Inbox {
        let inbox: InMemoryInbox

        func claim(_ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant) async throws -> InboxClaim {
            try await inbox.claim(entry, lease: lease, deadline: deadline)
        }

        func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws {
            try await inbox.complete(entry, timeToLive: timeToLive, deadline: deadline)
        }

        func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws {}
    }

    @Test func `what a subscriber itself loses with its connections, or a publisher has made up, makes no poison`()
        async throws
    {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            let mayWork = Atomic<Bool>(false)
            let attempts = Atomic<Int>(0)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                attempts.add(1, ordering: .relaxed)
                if !mayWork.load(ordering: .relaxed) { try await Task.sleep(for: .seconds(600)) }
                log.add("\(delivery.event.number)")
                return .acknowledge
            }
            let subscription = subscription {
                $0.retryDelay = .milliseconds(1)
                // Handlers of a lost consumer are left to finish, and keep their places.
                $0.concurrency = 256
            }
            try await harness.withSubscriber(subscription, router) {
                for number in 0..<20 { try await harness.publisher.publish(Numbered(number: number)) }
                for round in 1...10 {
                    try await until { attempts.load(ordering: .relaxed) >= round * 20 }
                    harness.broker.interrupt()
                }
                mayWork.store(true, ordering: .relaxed)
                try await until { log.all.count >= 20 }
                let event = EventEnvelope(
                    routingKey: Numbered.routingKey, service: "s", schemaVersion: 1, data: Array(#"{"number":99}"#.utf8)
                )
                _ = try await harness.broker.publish(
                    OutboundMessage(
                        exchange: ExchangeName.events, routingKey: Numbered.routingKey.rawValue,
                        properties: MessageProperties(headers: ["x-delivery-count": .integer(1_000)]),
                        body: try event.serialized()), deadline: .now + .seconds(5))
                try await until { log.all.contains("99") }
            }
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `dead letters are replayed and purged whatever their clocks say, and none twice by one call`()
        async throws
    {
        try await EventsTestHarness.withHarness { harness in
            var router = EventRouter()
            router.on(Numbered.self) { _ in .deadLetter(reason: "always") }
            let subscription = subscription { _ in }
            try await harness.withSubscriber(subscription, router) {
                let event = EventEnvelope(
                    routingKey: Numbered.routingKey, service: "s", schemaVersion: 1, data: Array(#"{"number":1}"#.utf8))
                for time in ["2999-01-01T00:00:00Z", "1970-01-01T00:00:00Z"] {
                    _ = try await harness.broker.publish(
                        OutboundMessage(
                            exchange: ExchangeName.deadLetters, routingKey: queue.rawValue,
                            properties: MessageProperties(headers: [
                                "x-smap-last-failure": .string(time),
                                "x-smap-original-key": .string(Numbered.routingKey.rawValue),
                            ]), body: try event.serialized()), deadline: .now + .seconds(5))
                }
                let letters = DeadLetterQueue(of: queue, transport: harness.broker)
                let replayed = try await letters.replay()
                #expect([replayed.examined, replayed.done, replayed.failed] == [2, 2, 0])
                try await until { harness.broker.messages(in: queue.deadLetterQueue).count == 2 }
                #expect(try await letters.purge().done == 2)
            }
        }
    }

    // MARK: Inbox

    @Test func `an event that comes twice is handled once, also after a retry, and by two subscriptions of one scope`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                return log.all.count(where: { $0 == "2" }) == 1 && delivery.event.number == 2 ? .retry : .acknowledge
            }
            let first = subscription { $0.inbox.scope = "consumer" }
            var second = EventSubscription(queue: "test.other", bindings: ["test.#"])
            second.inbox.scope = "consumer"
            try await harness.withSubscriber(first, router, usesInbox: true) { [router, second] in
                try await harness.withSubscriber(second, router, usesInbox: true) {
                    for number in [1, 2] {
                        let id = EventID()
                        try await harness.publisher.publish(
                            Numbered(number: number), options: PublishOptions(eventID: id))
                        try await harness.publisher.publish(
                            Numbered(number: number), options: PublishOptions(eventID: id))
                    }
                    // Whoever came while another one worked comes again later, and finds it done. Time passes only
                    // while nobody works: a handler would be late.
                    let parked: [QueueName] = ["smap.retry.1s", "smap.retry.120s"]
                    try await until {
                        guard harness.broker.isSettled(queue), harness.broker.isSettled("test.other") else {
                            return false
                        }
                        if log.all.count >= 3, parked.allSatisfy({ harness.broker.messages(in: $0).isEmpty }) {
                            return true
                        }
                        clock.advance(by: .seconds(1))
                        return false
                    }
                }
            }
            #expect(log.all.sorted() == ["1", "2", "2"])
        }
    }

    @Test func `ids that are no UUIDs are told apart by what the message says`() throws {
        let one = Array(#"{"event_id":"evt_001","payload":{"a":1}}"#.utf8)
        let two = Array(#"{"event_id":"evt_001","payload":{"a":2}}"#.utf8)
        func entry(_ id: String, _ body: [UInt8]) throws -> InboxEntry {
            InboxEntry(scope: "s", eventID: try EventID(id), body: body)
        }
        #expect(try entry("evt_001", one) != entry("evt_001", two))
        #expect(try entry("evt_001", one) == entry("evt_001", one))
        let id = EventID().rawValue
        #expect(try entry(id, one) == entry(id, two))
        #expect(try entry(id, one).id == id)
    }

    @Test func `a lease that its holder leaves behind runs out, and then the event is handled again`() async throws {
        let clock = ManualClock()
        let inbox = InMemoryInbox(clock: clock)
        let entry = InboxEntry(scope: "s", id: "e")
        let deadline = ContinuousClock.now + .seconds(5)
        guard case .granted(let token) = try await inbox.claim(entry, lease: .seconds(10), deadline: deadline) else {
            Issue.record("it was free")
            return
        }
        #expect(
            try await inbox.claim(entry, lease: .seconds(10), deadline: deadline) == .busy(remaining: .seconds(10)))
        clock.advance(by: .seconds(10))
        guard case .granted = try await inbox.claim(entry, lease: .seconds(10), deadline: deadline) else {
            Issue.record("the lease has run out")
            return
        }
        try await inbox.release(entry, token: token, deadline: deadline)
        #expect(
            try await inbox.claim(entry, lease: .seconds(10), deadline: deadline) == .busy(remaining: .seconds(10)),
            "the lease of another is not given back")
    }

    // MARK: Handlers

    @Test
    func `a handler past its deadline is cancelled and its event retried; one that does not listen keeps its place`()
        async throws
    {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number) \(delivery.attempt)")
                guard delivery.attempt == 1 else { return .acknowledge }
                if delivery.event.number == 1 {
                    do { try await Task.sleep(for: .seconds(600)) } catch {
                        log.add("cancelled")
                        throw error
                    }
                }
                // Deaf to cancellation: it waits in a task of its own.
                await Task { for await _ in released { break } }.value
                return .acknowledge
            }
            let subscription = subscription {
                $0.handlerDeadline = .seconds(30)
                $0.concurrency = 1
                $0.retry = RetryPolicy(rungs: [.seconds(1)])
            }
            let subscriber = EventSubscriber(
                transport: harness.broker, subscription: subscription, router: router, clock: clock)
            try await subscriber.declare()
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                try await harness.publisher.publish(Numbered(number: 1))
                try await until { log.all == ["1 1"] }
                clock.advance(by: .seconds(30))
                try await until {
                    log.all.contains("cancelled") && harness.broker.messages(in: "smap.retry.1s").count == 1
                }
                clock.advance(by: .seconds(1))
                try await until { log.all.last == "1 2" && harness.broker.isSettled(queue) }

                try await harness.publisher.publish(Numbered(number: 2))
                try await until { log.all.last == "2 1" }
                clock.advance(by: .seconds(30))
                try await until { harness.broker.messages(in: "smap.retry.1s").count == 1 }
                clock.advance(by: .seconds(1))
                try await until { await subscriber.health().description.contains("past their deadline") }
                #expect(log.all.last == "2 1", "there is no place for another one")
                release.yield()
                try await until { log.all.last == "2 2" && harness.broker.isSettled(queue) }
                #expect(await subscriber.health().isHealthy)
            }
        }
    }

    @Test func `a batch is handled when it is full or old enough, with an outcome for each`() async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.onBatch(of: Numbered.self, size: 3, within: .seconds(2), clock: clock) { batch in
                log.add(batch.map { "\($0.event.number)" }.sorted().joined(separator: ","))
                return batch.map { $0.event.number == 2 ? .deadLetter(reason: "two") : .acknowledge }
            }
            try await harness.withSubscriber(subscription(), router) {
                for number in 1...3 { try await harness.publisher.publish(Numbered(number: number)) }
                try await until { log.all == ["1,2,3"] }
                try await harness.publisher.publish(Numbered(number: 4))
                // The subscription's watch and the batch's timer.
                try await until { clock.sleeperCount == 2 && harness.broker.messages(in: queue).isEmpty }
                #expect(log.all.count == 1)
                clock.advance(by: .seconds(2))
                try await until { log.all.count == 2 }
                try await harness.settled(queue)
            }
            #expect(log.all == ["1,2,3", "4"])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 1)
        }
    }

    @Test func `a batch that nobody waits for any more is cancelled`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let log = Log()
            var router = EventRouter()
            router.onBatch(of: Numbered.self, size: 2) { batch in
                log.add("begun")
                do { try await Task.sleep(for: .seconds(600)) } catch {
                    log.add("cancelled")
                    throw error
                }
                return batch.map { _ in .acknowledge }
            }
            try await harness.withSubscriber(subscription(), router) {
                for number in 1...2 { try await harness.publisher.publish(Numbered(number: number)) }
                try await until { log.all == ["begun"] }
            }
            try await until { log.all == ["begun", "cancelled"] }
            #expect(harness.broker.messages(in: queue).count == 2, "they come again")
        }
    }

    @Test(arguments: [(1, false), (8, false), (8, true)])
    func `a circuit breaker pauses, tries one at a time, and never drains the queue into the dead letters`(
        concurrency: Int, isOrdered: Bool
    ) async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            let down = Dependency()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.event.number)")
                if down.isDown { throw Failure() }
                return .acknowledge
            }
            let subscription = subscription {
                $0.retry = RetryPolicy(maximumAttempts: 3, rungs: [.milliseconds(1)])
                $0.circuitBreaker = CircuitBreakerPolicy(window: 5, failureShare: 0.8, pause: .seconds(10))
                $0.concurrency = concurrency
                $0.orderingKey = isOrdered ? .init { "\($0.data.count)" } : nil
            }
            let subscriber = EventSubscriber(
                transport: harness.broker, subscription: subscription, router: router, clock: clock)
            try await subscriber.declare()
            // Few, so that each is tried more often than it has attempts.
            let events = isOrdered ? [1, 10, 100, 1_000, 10_000, 100_000] : [1, 2, 3, 4, 5, 6]
            for number in events { try await harness.publisher.publish(Numbered(number: number)) }
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                func paused() async throws {
                    // Its pause is what sleeps beside the watch.
                    try await until {
                        await subscriber.health().description.contains("paused") && clock.sleeperCount >= 2
                    }
                }
                // Those that were admitted before it opened may still be on their way to their handlers.
                for _ in 0..<2 {
                    try await paused()
                    let count = log.all.count
                    clock.advance(by: .seconds(10))
                    try await until { log.all.count > count }
                }
                try await paused()
                let before = log.all.count
                for round in 0..<25 {
                    try await paused()
                    #expect(log.all.count == before + round, "one at a time")
                    clock.advance(by: .seconds(10))
                    try await until { log.all.count > before + round }
                }
                try await paused()
                #expect(log.all.count == before + 25)
                #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
                down.isDown = false
                try await until {
                    if await subscriber.health().description.contains("paused") { clock.advance(by: .seconds(10)) }
                    clock.advance(by: .milliseconds(1))
                    return Set(log.all.dropFirst(before + 25)).count == 6 && harness.broker.isSettled(queue)
                }
                try await until { await subscriber.health().isHealthy }
            }
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `a breaker that stays open gives back what it holds before the broker takes it`() async throws {
        let clock = ManualClock()
        try await EventsTestHarness.withHarness(clock: clock) { harness in
            let log = Log()
            var router = EventRouter()
            router.on(Numbered.self) { delivery in
                log.add("\(delivery.isRedelivered)")
                throw Failure()
            }
            let subscription = subscription {
                $0.retry = RetryPolicy(maximumAttempts: 1_000, rungs: [.seconds(900)])
                $0.circuitBreaker = CircuitBreakerPolicy(window: 1, failureShare: 1, pause: .seconds(600))
                $0.concurrency = 1
            }
            try await harness.withSubscriber(subscription, router) {
                for number in 1...4 { try await harness.publisher.publish(Numbered(number: number)) }
                try await until { harness.broker.messages(in: "smap.retry.900s").count == 1 }
                // Each is parked after the breaker has noted its failure. The first trial comes within the time for which it may hold, the second one does not.
                clock.advance(by: .seconds(600))
                try await until { harness.broker.messages(in: "smap.retry.900s").count == 2 }
                clock.advance(by: .seconds(600))
                try await until { log.all.count == 3 }
            }
            #expect(log.all == ["false", "false", "true"])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).isEmpty)
        }
    }

    @Test func `a second request under a correlation id that is in use is refused`() async throws {
        let broker = InMemoryBroker()
        try await broker.declare(QueueDeclaration("test.asked"), deadline: .now + .seconds(5))
        let question = OutboundMessage(
            exchange: "", routingKey: "test.asked", properties: MessageProperties(correlationID: "same"), body: [])
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { _ = try await broker.request(question, deadline: .now + .seconds(600)) }
            defer { group.cancelAll() }
            try await until { broker.messages(in: "test.asked").count == 1 }
            let error = await #expect(throws: EventsError.self) {
                try await broker.request(question, deadline: .now + .seconds(5))
            }
            #expect(error?.code == .invalidEvent)
        }
    }

    private final class Dependency: Sendable {
        private let value = Mutex(true)
        var isDown: Bool {
            get { value.withLock { $0 } }
            set { value.withLock { $0 = newValue } }
        }
    }
}
