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
    public let broker = InMemoryBroker()
    /// The store.
    public let store = InMemoryProgressStore()
    /// Publishes to `smap.events`.
    public let publisher: EventPublisher
    /// Publishes what the tracker decides.
    public let finishLine: FinishLine
    /// Tracks projects, and tells ``finishLine`` of finishes.
    public let tracker: ProgressTracker

    private init(service: String) {
        publisher = EventPublisher(transport: broker, configuration: PublisherConfiguration(service: service))
        finishLine = FinishLine(store: store, publisher: publisher)
        tracker = ProgressTracker(store: store, finishLine: finishLine)
    }

    /// Runs `body` in surroundings of its own; the finish line runs beside it.
    public static func withHarness(
        service: String = "test", _ body: @escaping @Sendable (EventsTestHarness) async throws -> Void
    ) async throws {
        let harness = EventsTestHarness(service: service)
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
    public func withSubscriber(
        _ subscription: EventSubscription, _ router: EventRouter, _ body: @escaping @Sendable () async throws -> Void
    ) async throws {
        let subscriber = EventSubscriber(transport: broker, subscription: subscription, router: router)
        try await subscriber.declare()
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            defer { group.cancelAll() }
            try await body()
        }
    }

    /// Returns once a queue is empty and everything that was delivered from it is settled.
    /// Throws ``SMAPEvents/EventsError/Code/deadlineExceeded`` after `timeout`.
    public func settled(_ queue: QueueName, timeout: Duration = .seconds(5)) async throws {
        let deadline = ContinuousClock.now + timeout
        while !broker.isSettled(queue) {
            guard ContinuousClock.now < deadline else {
                throw EventsError(.deadlineExceeded, "\(queue) is not settled", operation: "test harness")
            }
            await Task.yield()
        }
    }
}
