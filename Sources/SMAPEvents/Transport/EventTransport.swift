/// What carries messages: RabbitMQ (`RabbitMQTransport`), or memory (`InMemoryBroker`).
///
/// Every call ends by its deadline with a result or an ``EventsError``, and at once when its task is cancelled.
public protocol EventTransport: Sendable {
    /// Makes sure that an exchange exists. Throws ``EventsError/Code/topologyConflict`` when it exists otherwise.
    func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws

    /// Makes sure that a queue exists. Throws ``EventsError/Code/topologyConflict`` when it exists otherwise.
    @discardableResult
    func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus

    /// Binds a queue to an exchange. Throws ``EventsError/Code/notFound`` when one of them is missing.
    func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant)
        async throws

    /// Asks whether an exchange exists, and changes nothing. Throws ``EventsError/Code/notFound``.
    func checkExchange(_ name: String, deadline: ContinuousClock.Instant) async throws

    /// Asks what a queue holds, and changes nothing. Throws ``EventsError/Code/notFound``.
    func status(of queue: QueueName, deadline: ContinuousClock.Instant) async throws -> QueueStatus

    /// Whether events can be published now.
    func health() async -> Health

    /// Publishes one message, and returns once the broker has taken responsibility for it.
    ///
    /// - Parameter message: Makes the message, once there is room for it: so what waits are callers, not messages. What
    ///   it throws is thrown.
    /// - Returns: Whether the message reached at least one queue.
    /// - Throws: ``EventsError`` with ``EventsError/Code/unsent``, ``EventsError/Code/unknownOutcome``,
    ///   ``EventsError/Code/nacked``, ``EventsError/Code/exchangeNotFound``, or, before anything is sent,
    ///   ``EventsError/Code/eventTooLarge`` or ``EventsError/Code/invalidEvent``.
    func publish(
        deadline: ContinuousClock.Instant, _ message: @Sendable () throws -> OutboundMessage
    ) async throws
        -> Bool

    /// Publishes a question, and waits for the reply that has its correlation id; its `reply_to` is set by the transport.
    ///
    /// - Throws: What publishing throws, ``EventsError/Code/unroutable`` when it reached no queue,
    ///   ``EventsError/Code/deadlineExceeded``, and ``EventsError/Code/connectionLost`` when the reply was lost.
    func request(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> InboundDelivery

    /// Consumes from a queue while `body` runs. When it returns, the consumer is cancelled, and whatever is unsettled
    /// goes back to the queue.
    ///
    /// - Parameters:
    ///   - prefetch: How many deliveries may be unsettled at a time, 1 to 65,535.
    ///   - deadline: When the consumer must have started.
    func withConsumer<Result: Sendable>(
        on queue: QueueName, prefetch: Int, deadline: ContinuousClock.Instant,
        _ body: @Sendable (any TransportConsumer) async throws -> Result
    ) async throws -> Result
}

/// A consumer of one queue, alive within ``EventTransport/withConsumer(on:prefetch:deadline:_:)``. Any number of tasks
/// may take deliveries from it; each delivery goes to one of them.
public protocol TransportConsumer: Sendable {
    /// The next delivery; waits for one. Nil once the consumer has been stopped.
    /// Throws ``EventsError`` when the connection, channel or queue is gone.
    func next() async throws -> InboundDelivery?

    /// Settles a delivery. Throws ``EventsError/Code/deliveryExpired`` when it is settled already or its channel is
    /// gone; then the broker delivers it again.
    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws

    /// Returns once the consumer has been stopped; throws why it ended otherwise, even if nobody waits for a delivery.
    func untilEnded() async throws

    /// Ends the stream of deliveries. What was delivered can still be settled.
    func stop() async
}

/// What becomes of a delivery.
public enum Settlement: Sendable, Hashable {
    /// It is done with.
    case acknowledge
    /// It goes back to its queue, and comes again.
    case requeue
    /// It goes to the queue's dead letter exchange, or away if the queue has none.
    case reject
}
