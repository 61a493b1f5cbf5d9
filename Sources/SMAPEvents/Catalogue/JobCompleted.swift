/// Every item of a project is settled. Published once per project, by ``FinishLine``.
public struct JobCompleted: SMAPEvent, Hashable {
    /// `job.completed`.
    public static let routingKey: RoutingKey = "job.completed"
    /// Written nested and flat: sibling services read these fields directly in the payload.
    public static let shape: EventShape = .both

    /// The project. Required to publish; it travels in the payload, not in the data.
    public var projectID: ProjectID?
    /// Items expected.
    public var total: Int
    /// Items settled, failed ones included.
    public var done: Int
    /// Items that failed.
    public var errors: Int
    /// From the project's start to its last item.
    public var durationSeconds: Double?

    /// Makes the event.
    public init(projectID: ProjectID, total: Int, done: Int, errors: Int, durationSeconds: Double? = nil) {
        self.projectID = projectID
        self.total = total
        self.done = done
        self.errors = errors
        self.durationSeconds = durationSeconds
    }

    private enum CodingKeys: String, CodingKey {
        case total
        case done
        case errors
        case durationSeconds = "duration_seconds"
    }

    /// Takes the project from the payload.
    public mutating func restore(from envelope: EventEnvelope) { projectID = envelope.projectID }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(projectID != nil, "project_id", "is missing")
        try Self.require(errors >= 0 && errors <= done, "errors", "is not between 0 and done")
    }
}
