public import Logging
internal import Metrics
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Publishes events to `smap.events` and, where they have a legacy form, to the legacy exchange too, under one id.
///
/// Which exchanges depends on the ``MigrationPhase``. Only ``EmailVerificationRequested`` has a legacy form so far.
///
/// Invariant (P6): the call returns when every leg of the phase is confirmed, or throws an error whose
/// ``EventsError/missingLegs`` names those that are not. While one leg is confirmed and the other is not, that one is
/// tried again until the deadline. An event that cannot be expressed in both forms is rejected
/// before either leg. Repeating the event under the same id completes it.
public struct DualPublisher: EventPublishing {
    private let transport: any EventTransport
    private let topic: EventPublisher
    private let configuration: PublisherConfiguration
    private let phase: MigrationPhase
    private let logger: Logger

    private final class Deprecation: Sendable {
        let warned = Mutex<Set<RoutingKey>>([])
        let legs = ["topic", "legacy"].map { Counter(label: "event_publish_legs_total", dimensions: [("leg", $0)]) }
    }
    private let deprecation = Deprecation()

    /// Makes a publisher for a phase of the migration.
    ///
    /// - Parameter depth: Refuses, before either leg, while a queue is too deep; nobody does by default.
    public init(
        transport: any EventTransport, configuration: PublisherConfiguration, phase: MigrationPhase,
        depth: QueueDepthWatch? = nil, logger: Logger = .silent
    ) {
        self.transport = transport
        self.topic = EventPublisher(
            transport: transport, configuration: configuration, depth: depth, logger: logger)
        self.configuration = configuration
        self.phase = phase
        self.logger = logger
    }

    /// Makes sure that the topic exchange exists and, unless the migration is over, the legacy one.
    public func declareExchanges() async throws {
        try await topic.declareExchanges()
        if phase.publishesLegacy {
            try await transport.declare(.legacyEmail, deadline: .now + configuration.deadline)
        }
    }

