/// What went wrong, in which operation, and whether trying again can help.
///
/// The description never holds a payload, a password or personal data, so it can be logged as it is.
public struct EventsError: Error, Sendable, CustomStringConvertible {
    /// The kind of an error. New kinds may be added, so a `switch` over them needs a `default`.
    public struct Code: Sendable, Hashable, CustomStringConvertible {
        /// The kind's name, as it appears in descriptions and as the `error_type` of metrics.
        public let description: String
        let isRetriable: Bool

        private init(_ description: String, retriable: Bool = false) {
            self.description = description
            self.isRetriable = retriable
        }

        /// A routing key, pattern, queue name, project id or event id breaks its rules.
        public static let invalidName = Code("invalidName")
        /// A setting or URL cannot be used.
        public static let invalidConfiguration = Code("invalidConfiguration")
        /// The event failed its own checks, or cannot be expressed; nothing was sent.
        public static let invalidEvent = Code("invalidEvent")
        /// The serialised event or one of its headers is larger than allowed; nothing was sent.
        public static let eventTooLarge = Code("eventTooLarge")
        /// A valid event of which not one byte was written. Safe to repeat.
        public static let unsent = Code("unsent", retriable: true)
        /// The event was sent and the answer was lost. Repeat it under the same event id.
        public static let unknownOutcome = Code("unknownOutcome", retriable: true)
        /// The broker refused responsibility for the event (`basic.nack`).
        public static let nacked = Code("nacked", retriable: true)
        /// The broker took the event, but no queue was bound, and the caller asked for one (`requireRoute`).
        public static let unroutable = Code("unroutable")
        /// The exchange published to does not exist.
        public static let exchangeNotFound = Code("exchangeNotFound")
        /// The broker closed the channel because of this event, for example because it is larger than `max_message_size`; the
        /// message is the broker's own.
        public static let eventRefused = Code("eventRefused")
        /// A queue or exchange that an operation names does not exist.
        public static let notFound = Code("notFound")
        /// A queue or exchange exists with other arguments than those declared.
        public static let topologyConflict = Code("topologyConflict")
        /// A topology that would lose messages silently; nothing was declared.
        public static let dangerousTopology = Code("dangerousTopology")
        /// The operation did not end by its deadline.
        public static let deadlineExceeded = Code("deadlineExceeded", retriable: true)
        /// The server could not be reached.
        public static let connectionFailed = Code("connectionFailed", retriable: true)
        /// The encrypted connection was refused, by us or by the server: the message says what for.
        public static let tlsFailed = Code("tlsFailed")
        /// The connection ended while the operation was under way.
        public static let connectionLost = Code("connectionLost", retriable: true)
        /// The transport, store or subscription was closed by its owner.
        public static let closed = Code("closed")
        /// The server refused the credentials or the permission.
        public static let accessRefused = Code("accessRefused")
        /// The server or the C library reported something that it should not.
        public static let protocolViolation = Code("protocolViolation", retriable: true)
        /// As much work is waiting as the configured limit allows.
        public static let overloaded = Code("overloaded", retriable: true)
        /// A queue that the event would go to is deeper than allowed; nothing was sent. See ``QueueDepthWatch``.
        public static let queueTooDeep = Code("queueTooDeep", retriable: true)
        /// A message is not an event: not JSON, or not an envelope, or not of the type asked for.
        public static let undecodable = Code("undecodable")
        /// Whoever handles a request has said no; the message says why. See ``RequestRejection``.
        public static let requestRejected = Code("requestRejected")
        /// No handler matches an event.
        public static let unhandled = Code("unhandled")
        /// A consumer was ended by the broker, for example because its queue was deleted.
        public static let subscriptionCancelled = Code("subscriptionCancelled", retriable: true)
        /// A delivery was settled on a channel that is gone, or settled twice.
        public static let deliveryExpired = Code("deliveryExpired")
        /// No progress is kept for the project; a report may have overtaken its start.
        public static let unknownProject = Code("unknownProject", retriable: true)
        /// Items cannot be expected any more: the project's total is final.
        public static let alreadySealed = Code("alreadySealed")
        /// The project is finished or has failed; the operation came too late.
        public static let alreadyFinished = Code("alreadyFinished")
        /// A total below what is already done.
        public static let totalBelowDone = Code("totalBelowDone")
        /// A project's items are counted by index or by name, never both.
        public static let itemKindMismatch = Code("itemKindMismatch")
        /// The project's layout has no such stage.
        public static let stageMismatch = Code("stageMismatch")
        /// The project is not over yet, so it cannot be restarted.
        public static let notFinished = Code("notFinished")
        /// The generation is one that a project has left behind.
        public static let staleGeneration = Code("staleGeneration")
        /// An item index beyond the configured limit.
        public static let indexOutOfRange = Code("indexOutOfRange")
        /// What is stored for the project is not what this tracker or its siblings write.
        public static let corruptProgress = Code("corruptProgress")
        /// The store is there but cannot work now (loading, busy, failing over); nothing was written.
        public static let storeUnavailable = Code("storeUnavailable", retriable: true)
        /// The store is out of memory; nothing was written.
        public static let storeFull = Code("storeFull", retriable: true)
    }

    /// The kind of error.
    public let code: Code
    /// What happened, in a sentence without secrets.
    public let message: String
    /// The operation that failed, such as `publish` or `declare queue`.
    public let operation: String
    /// The event concerned. Repeat an ``Code/unknownOutcome`` under this id.
    public let eventID: EventID?
    /// The exchanges that have not confirmed the event, when some have: see ``DualPublisher``.
    public let missingLegs: [String]
    /// The error underneath, if any.
    public let underlying: (any Error)?
    private let knownOutcome: PublishOutcome?

    /// Makes an error. The message must not hold secrets or payload.
    ///
    /// - Parameter outcome: How a publish ended, where the code alone does not tell.
    public init(
        _ code: Code, _ message: String, operation: String, eventID: EventID? = nil, missingLegs: [String] = [],
        underlying: (any Error)? = nil, outcome: PublishOutcome? = nil
    ) {
        self.code = code
        self.message = message
        self.operation = operation
        self.eventID = eventID
        self.missingLegs = missingLegs
        self.underlying = underlying
        knownOutcome = outcome
    }

    /// Whether the same call can succeed later without a change by a person.
    public var isRetriable: Bool { code.isRetriable }

    /// How this error counts as the end of a publish. Meaningful only for errors that a publish has thrown.
    public var publishOutcome: PublishOutcome {
        if let knownOutcome { return knownOutcome }
        return switch code {
        case .nacked, .exchangeNotFound, .eventRefused: .nacked
        case .unroutable: .returned
        case .invalidName, .invalidConfiguration, .invalidEvent, .eventTooLarge: .rejected
        case .unsent, .connectionFailed, .tlsFailed, .accessRefused, .closed, .overloaded, .queueTooDeep: .unsent
        // Of everything else it is not known that the broker has nothing.
        default: .unknown
        }
    }

    /// `operation: message (code)`, and the event's id where there is one.
    public var description: String {
        let event = eventID.map { " [\($0)]" } ?? ""
        return "\(operation)\(event): \(message) (\(code))"
    }

    func with(eventID: EventID) -> EventsError {
        EventsError(
            code, message, operation: operation, eventID: eventID, missingLegs: missingLegs, underlying: underlying,
            outcome: knownOutcome)
    }

    /// The same error, with another end of the publish.
    package func with(outcome: PublishOutcome) -> EventsError {
        EventsError(
            code, message, operation: operation, eventID: eventID, missingLegs: missingLegs, underlying: underlying,
            outcome: outcome)
    }
}
