/// What a handler decides about a delivery.
public struct HandlerOutcome: Sendable, Hashable {
    enum Decision: Hashable {
        case acknowledge
        case retry(Duration?)
        case deadLetter(String)
        case giveBack
        /// The body of a reply, or why there is none.
        case reply([UInt8], String?)
    }

    let decision: Decision

    /// The event has been handled.
    public static let acknowledge = HandlerOutcome(decision: .acknowledge)

    /// Handle the event again, after the pause that the subscription's ``RetryPolicy`` says, if attempts are left.
    public static let retry = HandlerOutcome(decision: .retry(nil))

    /// Handle the event again, not before `delay` has passed, if attempts are left. There is a queue for each rung of the
    /// ``RetryPolicy``: the shortest that is long enough is taken, or the longest that there is.
    public static func retry(after delay: Duration) -> HandlerOutcome {
        HandlerOutcome(decision: .retry(delay))
    }

    /// The event can never be handled: put it aside. The reason travels with the dead letter, up to 1,000 bytes of it, and
    /// is logged; it must not hold personal data.
    public static func deadLetter(reason: String) -> HandlerOutcome {
        HandlerOutcome(decision: .deadLetter(reason))
    }

    /// It is none of ours: put it back where it was, at once, for whoever consumes next. Not an attempt.
    package static let giveBack = HandlerOutcome(decision: .giveBack)
}
