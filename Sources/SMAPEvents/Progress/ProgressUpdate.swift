/// What an operation on a project's progress did.
public struct ProgressUpdate: Sendable, Hashable {
    /// The verdict on an operation. New ones may be added, so a `switch` over them needs a `default`.
    public struct Verdict: Sendable, Hashable, CustomStringConvertible {
        /// The verdict's name.
        public let description: String

        /// Wraps a name, as a store reports it.
        public init(_ name: String) { description = name }

        /// The project has been started.
        public static let started = Verdict("started")
        /// The project was there already; nothing was changed.
        public static let exists = Verdict("exists")
        /// The items were added to the total.
        public static let expected = Verdict("expected")
        /// The total is final now.
        public static let sealed = Verdict("sealed")
        /// A new life of the project has begun.
        public static let restarted = Verdict("restarted")
        /// The project has been cancelled.
        public static let cancelled = Verdict("cancelled")
        /// There was nothing to do.
        public static let unchanged = Verdict("unchanged")
        /// The project has been marked as failed.
        public static let failed = Verdict("failed")
        /// The item counted.
        public static let counted = Verdict("counted")
        /// It had counted before; nothing moved.
        public static let duplicate = Verdict("duplicate")
        /// An item that had failed has succeeded: one error less, `done` unchanged.
        public static let reclassified = Verdict("reclassified")
        /// This operation finished the project.
        public static let finished = Verdict("finished")
        /// The project is finished; its event has not been confirmed yet.
        public static let finishPending = Verdict("finishPending")
        /// The project is finished, and its event is out; or it has failed.
        public static let alreadyFinished = Verdict("alreadyFinished")
        /// The item is beyond the sealed total; nothing moved.
        public static let unexpectedItem = Verdict("unexpectedItem")
        /// The memory of counted items is gone while the counters are there; nothing moved.
        public static let memoryLost = Verdict("memoryLost")
        /// The report belongs to an earlier life of the project; nothing moved.
        public static let stale = Verdict("stale")
        /// The project is not over yet, so it cannot be restarted.
        public static let notFinished = Verdict("notFinished")
        /// The project's layout has no such stage.
        public static let stageMismatch = Verdict("stageMismatch")
        /// No progress is kept for the project; nothing was written.
        public static let unknownProject = Verdict("unknownProject")
        /// The total is final, so nothing can be expected any more.
        public static let alreadySealed = Verdict("alreadySealed")
        /// The total asked for is below what is done.
        public static let totalBelowDone = Verdict("totalBelowDone")
        /// Indexed and named items of one project were mixed.
        public static let itemKindMismatch = Verdict("itemKindMismatch")
        /// A field of the hash holds what no writer should have written.
        public static let corrupt = Verdict("corrupt")
    }

    /// What the operation did. Of several items the verdict on the last one, unless one of them finished the project.
    public let verdict: Verdict
    /// The verdict on each item, in their order; empty for other operations, and where all were refused together.
    public let items: [Verdict]
    /// The project's progress after it.
    public let progress: ProjectProgress
    /// How many replicas of the store have it; nil where the store was not told to wait for some. Fewer than asked for, when
    /// they did not answer in time: the update stands all the same.
    public let replicas: Int?

    /// Reports an operation.
    public init(verdict: Verdict, items: [Verdict] = [], progress: ProjectProgress, replicas: Int? = nil) {
        self.verdict = verdict
        self.items = items
        self.progress = progress
        self.replicas = replicas
    }

    /// Whether this very operation finished the project. True once per project.
    public var didFinish: Bool { verdict == .finished }
}
