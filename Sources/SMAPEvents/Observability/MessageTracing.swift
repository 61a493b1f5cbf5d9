internal import Tracing

/// Spans around publishing and handling, and the trace context in message headers, as OpenTelemetry's semantic
/// conventions for messaging and for RabbitMQ describe them. `traceparent` and `tracestate` are what a W3C tracer writes.
///
/// The data of events is never put into a span.
struct MessageTracing: Sendable {
    /// Nil when nobody listens: then nothing is done at all.
    private let tracer: (any Tracer)?

    init(_ tracer: any Tracer) {
        self.tracer = tracer is NoOpTracer ? nil : tracer
    }

    /// Whether there are no spans at all.
    var isOff: Bool { tracer == nil }

    /// Publishes within a producer span.
    ///
    /// - Parameter send: Publishes, with the headers of the span's context; none if there is no span.
    func publish<Result: Sendable>(
        to destination: PublishDestination, eventID: EventID,
        _ send: ([String: MessageProperties.HeaderValue]) async throws -> Result
    ) async throws -> Result {
        guard let tracer else { return try await send([:]) }
        return try await tracer.withAnySpan("publish \(destination.exchange)", ofKind: .producer) { span in
            Self.describe(
                span, "publish", type: "send", exchange: destination.exchange, key: destination.routingKey)
            span.attributes["messaging.message.id"] = eventID.rawValue
            var headers: [String: MessageProperties.HeaderValue] = [:]
            tracer.inject(span.context, into: &headers, using: HeaderInjector())
            do {
                return try await send(Self.sendable(headers))
            } catch let error as EventsError {
                span.attributes["error.type"] = error.code.description
                throw error
            }
        }
    }

    /// A producer span for one event of a list, which lasts no longer than this call; and the headers of its context.
    func context(of eventID: EventID, to destination: PublishDestination) -> [String: MessageProperties.HeaderValue] {
        guard let tracer else { return [:] }
        return tracer.withAnySpan("publish \(destination.exchange)", ofKind: .producer) { span in
            Self.describe(
                span, "publish", type: "send", exchange: destination.exchange, key: destination.routingKey)
            span.attributes["messaging.message.id"] = eventID.rawValue
            var headers: [String: MessageProperties.HeaderValue] = [:]
            tracer.inject(span.context, into: &headers, using: HeaderInjector())
            return Self.sendable(headers)
        }
    }

    /// The headers that can be sent. Others may come from the message that is being handled (`tracestate`, `baggage`): they
    /// must not keep an event from being published.
    private static func sendable(
        _ headers: [String: MessageProperties.HeaderValue]
    ) -> [String: MessageProperties.HeaderValue] {
        var room = contextLimit
        return headers.filter { name, value in
            guard case .string(let text) = value, (1...128).contains(name.utf8.count), OutboundMessage.isPlain(name),
                OutboundMessage.isPlain(text), !["cc", "bcc"].contains(name.lowercased())
            else { return false }
            let size = name.utf8.count + text.utf8.count + 16
            guard size <= room else { return false }
            room -= size
            return true
        }
    }

    /// W3C baggage asks for 8,192 bytes to be carried; this has room for that and for a trace context.
    private static let contextLimit = 12 * 1024

    /// Handles a delivery within a consumer span, which continues the trace of whoever published it and is linked to it.
    func process<Result: Sendable>(
        _ delivery: InboundDelivery, from queue: QueueName, _ body: () async throws -> Result
    ) async throws -> Result {
        guard let tracer else { return try await body() }
        var producer = ServiceContext.topLevel
        tracer.extract(delivery.properties.headers, into: &producer, using: HeaderExtractor())
        return try await tracer.withAnySpan("process \(queue)", context: producer, ofKind: .consumer) { span in
            Self.describe(span, "process", type: "process", exchange: delivery.exchange, key: delivery.routingKey)
            span.attributes["messaging.destination.subscription.name"] = queue.rawValue
            span.attributes["messaging.rabbitmq.message.delivery_tag"] = Int64(clamping: delivery.tag)
            span.attributes["messaging.message.body.size"] = Int64(delivery.body.count)
            if let id = delivery.properties.messageID { span.attributes["messaging.message.id"] = id }
            span.addLink(SpanLink(context: producer, attributes: [:]))
            return try await body()
        }
    }

    private static func describe(
        _ span: any Span, _ operation: String, type: String, exchange: String, key: String
    ) {
        span.attributes["messaging.system"] = "rabbitmq"
        span.attributes["messaging.operation.name"] = operation
        span.attributes["messaging.operation.type"] = type
        span.attributes["messaging.destination.name"] = exchange
        span.attributes["messaging.rabbitmq.destination.routing_key"] = key
    }
}

private struct HeaderInjector: Injector {
    func inject(_ value: String, forKey key: String, into headers: inout [String: MessageProperties.HeaderValue]) {
        headers[key] = .string(value)
    }
}

private struct HeaderExtractor: Extractor {
    func extract(key: String, from headers: [String: MessageProperties.HeaderValue]) -> String? {
        guard case .string(let value) = headers[key] else { return nil }
        return value
    }
}
