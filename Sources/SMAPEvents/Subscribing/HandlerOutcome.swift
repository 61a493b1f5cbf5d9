/// What a handler decides about a delivery.
public struct HandlerOutcome: Sendable, Hashable {
    enum Decision: Hashable {
        case acknowledge
        case retry(Duration)
        case deadLetter(String)
    }

    let decision: Decision

    /// The event has been handled.
    public static let acknowledge = HandlerOutcome(decision: .acknowledge)

    /// Handle the event again, not before `delay` has passed.
    public static func retry(after delay: Duration = .seconds(1)) -> HandlerOutcome {
        HandlerOutcome(decision: .retry(delay))
    }

    /// The event can never be handled: put it aside. The reason is logged; it must not hold personal data.
    public static func deadLetter(reason: String) -> HandlerOutcome {
        HandlerOutcome(decision: .deadLetter(reason))
    }
}
