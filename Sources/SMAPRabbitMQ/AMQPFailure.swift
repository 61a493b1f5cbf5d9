internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents

/// What librabbitmq or the broker reported, before it is turned into an `EventsError`.
enum AMQPFailure: Error {
    /// A status of the C library.
    case library(status: Int32, doing: String)
    /// `connection.close` from the broker.
    case closedByBroker(code: Int, text: String)
    /// Frames that no broker should send.
    case unexpected(String)

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
        case AMQPFailure.closedByBroker(let code, let text):
            return EventsError(brokerCode(code) ?? lost, text, operation: operation)
        case AMQPFailure.unexpected(let what):
            return EventsError(.protocolViolation, what, operation: operation)
        case let error as EventsError: return error
        default: return EventsError(lost, "\(type(of: error))", operation: operation)
        }
    }

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
