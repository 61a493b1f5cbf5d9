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

    /// Publishes a message within a producer span, and with its context in the headers.
    func publish(
        to exchange: String, key: String, eventID: EventID, over transport: any EventTransport,
        deadline: ContinuousClock.Instant, _ message: @Sendable () throws -> OutboundMessage
    ) async throws -> Bool {
        guard let tracer else { return try await transport.publish(deadline: deadline, message) }
        return try await tracer.withAnySpan("publish \(exchange)", ofKind: .producer) { span in
            Self.describe(span, "publish", type: "send", exchange: exchange, key: key)
            span.attributes["messaging.message.id"] = eventID.rawValue
            let context = span.context
            do {
                return try await transport.publish(deadline: deadline) {
                    var message = try message()
                    tracer.inject(context, into: &message.properties.headers, using: HeaderInjector())
                    return message
                }
            } catch let error as EventsError {
                span.attributes["error.type"] = error.code.description
                throw error
            }
        }
    }

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
