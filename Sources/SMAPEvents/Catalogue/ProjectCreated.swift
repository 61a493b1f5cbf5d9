/// A project has been set up and can be collected.
public struct ProjectCreated: SMAPEvent, Hashable {
    /// `project.created`.
    public static let routingKey: RoutingKey = "project.created"
    /// Written nested and flat: sibling services read these fields directly in the payload.
    public static let shape: EventShape = .both

    /// The project. Required to publish; it travels in the payload, not in the data.
    public var projectID: ProjectID?
    /// The brand that is watched.
    public var brandName: String?
    /// What to search for.
    public var keywords: [String]?
    /// Which pages to collect.
    public var targets: [Target]?
    /// First and last day, as `yyyy-MM-dd`.
    public var dateRange: [String]?

    /// A page of a platform.
    public struct Target: Codable, Sendable, Hashable {
        /// The platform, such as `tiktok`.
        public var platform: String
        /// The page's address.
        public var url: String

        /// Names a page.
        public init(platform: String, url: String) {
            self.platform = platform
            self.url = url
        }
    }

    /// Makes the event.
    public init(
        projectID: ProjectID, brandName: String? = nil, keywords: [String]? = nil, targets: [Target]? = nil,
        dateRange: [String]? = nil
    ) {
        self.projectID = projectID
        self.brandName = brandName
        self.keywords = keywords
        self.targets = targets
        self.dateRange = dateRange
    }

    private enum CodingKeys: String, CodingKey {
        case brandName = "brand_name"
        case keywords
        case targets
        case dateRange = "date_range"
    }

    /// Takes the project from the payload.
    public mutating func restore(from envelope: EventEnvelope) { projectID = envelope.projectID }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(projectID != nil, "project_id", "is missing")
    }
}
