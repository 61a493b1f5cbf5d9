/// Keeps the progress of projects, and finds out, exactly once, when the last item is done.
///
/// Invariants (P4, P5): an item moves `done` once, however often it is reported; `0 ≤ errors ≤ done`, and
/// `done ≤ total` once sealed; a project finishes once.
///
/// Every operation can be repeated after an error: the answer is then what it would have been.
public struct ProgressTracker: Sendable {
    /// The largest item index by default: a larger one would make a large bitmap.
    public static let maximumIndex = 10_000_000

    private let store: any ProgressStore
    private let finishLine: FinishLine?
    private let deadline: Duration
    private let metrics = ProgressMetrics()

    /// Makes a tracker.
    ///
    /// - Parameters:
    ///   - finishLine: Told of every finish decided here, to publish it at once. Without one, some other process's
    ///     ``FinishLine`` finds it.
    ///   - deadline: How long each operation may take, 10 s by default.
    public init(store: any ProgressStore, finishLine: FinishLine? = nil, deadline: Duration = .seconds(10)) {
        self.store = store
        self.finishLine = finishLine
        self.deadline = deadline
    }

    /// Starts a project. On one that exists it changes nothing and says so (``ProgressUpdate/Verdict/exists``).
    @discardableResult
    public func start(_ project: ProjectID, layout: ProgressLayout = .flat) async throws -> ProgressUpdate {
        try await run("start", project) {
            try await store.start(project, layout: layout, finishEventID: EventID(), deadline: $0)
        }
    }

    /// Starts a project again that is done, failed or cancelled: with nothing counted, and a finish event of its own.
    ///
    /// Reports of the life before may still be under way: those that name their generation do not count in the new one.
    /// Its pending finish is still published.
    ///
    /// - Parameter generation: The life that is over, as ``ProjectProgress/generation`` tells. Repeated, the restart changes
    ///   nothing (``ProgressUpdate/Verdict/exists``).
    /// - Throws: ``EventsError/Code/notFinished``, ``EventsError/Code/staleGeneration`` when it is further already,
    ///   ``EventsError/Code/unknownProject``.
    @discardableResult
    public func restart(_ project: ProjectID, from generation: Int) async throws -> ProgressUpdate {
        try await run("restart", project) {
            try await store.restart(project, from: generation, finishEventID: EventID(), deadline: $0)
        }
    }

    /// Adds `count` items to a project's total, once per batch key.
    ///
    /// - Parameter batch: Names this batch, 1 to 512 bytes; repeated, it changes nothing.
    /// - Throws: ``EventsError/Code/alreadySealed``, ``EventsError/Code/unknownProject``;
    ///   ``EventsError/Code/corruptProgress`` when the store has forgotten which batches it has counted.
    @discardableResult
    public func expect(_ count: Int, of project: ProjectID, batch: String) async throws -> ProgressUpdate {
        try Self.require(Self.totals.contains(count), "a count is 0 to 10^12", "expect")
        try Self.require((1...512).contains(batch.utf8.count), "a batch key has 1 to 512 bytes", "expect")
        return try await run("expect", project) {
            try await store.expect(count, of: project, batch: batch, deadline: $0)
        }
    }

    /// Makes a project's total final. With everything settled, this finishes it.
    ///
    /// - Parameter total: The final total, 0 included; without one, what was expected. Sealing again corrects it.
    /// - Throws: ``EventsError/Code/totalBelowDone``, ``EventsError/Code/alreadyFinished`` (unless the total is the same),
    ///   ``EventsError/Code/unknownProject``.
    @discardableResult
    public func seal(_ project: ProjectID, total: Int? = nil) async throws -> ProgressUpdate {
        if let total { try Self.require(Self.totals.contains(total), "a total is 0 to 10^12", "seal") }
        return try await run("seal", project) {
            try await store.seal(project, total: total, finishEventID: EventID(), deadline: $0)
        }
    }

