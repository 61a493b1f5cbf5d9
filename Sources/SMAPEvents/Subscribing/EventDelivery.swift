#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// An event in the hands of a handler.
public struct EventDelivery<Event: Sendable>: Sendable {
    /// The event, as the type that the handler asked for.
    public let event: Event
    /// The envelope that it came in, data included.
    public let envelope: EventEnvelope
    /// The key that it was delivered with.
    public let routingKey: String
    /// The queue that it was taken from.
    public let queue: QueueName
    /// Whether it may have been delivered before.
    public let isRedelivered: Bool
    /// Which attempt this is, from 1. See ``InboundDelivery/attempt``.
    public let attempt: Int
    /// The message's properties and headers.
    public let properties: MessageProperties
    /// When it arrived here.
    public let receivedAt: Date

    /// The event's id.
    public var eventID: EventID { envelope.eventID }
    /// The project that the event belongs to.
    public var projectID: ProjectID? { envelope.projectID }
}
