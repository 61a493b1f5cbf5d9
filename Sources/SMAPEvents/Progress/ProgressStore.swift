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
        _ project: ProjectID, _ items: ItemReports, finishEventID: EventID, deadline: ContinuousClock.Instant
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

    /// Some projects with finishes that are pending, at most `limit`, in no particular order.
    func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [ProjectID]

    /// The pending finishes of a project: one at most for each of its generations.
    func pendingFinishes(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> [PendingFinish]

    /// Forgets a pending finish once its event is confirmed. Returns whether it was there.
    func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool
}
