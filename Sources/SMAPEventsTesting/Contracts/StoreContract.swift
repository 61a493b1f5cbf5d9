public import SMAPEvents

/// What every ``SMAPEvents/ProgressStore`` must do. Each check uses projects of its own.
public enum StoreContract {
    /// One promise.
    public struct Check: Sendable, CustomStringConvertible {
        /// The promise, as a sentence.
        public let description: String
        private let body: @Sendable (any ProgressStore, ProjectID) async throws -> Void

        init(_ description: String, _ body: @escaping @Sendable (any ProgressStore, ProjectID) async throws -> Void) {
            self.description = description
            self.body = body
        }

        /// Runs the check. Throws ``ContractViolation`` when the promise is not kept.
        public func run(_ store: any ProgressStore) async throws {
            try await body(store, ProjectID("proj_\(EventID().rawValue)"))
        }
    }

    private static func equal(
        _ update: ProgressUpdate, _ verdict: ProgressUpdate.Verdict, done: Int, errors: Int, line: Int = #line
    ) throws {
        try ContractViolation.equal(update.verdict, verdict, "verdict", line: line)
        try ContractViolation.equal(update.progress.done, done, "done", line: line)
        try ContractViolation.equal(update.progress.errors, errors, "errors", line: line)
    }

    private static func pending(_ store: any ProgressStore, _ project: ProjectID) async throws -> PendingFinish? {
        try await store.pendingFinishes(of: project, deadline: .now + .seconds(10)).last
    }

    private static func clear(_ store: any ProgressStore, _ finish: PendingFinish) async throws -> Bool {
        try await store.clear(finish, deadline: .now + .seconds(10))
    }

