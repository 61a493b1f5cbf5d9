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

    /// Compares an exchange that exists with a declaration, and changes nothing else. Throws
    /// ``EventsError/Code/topologyConflict`` when it differs. What does not exist may be created.
    func compare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws

    /// Compares a queue that exists with a declaration; see ``compare(_:deadline:)-(ExchangeDeclaration,_)``.
    func compare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws

    /// Waits for room for messages that are about to be published, before they are encoded: so what waits are callers, not
    /// messages.
    ///
    /// - Parameters:
    ///   - count: For how many messages. A transport may give room for fewer, at least for one:
    ///     ``PublishReservation/count``.
    ///   - bytes: How many bytes they will have together; a guess, where that is not known yet.
    ///   - destination: Where they will go; the first of several destinations.
    /// - Throws: ``EventsError`` with ``EventsError/Code/unsent`` at the deadline, ``EventsError/Code/overloaded`` when too
    ///   many callers wait already, or why nothing will be published; `CancellationError`.
    func reserve(
        _ count: Int, bytes: Int, for destination: PublishDestination, deadline: ContinuousClock.Instant
    ) async throws -> PublishReservation

    /// Publishes one message, and returns once the broker has taken responsibility for it.
    ///
    /// - Parameter reservation: The room that was reserved for it.
    /// - Returns: Whether the message reached at least one queue.
    /// - Throws: ``EventsError``, whose ``EventsError/publishOutcome`` says how the publish ended;
    ///   `CancellationError`.
    func publish(
        _ message: consuming OutboundMessage, using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async throws -> Bool

    /// Publishes several messages, and returns once there is an answer for each: whether it reached a queue, or an error. One
    /// that is invalid or refused fails alone. When the task is cancelled, those without an answer end as
    /// ``PublishOutcome/unsent`` or ``PublishOutcome/unknown``.
    ///
    /// - Parameter reservation: The room that was reserved for them.
    func publish(
        contentsOf messages: consuming [OutboundMessage], using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async -> [Result<Bool, EventsError>]

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

extension EventTransport {
    /// Declares the exchange.
    public func compare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        try await declare(exchange, deadline: deadline)
    }

    /// Declares the queue.
    public func compare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws {
        _ = try await declare(queue, deadline: deadline)
    }

    /// Gives room at once: for transports without limits.
    public func reserve(
        _ count: Int, bytes: Int, for destination: PublishDestination, deadline: ContinuousClock.Instant
    ) async throws -> PublishReservation { PublishReservation(count: count) }

    /// Publishes the messages one after the other.
    public func publish(
        contentsOf messages: consuming [OutboundMessage], using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async -> [Result<Bool, EventsError>] {
        var results: [Result<Bool, EventsError>] = []
        for message in messages {
            do {
                results.append(
                    .success(try await publish(message, using: PublishReservation(), deadline: deadline)))
            } catch let error as EventsError {
                results.append(.failure(error))
            } catch {
                results.append(
                    .failure(EventsError(.unknownOutcome, "cancelled before it was confirmed", operation: "publish")))
            }
        }
        return results
    }

    /// Reserves room for a message and publishes it.
    @discardableResult
    public func publish(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> Bool {
        let reservation = try await reserve(
            1, bytes: message.body.count,
            for: PublishDestination(exchange: message.exchange, routingKey: message.routingKey), deadline: deadline)
        return try await publish(message, using: reservation, deadline: deadline)
    }
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

    /// Returns once the broker has what was settled so far: what happens to this process later does not bring it again.
    func flushSettlements(deadline: ContinuousClock.Instant) async throws

    /// Returns once the consumer has been stopped; throws why it ended otherwise, also while no task waits for a delivery.
    func untilEnded() async throws

    /// Has more deliveries unsettled at a time from now on. What was delivered stays as it is, and can be settled. Called once at
    /// most, while as many deliveries are unsettled as the prefetch allows. If the broker does not agree, the consumer ends.
    ///
    /// - Parameter prefetch: How many, 1 to 65,535.
    func widen(to prefetch: Int)

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
