#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// The standard envelope around an event's data.
///
/// Writing is strict (``serialized(shape:)``), reading is tolerant (``init(parsing:routingKey:timestamp:)``): messages
/// of sibling services decode although they deviate from the standard.
public struct EventEnvelope: Sendable, Hashable {
    /// The largest envelope that is written, in bytes: 256 KiB.
    public static let sizeLimit = 256 * 1024

    /// The event's id.
    public var eventID: EventID
    /// When the event happened. Written in UTC with milliseconds.
    public var timestamp: Date
    /// The event's key. Nil when read from a message that names none that is valid.
    public var routingKey: RoutingKey?
    /// The project that the event belongs to.
    public var projectID: ProjectID?
    /// The service that published it.
    public var service: String?
    /// What a consumer may use to recognise a repeated *cause*, as the event id recognises a repeated event.
    public var idempotencyKey: String?
    /// The version of the data's schema.
    public var schemaVersion: Int?
    /// The event's data: one JSON object in UTF-8, byte for byte as it was sent.
    public var data: [UInt8]

    /// Puts an envelope together.
    public init(
        eventID: EventID = EventID(), timestamp: Date = Date(), routingKey: RoutingKey?, projectID: ProjectID? = nil,
        service: String?, idempotencyKey: String? = nil, schemaVersion: Int? = nil, data: [UInt8]
    ) {
        self.eventID = eventID
        self.timestamp = timestamp
        self.routingKey = routingKey
        self.projectID = projectID
        self.service = service
        self.idempotencyKey = idempotencyKey
        self.schemaVersion = schemaVersion
        self.data = data
    }

    /// The routing key without its first word.
    public var action: Substring? { routingKey?.action }

    /// The data as an event type. Throws ``EventsError/Code/undecodable`` and names the field, never its value.
    public func decode<E: SMAPEvent>(_ type: E.Type = E.self) throws -> E {
        do {
            var event = try EventJSON.decode(type, from: data)
            event.restore(from: self)
            return event
        } catch let error as EventsError {
            throw error.with(eventID: eventID)
        }
    }
}
