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
    /// How the hash is laid out.
    public var layout: ProgressLayout
    /// The counters of each stage, one for all layouts but ``ProgressLayout/stages``.
    public var stages: [Counters]
    /// Whether the total is final.
    public var isSealed: Bool
    /// Which life of the project this is, from 1: it grows with each restart.
    public var generation: Int
    /// The id of the event that announces the finish, once that is decided.
    public var finishEventID: EventID?
    /// Whether it was cancelled; its status is then ``Status/failed``, the only one that siblings know for it.
    public var isCancelled: Bool
    /// Why it failed or was cancelled, if that was said.
    public var reason: String?

    /// How far one stage is.
    public struct Counters: Sendable, Hashable {
        /// Items expected.
        public var total: Int
        /// Items settled, failed ones included.
        public var done: Int
        /// Items that failed.
        public var errors: Int

        /// Reports a stage.
        public init(total: Int, done: Int, errors: Int) {
            self.total = total
            self.done = done
            self.errors = errors
        }
    }

    /// Reports a project's progress.
    public init(
        project: ProjectID, status: Status, layout: ProgressLayout = .flat, stages: [Counters], isSealed: Bool,
        generation: Int = 1, finishEventID: EventID? = nil, isCancelled: Bool = false, reason: String? = nil
    ) {
        self.project = project
        self.status = status
        self.layout = layout
        self.stages = stages
        self.isSealed = isSealed
        self.generation = generation
        self.finishEventID = finishEventID
        self.isCancelled = isCancelled
        self.reason = reason
    }

    /// Items expected, in all stages.
    public var total: Int { stages.reduce(0) { $0 + $1.total } }
    /// Items settled in all stages, failed ones included.
    public var done: Int { stages.reduce(0) { $0 + $1.done } }
    /// Items that failed, in all stages.
    public var errors: Int { stages.reduce(0) { $0 + $1.errors } }

    /// What is settled in percent of what is expected, 0 to 100, the mean of the stages; 100 for an empty project that is
    /// done.
    public var percent: Double {
        guard total > 0 else { return status == .done ? 100 : 0 }
        let shares = stages.map { $0.total > 0 ? min(1, Double($0.done) / Double($0.total)) : 0 }
        return shares.reduce(0, +) / Double(shares.count) * 100
    }

    /// Whether nothing more will happen: done or failed.
    public var isOver: Bool { status == .done || status == .failed }
}
