/// An event whose data is JSON already: for tools and bridges, where there is no Swift type.
///
/// The platform's own events are checked all the same; other keys carry any JSON object.
public struct UntypedEvent: Sendable, Hashable {
    /// The event's key.
    public var routingKey: RoutingKey
    /// One JSON object in UTF-8. It is sent byte for byte.
    public var data: [UInt8]
    /// The project that the event belongs to.
    public var projectID: ProjectID?
    /// What recognises a repeated cause.
    public var idempotencyKey: String?
    /// Where the fields stand in the payload. By default as the catalogue says, else nested.
    public var shape: EventShape?
    /// The event's id; by default the one in ``PublishOptions``, else a new one. In a list each event needs its own.
    public var eventID: EventID?

    /// Puts an event together.
    public init(
        routingKey: RoutingKey, data: [UInt8], projectID: ProjectID? = nil, idempotencyKey: String? = nil,
        shape: EventShape? = nil, eventID: EventID? = nil
    ) {
        self.routingKey = routingKey
        self.data = data
        self.projectID = projectID
        self.idempotencyKey = idempotencyKey
        self.shape = shape
        self.eventID = eventID
    }
}
