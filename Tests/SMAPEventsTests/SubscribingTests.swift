import SMAPEvents
import SMAPEventsTesting
import ServiceLifecycle
import ServiceLifecycleTestKit
import Synchronization
import Testing

private let queue: QueueName = "test.queue"

@Suite struct EventSubscriberTests {
    private final class Seen: Sendable {
        private let values = Mutex<[String]>([])
        func add(_ value: String) { values.withLock { $0.append(value) } }
        var all: [String] { values.withLock { $0 } }
    }

    private func raw(_ broker: InMemoryBroker, _ body: String, key: String = "user.registered") async throws {
        try await broker.publish(
            OutboundMessage(
                exchange: ExchangeName.events, routingKey: key, properties: MessageProperties(), body: Array(body.utf8)),
            deadline: .now + .seconds(5))
    }

    @Test func `the first handler that matches takes an event`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let seen = Seen()
            var router = EventRouter()
            router.on(UserRegistered.self) { delivery in
                seen.add("typed \(delivery.event.userID)")
                return .acknowledge
            }
            router.on(matching: "user.#") { delivery in
                seen.add("any \(delivery.routingKey)")
                return .acknowledge
            }
            try await harness.withSubscriber(EventSubscription(queue: queue, bindings: ["#"]), router) {
                try await harness.publisher.publish(UserRegistered(userID: "7"))
                try await harness.publisher.publish(UserLoggedIn(userID: "7"))
                try await harness.settled(queue)
            }
            #expect(seen.all.sorted() == ["any user.logged_in", "typed 7"])
        }
    }

    @Test func `what cannot be decoded and what nobody handles is dead-lettered, and the consumer goes on`()
        async throws
    {
        try await EventsTestHarness.withHarness { harness in
            let seen = Seen()
            var router = EventRouter()
            router.on(UserRegistered.self) { delivery in
                seen.add(delivery.event.userID)
                return .acknowledge
            }
            let deep = String(repeating: "[", count: 10_000)
            try await harness.withSubscriber(EventSubscription(queue: queue, bindings: ["#"]), router) {
                for body in ["not json", "{\"event_id\":\"e\"}", "{\"event_id\":\"e\",\"payload\":\(deep)}"] {
                    try await raw(harness.broker, body)
                }
                try await raw(harness.broker, "{\"event_id\":\"e\",\"payload\":{\"user_id\":7}}")
                try await raw(harness.broker, "{\"event_id\":\"e\",\"payload\":{}}", key: "nobody.cares")
                try await harness.publisher.publish(UserRegistered(userID: "last"))
                try await harness.settled(queue)
            }
            #expect(seen.all == ["last"])
            #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 5)
        }
    }

    @Test func `a handler that throws is asked again, and after the last attempt the event is dead-lettered`()
        async throws
    {
        struct Failure: Error {}
        try await EventsTestHarness.withHarness { harness in
            let seen = Seen()
            var router = EventRouter()
            router.on(UserRegistered.self) { delivery in
                seen.add("\(delivery.event.userID) \(delivery.attempt)")
                if delivery.event.userID == "never" { return .retry }
                if delivery.attempt < 3 { throw Failure() }
                return .acknowledge
            }
            let subscription = EventSubscription(
                queue: queue, bindings: ["#"],
                retry: RetryPolicy(maximumAttempts: 4, firstDelay: .milliseconds(1), rungs: [.milliseconds(1)]))
            try await harness.withSubscriber(subscription, router) {
                try await harness.publisher.publish(UserRegistered(userID: "thrice"))
                try await harness.publisher.publish(UserRegistered(userID: "never"))
                while harness.broker.messages(in: queue.deadLetterQueue).isEmpty
                    || seen.all.count(where: { $0.hasPrefix("thrice") }) < 3
                { await Task.yield() }
            }
            #expect(seen.all.filter { $0.hasPrefix("thrice") } == ["thrice 1", "thrice 2", "thrice 3"])
            #expect(seen.all.filter { $0.hasPrefix("never") }.count == 4)
            #expect(harness.broker.messages(in: queue.deadLetterQueue).count == 1)
        }
    }

    @Test func `graceful shutdown lets the handlers in hand finish, and returns the rest to the queue`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let (started, start) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
            let (released, release) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
            var router = EventRouter()
            router.on(UserRegistered.self) { _ in
                start.yield()
                for await _ in released { break }
                return .acknowledge
            }
            let subscriber = EventSubscriber(
                transport: harness.broker,
                subscription: EventSubscription(queue: queue, bindings: ["#"], prefetch: 2, concurrency: 1),
                router: router)
            try await subscriber.declare()
            for number in 0..<3 { try await harness.publisher.publish(UserRegistered(userID: "\(number)")) }
            try await testGracefulShutdown { trigger in
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await subscriber.run() }
                    for await _ in started { break }
                    trigger.triggerGracefulShutdown()
                    // Only once it takes no more is the handler in hand allowed to end.
                    let declaration = QueueDeclaration(queue, deadLetters: true)
                    while try await harness.broker.declare(declaration, deadline: .now).consumers > 0 {
                        await Task.yield()
                    }
                    release.yield()
                    try await group.waitForAll()
                }
            }
            #expect(harness.broker.messages(in: queue).count == 2)
        }
    }

    @Test func `a subscription that cannot work is refused`() async {
        let subscriber = EventSubscriber(
            transport: InMemoryBroker(), subscription: EventSubscription(queue: queue, bindings: [], prefetch: 0),
            router: EventRouter())
        let error = await #expect(throws: EventsError.self) { try await subscriber.run() }
        #expect(error?.code == .invalidConfiguration)
    }
}

