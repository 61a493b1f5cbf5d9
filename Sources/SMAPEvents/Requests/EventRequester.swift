public import Logging

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Publishes an event as a question, and waits for the answer of the service that handles it.
///
/// The question goes to the topic exchange like any event, durable and confirmed; the answer comes back by RabbitMQ's direct
/// reply-to, which is neither: it is lost with a connection, and then the call throws. Ask only what may be asked twice. On
/// the other side stands ``EventRouter/onRequest(_:matching:_:)``.
public struct EventRequester: Sendable {
    private let publisher: EventPublisher

    /// Creates a requester. It does not own the transport: the caller runs and closes it.
    ///
    /// - Parameters:
    ///   - transport: What carries requests and replies.
    ///   - configuration: The service's name, the exchange, the default deadline and the tracer.
    ///   - depth: Refuses requests while a watched queue is too deep. No limit by default.
    ///   - logger: Logs each request as a publish.
    public init(
        transport: any EventTransport, configuration: PublisherConfiguration, depth: QueueDepthWatch? = nil,
        logger: Logger = .silent
    ) {
        publisher = EventPublisher(transport: transport, configuration: configuration, depth: depth, logger: logger)
    }

    /// Asks, and returns the reply.
    ///
    /// - Parameter options: The deadline is that of question and answer together; a correlation id is chosen here.
    /// - Throws: ``EventsError/Code/unroutable`` at once when no queue is bound for the question,
    ///   ``EventsError/Code/requestRejected`` when the other side says no, ``EventsError/Code/deadlineExceeded``,
    ///   ``EventsError/Code/connectionLost`` when the reply was lost with the connection,
    ///   ``EventsError/Code/undecodable`` when it is of another type, and what publishing throws.
    public func request<Question: SMAPEvent, Reply: Decodable & Sendable>(
        _ question: Question, reply: Reply.Type = Reply.self, options: PublishOptions = PublishOptions()
    ) async throws -> Reply {
        let eventID = options.eventID ?? EventID()
        let answer = try await publisher.request(question, eventID, options)
        do {
            if let type = answer.text(RequestHeader.errorType) {
                let reason = answer.text(HistoryHeader.reason) ?? ""
                throw EventsError(.requestRejected, "\(type): \(reason)", operation: "request")
            }
            return try EventJSON.decode(Reply.self, from: answer.body, "\(Reply.self)")
        } catch let error as EventsError {
            throw error.with(eventID: eventID)
        }
    }
}

/// What a handler of requests throws to say no; other errors ask for a retry, while the other side waits.
public struct RequestRejection: Error, Sendable {
    /// Why, for the one who asked. It must not hold personal data.
    public let reason: String

    /// Says no.
    public init(reason: String) { self.reason = reason }
}

enum RequestHeader {
    /// When the one who asked stops waiting, in milliseconds since 1970.
    static let deadline = "x-smap-deadline"
    static let errorType = "x-smap-error-type"
}

extension EventRouter {
    /// Answers requests of one type: what the handler returns goes to whoever asked, as JSON.
    ///
    /// A request whose deadline has passed, by the clock of this machine, is not handled any more. A handler that throws
    /// ``RequestRejection`` says no; other errors ask for a retry. An event that nobody waits for is handled, and the answer dropped.
    public mutating func onRequest<Question: SMAPEvent, Reply: Encodable & Sendable>(
        _ type: Question.Type, matching pattern: TopicPattern? = nil,
        _ handler: @escaping @Sendable (EventDelivery<Question>) async throws -> Reply
    ) {
        add(pattern ?? TopicPattern(Question.routingKey), { try $0.decode(type) }) { delivery in
            if case .integer(let due) = delivery.properties.headers[RequestHeader.deadline],
                Double(due) < Date().timeIntervalSince1970 * 1000
            {
                return .acknowledge
            }
            do {
                return HandlerOutcome(
                    decision: .reply(
                        try EventJSON.encode(try await handler(delivery), "\(Reply.self)", operation: "reply"), nil))
            } catch let rejection as RequestRejection {
                return HandlerOutcome(decision: .reply([], rejection.reason))
            }
        }
    }
}