    /// Reports how an item ended. It counts once; the verdict says what this report did.
    ///
    /// - Parameters:
    ///   - stage: Which stage of a project with the layout ``ProgressLayout/stages``; the first by default.
    ///   - generation: The life of the project that the item belongs to; a report of an earlier one is
    ///     ``ProgressUpdate/Verdict/stale``. By default it counts in whichever there is.
    /// - Throws: ``EventsError/Code/unknownProject`` when the project is not there, or its generation: retry, the report
    ///   may have overtaken the start. ``EventsError/Code/itemKindMismatch``, ``EventsError/Code/indexOutOfRange``,
    ///   ``EventsError/Code/stageMismatch``.
    @discardableResult
    public func advance(
        _ project: ProjectID, item: ItemReference, outcome: ItemOutcome, stage: ProgressStage? = nil,
        generation: Int? = nil
    ) async throws -> ProgressUpdate {
        try await advance(project, [ItemReport(item, outcome)], stage: stage, generation: generation)
    }

    /// How many items one call takes at most: the store does nothing else meanwhile.
    public static let maximumItems = 1_000

    /// Reports how several items ended, all in one step of the store: as if one after the other, with nothing in between.
    ///
    /// - Parameter items: 1 to ``maximumItems``, all by index or all by name. The verdicts are in
    ///   ``ProgressUpdate/items``. The rest is as for one item.
    @discardableResult
    public func advance(
        _ project: ProjectID, _ items: [ItemReport], stage: ProgressStage? = nil, generation: Int? = nil
    ) async throws -> ProgressUpdate {
        try Self.require((1...Self.maximumItems).contains(items.count), "a call takes 1 to 1,000 items", "advance")
        var isIndexed: Bool?
        for report in items {
            let isIndex: Bool
            switch report.item {
            case .index(let index):
                isIndex = true
                guard (0...Self.maximumIndex).contains(index) else {
                    throw EventsError(
                        .indexOutOfRange, "an item index is 0 to \(Self.maximumIndex)", operation: "advance \(project)")
                }
            case .named(let name):
                isIndex = false
                try Self.require((1...512).contains(name.utf8.count), "an item name has 1 to 512 bytes", "advance")
            }
            guard isIndexed ?? isIndex == isIndex else {
                throw EventsError(
                    .itemKindMismatch, "items by index and by name in one call", operation: "advance \(project)")
            }
            isIndexed = isIndex
        }
        let reports = AdvanceRequest(items, stage: stage, generation: generation)
        return try await run("advance", project) {
            let update = try await store.advance(project, reports, finishEventID: EventID(), deadline: $0)
            metrics.reported(items.count, update)
            return update
        }
    }

    /// Marks a project as failed: it counts on, and will not finish any more. Repeated, it changes nothing.
    ///
    /// - Parameter reason: Why, for whoever asks; at most 1,000 bytes are kept.
    /// - Throws: ``EventsError/Code/alreadyFinished`` when it is done or cancelled, ``EventsError/Code/unknownProject``.
    @discardableResult
    public func fail(_ project: ProjectID, reason: String = "") async throws -> ProgressUpdate {
        try await abandon("fail", project, isCancelled: false, reason)
    }

    /// Cancels a project, which siblings see as failed. Otherwise as ``fail(_:reason:)``.
    @discardableResult
    public func cancel(_ project: ProjectID, reason: String = "") async throws -> ProgressUpdate {
        try await abandon("cancel", project, isCancelled: true, reason)
    }

    private func abandon(
        _ operation: String, _ project: ProjectID, isCancelled: Bool, _ reason: String
    ) async throws -> ProgressUpdate {
        let kept = String(decoding: Array(reason.utf8.prefix(1_000)), as: UTF8.self)
        return try await run(operation, project) {
            try await store.abandon(project, isCancelled: isCancelled, reason: kept, deadline: $0)
        }
    }

    /// A project's progress; nil if none is kept.
    public func progress(of project: ProjectID) async throws -> ProjectProgress? {
        try await store.progress(of: project, deadline: .now + deadline)
    }

