/// How far a project is.
public struct ProjectProgress: Sendable, Hashable {
    /// The status field of the hash, which sibling services write too.
    public struct Status: Sendable, Hashable, CustomStringConvertible {
        /// The text in the hash.
        public let rawValue: String

        /// Wraps the text in the hash.
        public init(_ rawValue: String) { self.rawValue = rawValue }

        /// Started; no items expected yet.
        public static let initializing = Status("INITIALIZING")
        /// Items are still being discovered.
        public static let crawling = Status("CRAWLING")
        /// The total is final.
        public static let processing = Status("PROCESSING")
        /// Every item is settled.
        public static let done = Status("DONE")
        /// Given up.
        public static let failed = Status("FAILED")

        /// The text in the hash.
        public var description: String { rawValue }
    }

    /// The project.
    public var project: ProjectID
    /// The status that is shown to everyone.
    public var status: Status
    /// Items expected.
    public var total: Int
    /// Items settled, failed ones included.
    public var done: Int
    /// Items that failed.
    public var errors: Int
    /// Whether the total is final.
    public var isSealed: Bool
    /// The id of the event that announces the finish, once that is decided.
    public var finishEventID: EventID?

    /// Reports a project's progress.
    public init(
        project: ProjectID, status: Status, total: Int, done: Int, errors: Int, isSealed: Bool,
        finishEventID: EventID? = nil
    ) {
        self.project = project
        self.status = status
        self.total = total
        self.done = done
        self.errors = errors
        self.isSealed = isSealed
        self.finishEventID = finishEventID
    }

    /// `done` in percent of `total`, 0 to 100; 100 for an empty project that is done.
    public var percent: Double {
        guard total > 0 else { return status == .done ? 100 : 0 }
        return min(100, Double(done) / Double(total) * 100)
    }

    /// Whether nothing more will happen: done or failed.
    public var isOver: Bool { status == .done || status == .failed }
}
