internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents

/// What librabbitmq or the broker reported, before it is turned into an `EventsError`.
enum AMQPFailure: Error {
    /// A status of the C library.
    case library(status: Int32, doing: String)
    /// `connection.close` from the broker; `method` is the method that it blames, 0 for none.
    case closedByBroker(code: Int, text: String, method: UInt32)
    /// Frames that no broker should send.
    case unexpected(String)
    /// The server gives no sign of life, or takes nothing of what it is sent.
    case silent(String)

    /// What has ended a connection, as far as messages are concerned.
    enum Cause {
        /// A message: the broker says so.
        case message
        /// Perhaps a message: the end has no reason, or one that tells nothing of what it was for.
        case unexplained
        /// Something else: the server's own state, its silence, a request, or ourselves.
        case other
    }

    /// The end of a connection as callers see it. The texts come from the broker and the C library, and hold neither
    /// passwords nor payload.
    static func error(from error: any Error, server: String, connecting: Bool) -> EventsError {
        let operation = connecting ? "connect to \(server)" : "connection to \(server)"
        let lost: EventsError.Code = connecting ? .connectionFailed : .connectionLost
        switch error {
        case let failure as SocketError:
            return EventsError(lost, failure.description, operation: operation)
        case AMQPFailure.library(let status, let doing):
            return EventsError(
                lost, "\(doing): \(String(cString: amqp_error_string2(status)))", operation: operation)
        case let failure as TLSError:
            return EventsError(
                failure.kind == .invalidOptions ? .invalidConfiguration : connecting ? .tlsFailed : lost,
                failure.description, operation: operation)
        case AMQPFailure.closedByBroker(let code, let text, _):
            // A limit of connections is no matter of permission, although RabbitMQ says NOT_ALLOWED: it passes.
            let isLimit = code == 530 && text.contains("connection limit (")
            return EventsError(isLimit ? lost : brokerCode(code) ?? lost, text, operation: operation)
        case AMQPFailure.unexpected(let what):
            return EventsError(.protocolViolation, what, operation: operation)
        case AMQPFailure.silent(let what): return EventsError(lost, what, operation: operation)
        case let error as EventsError: return error
        default: return EventsError(lost, "\(type(of: error))", operation: operation)
        }
    }

    /// What has ended a connection. The broker closes it because of a message if it names the method, or says that a frame
    /// was wrong and names none.
    ///
    /// - Parameter hasRequests: Whether requests were in flight: then one of them may be to blame as well.
    static func cause(of failure: any Error, hasRequests: Bool) -> Cause {
        switch failure {
        // RabbitMQ says so of a message that crashes its channel: it names neither the message nor the method.
        case AMQPFailure.closedByBroker(541, _, 0): .unexplained
        case AMQPFailure.closedByBroker(let code, _, _) where isStateOfServer(code): .other
        case AMQPFailure.closedByBroker(_, _, AMQP_BASIC_PUBLISH_METHOD): .message
        case AMQPFailure.closedByBroker(let code, _, 0):
            !hasRequests && brokerCode(code) == .protocolViolation ? .message : .unexplained
        // A broker that dies of a message gives no reason; neither does a proxy that has lost its broker.
        case let failure as SocketError: failure.kind == .lost ? .unexplained : .other
        case is TLSError: .unexplained
        default: .other
        }
    }

    /// Whether a reply code tells of the server's own state, which passes, and not of what it was sent.
    static func isStateOfServer(_ code: Int) -> Bool { [313, 320, 506, 541].contains(code) }

    /// Our kind of error for a reply code that means the same on every connection and channel (AMQP 0-9-1, 1.2).
    static func brokerCode(_ code: Int) -> EventsError.Code? {
        switch code {
        case 403, 530: .accessRefused
        case 404: .notFound
        case 406: .topologyConflict
        case 501, 502, 503, 504, 505, 540: .protocolViolation
        default: nil
        }
    }
}
