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

    private struct Stage {
        var counters = ProjectProgress.Counters(total: 0, done: 0, errors: 0)
        /// What has been counted, and whether it succeeded.
        var items: [Item: ItemOutcome] = [:]
        var isSettled: Bool { counters.done >= counters.total }
    }

    private struct Project {
        let layout: ProgressLayout
        var generation = 1
        var status = ProjectProgress.Status.initializing
        var stages: [Stage]
        var isSealed = false
        var isFinished = false
        var isCancelled = false
        var reason: String?
        let finishEventID: EventID
        let startedAt = Date()
        var batches: Set<String> = []
        var isIndexed: Bool?

        init(_ layout: ProgressLayout, _ finishEventID: EventID) {
            self.layout = layout
            self.finishEventID = finishEventID
            stages = layout.stages.map { _ in Stage() }
        }
    }

    private struct State {
        var projects: [ProjectID: Project] = [:]
        var pending: [ProjectID: [PendingFinish]] = [:]
    }

    // A class of its own, so that the hub does not hold the store that holds it.
    private final class Storage: Sendable {
        let state = Mutex(State())
    }

    private let storage = Storage()
    private let hub: ProgressHub

    /// Makes an empty store.
    public init() {
        hub = ProgressHub(interval: .seconds(2)) { [storage] project in
            storage.state.withLock { $0.projects[project].map { Self.progress(project, $0) } }
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func updates(of project: ProjectID) -> AsyncThrowingStream<ProjectProgress, any Error> {
        hub.watch(project)
    }

    /// Forgets a project, as an expiry would.
    public func remove(_ project: ProjectID) {
        storage.state.withLock { state in _ = state.projects.removeValue(forKey: project) }
    }

    /// Always healthy: there is nothing that could fail.
    public func health(deadline: ContinuousClock.Instant) async -> Health { Health() }

    /// See ``SMAPEvents/ProgressStore``.
    public func start(
        _ project: ProjectID, layout: ProgressLayout, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        storage.state.withLock { state in
            if let known = state.projects[project] { return Self.update(.exists, project, known) }
            let new = Project(layout, finishEventID)
            state.projects[project] = new
            return Self.update(.started, project, new)
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func restart(
        _ project: ProjectID, from generation: Int, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, _ in
            if entry.generation == generation + 1 { return .exists }
            guard entry.generation == generation else {
                return entry.generation > generation ? .stale : .unknownProject
            }
            guard entry.status == .done || entry.status == .failed else { return .notFinished }
            var next = Project(entry.layout, finishEventID)
            next.generation = generation + 1
            entry = next
            return .restarted
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, _ in
            guard !entry.batches.contains(batch) else { return .duplicate }
            guard !entry.isFinished, entry.status != .failed else { return .alreadyFinished }
            guard !entry.isSealed else { return .alreadySealed }
            entry.batches.insert(batch)
            entry.stages[0].counters.total += count
            if entry.status == .initializing { entry.status = entry.layout == .stages ? .processing : .crawling }
            return .expected
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, state in
            let total = total ?? entry.stages[0].counters.total
            if entry.isFinished {
                guard total == entry.stages[0].counters.total else { return .alreadyFinished }
                return self.finished(project, entry, state) == .finishPending ? .finishPending : .duplicate
            }
            guard entry.status != .failed else { return .alreadyFinished }
            guard total >= entry.stages[0].counters.done else { return .totalBelowDone }
            entry.stages[0].counters.total = total
            entry.isSealed = true
            entry.status = .processing
            return self.finishIfSettled(project, &entry, &state) ?? .sealed
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func advance(
        _ project: ProjectID, _ items: AdvanceRequest, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        var verdicts: [ProgressUpdate.Verdict] = []
        let update = change(project) { entry, state in
            if let generation = items.generation, generation != entry.generation {
                return generation < entry.generation ? .stale : .unknownProject
            }
            guard items.stage == nil || entry.layout == .stages else { return .stageMismatch }
            let isIndexed = items.reports.contains { if case .index = $0.item { true } else { false } }
            guard entry.isIndexed ?? isIndexed == isIndexed else { return .itemKindMismatch }
            for report in items.reports {
                verdicts.append(self.count(report, items.stage == .analyze, project, &entry, state))
            }
            if let last = verdicts.lastIndex(of: .counted), let finish = self.finishIfSettled(project, &entry, &state) {
                verdicts[last] = finish
                return finish
            }
            return verdicts.last ?? .unchanged
        }
        return ProgressUpdate(verdict: update.verdict, items: verdicts, progress: update.progress)
    }

    private func count(
        _ report: ItemReport, _ isSecond: Bool, _ project: ProjectID, _ entry: inout Project, _ state: State
    ) -> ProgressUpdate.Verdict {
        let key: Item =
            switch report.item {
            case .index(let index): .index(index)
            case .named(let name): .named(name)
            }
        let n = isSecond ? 1 : 0
        // A crawled item is to be analysed.
        func feed(_ entry: inout Project) {
            if entry.layout == .stages, !isSecond, !entry.isFinished { entry.stages[1].counters.total += 1 }
        }
        if let known = entry.stages[n].items[key] {
            guard known == .failure, report.outcome == .success else {
                return entry.isFinished ? finished(project, entry, state) : .duplicate
            }
            entry.stages[n].items[key] = .success
            entry.stages[n].counters.errors -= 1
            feed(&entry)
            return .reclassified
        }
        if entry.isSealed {
            let crawl = entry.stages[0]
            let limit = isSecond && !crawl.isSettled ? crawl.counters.total : entry.stages[n].counters.total
            guard entry.stages[n].counters.done < limit else { return .unexpectedItem }
            if case .index(let index) = key, index >= crawl.counters.total { return .unexpectedItem }
        }
        if case .index = key { entry.isIndexed = true } else { entry.isIndexed = false }
        entry.stages[n].items[key] = report.outcome
        entry.stages[n].counters.done += 1
        if report.outcome == .failure { entry.stages[n].counters.errors += 1 } else { feed(&entry) }
        return .counted
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func abandon(
        _ project: ProjectID, isCancelled: Bool, reason: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, _ in
            guard !entry.isFinished else { return .alreadyFinished }
            if entry.status == .failed, entry.isCancelled != isCancelled { return .alreadyFinished }
            if entry.status != .failed, !reason.isEmpty { entry.reason = reason }
            entry.status = .failed
            entry.isCancelled = isCancelled
            return isCancelled ? .cancelled : .failed
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func settle(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        change(project) { entry, state in
            if entry.isFinished { return self.finished(project, entry, state) }
            return self.finishIfSettled(project, &entry, &state) ?? .unchanged
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress? {
        storage.state.withLock { state in state.projects[project].map { Self.progress(project, $0) } }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [ProjectID] {
        storage.state.withLock { Array($0.pending.keys.prefix(limit)) }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinishes(
        of project: ProjectID, deadline: ContinuousClock.Instant
    ) async throws -> [PendingFinish] {
        storage.state.withLock { $0.pending[project] ?? [] }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool {
        storage.state.withLock { state in
            guard let index = state.pending[finish.project]?.firstIndex(where: { $0.eventID == finish.eventID }) else {
                return false
            }
            state.pending[finish.project]?.remove(at: index)
            if state.pending[finish.project]?.isEmpty == true { state.pending[finish.project] = nil }
            return true
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func projects(after cursor: String?, deadline: ContinuousClock.Instant) async throws -> ProjectPage {
        storage.state.withLock { ProjectPage(projects: Array($0.projects.keys), next: nil) }
    }

    /// See ``SMAPEvents/ProgressStore``. There are no siblings here, so nothing but a pending finish can be found.
    public func inspect(
        _ project: ProjectID, finishEventID: EventID, isDryRun: Bool, deadline: ContinuousClock.Instant
    ) async throws -> ProjectFindings {
        storage.state.withLock { state in
            ProjectFindings(
                findings: state.pending[project] == nil ? [] : [.finishPending], mended: [],
                progress: state.projects[project].map { Self.progress(project, $0) }, idle: nil)
        }
    }

    private func change(
        _ project: ProjectID, _ body: (inout Project, inout State) -> ProgressUpdate.Verdict
    ) -> ProgressUpdate {
        defer { hub.nudge(project) }
        return storage.state.withLock { state in
            guard var entry = state.projects[project] else {
                let nothing = ProjectProgress(
                    project: project, status: ProjectProgress.Status(""), stages: [], isSealed: false)
                return ProgressUpdate(verdict: .unknownProject, progress: nothing)
            }
            let verdict = body(&entry, &state)
            state.projects[project] = entry
            return Self.update(verdict, project, entry)
        }
    }

    private func finished(_ project: ProjectID, _ entry: Project, _ state: State) -> ProgressUpdate.Verdict {
        let isPending = state.pending[project]?.contains { $0.eventID == entry.finishEventID } ?? false
        return isPending ? .finishPending : .alreadyFinished
    }

    private func finishIfSettled(
        _ project: ProjectID, _ entry: inout Project, _ state: inout State
    ) -> ProgressUpdate.Verdict? {
        guard entry.isSealed, !entry.isFinished, entry.status != .failed, entry.stages.allSatisfy(\.isSettled) else {
            return nil
        }
        entry.isFinished = true
        entry.status = .done
        let now = Date()
        let seconds = (now.timeIntervalSince(entry.startedAt) * 1000).rounded() / 1000
        let sums = Self.progress(project, entry)
        let data =
            "{\"total\":\(sums.total),\"done\":\(sums.done),\"errors\":\(sums.errors),\"duration_seconds\":\(seconds)}"
        state.pending[project, default: []].append(
            PendingFinish(
                project: project, generation: entry.generation, eventID: entry.finishEventID, data: Array(data.utf8),
                decidedAt: now))
        return .finished
    }

    private static func update(
        _ verdict: ProgressUpdate.Verdict, _ project: ProjectID, _ entry: Project
    ) -> ProgressUpdate {
        ProgressUpdate(verdict: verdict, progress: progress(project, entry))
    }

    private static func progress(_ project: ProjectID, _ entry: Project) -> ProjectProgress {
        ProjectProgress(
            project: project, status: entry.status, layout: entry.layout, stages: entry.stages.map(\.counters),
            isSealed: entry.isSealed, generation: entry.generation,
            finishEventID: entry.isFinished ? entry.finishEventID : nil, isCancelled: entry.isCancelled,
            reason: entry.reason)
    }
}
