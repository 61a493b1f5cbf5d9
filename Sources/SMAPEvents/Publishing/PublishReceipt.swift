/// The broker has confirmed an event.
public struct PublishReceipt: Sendable, Hashable {
    /// One exchange that has confirmed the event.
    public struct Leg: Sendable, Hashable {
        /// The exchange's name.
        public let exchange: String
        /// Whether the event reached at least one queue there.
        public let routed: Bool

        /// Reports a leg.
        public init(exchange: String, routed: Bool) {
            self.exchange = exchange
            self.routed = routed
        }
    }

    /// The event's id.
    public let eventID: EventID
    /// The event's key.
    public let routingKey: RoutingKey
    /// The exchanges that have confirmed it: one, or two during dual publishing.
    public let legs: [Leg]

    /// Whether the event reached at least one queue on every leg. If not, nobody will ever receive it there.
    public var routed: Bool { legs.allSatisfy(\.routed) }

    /// Reports a confirmed event.
    public init(eventID: EventID, routingKey: RoutingKey, legs: [Leg]) {
        self.eventID = eventID
        self.routingKey = routingKey
        self.legs = legs
    }
}

/// How a publish ended. Every publish ends as just one of these.
public enum PublishOutcome: String, Sendable, CaseIterable {
    /// The broker has it, and at least one queue.
    case confirmed
    /// The broker confirmed it, but no queue was bound.
    case returned
    /// The broker refused responsibility.
    case nacked
    /// Invalid; never sent.
    case rejected
    /// Valid, but not one byte was written: safe to repeat.
    case unsent
    /// Sent, but the answer was lost: repeat it under the same id.
    case unknown
}
