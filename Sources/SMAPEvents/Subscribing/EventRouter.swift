/// Says which handler handles which event. The first one that matches the key that it was delivered with takes it.
public struct EventRouter: Sendable {
    /// Has a handler decide about its event.
    typealias Handler = @Sendable () async throws -> HandlerOutcome

    struct Route: Sendable {
        let pattern: TopicPattern
        /// Reads an event, and binds the handler to it.
        let handler: @Sendable (EventEnvelope, InboundDelivery, QueueName) throws -> Handler
    }

    private(set) var routes: [Route] = []

    /// Makes a router without handlers.
    public init() {}

    /// Handles events of one type.
    ///
    /// An event that matches and is not of this type is dead-lettered as undecodable. A handler that throws asks for a
    /// retry, as the subscription's ``RetryPolicy`` says.
    ///
    /// - Parameter pattern: The keys to take; just the type's own key by default.
    public mutating func on<E: SMAPEvent>(
        _ type: E.Type, matching pattern: TopicPattern? = nil,
        _ handler: @escaping @Sendable (EventDelivery<E>) async throws -> HandlerOutcome
    ) {
        add(pattern ?? TopicPattern(E.routingKey), { try $0.decode(type) }, handler)
    }

    /// Handles events of any type as they are; the data is in the envelope.
    public mutating func on(
        matching pattern: TopicPattern,
        _ handler: @escaping @Sendable (EventDelivery<EventEnvelope>) async throws -> HandlerOutcome
    ) {
        add(pattern, { $0 }, handler)
    }

    /// Handles events of one type in batches, with one outcome for each, in their order.
    ///
    /// A batch is handled when it is full, or when its first event has waited for `wait`. Each waiting event holds one of
    /// the subscription's handlers, so batches grow no larger than ``EventSubscription/concurrency``. If the handler throws,
    /// or returns another number of outcomes, all of the batch is retried.
    ///
    /// - Parameters:
    ///   - size: How many events a batch holds at most, 1 or more.
    ///   - wait: How long an event waits for others, 1 s by default. It counts towards
    ///     ``EventSubscription/handlerDeadline``, and must be well below that.
    ///   - clock: What measures that; for tests.
    public mutating func onBatch<E: SMAPEvent>(
        of type: E.Type, matching pattern: TopicPattern? = nil, size: Int, within wait: Duration = .seconds(1),
        clock: any Clock<Duration> = ContinuousClock(),
        _ handler: @escaping @Sendable ([EventDelivery<E>]) async throws -> [HandlerOutcome]
    ) {
        let batches = BatchCollector(size: max(1, size), wait: wait, stopwatch: Stopwatch(clock), handler)
        add(pattern ?? TopicPattern(E.routingKey), { try $0.decode(type) }) { try await batches.handle($0) }
    }

    mutating func add<Event: Sendable>(
        _ pattern: TopicPattern, _ decode: @escaping @Sendable (EventEnvelope) throws -> Event,
        _ handler: @escaping @Sendable (EventDelivery<Event>) async throws -> HandlerOutcome
    ) {
        routes.append(
            Route(pattern: pattern) { envelope, inbound, queue in
                let delivery = EventDelivery(
                    event: try decode(envelope), envelope: envelope, routingKey: inbound.routingKey, queue: queue,
                    isRedelivered: inbound.isRedelivered, attempt: inbound.attempt, properties: inbound.properties,
                    receivedAt: inbound.receivedAt)
                return { try await handler(delivery) }
            })
    }

    /// Reads a message, a legacy one as the event that it stands for. Throws ``EventsError/Code/undecodable``.
    func envelope(of inbound: InboundDelivery) throws -> EventEnvelope {
        if inbound.exchange == ExchangeName.legacyEmail { return try EventEnvelope(legacy: inbound) }
        return try EventEnvelope(
            parsing: inbound.body, routingKey: inbound.routingKey,
            timestamp: inbound.properties.timestamp ?? inbound.receivedAt)
    }

    /// The handler of an event, which has been read as the type that it takes. Throws ``EventsError/Code/undecodable``, and
    /// ``EventsError/Code/unhandled`` if there is none: what the handler itself throws later is another matter.
    func handler(
        of envelope: EventEnvelope, in inbound: InboundDelivery, from queue: QueueName
    ) throws -> Handler {
        // The broker's key counts: it is what the publisher was permitted. Only of a message that was moved by hand, whose key
        // no handler takes, the payload may know it.
        let key = inbound.routingKey
        let named = envelope.routingKey?.rawValue
        guard
            let route = routes.first(where: { $0.pattern.matches(key) })
                ?? named.flatMap({ named in routes.first { $0.pattern.matches(named) } })
        else { throw EventsError(.unhandled, "unhandled: no handler matches", operation: "handle from \(queue)") }
        return try route.handler(envelope, inbound, queue)
    }
}
