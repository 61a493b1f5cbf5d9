/// What keeps the progress of projects: Redis (`RedisProgressStore`), or memory (`InMemoryProgressStore`).
///
/// Each operation is atomic, and can be repeated when its answer was lost. All of them end by `deadline`, and throw
/// ``EventsError`` when the store cannot be reached or refuses; what they *decided* is in the verdict. Use
/// ``ProgressTracker`` instead of calling a store directly.
public protocol ProgressStore: Sendable {
    /// Whether the store answers; if not, why.
    func health(deadline: ContinuousClock.Instant) async -> Health

    /// Creates a project, unless it is there: ``ProgressUpdate/Verdict/started`` or ``ProgressUpdate/Verdict/exists``.
    /// - Parameter finishEventID: The id of its future `job.completed`.
    func start(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws
        -> ProgressUpdate

    /// Adds `count` items to the total, once per batch.
    func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: ContinuousClock.Instant
    ) async throws
        -> ProgressUpdate

    /// Makes the total final: `total`, or without one what was expected.
    /// - Parameter finishEventID: Used when the project was started by a sibling, which stores none.
    func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: ContinuousClock.Instant
    )
        async throws -> ProgressUpdate

    /// Counts an item, once.
    /// - Parameter finishEventID: Used when the project was started by a sibling, which stores none.
    func advance(
        _ project: ProjectID, item: ItemReference, outcome: ItemOutcome, finishEventID: EventID,
        deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate

    /// Marks a project as failed. It will not finish any more.
    func fail(_ project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProgressUpdate

    /// Reads a project's progress; nil if there is none.
    func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress?

    /// Some finishes that are pending, at most `limit`, in no particular order.
    func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [PendingFinish]

    /// The pending finish of a project, if there is one.
    func pendingFinish(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> PendingFinish?

    /// Forgets a pending finish once its event is confirmed, unless another event's is pending by now.
    /// Returns whether it was there.
    func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool
}
