public import Logging

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Publishes events in the standard envelope to the topic exchange.
///
/// Invariant (P1, P2): a receipt is returned only after the broker's confirm, and every call ends by its deadline as
/// just one ``PublishOutcome``. All checks come before the first byte is sent.
public final class EventPublisher: EventPublishing {
    private let transport: any EventTransport
    private let configuration: PublisherConfiguration
    private let logger: Logger
    private let metrics = PublisherMetrics()
    private let tracing: MessageTracing
    private let depth: QueueDepthWatch?

    /// Makes a publisher. It holds nothing of its own: the transport is started and closed by whoever made it.
    ///
    /// - Parameter depth: Refuses while a queue is too deep; nobody does by default.
    public init(
        transport: any EventTransport, configuration: PublisherConfiguration, depth: QueueDepthWatch? = nil,
        logger: Logger = .silent
    ) {
        self.transport = transport
        self.configuration = configuration
        self.tracing = MessageTracing(configuration.tracer)
        self.depth = depth
        self.logger = logger
    }

    /// Makes sure that the exchange exists, as a durable topic exchange. Publishing to one that does not is
    /// ``EventsError/Code/exchangeNotFound``.
    public func declareExchanges() async throws {
        try await transport.declare(
            ExchangeDeclaration(name: configuration.exchange, kind: .topic), deadline: .now + configuration.deadline)
    }

    /// Whether events can be published now; if not, why. It does not wait: a connection that nobody has opened yet is
    /// opened, and reported as connecting.
    public func health() async -> Health { await transport.health() }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
        let eventID = options.eventID ?? EventID()
        return try await send(E.routingKey, eventID, options) {
            try event.validate()
        } message: {
            try message(for: event, eventID, options)
        }
    }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
        let eventID = options.eventID ?? EventID()
        return try await send(event.routingKey, eventID, options) {
            try EventEnvelope.checkData(event.data, operation: "publish")
        } message: {
            try message(for: event, eventID, options)
        }
    }

    /// The message of an event that has been validated.
    func message<E: SMAPEvent>(for event: E, _ eventID: EventID, _ options: PublishOptions) throws -> OutboundMessage {
        let envelope = EventEnvelope(
            eventID: eventID, timestamp: options.timestamp ?? Date(), routingKey: E.routingKey,
            projectID: event.projectID, service: configuration.service, idempotencyKey: event.idempotencyKey,
            schemaVersion: E.schemaVersion, data: try EventJSON.encode(event))
        return try message(envelope, E.routingKey, E.shape, options)
    }

    /// The message of an event whose data is known to be a JSON object.
    func message(for event: UntypedEvent, _ eventID: EventID, _ options: PublishOptions) throws -> OutboundMessage {
        var envelope = EventEnvelope(
            eventID: eventID, timestamp: options.timestamp ?? Date(), routingKey: event.routingKey,
            projectID: event.projectID, service: configuration.service, idempotencyKey: event.idempotencyKey,
            data: event.data)
        try EventCatalogue.complete(&envelope)
        let shape = event.shape ?? EventCatalogue.shape(of: event.routingKey) ?? .nested
        return try message(envelope, event.routingKey, shape, options)
    }

    private func message(
        _ envelope: EventEnvelope, _ key: RoutingKey, _ shape: EventShape, _ options: PublishOptions
    ) throws -> OutboundMessage {
        var headers: [String: MessageProperties.HeaderValue] = [:]
        if let version = envelope.schemaVersion { headers["x-smap-schema-version"] = .integer(Int64(version)) }
        if let tenant = options.tenantID { headers["tenant_id"] = .string(tenant) }
        if let user = options.userID { headers["user_id"] = .string(user) }
        return OutboundMessage(
            exchange: configuration.exchange, routingKey: key.rawValue,
            properties: MessageProperties(
                contentType: "application/json", messageID: envelope.eventID.rawValue, type: key.rawValue,
                appID: configuration.service, correlationID: options.correlationID, timestamp: envelope.timestamp,
                headers: headers),
            body: try envelope.serialized(shape: shape))
    }

    /// Sends one message, and turns however that ends into a receipt or an error that names the event.
    func send(
        _ key: RoutingKey, _ eventID: EventID, _ options: PublishOptions,
        check: () throws -> Void = {}, message: @Sendable () throws -> OutboundMessage
    ) async throws -> PublishReceipt {
        let start = ContinuousClock.now
        do {
            do {
                try check()
                try depth?.check()
                let deadline = start + (options.deadline ?? configuration.deadline)
                let routed = try await tracing.publish(
                    to: configuration.exchange, key: key.rawValue, eventID: eventID, over: transport,
                    deadline: deadline, message)
                if !routed {
                    logger.warning(
                        "event reached no queue", metadata: ["event_id": "\(eventID)", "routing_key": "\(key)"])
                    if options.requireRoute {
                        throw EventsError(
                            .unroutable, "no queue is bound to \(configuration.exchange) for \(key)",
                            operation: "publish")
                    }
                }
                metrics.published(key, since: start)
                logger.info(
                    "event published",
                    metadata: [
                        "event_id": "\(eventID)", "routing_key": "\(key)", "service": "\(configuration.service)",
                        "action": "\(key.action)",
                    ])
                return PublishReceipt(
                    eventID: eventID, routingKey: key,
                    legs: [PublishReceipt.Leg(exchange: configuration.exchange, routed: routed)])
            } catch let error as EventsError {
                throw error.with(eventID: eventID)
            } catch let error where !(error is CancellationError) {
                // What a user's own validate() or encode(to:) throws.
                throw EventsError(
                    .invalidEvent, "\(key) is not valid: \(type(of: error))", operation: "publish", eventID: eventID,
                    underlying: error)
            }
        } catch let error as EventsError {
            metrics.failed(key, error.code)
            logger.warning(
                "event not published",
                metadata: ["event_id": "\(eventID)", "routing_key": "\(key)", "error_type": "\(error.code)"])
            throw error
        }
    }
}
