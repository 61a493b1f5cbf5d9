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
    let transport: any EventTransport
    let configuration: PublisherConfiguration
    let depth: QueueDepthWatch?
    let tracing: MessageTracing
    private let logger: Logger
    private let templates: EventTemplates

    /// Creates a publisher. The publisher does not own the transport: the caller runs and closes it.
    ///
    /// - Parameters:
    ///   - transport: What carries the events.
    ///   - configuration: The service's name, the exchange and the default deadline.
    ///   - depth: Refuses events while a watched queue is too deep. No limit by default.
    ///   - logger: Logs each publish: `info` for those that were confirmed, `warning` for the others.
    public init(
        transport: any EventTransport, configuration: PublisherConfiguration, depth: QueueDepthWatch? = nil,
        logger: Logger = .silent
    ) {
        self.transport = transport
        self.configuration = configuration
        self.tracing = MessageTracing(configuration.tracer)
        self.templates = EventTemplates(configuration)
        self.depth = depth
        self.logger = logger
    }

    /// Makes sure that the exchange exists, as a durable topic exchange. Publishing to one that does not is
    /// ``EventsError/Code/exchangeNotFound``.
    public func declareExchanges() async throws {
        try await transport.declare(
            ExchangeDeclaration(name: configuration.exchange, kind: .topic), deadline: .now + configuration.deadline)
    }

    /// Whether events can be published now; if not, why. It does not wait: a connection that no call has opened yet is
    /// opened, and reported as connecting.
    public func health() async -> Health { await transport.health() }

    // MARK: One event

    /// Publishes with the default options; see ``EventPublishing``.
    @discardableResult
    public func publish<E: SMAPEvent>(_ event: E) async throws -> PublishReceipt {
        try await publish(event, options: PublishOptions())
    }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
        let eventID = options.eventID ?? EventID()
        let template = templates.template(of: E.self)
        return try await publish(template, eventID, options) {
            try event.validate()
        } making: {
            try message(for: event, template, eventID, options)
        }
    }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
        let eventID = event.eventID ?? options.eventID ?? EventID()
        let template = template(of: event)
        return try await publish(template, eventID, options) {
            try EventEnvelope.checkData(event.data, operation: "publish")
        } making: {
            try message(for: event, template, eventID, options)
        }
    }

    /// Reserves room for one event, makes its message, and publishes it.
    private func publish(
        _ template: EventTemplate, _ eventID: EventID, _ options: PublishOptions, checking check: () throws -> Void,
        making message: () throws -> OutboundMessage
    ) async throws -> PublishReceipt {
        let start = ContinuousClock.now
        let deadline = start + (options.deadline ?? configuration.deadline)
        do {
            try check()
            try depth?.check()
            let routed: Bool
            if tracing.isOff {
                let reservation = try await transport.reserve(
                    1, bytes: template.expectedSize, for: template.destination, deadline: deadline)
                let message = try message()
                template.expectedSize = message.body.count
                routed = try await transport.publish(consume message, using: reservation, deadline: deadline)
            } else {
                routed = try await tracing.publish(to: template.destination, eventID: eventID) { headers in
                    let reservation = try await transport.reserve(
                        1, bytes: template.expectedSize, for: template.destination, deadline: deadline)
                    var message = try message()
                    template.expectedSize = message.body.count
                    message.properties.headers.merge(headers) { own, _ in own }
                    return try await transport.publish(message, using: reservation, deadline: deadline)
                }
            }
            return try receipt(template, eventID, routed, start, options)
        } catch {
            throw failure(error, template, eventID)
        }
    }

    /// Publishes a message that was made already, as one leg of a dual publish.
    func publish(
        _ message: OutboundMessage, key: RoutingKey, _ eventID: EventID, _ options: PublishOptions,
        deadline: ContinuousClock.Instant
    ) async throws -> PublishReceipt {
        let start = ContinuousClock.now
        let template = templates.template(key, schemaVersion: nil)
        do {
            let routed = try await tracing.publish(
                to: PublishDestination(exchange: message.exchange, routingKey: message.routingKey), eventID: eventID
            ) { headers in
                var message = message
                if !headers.isEmpty { message.properties.headers.merge(headers) { own, _ in own } }
                return try await transport.publish(message, deadline: deadline)
            }
            return try receipt(template, eventID, routed, start, options, exchange: message.exchange)
        } catch {
            throw failure(error, template, eventID)
        }
    }

    /// Publishes an event that is replied to, and waits for the reply. It is traced and counted as any other.
    func request<E: SMAPEvent>(
        _ event: E, _ eventID: EventID, _ options: PublishOptions
    ) async throws -> InboundDelivery {
        let start = ContinuousClock.now
        let span = options.deadline ?? configuration.deadline
        let template = templates.template(of: E.self)
        do {
            try event.validate()
            try depth?.check()
            var message = try message(for: event, template, eventID, options)
            message.properties.correlationID = EventID().rawValue
            message.properties.headers[RequestHeader.deadline] = .integer(
                Int64(clamping: Int((Date().timeIntervalSince1970 + min(span / .seconds(1), 1e9)) * 1000)))
            let reply = try await tracing.publish(to: template.destination, eventID: eventID) { [message] headers in
                var message = message
                message.properties.headers.merge(headers) { own, _ in own }
                return try await transport.request(message, deadline: start + span)
            }
            template.metrics.published(routed: true, after: .now - start)
            return reply
        } catch {
            throw failure(error, template, eventID)
        }
    }

    private func receipt(
        _ template: EventTemplate, _ eventID: EventID, _ routed: Bool, _ start: ContinuousClock.Instant,
        _ options: PublishOptions, exchange: String? = nil
    ) throws -> PublishReceipt {
        let exchange = exchange ?? configuration.exchange
        template.metrics.published(routed: routed, after: .now - start)
        let key = template.routingKey
        if !routed {
            logger.warning(
                "event reached no queue",
                metadata: ["event_id": "\(eventID)", "routing_key": "\(key)", "exchange": "\(exchange)"])
            if options.requireRoute {
                throw EventsError(.unroutable, "no queue is bound to \(exchange) for \(key)", operation: "publish")
            }
        }
        logger.info(
            "event published",
            metadata: [
                "event_id": "\(eventID)", "routing_key": "\(key)", "service": "\(configuration.service)",
                "action": "\(key.action)",
            ])
        return PublishReceipt(
            eventID: eventID, routingKey: key, legs: [PublishReceipt.Leg(exchange: exchange, routed: routed)])
    }

    /// Whatever has ended a publish, as an error that names the event; counted and logged.
    private func failure(_ error: any Error, _ template: EventTemplate, _ eventID: EventID) -> any Error {
        if error is CancellationError { return error }
        // Another error is what a user's own validate() or encode(to:) throws.
        let failure =
            (error as? EventsError)?.with(eventID: eventID)
            ?? EventsError(
                .invalidEvent, "\(template.routingKey) is not valid: \(type(of: error))", operation: "publish",
                eventID: eventID, underlying: error)
        template.metrics.failed(failure.code)
        logger.warning(
            "event not published",
            metadata: [
                "event_id": "\(eventID)", "routing_key": "\(template.routingKey)", "error_type": "\(failure.code)",
                "reason": "\(failure.message)",
            ])
        return failure
    }

    // MARK: Many events

    /// See ``EventPublishing``.
    public func publish<E: SMAPEvent>(
        contentsOf events: [E], ids: [EventID]?, options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        let template = templates.template(of: E.self)
        guard let ids = ids ?? events.map({ _ in EventID() }) as [EventID]?, ids.count == events.count else {
            let error = EventsError(
                .invalidEvent, "there are \(ids?.count ?? 0) ids for \(events.count) events", operation: "publish")
            return Array(repeating: .failure(error), count: events.count)
        }
        return await publish(count: events.count, options) { index in
            (template, ids[index])
        } making: { index in
            try events[index].validate()
            return try message(for: events[index], template, ids[index], options)
        }
    }

    /// See ``EventPublishing``.
    public func publish(
        contentsOf events: [UntypedEvent], options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        let known = events.map { (template(of: $0), $0.eventID ?? EventID()) }
        return await publish(count: events.count, options) { index in
            known[index]
        } making: { index in
            try EventEnvelope.checkData(events[index].data, operation: "publish")
            return try message(for: events[index], known[index].0, known[index].1, options)
        }
    }

    /// Publishes events in parts, each with one reservation and one wait.
    private func publish(
        count: Int, _ options: PublishOptions, identity: (Int) -> (EventTemplate, EventID),
        making message: (Int) throws -> OutboundMessage
    ) async -> [Result<PublishReceipt, EventsError>] {
        let start = ContinuousClock.now
        let deadline = start + (options.deadline ?? configuration.deadline)
        var results: [Result<PublishReceipt, EventsError>] = []
        results.reserveCapacity(count)
        while results.count < count {
            let first = results.count
            let (template, _) = identity(first)
            do {
                try Task.checkCancellation()
                try depth?.check()
                let reservation = try await transport.reserve(
                    count - first, bytes: template.expectedSize * (count - first), for: template.destination,
                    deadline: deadline)
                results += await publish(
                    first..<min(count, first + max(1, reservation.count)), using: reservation, start, deadline, options,
                    identity: identity, making: message)
            } catch {
                // Of these nothing was written.
                let reason =
                    error as? EventsError
                    ?? EventsError(.unsent, "cancelled before it was written", operation: "publish")
                for index in first..<count {
                    let (template, eventID) = identity(index)
                    results.append(.failure(eventsError(failure(reason, template, eventID), eventID)))
                }
            }
        }
        return results
    }

    private func publish(
        _ range: Range<Int>, using reservation: consuming PublishReservation, _ start: ContinuousClock.Instant,
        _ deadline: ContinuousClock.Instant, _ options: PublishOptions, identity: (Int) -> (EventTemplate, EventID),
        making message: (Int) throws -> OutboundMessage
    ) async -> [Result<PublishReceipt, EventsError>] {
        var errors: [Int: any Error] = [:]
        var messages: [OutboundMessage] = []
        messages.reserveCapacity(range.count)
        var bytes = 0
        var range = range
        for index in range {
            // The sizes were guesses: what is larger than its room waits for more.
            if bytes > reservation.bytes, reservation.bytes > 0 {
                range = range.lowerBound..<index
                break
            }
            do {
                var made = try message(index)
                let (template, eventID) = identity(index)
                template.expectedSize = made.body.count
                let headers = tracing.context(of: eventID, to: template.destination)
                if !headers.isEmpty { made.properties.headers.merge(headers) { own, _ in own } }
                bytes += made.body.count
                messages.append(made)
            } catch {
                errors[index] = error
            }
        }
        let answers =
            messages.isEmpty
            ? [] : await transport.publish(contentsOf: messages, using: reservation, deadline: deadline)
        var next = answers.makeIterator()
        return range.map { index in
            let (template, eventID) = identity(index)
            do {
                if let error = errors[index] { throw error }
                guard let answer = next.next() else {
                    throw EventsError(.unknownOutcome, "the transport has not answered", operation: "publish")
                }
                return .success(try receipt(template, eventID, try answer.get(), start, options))
            } catch {
                return .failure(eventsError(failure(error, template, eventID), eventID))
            }
        }
    }

    private func eventsError(_ error: any Error, _ eventID: EventID) -> EventsError {
        error as? EventsError
            ?? EventsError(.unsent, "cancelled before it was written", operation: "publish", eventID: eventID)
    }

    // MARK: Messages

    private func template(of event: UntypedEvent) -> EventTemplate {
        templates.template(
            event.routingKey, schemaVersion: EventCatalogue.schemaVersion(of: event.routingKey))
    }

    /// The message of an event that has been validated.
    func message<E: SMAPEvent>(for event: E, _ eventID: EventID, _ options: PublishOptions) throws -> OutboundMessage {
        try message(for: event, templates.template(of: E.self), eventID, options)
    }

    /// The message of an event whose data is known to be a JSON object.
    func message(for event: UntypedEvent, _ eventID: EventID, _ options: PublishOptions) throws -> OutboundMessage {
        try message(for: event, template(of: event), eventID, options)
    }

    private func message<E: SMAPEvent>(
        for event: E, _ template: EventTemplate, _ eventID: EventID, _ options: PublishOptions
    ) throws -> OutboundMessage {
        let data = try EventJSON.encodedData(of: event)
        let isNested = E.shape == .nested
        let envelope = EventEnvelope(
            eventID: eventID, timestamp: options.timestamp ?? Date(), routingKey: template.routingKey,
            projectID: event.projectID, service: configuration.service, idempotencyKey: event.idempotencyKey,
            schemaVersion: E.schemaVersion, data: isNested ? [] : Array(data))
        let body =
            isNested
            ? try envelope.serialized(nesting: data, identity: template.identity)
            : try envelope.serialized(shape: E.shape, identity: template.identity)
        return message(envelope, template, body, options)
    }

    private func message(
        for event: UntypedEvent, _ template: EventTemplate, _ eventID: EventID, _ options: PublishOptions
    ) throws -> OutboundMessage {
        var envelope = EventEnvelope(
            eventID: eventID, timestamp: options.timestamp ?? Date(), routingKey: event.routingKey,
            projectID: event.projectID, service: configuration.service, idempotencyKey: event.idempotencyKey,
            data: event.data)
        try EventCatalogue.complete(&envelope)
        let shape = event.shape ?? EventCatalogue.shape(of: event.routingKey) ?? .nested
        let body = try envelope.serialized(shape: shape, identity: template.identity)
        return message(envelope, template, body, options)
    }

    private func message(
        _ envelope: EventEnvelope, _ template: EventTemplate, _ body: [UInt8], _ options: PublishOptions
    ) -> OutboundMessage {
        var message = OutboundMessage(
            template.message, messageID: envelope.eventID, timestamp: envelope.timestamp, body: body)
        // What few events have is encoded with each of them.
        if let correlationID = options.correlationID { message.properties.correlationID = correlationID }
        if let tenant = options.tenantID { message.properties.headers["tenant_id"] = .string(tenant) }
        if let user = options.userID { message.properties.headers["user_id"] = .string(user) }
        return message
    }
}
