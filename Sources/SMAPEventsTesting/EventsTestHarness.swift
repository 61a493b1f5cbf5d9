public import SMAPEvents

/// A service's whole surroundings in memory: broker, store, publisher, tracker, finish line.
///
/// ```swift
/// try await EventsTestHarness.withHarness { harness in
///     var router = EventRouter()
///     router.on(ProjectCreated.self) { delivery in … }
///     try await harness.withSubscriber(EventSubscription(queue: "collector.projects", bindings: ["project.#"]), router) {
///         try await harness.publisher.publish(ProjectCreated(projectID: project))
///         try await harness.settled("collector.projects")
///     }
/// }
/// ```
public struct EventsTestHarness: Sendable {
    /// The broker, with `smap.events`, the legacy exchange and the dead letter exchange declared.
    public let broker: InMemoryBroker
    /// What subscribers remember of handled events.
    public let inbox: InMemoryInbox
    /// What retries, deadlines and leases are measured by.
    public let clock: any Clock<Duration>
    /// The store.
    public let store = InMemoryProgressStore()
    /// Publishes to `smap.events`.
    public let publisher: EventPublisher
    /// Publishes what the tracker decides.
    public let finishLine: FinishLine
    /// Tracks projects, and tells ``finishLine`` of finishes.
    public let tracker: ProgressTracker

    private init(service: String, clock: any Clock<Duration>) {
        self.clock = clock
        broker = InMemoryBroker(clock: clock)
        inbox = InMemoryInbox(clock: clock)
        publisher = EventPublisher(transport: broker, configuration: PublisherConfiguration(service: service))
        finishLine = FinishLine(store: store, publisher: publisher)
        tracker = ProgressTracker(store: store, finishLine: finishLine)
    }

    /// Runs `body` in surroundings of its own; the finish line runs beside it.
    ///
    /// - Parameter clock: A ``ManualClock`` makes retries wait for nothing but ``ManualClock/advance(by:)``.
    public static func withHarness(
        service: String = "test", clock: any Clock<Duration> = ContinuousClock(),
        _ body: @escaping @Sendable (EventsTestHarness) async throws -> Void
    ) async throws {
        let harness = EventsTestHarness(service: service, clock: clock)
        for exchange in [ExchangeDeclaration.events, .legacyEmail, .deadLetters] {
            try await harness.broker.declare(exchange, deadline: .now + .seconds(5))
        }
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { await harness.finishLine.run() }
            defer { group.cancelAll() }
            try await body(harness)
        }
    }

    /// Runs a subscriber while `body` runs. Its queue is bound before `body` begins.
    ///
    /// - Parameter usesInbox: Whether it remembers what it has handled.
    public func withSubscriber(
        _ subscription: EventSubscription, _ router: EventRouter, usesInbox: Bool = false,
        _ body: @escaping @Sendable () async throws -> Void
    ) async throws {
        let subscriber = EventSubscriber(
            transport: broker, subscription: subscription, router: router, inbox: usesInbox ? inbox : nil,
            clock: clock)
        try await subscriber.declare()
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            defer { group.cancelAll() }
            try await body()
        }
    }

    /// Returns once a queue is empty and everything that was delivered from it is settled.
    /// Throws ``SMAPEvents/EventsError/Code/deadlineExceeded`` after `timeout`.
    public func settled(_ queue: QueueName, timeout: Duration = .seconds(30)) async throws {
        let deadline = ContinuousClock.now + timeout
        while !broker.isSettled(queue) {
            guard ContinuousClock.now < deadline else {
                throw EventsError(.deadlineExceeded, "\(queue) is not settled", operation: "test harness")
            }
            await Task.yield()
        }
    }
}