    /// All promises.
    public static let checks: [Check] = [
        Check("a project starts once, and starting it again changes nothing") { store, project in
            let tracker = ProgressTracker(store: store)
            try ContractViolation.require(try await tracker.progress(of: project) == nil, "nothing is there")
            let started = try await tracker.start(project)
            try ContractViolation.equal(started.verdict, .started, "verdict")
            try ContractViolation.equal(started.progress.status, .initializing, "status")
            try await tracker.expect(5, of: project, batch: "a")
            let again = try await tracker.start(project)
            try ContractViolation.equal(again.verdict, .exists, "verdict")
            try ContractViolation.equal(again.progress.total, 5, "total")
        },
        Check("a batch is expected once, and moves the status to crawling") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try ContractViolation.equal(
                try await tracker.expect(10, of: project, batch: "page-1").verdict, .expected, "first")
            try ContractViolation.equal(
                try await tracker.expect(10, of: project, batch: "page-1").verdict, .duplicate, "again")
            let update = try await tracker.expect(5, of: project, batch: "page-2")
            try ContractViolation.equal(update.progress.total, 15, "total")
            try ContractViolation.equal(update.progress.status, .crawling, "status")
        },
        Check("a write to a project that is not there is unknownProject, and makes none") { store, project in
            let tracker = ProgressTracker(store: store)
            for write in [
                { _ = try await tracker.advance(project, item: .index(0), outcome: .success) },
                { _ = try await tracker.expect(1, of: project, batch: "a") },
                { _ = try await tracker.seal(project, total: 0) },
                { _ = try await tracker.fail(project) },
            ] {
                let error = try await ContractViolation.error(.unknownProject) { try await write() }
                try ContractViolation.require(error.isRetriable, "a report may have overtaken the start")
            }
            try ContractViolation.require(try await tracker.progress(of: project) == nil, "nothing is there")
        },
        Check("one item reported a thousand times at once counts once") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            let verdicts = try await withThrowingTaskGroup(of: ProgressUpdate.Verdict.self) { group in
                for _ in 0..<1_000 {
                    group.addTask {
                        try await tracker.advance(project, item: .named("item"), outcome: .success).verdict
                    }
                }
                var counts: [ProgressUpdate.Verdict: Int] = [:]
                for try await verdict in group { counts[verdict, default: 0] += 1 }
                return counts
            }
            try ContractViolation.equal(verdicts, [.counted: 1, .duplicate: 999], "verdicts")
            try ContractViolation.equal(try await tracker.progress(of: project)?.done, 1, "done")
        },
        Check("a hundred workers race for the last item, and one finishes the project") { store, project in
            let tracker = ProgressTracker(store: store)
            for round in 0..<20 {
                let project = try ProjectID("\(project)_\(round)")
                try await tracker.start(project)
                try await tracker.seal(project, total: 100)
                let finishes = try await withThrowingTaskGroup(of: Bool.self) { group in
                    for index in 0..<100 {
                        group.addTask {
                            try await tracker.advance(project, item: .index(index), outcome: .success).didFinish
                        }
                    }
                    var count = 0
                    for try await didFinish in group where didFinish { count += 1 }
                    return count
                }
                try ContractViolation.equal(finishes, 1, "finishes in round \(round)")
            }
        },
        Check("a failed item counts in done and errors, and its success later takes one error back") { store, project in
            let tracker = ProgressTracker(store: store)
            for (suffix, item) in [("i", ItemReference.index(3)), ("n", .named("x"))] {
                let project = try ProjectID("\(project)_\(suffix)")
                try await tracker.start(project)
                try equal(
                    try await tracker.advance(project, item: item, outcome: .failure), .counted, done: 1, errors: 1)
                try equal(
                    try await tracker.advance(project, item: item, outcome: .failure), .duplicate, done: 1, errors: 1)
                try equal(
                    try await tracker.advance(project, item: item, outcome: .success), .reclassified, done: 1,
                    errors: 0)
                try equal(
                    try await tracker.advance(project, item: item, outcome: .failure), .duplicate, done: 1, errors: 0)
            }
        },
        Check("when everything is settled before the seal, the seal finishes") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.expect(3, of: project, batch: "all")
            for index in 0..<3 {
                let update = try await tracker.advance(project, item: .index(index), outcome: .success)
                try ContractViolation.equal(update.verdict, .counted, "verdict")
            }
            try ContractViolation.require(try await pending(store, project) == nil, "nothing is pending yet")
            let sealed = try await tracker.seal(project)
            try ContractViolation.require(sealed.didFinish, "the seal finished it: \(sealed.verdict)")
            try ContractViolation.equal(sealed.progress.status, .done, "status")
        },
        Check("an empty project finishes when it is sealed, and a project of one item with that item") {
            store, project in
            let tracker = ProgressTracker(store: store)
            let empty = try ProjectID("\(project)_empty")
            try await tracker.start(empty)
            let sealed = try await tracker.seal(empty, total: 0)
            try ContractViolation.require(sealed.didFinish, "empty")
            try ContractViolation.equal(sealed.progress.percent, 100, "percent")
            let one = try ProjectID("\(project)_one")
            try await tracker.start(one)
            try await tracker.seal(one, total: 1)
            try ContractViolation.require(
                try await tracker.advance(one, item: .named("only"), outcome: .failure).didFinish, "one item")
        },
        Check("the finish is pending under one id, with its totals frozen, until it is cleared under that id") {
            store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 2)
            try await tracker.advance(project, item: .index(0), outcome: .failure)
            let last = try await tracker.advance(project, item: .index(1), outcome: .success)
            try ContractViolation.require(last.didFinish, "finished")
            guard let finish = try await pending(store, project) else {
                throw ContractViolation(description: "no pending finish")
            }
            try ContractViolation.equal(last.progress.finishEventID, finish.eventID, "id")
            let repeated = try await tracker.advance(project, item: .index(1), outcome: .success)
            try ContractViolation.equal(repeated.verdict, .finishPending, "repeated while pending")
            try ContractViolation.equal(
                try await tracker.seal(project, total: 2).verdict, .finishPending, "sealed again while pending")
            // A correction after the decision changes the hash, not what is announced.
            try ContractViolation.equal(
                try await tracker.advance(project, item: .index(0), outcome: .success).verdict, .reclassified, "later")
            let text = String(decoding: try await pending(store, project)?.data ?? [], as: UTF8.self)
            try ContractViolation.require(
                text.hasPrefix("{\"total\":2,\"done\":2,\"errors\":1,\"duration_seconds\":"), "frozen: \(text)")

            let all = try await store.pendingFinishes(limit: 10_000, deadline: .now + .seconds(10))
            try ContractViolation.equal(all.filter { $0 == project }.count, 1, "found by a sweep")
            let stranger = PendingFinish(
                project: project, eventID: EventID(), data: finish.data, decidedAt: finish.decidedAt)
            try ContractViolation.equal(try await clear(store, stranger), false, "cleared under another id")
            try ContractViolation.equal(try await clear(store, finish), true, "cleared")
            try ContractViolation.equal(try await clear(store, finish), false, "cleared again")
            try ContractViolation.require(try await pending(store, project) == nil, "nothing is pending any more")
            try ContractViolation.equal(
                try await tracker.advance(project, item: .index(1), outcome: .success).verdict, .alreadyFinished,
                "repeated afterwards")
            try ContractViolation.equal(try await tracker.seal(project, total: 2).verdict, .duplicate, "sealed again")
        },
        Check("beyond the sealed total nothing moves") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 2)
            try equal(
                try await tracker.advance(project, item: .index(2), outcome: .success), .unexpectedItem, done: 0,
                errors: 0)
            try await tracker.advance(project, item: .index(0), outcome: .success)
            try await tracker.advance(project, item: .index(1), outcome: .success)
            try equal(
                try await tracker.advance(project, item: .index(3), outcome: .failure), .unexpectedItem, done: 2,
                errors: 0)
        },
        Check("after the seal nothing can be expected, and the total can be corrected, but not below done") {
            store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.expect(10, of: project, batch: "a")
            for index in 0..<3 { try await tracker.advance(project, item: .index(index), outcome: .success) }
            try await ContractViolation.error(.totalBelowDone) { _ = try await tracker.seal(project, total: 2) }
            try ContractViolation.equal(try await tracker.progress(of: project)?.isSealed, false, "sealed")
            try await tracker.seal(project)
            try await ContractViolation.error(.alreadySealed) {
                _ = try await tracker.expect(1, of: project, batch: "b")
            }
            try ContractViolation.equal(
                try await tracker.expect(10, of: project, batch: "a").verdict, .duplicate, "a known batch")
            try ContractViolation.require(
                try await tracker.seal(project, total: 3).didFinish, "corrected down to done, it finishes")
            try await ContractViolation.error(.alreadyFinished) { _ = try await tracker.seal(project, total: 4) }
            try await ContractViolation.error(.alreadyFinished) {
                _ = try await tracker.expect(1, of: project, batch: "c")
            }
        },
        Check("items are counted by index or by name, never both") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.advance(project, item: .index(0), outcome: .success)
            try await ContractViolation.error(.itemKindMismatch) {
                _ = try await tracker.advance(project, item: .named("a"), outcome: .success)
            }
            try ContractViolation.equal(try await tracker.progress(of: project)?.done, 1, "done")
        },
        Check("an index far out, and names over their limit, are refused") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            for index in [-1, ProgressTracker.maximumIndex + 1, 4_000_000_000] {
                try await ContractViolation.error(.indexOutOfRange) {
                    _ = try await tracker.advance(project, item: .index(index), outcome: .success)
                }
            }
            for name in ["", String(repeating: "n", count: 513)] {
                try await ContractViolation.error(.invalidName) {
                    _ = try await tracker.advance(project, item: .named(name), outcome: .success)
                }
            }
            try ContractViolation.equal(try await tracker.progress(of: project)?.done, 0, "done")
        },
        Check("a failed project counts on and never finishes") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 1)
            try ContractViolation.equal(try await tracker.fail(project).verdict, .failed, "verdict")
            try ContractViolation.equal(try await tracker.fail(project).verdict, .failed, "repeated")
            try equal(
                try await tracker.advance(project, item: .index(0), outcome: .success), .counted, done: 1, errors: 0)
            try ContractViolation.equal(try await tracker.progress(of: project)?.status, .failed, "status")
            try ContractViolation.require(try await pending(store, project) == nil, "nothing is pending")
            try await ContractViolation.error(.alreadyFinished) { _ = try await tracker.seal(project) }
        },
        Check("a finished project cannot fail") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 0)
            try await ContractViolation.error(.alreadyFinished) { _ = try await tracker.fail(project) }
        },
        Check("with errors apart a failed item moves errors alone, and the end is when both together reach the total") {
            store, project in
            let tracker = ProgressTracker(store: store)
            try ContractViolation.equal(
                try await tracker.start(project, layout: .errorsApart).progress.layout, .errorsApart, "layout")
            try await tracker.seal(project, total: 3)
            try equal(
                try await tracker.advance(project, item: .index(0), outcome: .failure), .counted, done: 1, errors: 1)
            try equal(
                try await tracker.advance(project, item: .index(1), outcome: .failure), .counted, done: 2, errors: 2)
            try equal(
                try await tracker.advance(project, item: .index(0), outcome: .success), .reclassified, done: 2,
                errors: 1)
            try equal(
                try await tracker.advance(project, item: .index(2), outcome: .success), .finished, done: 3, errors: 1)
        },
        Check("with stages what was crawled is to be analysed, and the end is when both are settled") {
            store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project, layout: .stages)
            let expected = try await tracker.expect(3, of: project, batch: "all")
            try ContractViolation.equal(expected.progress.status, .processing, "status")
            try await tracker.advance(project, item: .index(0), outcome: .success)
            try await tracker.advance(project, item: .index(0), outcome: .success, stage: .analyze)
            try await tracker.advance(project, item: .index(1), outcome: .failure, stage: .crawl)
            try await tracker.seal(project)
            let crawled = try await tracker.advance(project, item: .index(2), outcome: .success, stage: .crawl)
            try ContractViolation.equal(crawled.verdict, .counted, "the crawl is not the end")
            try ContractViolation.equal(
                crawled.progress.stages, [.init(total: 3, done: 3, errors: 1), .init(total: 2, done: 1, errors: 0)],
                "stages")
            try ContractViolation.equal(crawled.progress.percent, 75, "the mean of the stages")
            let last = try await tracker.advance(project, item: .index(2), outcome: .failure, stage: .analyze)
            try ContractViolation.require(last.didFinish, "the end: \(last.verdict)")
            try ContractViolation.equal(
                try await tracker.advance(project, item: .index(1), outcome: .success, stage: .analyze).verdict,
                .unexpectedItem, "what was not crawled is not analysed")
            let flat = try ProjectID("\(project)_flat")
            try await tracker.start(flat)
            try await ContractViolation.error(.stageMismatch) {
                _ = try await tracker.advance(flat, item: .index(0), outcome: .success, stage: .analyze)
            }
        },
        Check("a restart begins a new life with an id of its own, and the old one's reports and finish do not touch it")
        {
            store, project in
            let tracker = ProgressTracker(store: store)
            try await ContractViolation.error(.unknownProject) { _ = try await tracker.restart(project, from: 1) }
            try await tracker.start(project)
            try await tracker.expect(2, of: project, batch: "a")
            try await ContractViolation.error(.notFinished) { _ = try await tracker.restart(project, from: 1) }
            try await tracker.advance(project, item: .index(0), outcome: .failure)
            try await tracker.seal(project, total: 1)
            let restarted = try await tracker.restart(project, from: 1)
            try equal(restarted, .restarted, done: 0, errors: 0)
            try ContractViolation.equal(restarted.progress.status, .initializing, "status")
            try ContractViolation.equal(restarted.progress.generation, 2, "generation")
            try ContractViolation.equal(try await tracker.restart(project, from: 1).verdict, .exists, "repeated")
            try equal(
                try await tracker.advance(project, item: .index(0), outcome: .success, generation: 1), .stale, done: 0,
                errors: 0)
            try await ContractViolation.error(.unknownProject) {
                _ = try await tracker.advance(project, item: .index(0), outcome: .success, generation: 3)
            }
            try equal(
                try await tracker.advance(project, item: .index(0), outcome: .success, generation: 2), .counted,
                done: 1, errors: 0)
            try ContractViolation.equal(
                try await tracker.expect(1, of: project, batch: "a").verdict, .expected, "a batch of the new life")
            try ContractViolation.require(try await tracker.seal(project).didFinish, "it finishes again")
            let pending = try await store.pendingFinishes(of: project, deadline: .now + .seconds(10))
            try ContractViolation.equal(pending.map(\.generation).sorted(), [1, 2], "both are pending")
            try ContractViolation.equal(Set(pending.map(\.eventID)).count, 2, "ids")
            for finish in pending { try ContractViolation.equal(try await clear(store, finish), true, "cleared") }
            let swept = try await store.pendingFinishes(limit: 10_000, deadline: .now + .seconds(10))
            try ContractViolation.require(!swept.contains(project), "nothing is pending any more")
            try await tracker.restart(project, from: 2)
            try await ContractViolation.error(.staleGeneration) { _ = try await tracker.restart(project, from: 1) }
        },
        Check("a project is failed or cancelled with a reason, once, and neither undoes the other") { store, project in
            let tracker = ProgressTracker(store: store)
            let other = try ProjectID("\(project)_other")
            for id in [project, other] { try await tracker.start(id) }
            try await tracker.fail(project, reason: "no disk")
            let failed = try await tracker.fail(project, reason: "later")
            try ContractViolation.equal(failed.progress.reason, "no disk", "the first reason")
            try await ContractViolation.error(.alreadyFinished) { _ = try await tracker.cancel(project) }
            let cancelled = try await tracker.cancel(other, reason: "not wanted")
            try ContractViolation.equal(cancelled.verdict, .cancelled, "verdict")
            let read = try await tracker.progress(of: other)
            try ContractViolation.equal(read?.isCancelled, true, "cancelled")
            try ContractViolation.equal(read?.reason, "not wanted", "reason")
            try ContractViolation.equal(read?.status, .failed, "what siblings see")
            try await ContractViolation.error(.alreadyFinished) { _ = try await tracker.fail(other) }
            try ContractViolation.equal(try await tracker.restart(other, from: 1).progress.reason, nil, "restarted")
        },
        Check("many items in one call are counted as if one after the other") { store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 3)
            let first = try await tracker.advance(
                project,
                [.init(.named("a"), .failure), .init(.named("a"), .success), .init(.named("a"), .failure)])
            try ContractViolation.equal(first.items, [.counted, .reclassified, .duplicate], "verdicts")
            try equal(first, .duplicate, done: 1, errors: 0)
            let last = try await tracker.advance(
                project,
                [.init(.named("b"), .success), .init(.named("c"), .failure), .init(.named("d"), .success)])
            try ContractViolation.equal(last.items, [.counted, .finished, .unexpectedItem], "verdicts")
            try equal(last, .finished, done: 3, errors: 1)
            try await ContractViolation.error(.itemKindMismatch) {
                _ = try await tracker.advance(project, [.init(.named("b"), .success), .init(.index(1), .success)])
            }
            for count in [0, 1_001] {
                let reports = (0..<count).map { ItemReport(.named("\($0)"), .success) }
                try await ContractViolation.error(.invalidName) { _ = try await tracker.advance(project, reports) }
            }
        },
        Check("whoever watches sees the progress grow, and ends with the finish; a slow one holds up nobody") {
            store, project in
            let tracker = ProgressTracker(store: store)
            try await tracker.start(project)
            try await tracker.seal(project, total: 100)
            try await withThrowingTaskGroup(of: [Int].self) { group in
                // One that never reads.
                let slow = tracker.watch(project)
                for _ in 0..<100 {
                    group.addTask {
                        var seen: [Int] = []
                        for try await progress in tracker.watch(project) {
                            seen.append(progress.done)
                            if progress.isOver { try ContractViolation.equal(progress.status, .done, "the last") }
                        }
                        return seen
                    }
                }
                for index in 0..<100 {
                    try await tracker.advance(project, item: .index(index), outcome: .success)
                }
                for try await seen in group {
                    try ContractViolation.equal(seen.last, 100, "the last state")
                    try ContractViolation.equal(seen, seen.sorted(), "it grows")
                }
                var last: ProjectProgress?
                for try await progress in slow { last = progress }
                try ContractViolation.equal(last?.done, 100, "what the slow one finds")
            }
            let unknown = try ProjectID("\(project)_unknown")
            try await ContractViolation.error(.unknownProject) {
                for try await _ in tracker.watch(unknown) {}
            }
        },
    ]
}
