/// Says which handler handles which event. The first one that matches takes it.
public struct EventRouter: Sendable {
    struct Route: Sendable {
        let pattern: TopicPattern
        let handle: @Sendable (EventEnvelope, InboundDelivery, QueueName) async throws -> HandlerOutcome
    }

    private(set) var routes: [Route] = []

    /// Makes a router without handlers.
    public init() {}

    /// Handles events of one type.
    ///
    /// An event that matches and is not of this type is dead-lettered as undecodable. A handler that throws asks for a
    /// retry.
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

    private mutating func add<Event: Sendable>(
        _ pattern: TopicPattern, _ decode: @escaping @Sendable (EventEnvelope) throws -> Event,
        _ handler: @escaping @Sendable (EventDelivery<Event>) async throws -> HandlerOutcome
    ) {
        routes.append(
            Route(pattern: pattern) { envelope, inbound, queue in
                try await handler(
                    EventDelivery(
                        event: try decode(envelope), envelope: envelope, routingKey: inbound.routingKey, queue: queue,
                        isRedelivered: inbound.isRedelivered, attempt: inbound.attempt,
                        properties: inbound.properties, receivedAt: inbound.receivedAt))
            })
    }

    /// Finds out what becomes of a message. Throws what its handler throws.
    func outcome(of inbound: InboundDelivery, from queue: QueueName) async throws -> HandlerOutcome {
        do {
            let envelope = try EventEnvelope(
                parsing: inbound.body, routingKey: inbound.routingKey,
                timestamp: inbound.properties.timestamp ?? inbound.receivedAt)
            // A message in a queue of ours came by its key, but in one that was moved or replayed only the payload
            // knows it.
            let key = inbound.routingKey
            let named = envelope.routingKey?.rawValue
            guard
                let route = routes.first(where: { $0.pattern.matches(key) || (named.map($0.pattern.matches) ?? false) })
            else { return .deadLetter(reason: "unhandled") }
            return try await route.handle(envelope, inbound, queue)
        } catch let error as EventsError where error.code == .undecodable {
            return .deadLetter(reason: "undecodable: \(error.message)")
        }
    }
}