    /// Follows a project: its progress now, then each newer one, until it is done, failed or cancelled.
    ///
    /// It is told by the store at each whole percent and each new status, and looks for itself every two seconds, in case
    /// it was not. A slow reader misses what has been overtaken, and delays nobody. All who watch one project through one
    /// store share a subscription and its reads. While the store is away it waits.
    ///
    /// The sequence throws ``EventsError/Code/unknownProject`` when the project is not there, or no longer.
    public func watch(_ project: ProjectID) -> AsyncThrowingStream<ProjectProgress, any Error> {
        store.updates(of: project)
    }

    /// Looks for what is wrong with a project, and mends what can be mended without losing anything.
    ///
    /// - Parameters:
    ///   - limit: Projects that are not over and were last updated longer ago are ``ProjectFindings/Finding/stuck``.
    ///   - isDryRun: Whether nothing is mended.
    public func reconcile(
        _ project: ProjectID, stuckAfter limit: Duration = .seconds(86_400), isDryRun: Bool = false
    ) async throws -> ProjectFindings {
        var found = try await store.inspect(
            project, finishEventID: EventID(), isDryRun: isDryRun, deadline: .now + deadline)
        if let progress = found.progress, !progress.isOver, let idle = found.idle, idle > limit {
            found.findings.append(.stuck)
        }
        if found.mended.contains(.pastTheLine), !isDryRun { finishLine?.announce(project) }
        return found
    }

    /// Does that to every project of the store, one after the other, and tells of those where something was found.
    ///
    /// - Returns: How many projects were looked at.
    @discardableResult
    public func reconcileAll(
        stuckAfter limit: Duration = .seconds(86_400), isDryRun: Bool = false,
        _ tell: (ProjectID, ProjectFindings) async throws -> Void
    ) async throws -> Int {
        var seen: Set<ProjectID> = []
        var cursor: String?
        repeat {
            let page = try await store.projects(after: cursor, deadline: .now + deadline)
            for project in page.projects where seen.insert(project).inserted {
                let found = try await reconcile(project, stuckAfter: limit, isDryRun: isDryRun)
                if !found.findings.isEmpty { try await tell(project, found) }
            }
            cursor = page.next
        } while cursor != nil
        return seen.count
    }

    private static let totals = 0...1_000_000_000_000

    private static func require(_ condition: Bool, _ rule: String, _ operation: String) throws {
        guard condition else { throw EventsError(.invalidName, rule, operation: operation) }
    }

    private func run(
        _ operation: String, _ project: ProjectID, _ body: (ContinuousClock.Instant) async throws -> ProgressUpdate
    ) async throws -> ProgressUpdate {
        let update = try await body(.now + deadline)
        if update.didFinish { finishLine?.announce(project) }
        // What was refused as a whole is an error: a caller that looks only for errors must not take it for counted.
        let refusal: (EventsError.Code, String)? =
            switch update.verdict {
            case .unknownProject where update.progress.status.rawValue.isEmpty:
                (.unknownProject, "no progress is kept for this project")
            case .unknownProject:
                (
                    .unknownProject,
                    "there is no such generation of it yet: it is in generation \(update.progress.generation)"
                )
            case .alreadySealed: (.alreadySealed, "the total is final")
            case .totalBelowDone: (.totalBelowDone, "the total is below the \(update.progress.done) items done")
            case .itemKindMismatch: (.itemKindMismatch, "its items are counted the other way, by index or by name")
            case .corrupt: (.corruptProgress, "a field of the hash is no number, or the hash is incomplete")
            case .memoryLost where operation == "expect":
                (.corruptProgress, "the batches that it has counted are forgotten")
            case .stageMismatch:
                (.stageMismatch, "its layout is \(update.progress.layout): there is no such stage")
            case .notFinished: (.notFinished, "it is \(update.progress.status) still: fail or cancel it first")
            case .stale where operation == "restart":
                (.staleGeneration, "it is in generation \(update.progress.generation) already")
            case .alreadyFinished where operation != "advance": (.alreadyFinished, "the project is over")
            default: nil
            }
        if let (code, message) = refusal {
            throw EventsError(code, message, operation: "\(operation) \(project)")
        }
        return update
    }
}
