/// What keeps the progress of projects: Redis (`RedisProgressStore`), or memory (`InMemoryProgressStore`).
///
/// Each operation is atomic, and can be repeated when its answer was lost. All of them end by `deadline`, and throw
/// ``EventsError`` when the store cannot be reached or refuses; what they *decided* is in the verdict. Use
/// ``ProgressTracker`` instead of calling a store directly: it checks the arguments.
///
/// A `finishEventID` is made by the caller, and is the id of a future `job.completed`: stored when a project starts, and
/// otherwise used only where a sibling has started it, who stores none.
public protocol ProgressStore: Sendable {
    /// Whether the store answers; if not, why.
    func health(deadline: ContinuousClock.Instant) async -> Health

    /// Creates a project, unless it is there: ``ProgressUpdate/Verdict/started`` or ``ProgressUpdate/Verdict/exists``.
    func start(
        _ project: ProjectID, layout: ProgressLayout, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Begins a new life of a project that is over, as the one after `generation`.
    func restart(
        _ project: ProjectID, from generation: Int, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Adds `count` items to the total, once per batch.
    func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Makes the total final: `total`, or without one what was expected.
    func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Counts items, each once.
    func advance(
        _ project: ProjectID, _ items: AdvanceRequest, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Ends a project that will not finish any more: ``ProgressUpdate/Verdict/failed`` or
    /// ``ProgressUpdate/Verdict/cancelled``.
    func abandon(
        _ project: ProjectID, isCancelled: Bool, reason: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Finishes a project that is past its line without anyone having noticed, because a sibling moved it there.
    func settle(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Reads a project's progress; nil if there is none.
    func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress?

    /// Follows a project: its progress now, then each newer one, until it is over. A slow reader misses what has been
    /// overtaken.
    func updates(of project: ProjectID) -> AsyncThrowingStream<ProjectProgress, any Error>

    /// Some projects with finishes that are pending, at most `limit`, in no particular order.
    func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [ProjectID]

    /// The pending finishes of a project: one at most for each of its generations.
    func pendingFinishes(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> [PendingFinish]

    /// Forgets a pending finish once its event is confirmed. Returns whether it was there.
    func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool

    /// A page of the projects that there is anything of, the hash or what belongs to it; in no particular order, and some
    /// more than once.
    /// - Parameter cursor: Where the last page ended; nil for the first one.
    func projects(after cursor: String?, deadline: ContinuousClock.Instant) async throws -> ProjectPage

    /// Looks for what is wrong with a project, and mends what can be mended without losing anything, unless `isDryRun`.
    func inspect(
        _ project: ProjectID, finishEventID: EventID, isDryRun: Bool, deadline: ContinuousClock.Instant
    ) async throws -> ProjectFindings
}

/// A page of projects.
public struct ProjectPage: Sendable {
    /// The projects.
    public let projects: [ProjectID]
    /// Where the next page begins; nil after the last.
    public let next: String?

    /// Reports a page.
    public init(projects: [ProjectID], next: String?) {
        self.projects = projects
        self.next = next
    }
}

/// What an inspection of a project has found.
public struct ProjectFindings: Sendable, Hashable {
    /// Something that is not as it should be. There may be new ones, so a `switch` needs a `default`.
    public struct Finding: Sendable, Hashable, CustomStringConvertible {
        /// The finding's name.
        public let description: String

        /// Wraps a name, as a store reports it.
        public init(_ name: String) { description = name }

        /// Sealed and settled, and nobody has decided its finish. Mended: it is finished.
        public static let pastTheLine = Finding("pastTheLine")
        /// Its `job.completed` is not confirmed yet. A ``FinishLine`` publishes it.
        public static let finishPending = Finding("finishPending")
        /// It would stay for ever. Mended: it has a time to live.
        public static let noTimeToLive = Finding("noTimeToLive")
        /// Memory of items or batches without a project. Mended: it has a time to live, and a start removes it.
        public static let itemsWithoutProject = Finding("itemsWithoutProject")
        /// It counted items that it no longer remembers, so it counts no new ones. Restart it.
        public static let memoryLost = Finding("memoryLost")
        /// A field of the hash holds what no writer should have written, or a key is of another type. Not mended.
        public static let corrupt = Finding("corrupt")
        /// It has been neither moved nor ended for longer than was asked about. Not mended: fail, cancel or replay it.
        public static let stuck = Finding("stuck")
    }

    /// What was found.
    public var findings: [Finding]
    /// Which of it has been mended, or would be.
    public var mended: [Finding]
    /// The project's progress after it; nil if it has no hash that can be read.
    public var progress: ProjectProgress?
    /// How long ago the last update was, to the second; nil where that cannot be told.
    public var idle: Duration?

    /// Reports an inspection.
    public init(findings: [Finding], mended: [Finding], progress: ProjectProgress?, idle: Duration?) {
        self.findings = findings
        self.mended = mended
        self.progress = progress
        self.idle = idle
    }
}