@Suite(.timeLimit(.minutes(5))) struct FinishLineTests {
    /// What the harness has, but for a finish line of its own, which would sweep too.
    private struct Surroundings {
        let broker = InMemoryBroker()
        let store = InMemoryProgressStore()
        let publisher: EventPublisher

        init() {
            publisher = EventPublisher(transport: broker, configuration: PublisherConfiguration(service: "test"))
        }
    }

    private func withoutFinishLine(_ body: (Surroundings) async throws -> Void) async throws {
        let surroundings = Surroundings()
        try await surroundings.broker.declare(.events, deadline: .now + .seconds(5))
        try await body(surroundings)
    }

    private func finished(_ harness: Surroundings, _ name: String = "proj_1") async throws -> EventID {
        let project = try ProjectID(name)
        let tracker = ProgressTracker(store: harness.store)
        try await tracker.start(project)
        return try #require(try await tracker.seal(project, total: 0).progress.finishEventID)
    }

    private func bind(_ broker: InMemoryBroker) async throws {
        try await broker.declare(QueueDeclaration(queue), deadline: .now + .seconds(5))
        try await broker.bind(
            queue, to: ExchangeName.events, routingKey: "job.completed", deadline: .now + .seconds(5))
    }

    private func finishLine(_ harness: Surroundings) -> FinishLine {
        FinishLine(store: harness.store, publisher: harness.publisher)
    }

    @Test func `a finish that a dead process left behind is published by a sweep, with the stored id`() async throws {
        try await withoutFinishLine { harness in
            try await bind(harness.broker)
            let id = try await finished(harness)
            // The harness's own finish line has not been told; this one belongs to another process.
            try await finishLine(harness).sweep()
            let messages = harness.broker.messages(in: queue)
            #expect(messages.map(\.properties.messageID) == [id.rawValue])
            let event: JobCompleted = try EventEnvelope(parsing: messages[0].body).decode()
            #expect(event.total == 0 && event.done == 0 && event.errors == 0)
            #expect(event.projectID?.rawValue == "proj_1")
            #expect(try await finishLine(harness).sweep() == 0)
        }
    }

    @Test func `a finish that no queue receives stays pending, and goes out once one is bound`() async throws {
        try await withoutFinishLine { harness in
            let id = try await finished(harness)
            let error = await #expect(throws: EventsError.self) { try await finishLine(harness).sweep() }
            #expect(error?.code == .unroutable)
            try await bind(harness.broker)
            #expect(try await finishLine(harness).sweep() == 1)
            #expect(harness.broker.messages(in: queue).map(\.properties.messageID) == [id.rawValue])
        }
    }

    @Test func `a sweep repeated after the publish and before the clearing sends the same id`() async throws {
        struct Dies: Error {}
        try await withoutFinishLine { harness in
            try await bind(harness.broker)
            let id = try await finished(harness)
            // Dies between the confirm and the clearing.
            let store = InterceptedStore(harness.store) { if $0 == .clear { throw Dies() } }
            let dying = FinishLine(store: store, publisher: harness.publisher)
            await #expect(throws: Dies.self) { try await dying.sweep() }
            try await finishLine(harness).sweep()
            #expect(harness.broker.messages(in: queue).map(\.properties.messageID) == [id.rawValue, id.rawValue])
        }
    }

    @Test func `at shutdown the finish in hand is still confirmed and cleared, and the others stay pending`()
        async throws
    {
        /// Publishes only when shutdown has begun.
        struct SlowPublisher: EventPublishing {
            let publisher: EventPublisher
            let entered: AsyncStream<Void>.Continuation

            func declareExchanges() async throws {}
            func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
                try await publisher.publish(event, options: options)
            }
            func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
                entered.yield()
                try await gracefulShutdown()
                return try await publisher.publish(event, options: options)
            }
        }
        try await withoutFinishLine { harness in
            try await bind(harness.broker)
            for name in ["proj_1", "proj_2", "proj_3"] { _ = try await finished(harness, name) }
            let (entered, enter) = AsyncStream.makeStream(of: Void.self)
            let slow = FinishLine(
                store: harness.store, publisher: SlowPublisher(publisher: harness.publisher, entered: enter))
            await testGracefulShutdown { trigger in
                await withTaskGroup { group in
                    group.addTask { await slow.run() }
                    for await _ in entered { break }
                    trigger.triggerGracefulShutdown()
                    await group.waitForAll()
                }
            }
            #expect(harness.broker.messages(in: queue).count == 1)
            let pending = try await harness.store.pendingFinishes(limit: 10, deadline: .now + .seconds(5))
            #expect(pending.count == 2, "the one that was published has been cleared")
        }
    }

    @Test func `a finish decided here is published at once, without waiting for a sweep`() async throws {
        try await withoutFinishLine { harness in
            try await bind(harness.broker)
            let finishLine = FinishLine(
                store: harness.store, publisher: harness.publisher,
                configuration: FinishLine.Configuration(interval: .seconds(3600)))
            let tracker = ProgressTracker(store: harness.store, finishLine: finishLine)
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { await finishLine.run() }
                defer { group.cancelAll() }
                // The first sweep, at the start, can have found one of them at most.
                for name in ["proj_1", "proj_2"] {
                    let project = try ProjectID(name)
                    try await tracker.start(project)
                    try await tracker.seal(project, total: 0)
                    while harness.broker.messages(in: queue).last?.properties.messageID
                        != (try await tracker.progress(of: project)?.finishEventID?.rawValue)
                    { await Task.yield() }
                }
            }
            #expect(harness.broker.messages(in: queue).count == 2)
        }
    }
}