    /// Whether events can be published now; if not, why.
    public func health() async -> Health { await transport.health() }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
        guard phase.publishesLegacy, let mail = event as? EmailVerificationRequested else {
            return try await publishTopicOnly(E.routingKey) { try await topic.publish(event, options: options) }
        }
        return try await publishBoth(E.routingKey, options) { eventID, options in
            try mail.validate()
            return (try LegacyEmailMessage(mail), try topic.message(for: event, eventID, options))
        }
    }

    /// See ``EventPublishing``.
    @discardableResult
    public func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
        guard phase.publishesLegacy, event.routingKey == EmailVerificationRequested.routingKey else {
            return try await publishTopicOnly(event.routingKey) { try await topic.publish(event, options: options) }
        }
        var options = options
        options.eventID = event.eventID ?? options.eventID
        return try await publishBoth(event.routingKey, options) { eventID, options in
            try EventEnvelope.checkData(event.data, operation: "publish")
            // The catalogue checks the data, so it decodes.
            let message = try topic.message(for: event, eventID, options)
            return (
                try LegacyEmailMessage(EventJSON.decode(EmailVerificationRequested.self, from: event.data)), message
            )
        }
    }

    /// See ``EventPublishing``. Mails go one by one, since both legs of each must be confirmed; other events in one go.
    public func publish<E: SMAPEvent>(
        contentsOf events: [E], ids: [EventID]?, options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        guard phase.publishesTopic, !(phase.publishesLegacy && E.self == EmailVerificationRequested.self) else {
            return await publishEach(events, ids: ids, options: withDeadline(options))
        }
        return await topic.publish(contentsOf: events, ids: ids, options: options)
    }

    /// See ``EventPublishing``. Mails go one by one, since both legs of each must be confirmed; other events in one go.
    public func publish(
        contentsOf events: [UntypedEvent], options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        var results = [Result<PublishReceipt, EventsError>?](repeating: nil, count: events.count)
        let isSingle = events.map { event in
            !phase.publishesTopic
                || (phase.publishesLegacy && event.routingKey == EmailVerificationRequested.routingKey)
        }
        let together = events.indices.filter { !isSingle[$0] }
        let single = events.indices.filter { isSingle[$0] }
        async let published = topic.publish(contentsOf: together.map { events[$0] }, options: options)
        let others = await publishEach(single.map { events[$0] }, options: withDeadline(options))
        for (index, result) in zip(together, await published) { results[index] = result }
        for (index, result) in zip(single, others) { results[index] = result }
        return results.compactMap { $0 }
    }

    /// The deadline of a list is that of the whole call.
    private func withDeadline(_ options: PublishOptions) -> PublishOptions {
        var options = options
        options.deadline = options.deadline ?? configuration.deadline
        return options
    }

    private func publishTopicOnly(
        _ key: RoutingKey, _ publish: () async throws -> PublishReceipt
    ) async throws -> PublishReceipt {
        guard phase.publishesTopic else {
            throw EventsError(
                .invalidEvent, "\(key) has no legacy form, and phase 1 publishes nothing else", operation: "publish")
        }
        return try await publish()
    }

    /// - Parameter forms: Makes both forms, or throws before anything is sent.
    private func publishBoth(
        _ key: RoutingKey, _ options: PublishOptions,
        forms: (EventID, PublishOptions) throws -> (LegacyEmailMessage, OutboundMessage)
    ) async throws -> PublishReceipt {
        var options = options
        let eventID = options.eventID ?? EventID()
        options.timestamp = options.timestamp ?? Date()
        let (legacyMessage, message): (OutboundMessage, OutboundMessage)
        do {
            let (form, topicMessage) = try forms(eventID, options)
            message = topicMessage
            legacyMessage = self.message(form, eventID, options)
            // What one leg cannot carry is rejected before the other has gone out.
            try message.validate()
            try legacyMessage.validate()
            try topic.depth?.check()
        } catch let error as EventsError {
            throw error.with(eventID: eventID)
        }
        warnOnce(key)
        let shared = options
        let deadline = ContinuousClock.now + (options.deadline ?? configuration.deadline)
        let send: @Sendable (OutboundMessage) async throws -> [PublishReceipt.Leg] = { message in
            try await topic.publish(message, key: key, eventID, shared, deadline: deadline).legs
        }
        guard phase.publishesTopic else {
            return PublishReceipt(eventID: eventID, routingKey: key, legs: try await send(legacyMessage))
        }

        async let topicResult = outcome { try await send(message) }
        async let legacyResult = outcome { try await send(legacyMessage) }
        var results = await [
            (configuration.exchange, topicResult), (ExchangeName.legacyEmail, legacyResult),
        ]
        // One leg alone is what must not be: the other is tried for as long as there is time.
        for (index, leg) in [message, legacyMessage].enumerated() {
            if case .success = results[1 - index].1, case .failure(let error) = results[index].1 {
                results[index].1 = await complete(error, deadline) { try await send(leg) }
            }
        }
        try Task.checkCancellation()
        var legs: [PublishReceipt.Leg] = []
        var failures: [(exchange: String, error: any Error)] = []
        for (exchange, result) in results {
            switch result {
            case .success(let confirmed):
                legs += confirmed
                deprecation.legs[exchange == ExchangeName.legacyEmail ? 1 : 0].increment()
            case .failure(let error): failures.append((exchange, error))
            }
        }
        guard let first = failures.first else { return PublishReceipt(eventID: eventID, routingKey: key, legs: legs) }
        // Unknown wins: an event that may be on one leg must be repeated under this id, not under a new one.
        let causes = failures.compactMap { $0.error as? EventsError }
        let worst = causes.first { $0.publishOutcome == .unknown } ?? causes.first { !$0.isRetriable } ?? causes.first
        let missing = failures.map(\.exchange)
        // What no repetition completes keeps its code, which is not retriable; that one leg is out makes its end unknown.
        let code = worst.map { $0.isRetriable && !legs.isEmpty ? .unknownOutcome : $0.code } ?? .unsent
        throw EventsError(
            code,
            "not confirmed by \(missing.joined(separator: " and ")): \(worst?.message ?? "\(type(of: first.error))")",
            operation: "publish", eventID: eventID, missingLegs: missing, underlying: first.error,
            outcome: legs.isEmpty ? worst?.publishOutcome : .unknown)
    }

    /// Tries a leg again until it is confirmed, the deadline has passed, or its error is not worth it.
    private func complete(
        _ error: any Error, _ deadline: ContinuousClock.Instant,
        _ send: @Sendable () async throws -> [PublishReceipt.Leg]
    ) async -> Result<[PublishReceipt.Leg], any Error> {
        var failure = error
        let backoff = Backoff(first: .milliseconds(100), longest: .seconds(2))
        var failures = 0
        while (failure as? EventsError)?.isRetriable == true {
            failures += 1
            let pause = backoff.delay(after: failures)
            guard ContinuousClock.now + pause < deadline, (try? await Task.sleep(for: pause)) != nil else { break }
            do { return .success(try await send()) } catch { failure = error }
        }
        return .failure(failure)
    }

    private func outcome(
        _ body: @Sendable () async throws -> [PublishReceipt.Leg]
    ) async -> Result<[PublishReceipt.Leg], any Error> {
        do { return .success(try await body()) } catch { return .failure(error) }
    }

    private func message(
        _ form: LegacyEmailMessage, _ eventID: EventID, _ options: PublishOptions
    ) -> OutboundMessage {
        OutboundMessage(
            exchange: ExchangeName.legacyEmail, routingKey: "",
            properties: MessageProperties(
                contentType: "text/plain", messageID: eventID.rawValue, appID: configuration.service,
                correlationID: options.correlationID, timestamp: options.timestamp,
                headers: ["x-smap-event-id": .string(eventID.rawValue)]),
            body: form.serialized())
    }

    private func warnOnce(_ key: RoutingKey) {
        if deprecation.warned.withLock({ $0.insert(key).inserted }) {
            logger.warning(
                "publishing to a deprecated exchange",
                metadata: ["exchange": "\(ExchangeName.legacyEmail)", "routing_key": "\(key)"])
        }
    }
}
