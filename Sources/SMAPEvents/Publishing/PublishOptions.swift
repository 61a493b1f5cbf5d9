#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// What a caller may say about one publish. Everything has a default.
public struct PublishOptions: Sendable {
    /// The event's id; a new one by default. Give the id of an earlier attempt to repeat it. An inbox recognises repetitions
    /// by ids that are, or end in, a UUID; see ``InboxEntry``.
    public var eventID: EventID?
    /// When the event happened; now by default.
    public var timestamp: Date?
    /// Ties together the messages of one request (`correlation_id`), at most 255 bytes.
    public var correlationID: String?
    /// The tenant, sent as header `tenant_id`.
    public var tenantID: String?
    /// The acting user, sent as header `user_id`.
    public var userID: String?
    /// How long the call may take; ``PublisherConfiguration/deadline`` by default.
    public var deadline: Duration?
    /// Whether an event that reaches no queue is an error (``EventsError/Code/unroutable``). Off by default: then
    /// ``PublishReceipt/routed`` tells.
    public var requireRoute: Bool

    /// Makes options.
    public init(
        eventID: EventID? = nil, timestamp: Date? = nil, correlationID: String? = nil, tenantID: String? = nil,
        userID: String? = nil, deadline: Duration? = nil, requireRoute: Bool = false
    ) {
        self.eventID = eventID
        self.timestamp = timestamp
        self.correlationID = correlationID
        self.tenantID = tenantID
        self.userID = userID
        self.deadline = deadline
        self.requireRoute = requireRoute
    }
}
