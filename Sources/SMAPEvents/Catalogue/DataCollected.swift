/// A collector has stored a batch of a project's items.
public struct DataCollected: SMAPEvent, Hashable {
    /// `data.collected`.
    public static let routingKey: RoutingKey = "data.collected"
    /// Written nested and flat: sibling services read these fields directly in the payload.
    public static let shape: EventShape = .both

    /// The project. Required to publish; it travels in the payload, not in the data.
    public var projectID: ProjectID?
    /// The collecting job. Not empty.
    public var jobID: String
    /// Where the items come from, such as `TIKTOK`. Not empty.
    public var platform: String
    /// Where the batch is stored. Not empty.
    public var minioPath: String
    /// How many items it has.
    public var contentCount: Int?
    /// Its place among the batches, from 0.
    public var batchIndex: Int?
    /// How many batches there are.
    public var totalBatches: Int?

    /// Makes the event.
    public init(
        projectID: ProjectID, jobID: String, platform: String, minioPath: String, contentCount: Int? = nil,
        batchIndex: Int? = nil, totalBatches: Int? = nil
    ) {
        self.projectID = projectID
        self.jobID = jobID
        self.platform = platform
        self.minioPath = minioPath
        self.contentCount = contentCount
        self.batchIndex = batchIndex
        self.totalBatches = totalBatches
    }

    private enum CodingKeys: String, CodingKey {
        case jobID = "job_id"
        case platform
        case minioPath = "minio_path"
        case contentCount = "content_count"
        case batchIndex = "batch_index"
        case totalBatches = "total_batches"
    }

    /// Takes the project from the payload.
    public mutating func restore(from envelope: EventEnvelope) { projectID = envelope.projectID }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(projectID != nil, "project_id", "is missing")
        try Self.require(!jobID.isEmpty, "job_id", "is empty")
        try Self.require(!platform.isEmpty, "platform", "is empty")
        try Self.require(!minioPath.isEmpty, "minio_path", "is empty")
        try Self.require((contentCount ?? 0) >= 0, "content_count", "is negative")
    }
}
