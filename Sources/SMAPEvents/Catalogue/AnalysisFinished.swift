/// An item of a project has been analysed.
public struct AnalysisFinished: SMAPEvent, Hashable {
    /// `analysis.finished`.
    public static let routingKey: RoutingKey = "analysis.finished"
    /// Written nested and flat: sibling services read these fields directly in the payload.
    public static let shape: EventShape = .both

    /// The project. Required to publish; it travels in the payload, not in the data.
    public var projectID: ProjectID?
    /// The item. Not empty.
    public var itemID: String
    /// How it went.
    public var status: Status?

    /// Makes the event.
    public init(projectID: ProjectID, itemID: String, status: Status? = nil) {
        self.projectID = projectID
        self.itemID = itemID
        self.status = status
    }

    private enum CodingKeys: String, CodingKey {
        case itemID = "item_id"
        case status
    }

    /// Takes the project from the payload.
    public mutating func restore(from envelope: EventEnvelope) { projectID = envelope.projectID }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(projectID != nil, "project_id", "is missing")
        try Self.require(!itemID.isEmpty, "item_id", "is empty")
    }

    /// How the analysis of an item went.
    public enum Status: String, Codable, Sendable {
        /// The item was analysed.
        case success
        /// The item could not be analysed.
        case error
    }
}
