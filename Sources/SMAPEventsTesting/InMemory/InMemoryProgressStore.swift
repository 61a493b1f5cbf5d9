public import SMAPEvents
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// A progress store in memory, for tests that need no server. `StoreContract` holds it to the same promises as Redis.
public final class InMemoryProgressStore: ProgressStore {
    private enum Item: Hashable {
        case index(Int)
        case named(String)
    }

    private struct Project {
        var status = ProjectProgress.Status.initializing
        var total = 0
        var done = 0
        var errors = 0
        var isSealed = false
        var isFinished = false
        let finishEventID: EventID
        let startedAt = Date()
        var batches: Set<String> = []
        var isIndexed: Bool?
        /// What has been counted, and whether it succeeded.
        var items: [Item: ItemOutcome] = [:]
    }

    private struct State {
        var projects: [ProjectID: Project] = [:]
        var pending: [ProjectID: PendingFinish] = [:]
    }

    private let state = Mutex(State())

    /// Makes an empty store.
    public init() {}

    /// Forgets a project, as an expiry would.
    public func remove(_ project: ProjectID) {
        state.withLock { state in _ = state.projects.removeValue(forKey: project) }
    }

    /// Always healthy: there is nothing that could fail.
    public func health(deadline: ContinuousClock.Instant) async -> Health { Health() }

    /// See ``SMAPEvents/ProgressStore``.
    public func start(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws
        -> ProgressUpdate
    {
        state.withLock { state in
            if let known = state.projects[project] { return Self.update(.exists, project, known) }
            let new = Project(finishEventID: finishEventID)
            state.projects[project] = new
            return Self.update(.started, project, new)
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: ContinuousClock.Instant
    )
        async throws -> ProgressUpdate
    {
        change(project) { entry, _ in
            guard !entry.batches.contains(batch) else { return .duplicate }
            guard !entry.isFinished, entry.status != .failed else { return .alreadyFinished }
            guard !entry.isSealed else { return .alreadySealed }
            entry.batches.insert(batch)
            entry.total += count
            if entry.status == .initializing { entry.status = .crawling }
            return .expected
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: ContinuousClock.Instant
    )
        async throws -> ProgressUpdate
    {
        change(project) { entry, state in
            let total = total ?? entry.total
            if entry.isFinished {
                guard total == entry.total else { return .alreadyFinished }
                return state.pending[project] == nil ? .duplicate : .finishPending
            }
            guard entry.status != .failed else { return .alreadyFinished }
            guard total >= entry.done else { return .totalBelowDone }
            entry.total = total
            entry.isSealed = true
            entry.status = .processing
            return self.finishIfSettled(project, &entry, &state) ?? .sealed
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func advance(
        _ project: ProjectID, item: ItemReference, outcome: ItemOutcome, finishEventID: EventID,
        deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, state in
            let key: Item
            switch item {
            case .index(let index): key = .index(index)
            case .named(let name): key = .named(name)
            }
            let isIndexed = if case .index = item { true } else { false }
            guard entry.isIndexed ?? isIndexed == isIndexed else { return .itemKindMismatch }
            if let known = entry.items[key] {
                if known == .failure, outcome == .success {
                    entry.items[key] = .success
                    entry.errors -= 1
                    return .reclassified
                }
                return entry.isFinished ? self.finished(project, state) : .duplicate
            }
            if entry.isSealed {
                guard entry.done < entry.total else { return .unexpectedItem }
                if case .index(let index) = item, index >= entry.total { return .unexpectedItem }
            }
            entry.isIndexed = isIndexed
            entry.items[key] = outcome
            entry.done += 1
            if outcome == .failure { entry.errors += 1 }
            return self.finishIfSettled(project, &entry, &state) ?? .counted
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func fail(_ project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProgressUpdate {
        change(project) { entry, _ in
            guard !entry.isFinished else { return .alreadyFinished }
            entry.status = .failed
            return .failed
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress? {
        state.withLock { state in state.projects[project].map { Self.progress(project, $0) } }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [PendingFinish] {
        state.withLock { Array($0.pending.values.prefix(limit)) }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinish(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> PendingFinish? {
        state.withLock { $0.pending[project] }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool {
        state.withLock { state in
            guard state.pending[finish.project]?.eventID == finish.eventID else { return false }
            state.pending[finish.project] = nil
            return true
        }
    }

    private func change(
        _ project: ProjectID, _ body: (inout Project, inout State) -> ProgressUpdate.Verdict
    ) -> ProgressUpdate {
        state.withLock { state in
            guard var entry = state.projects[project] else {
                let nothing = ProjectProgress(
                    project: project, status: ProjectProgress.Status(""), total: 0, done: 0, errors: 0, isSealed: false)
                return ProgressUpdate(verdict: .unknownProject, progress: nothing)
            }
            let verdict = body(&entry, &state)
            state.projects[project] = entry
            return Self.update(verdict, project, entry)
        }
    }

    private func finished(_ project: ProjectID, _ state: State) -> ProgressUpdate.Verdict {
        state.pending[project] == nil ? .alreadyFinished : .finishPending
    }

    private func finishIfSettled(
        _ project: ProjectID, _ entry: inout Project, _ state: inout State
    ) -> ProgressUpdate.Verdict? {
        guard entry.isSealed, entry.done >= entry.total, entry.status != .failed else { return nil }
        entry.isFinished = true
        entry.status = .done
        let now = Date()
        let seconds = (now.timeIntervalSince(entry.startedAt) * 1000).rounded() / 1000
        let data =
            "{\"total\":\(entry.total),\"done\":\(entry.done),\"errors\":\(entry.errors),\"duration_seconds\":\(seconds)}"
        state.pending[project] = PendingFinish(
            project: project, eventID: entry.finishEventID, data: Array(data.utf8), decidedAt: now)
        return .finished
    }

    private static func update(
        _ verdict: ProgressUpdate.Verdict, _ project: ProjectID, _ entry: Project
    ) -> ProgressUpdate {
        ProgressUpdate(verdict: verdict, progress: progress(project, entry))
    }

    private static func progress(_ project: ProjectID, _ entry: Project) -> ProjectProgress {
        ProjectProgress(
            project: project, status: entry.status, total: entry.total, done: entry.done, errors: entry.errors,
            isSealed: entry.isSealed, finishEventID: entry.isFinished ? entry.finishEventID : nil)
    }
}
