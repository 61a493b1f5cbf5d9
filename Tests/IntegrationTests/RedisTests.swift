import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRedis
import Testing

@Suite struct RedisTests {
    /// `redis-cli` against the shared server's state database.
    private func redis(_ arguments: String...) async throws -> String {
        let port = String(try await SharedStack.current.redisPort)
        let result = try await Program.run("redis-cli", ["-p", port, "-n", "1"] + arguments)
        return result.output.trimmingCharacters(in: .whitespacesAndNewlines)
    }

    @Test(.timeLimit(.minutes(10)))
    func `a hundred workers race for the last item, a thousand rounds, and each has one finish`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let run = EventID().rawValue
        for round in 0..<1_000 {
            let project = try ProjectID("race_\(run)_\(round)")
            try await tracker.start(project)
            try await tracker.seal(project, total: 1)
            let finishes = try await withThrowingTaskGroup(of: Bool.self) { group in
                for _ in 0..<100 {
                    group.addTask {
                        try await tracker.advance(project, item: .index(0), outcome: .success).didFinish
                    }
                }
                return try await group.reduce(into: 0) { $0 += $1 ? 1 : 0 }
            }
            #expect(finishes == 1, "round \(round)")
        }
        await store.close()
    }

    @Test func `SCRIPT FLUSH under load goes unnoticed, and each item counts once`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("flush_\(EventID())")
        try await tracker.start(project)
        let items = 20_000
        try await tracker.seal(project, total: items)
        let finishes = try await withThrowingTaskGroup(of: Int.self) { group in
            for worker in 0..<50 {
                group.addTask {
                    var finishes = 0
                    for index in stride(from: worker, to: items, by: 50) {
                        let update = try await tracker.advance(project, item: .index(index), outcome: .success)
                        if update.didFinish { finishes += 1 }
                    }
                    return finishes
                }
            }
            group.addTask {
                for _ in 0..<10 {
                    let answer = try await redis("SCRIPT", "FLUSH")
                    #expect(answer == "OK")
                }
                return 0
            }
            return try await group.reduce(0, +)
        }
        #expect(finishes == 1)
        let progress = try #require(try await tracker.progress(of: project))
        #expect(progress.done == items && progress.errors == 0 && progress.status == .done)
        // Proof that the scripts were gone: the errors that Redis counted.
        #expect(try await redis("INFO", "errorstats").contains("errorstat_NOSCRIPT"))
        await store.close()
    }

    @Test func `the hash is what the siblings read, with a time to live that a pending finish suspends`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("hash_\(EventID())")
        let key = "smap:proj:\(project)"
        try await tracker.start(project)
        try await tracker.expect(2, of: project, batch: "a")
        try await tracker.advance(project, item: .named("x"), outcome: .failure)
        #expect(try await redis("HMGET", key, "status", "total", "done", "errors") == "CRAWLING\n2\n1\n1")
        #expect(try #require(Int(try await redis("TTL", key))) > 604_000)
        #expect(try #require(Int(try await redis("TTL", "{\(key)}:err"))) > 604_000)
        try await tracker.advance(project, item: .named("y"), outcome: .success)
        #expect(try await tracker.seal(project).didFinish)
        #expect(try await redis("TTL", key) == "-1")
        let finish = try #require(try await store.pendingFinishes(of: project, deadline: .now + .seconds(5)).first)
        #expect(try await store.clear(finish, deadline: .now + .seconds(5)))
        #expect(try #require(Int(try await redis("TTL", key))) > 604_000)
        await store.close()
    }

    @Test func `a hash that a sibling wrote is counted on, and one that it finished is not finished again`()
        async throws
    {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("sibling_\(EventID())")
        let key = "smap:proj:\(project)"
        _ = try await redis("HSET", key, "status", "PROCESSING", "total", "3", "done", "1", "errors", "0")
        let update = try await tracker.advance(project, item: .index(7), outcome: .success)
        #expect(update.verdict == .counted)
        #expect(update.progress.done == 2)
        _ = try await redis("HSET", key, "status", "DONE")
        #expect(try await tracker.advance(project, item: .index(8), outcome: .success).verdict == .counted)
        await #expect(throws: EventsError.self) { try await tracker.seal(project, total: 3) }
        #expect(try await store.pendingFinishes(of: project, deadline: .now + .seconds(5)).isEmpty)
        await store.close()
    }

    @Test(arguments: [
        ["done", "many"], ["total", "-1"], ["errors", "1e3"], ["done", "1234567890123456"], ["done", "007"],
    ])
    func `junk in a counter is a typed error, and nothing is written`(field: [String]) async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("junk_\(EventID())")
        let key = "smap:proj:\(project)"
        try await tracker.start(project)
        _ = try await redis("HSET", key, field[0], field[1])
        let before = try await redis("HGETALL", key)
        let error = await #expect(throws: EventsError.self) {
            try await tracker.advance(project, item: .index(0), outcome: .success)
        }
        #expect(error?.code == .corruptProgress)
        await #expect(throws: EventsError.self) { try await tracker.progress(of: project) }
        #expect(try await redis("HGETALL", key) == before)
        #expect(try await redis("EXISTS", "{\(key)}:ok") == "0")
        await store.close()
    }

    @Test func `when the memory of items is gone nothing counts twice`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("memory_\(EventID())")
        try await tracker.start(project)
        try await tracker.advance(project, item: .index(0), outcome: .success)
        _ = try await redis("DEL", "{smap:proj:\(project)}:ok")
        let update = try await tracker.advance(project, item: .index(0), outcome: .success)
        #expect(update.verdict == .memoryLost)
        #expect(update.progress.done == 1)
        await store.close()
    }

    @Test func `when a part of the memory is gone nothing counts twice either, batches included`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("part_\(EventID())")
        try await tracker.start(project)
        try await tracker.expect(5, of: project, batch: "all")
        try await tracker.advance(project, item: .index(0), outcome: .success)
        try await tracker.advance(project, item: .index(3), outcome: .failure)
        _ = try await redis("DEL", "{smap:proj:\(project)}:ok", "{smap:proj:\(project)}:batches")
        for (index, outcome) in [(0, ItemOutcome.success), (3, .success), (0, .success)] {
            let update = try await tracker.advance(project, item: .index(index), outcome: outcome)
            #expect(update.verdict == .memoryLost && update.progress.done == 2 && update.progress.errors == 1)
        }
        let error = await #expect(throws: EventsError.self) { try await tracker.expect(5, of: project, batch: "all") }
        #expect(error?.code == .corruptProgress)
        #expect(try await tracker.progress(of: project)?.total == 5)
        await store.close()
    }

    @Test func `a status that a sibling writes undoes neither a seal, a finish nor a cancellation`() async throws {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let (cancelled, done, foreign) = (
            try ProjectID("cancelled_\(EventID())"), try ProjectID("done_\(EventID())"),
            try ProjectID("foreign_\(EventID())")
        )
        try await tracker.start(cancelled)
        try await tracker.seal(cancelled, total: 1)
        try await tracker.cancel(cancelled)
        try await tracker.start(done)
        try await tracker.seal(done, total: 0)
        for project in [cancelled, done] { _ = try await redis("HSET", "smap:proj:\(project)", "status", "CRAWLING") }
        let update = try await tracker.advance(cancelled, item: .index(0), outcome: .success)
        #expect(update.verdict == .counted && update.progress.status == .failed)
        #expect(try await store.pendingFinishes(of: cancelled, deadline: .now + .seconds(5)).isEmpty)
        #expect(try await tracker.progress(of: done)?.status == .done)
        #expect(try await tracker.restart(cancelled, from: 1).verdict == .restarted)
        _ = try await redis("HSET", "smap:proj:\(foreign)", "status", "PROCESSING_WAIT", "total", "1")
        #expect(try await tracker.advance(foreign, item: .index(0), outcome: .success).didFinish)
        let late = try await tracker.advance(foreign, item: .index(7), outcome: .success)
        #expect(late.verdict == .unexpectedItem && late.progress.done == 1 && late.progress.isSealed)
        // The hash goes while the finish is pending: what is left of the family goes too.
        _ = try await redis("DEL", "smap:proj:\(foreign)")
        let finish = try #require(try await store.pendingFinishes(of: foreign, deadline: .now + .seconds(5)).first)
        #expect(try await store.clear(finish, deadline: .now + .seconds(5)))
        #expect(try #require(Int(try await redis("TTL", "{smap:proj:\(foreign)}:ok"))) > 0)
        await store.close()
    }

    @Test(.timeLimit(.minutes(10)))
    func `a million indexed items are remembered in little memory, each counts once, and the last one finishes`()
        async throws
    {
        let store = try await SharedStack.store()
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("million_\(EventID())")
        let total = 1_000_000
        try await tracker.start(project)
        try await tracker.seal(project, total: total)
        /// Every seventh comes twice, every hundredth fails.
        let verdicts = try await withThrowingTaskGroup(of: [ProgressUpdate.Verdict: Int].self) { group in
            for task in 0..<4 {
                group.addTask {
                    var verdicts: [ProgressUpdate.Verdict: Int] = [:]
                    for start in stride(from: task * 800, to: total, by: 3_200) {
                        let items = start..<min(start + 800, total)
                        let reports = items.flatMap { index in
                            let report = ItemReport(.index(index), index % 100 == 0 ? .failure : .success)
                            return index % 7 == 0 ? [report, report] : [report]
                        }
                        for verdict in try await tracker.advance(project, reports).items {
                            verdicts[verdict, default: 0] += 1
                        }
                    }
                    return verdicts
                }
            }
            return try await group.reduce(into: [:]) { $0.merge($1, uniquingKeysWith: +) }
        }
        #expect(verdicts[.finished] == 1 && verdicts[.counted] == total - 1, "\(verdicts)")
        let progress = try #require(try await tracker.progress(of: project))
        #expect(progress.status == .done && progress.done == total && progress.errors == total / 100)
        let keys = ["", "ok", "err", "finish"].map {
            $0.isEmpty ? "smap:proj:\(project)" : "{smap:proj:\(project)}:\($0)"
        }
        var bytes = 0
        for key in keys { bytes += Int(try await redis("MEMORY", "USAGE", key)) ?? 0 }
        print("a project of a million indexed items: \(bytes) bytes")
        // One bit for each outcome is 250,000; Redis makes room for more at a time.
        #expect((125_000...600_000).contains(bytes))
        await store.close()
    }

    @Test func `a key of another type is a typed error`() async throws {
        let store = try await SharedStack.store()
        let project = try ProjectID("type_\(EventID())")
        _ = try await redis("SET", "smap:proj:\(project)", "text")
        let error = await #expect(throws: EventsError.self) {
            try await ProgressTracker(store: store).advance(project, item: .index(0), outcome: .success)
        }
        #expect(error?.code == .corruptProgress)
        await store.close()
    }

    @Test(.timeLimit(.minutes(10)))
    func `when Redis is stopped every call ends by its deadline, and when it is back the store works again`()
        async throws
    {
        var options = LocalStack.Options()
        options.rabbitMQ = false
        try await LocalStack.withStack(options) { stack in
            let store = try RedisProgressStore(
                configuration: RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("stopped")
            try await tracker.start(project)
            let redis = try #require(stack.processIDs.first)
            #expect(kill(redis, SIGSTOP) == 0)
            let late = await overrun(.seconds(1)) {
                let error = await #expect(throws: EventsError.self) {
                    try await ProgressTracker(store: store, deadline: .seconds(1))
                        .advance(project, item: .index(0), outcome: .success)
                }
                #expect(error?.code == .deadlineExceeded)
            }
            #expect(late < .seconds(1))
            kill(redis, SIGCONT)
            // It had been carried out, or it is now: repeated, it counts once.
            let verdict = try await tracker.advance(project, item: .index(0), outcome: .success).verdict
            #expect(verdict == .duplicate || verdict == .counted)
            #expect(try await tracker.progress(of: project)?.done == 1)
            await store.close()
        }
    }
}
