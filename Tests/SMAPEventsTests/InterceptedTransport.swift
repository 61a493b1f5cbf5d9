import SMAPEvents
import SMAPEventsTesting

/// The broker in memory, with something happening at the moments that matter.
struct InterceptedTransport: EventTransport {
    let broker: InMemoryBroker
    /// What happens before a message is published.
    var publishing: @Sendable (OutboundMessage) throws -> Void = { _ in }
    /// What a message waits for before it is published.
    var awaiting: @Sendable (OutboundMessage) async throws -> Void = { _ in }
    /// What happens once a message has been published.
    var published: @Sendable (OutboundMessage) -> Void = { _ in }
    /// What happens before a consumer is started.
    var consuming: @Sendable () throws -> Void = {}

    func publish(
        _ message: consuming OutboundMessage, using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async throws -> Bool {
        try publishing(message)
        try await awaiting(message)
        let isRouted = try await broker.publish(message, deadline: deadline)
        published(message)
        return isRouted
    }

    func withConsumer<Result: Sendable>(
        on queue: QueueName, prefetch: Int, deadline: ContinuousClock.Instant,
        _ body: @Sendable (any TransportConsumer) async throws -> Result
    ) async throws -> Result {
        try consuming()
        return try await broker.withConsumer(on: queue, prefetch: prefetch, deadline: deadline, body)
    }

    func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        try await broker.declare(exchange, deadline: deadline)
    }
    func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        try await broker.declare(queue, deadline: deadline)
    }
    func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant
    ) async throws { try await broker.bind(queue, to: exchange, routingKey: routingKey, deadline: deadline) }
    func checkExchange(_ name: String, deadline: ContinuousClock.Instant) async throws {
        try await broker.checkExchange(name, deadline: deadline)
    }
    func status(of queue: QueueName, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        try await broker.status(of: queue, deadline: deadline)
    }
    func health() async -> Health { await broker.health() }
    func request(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> InboundDelivery {
        try await broker.request(message, deadline: deadline)
    }
}
