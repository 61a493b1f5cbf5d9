import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRedis
import Synchronization
import Testing

/// A publisher that only remembers what it was given.
final class Ledger: EventPublishing {
    let events = Mutex<[(project: ProjectID?, id: EventID?)]>([])
    let isDown = Mutex(false)
    let attempts = Mutex(0)

    func declareExchanges() async throws {}
    func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
        throw EventsError(.invalidEvent, "not here", operation: "publish")
    }
    func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
        attempts.withLock { $0 += 1 }
        if isDown.withLock({ $0 }) { throw EventsError(.unsent, "the broker is away", operation: "publish") }
        events.withLock { $0.append((event.projectID, options.eventID)) }
        return PublishReceipt(eventID: options.eventID ?? EventID(), routingKey: event.routingKey, legs: [])
    }
}

/// The tracker beside siblings, and what looks at all projects: each test in a Redis database of its own.
@Suite(.timeLimit(.minutes(10))) struct ProgressTests {
    private func withStore(
        _ database: Int,
        _ body: (RedisProgressStore, _ redis: @Sendable (String...) async throws -> String) async throws
            -> Void
    ) async throws {
        let port = try await SharedStack.current.redisPort
        let redis: @Sendable (String...) async throws -> String = { (arguments: String...) in
            let result = try await Program.run("redis-cli", ["-p", "\(port)", "-n", "\(database)"] + arguments)
            return result.output.trimmingCharacters(in: .whitespacesAndNewlines)
        }
        try await RedisProgressStore.withStore(
            configuration: RedisConfiguration(host: "127.0.0.1", port: port, database: database)
        ) { try await body($0, redis) }
    }

    @Test func `a sibling in Python counts on the same hash: no count is lost, and there is one finish`() async throws {
        try await withStore(4) { store, redis in
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("mixed_\(EventID())")
            try await tracker.start(project)
            try await tracker.seal(project, total: 500)
            let port = try await SharedStack.current.redisPort
            let finishes = try await withThrowingTaskGroup(of: Int.self) { group in
                group.addTask {
                    let sibling = try await Program.run(
                        Program.python, [Program.script("sibling"), "\(port)", "4", "\(project)", "180", "20", "500"])
                    #expect(sibling.status == 0, "\(sibling.error)")
                    return 0
                }
                for start in 0..<3 {
                    group.addTask {
                        var finishes = 0
                        for index in stride(from: start, to: 300, by: 3) {
                            let outcome: ItemOutcome = index % 10 == 0 ? .failure : .success
                            let update = try await tracker.advance(project, item: .index(index), outcome: outcome)
                            if update.didFinish { finishes += 1 }
                        }
                        return finishes
                    }
                }
                return try await group.reduce(0, +)
            }
            let before = try #require(try await tracker.progress(of: project))
            #expect(before.done == 500 && before.errors == 50 && before.total == 500)
            // Whoever was last: if that was the sibling, a sweep finds it.
            let ledger = Ledger()
            let finishLine = FinishLine(store: store, publisher: ledger)
            try await finishLine.sweep()
            try await finishLine.sweep()
            #expect(finishes <= 1)
            let ids = ledger.events.withLock { $0.filter { $0.project == project }.compactMap(\.id) }
            #expect(Set(ids).count == 1 && ids.count == 1, "one event")
            #expect(try await redis("HGET", "smap:proj:\(project)", "status") == "DONE")
            #expect(try await redis("GET", "smap:proj:\(project):user") == "somebody")
        }
    }

    @Test func `a project that a sibling moved past its line is finished by a sweep`() async throws {
        try await withStore(5) { store, redis in
            let tracker = ProgressTracker(store: store)
            let ledger = Ledger()
            let told = Locked<[ProjectID]>([])
            let finishLine = FinishLine(store: store, publisher: ledger) { finish in
                told.withLock { $0.append(finish.project) }
            }
            let (flat, staged) = (try ProjectID("past_flat"), try ProjectID("past_staged"))
            try await tracker.start(flat)
            try await tracker.seal(flat, total: 2)
            _ = try await redis(
                "HSET", "smap:proj:\(staged)", "status", "PROCESSING_WAIT", "crawl_total", "2", "crawl_done", "2",
                "analyze_total", "2", "analyze_done", "1", "analyze_errors", "1")
            #expect(try await tracker.progress(of: staged)?.layout == .stages)
            #expect(try await finishLine.sweep() == 1)
            _ = try await redis("HINCRBY", "smap:proj:\(flat)", "done", "2")
            #expect(try await finishLine.sweep() == 1)
            #expect(try await finishLine.sweep() == 0)
            #expect(ledger.events.withLock { $0.map(\.project) } == [staged, flat])
            #expect(told.withLock { $0 } == [staged, flat])
            #expect(try await tracker.progress(of: flat)?.status == .done)
        }
    }

    @Test func `reconcile finds what is wrong, mends what is safe, and says so`() async throws {
        try await withStore(6) { store, redis in
            let tracker = ProgressTracker(store: store)
            func project(_ name: String, total: Int) async throws -> ProjectID {
                let id = try ProjectID(name)
                try await tracker.start(id)
                try await tracker.advance(id, item: .index(0), outcome: .success)
                try await tracker.seal(id, total: total)
                return id
            }
            let past = try await project("past", total: 3)
            _ = try await redis("HINCRBY", "smap:proj:past", "done", "2")
            let pending = try await project("pending", total: 1)
            let eternal = try await project("eternal", total: 2)
            _ = try await redis("PERSIST", "smap:proj:eternal")
            let lost = try await project("lost", total: 2)
            _ = try await redis("DEL", "{smap:proj:lost}:ok")
            let orphan = try await project("orphan", total: 2)
            _ = try await redis("DEL", "smap:proj:orphan")
            _ = try await redis("PERSIST", "{smap:proj:orphan}:ok")
            let junk = try await project("junk", total: 2)
            _ = try await redis("HSET", "smap:proj:junk", "total", "many")
            let string = try ProjectID("string")
            _ = try await redis("SET", "smap:proj:string", "text")
            _ = try await redis("SET", "smap:proj:past:user", "not a project")
            _ = try await project("fine", total: 2)
            let stuck = try await project("stuck", total: 2)
            _ = try await redis("EXPIRE", "smap:proj:stuck", "10000")

            func all(isDryRun: Bool) async throws -> [ProjectID: ProjectFindings] {
                var found: [ProjectID: ProjectFindings] = [:]
                let count = try await tracker.reconcileAll(isDryRun: isDryRun) { found[$0] = $1 }
                #expect(count == 9)
                return found
            }
            let expected: [ProjectID: [ProjectFindings.Finding]] = [
                past: [.pastTheLine], pending: [.finishPending], eternal: [.noTimeToLive], lost: [.memoryLost],
                orphan: [.itemsWithoutProject], junk: [.corrupt], string: [.corrupt], stuck: [.stuck],
            ]
            for _ in 1...2 {
                let dry = try await all(isDryRun: true)
                #expect(dry.mapValues(\.findings) == expected)
            }
            #expect(try await redis("TTL", "smap:proj:eternal") == "-1", "a dry run changes nothing")
            let mended = try await all(isDryRun: false)
            #expect(mended.mapValues(\.findings) == expected)
            #expect(
                mended.filter { !$0.value.mended.isEmpty }.keys.sorted { "\($0)" < "\($1)" } == [eternal, orphan, past])
            #expect(try #require(Int(try await redis("TTL", "smap:proj:eternal"))) > 600_000)
            #expect(try #require(Int(try await redis("TTL", "{smap:proj:orphan}:ok"))) > 600_000)
            var left = expected
            left[past] = [.finishPending]
            left[eternal] = nil
            #expect(try await all(isDryRun: false).mapValues(\.findings) == left)
            #expect(try await store.pendingFinishes(of: past, deadline: .now + .seconds(5)).count == 1)
        }
    }

    @Test func `a thousand watchers share one subscription, hear of each percent, and survive its loss`() async throws {
        let port = try await SharedStack.current.redisPort
        var configuration = RedisConfiguration(host: "127.0.0.1", port: port, database: 8)
        // So that what is heard is heard by message.
        configuration.watchInterval = .seconds(3600)
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("watched_\(EventID())")
            let channel = "{smap:proj:\(project)}:progress"
            func subscribers() async throws -> String? {
                let said = try await Program.run("redis-cli", ["-p", "\(port)", "PUBSUB", "NUMSUB", channel])
                return said.output.split(separator: "\n").last.map(String.init)
            }
            try await tracker.start(project)
            try await tracker.seal(project, total: 100)
            let begun = Locked(0)
            let seen = Locked(0)
            try await withThrowingTaskGroup { group in
                for _ in 0..<1_000 {
                    group.addTask {
                        var isFirst = true
                        for try await progress in tracker.watch(project) {
                            if isFirst { begun.withLock { $0 += 1 } }
                            isFirst = false
                            if progress.done == 1 { seen.withLock { $0 += 1 } }
                        }
                    }
                }
                try await eventually("all watch") { begun.withLock { $0 } == 1_000 }
                #expect(try await subscribers() == "1")
                try await tracker.advance(project, item: .index(0), outcome: .success)
                try await eventually("all hear of it") { seen.withLock { $0 } == 1_000 }
                for index in 1..<100 { try await tracker.advance(project, item: .index(index), outcome: .success) }
                try await group.waitForAll()
            }
            try await eventually("nobody listens any more") { try await subscribers() == "0" }
        }
        // Its connection is cut: the next look subscribes anew.
        configuration.watchInterval = .milliseconds(200)
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("cut_\(EventID())")
            try await tracker.start(project)
            try await tracker.seal(project, total: 1)
            try await withThrowingTaskGroup(of: Int.self) { group in
                group.addTask { try await tracker.watch(project).reduce(0) { _, progress in progress.done } }
                func listeners() async throws -> [Substring] {
                    try await Program.run("redis-cli", ["-p", "\(port)", "CLIENT", "LIST", "TYPE", "pubsub"]).output
                        .split(separator: "\n").filter { $0.contains(" db=8 ") }
                }
                try await eventually("it listens") { try await !listeners().isEmpty }
                let id = try #require(try await listeners().first?.split(separator: " ").first?.dropFirst(3))
                _ = try await Program.run("redis-cli", ["-p", "\(port)", "CLIENT", "KILL", "ID", String(id)])
                try await eventually("it listens again") {
                    try await listeners().contains { !$0.hasPrefix("id=\(id) ") }
                }
                try await tracker.advance(project, item: .index(0), outcome: .success)
                #expect(try await group.next() == 1)
            }
        }
    }

    /// As the README documents them.
    private static func permissions() throws -> [String] {
        let readme = try String(contentsOfFile: Program.repository + "/README.md", encoding: .utf8)
        let start = try #require(readme.range(of: "redis-cli ACL SETUSER tracker on '>password' "))
        let end = try #require(readme[start.upperBound...].range(of: "```"))
        return readme[start.upperBound..<end.lowerBound].filter { $0 != "'" && $0 != "\\" }
            .split(whereSeparator: \.isWhitespace).map(String.init)
    }

    @Test func `a user with just the documented permissions can do it all; one fewer is a typed, permanent error`()
        async throws
    {
        let port = try await SharedStack.current.redisPort
        let name = "user_\(UUID())"
        let documented = try Self.permissions()
        #expect(documented.count > 20)
        func grant(_ permissions: [String]) async throws {
            let said = try await Program.run(
                "redis-cli", ["-p", "\(port)", "ACL", "SETUSER", name, "reset", "on", ">s3cret"] + permissions)
            #expect(said.output.hasPrefix("OK"), "\(said.output)")
        }
        var configuration = RedisConfiguration(host: "127.0.0.1", port: port, password: "s3cret", database: 9)
        configuration.username = name
        configuration.watchInterval = .seconds(3600)
        try await grant(documented)
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let tracker = ProgressTracker(store: store)
            for (project, layout) in [(try ProjectID("acl_i"), ProgressLayout.flat), (try ProjectID("acl_n"), .stages)]
            {
                try await tracker.start(project, layout: layout)
                try await tracker.expect(1, of: project, batch: "all")
                let item = layout == .flat ? ItemReference.index(0) : .named("a")
                try await tracker.advance(project, item: item, outcome: .failure)
                let heard = Task { try await tracker.watch(project).reduce(0) { _, progress in progress.done } }
                try await tracker.advance(project, item: item, outcome: .success)
                if layout == .stages {
                    try await tracker.advance(project, item: item, outcome: .success, stage: .analyze)
                }
                try await tracker.seal(project)
                #expect(try await heard.value == (layout == .flat ? 1 : 2))
                for finish in try await store.pendingFinishes(of: project, deadline: .now + .seconds(5)) {
                    #expect(try await store.clear(finish, deadline: .now + .seconds(5)))
                }
                try await tracker.restart(project, from: 1)
                try await tracker.cancel(project)
            }
            #expect(try await store.pendingFinishes(limit: 1, deadline: .now + .seconds(5)).isEmpty)
            #expect(try await tracker.reconcileAll { _, _ in } == 2)
            #expect(await store.health().isHealthy)
        }
        try await grant(documented + ["~smap:inbox:*", "+get", "+set", "+pttl"])
        let inbox = try RedisInbox(configuration: configuration)
        for check in InboxContract.checks { try await check.run(inbox) }
        await inbox.close()
        let project = try ProjectID("acl_denied")
        for denied in ["-evalsha", "-hmget", "-hset", "-select"] {
            try await grant(documented + [denied])
            try await RedisProgressStore.withStore(configuration: configuration) { store in
                let error = await #expect(throws: EventsError.self) {
                    try await ProgressTracker(store: store).start(project)
                }
                #expect(
                    error?.code == .accessRefused && error?.isRetriable == false,
                    "\(denied): \(String(describing: error))")
            }
        }
        configuration.replicas = 1
        configuration.replicaTimeout = .milliseconds(100)
        try await grant(documented)
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let error = await #expect(throws: EventsError.self) {
                try await ProgressTracker(store: store).start(project)
            }
            #expect(error?.code == .accessRefused && error?.isRetriable == false)
            try await grant(documented + ["+wait"])
            let update = try await ProgressTracker(store: store).start(project)
            #expect(update.verdict == .started, "it was refused before anything was written")
            #expect(update.replicas == 0)
        }
        configuration.password = "wrong"
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let error = await #expect(throws: EventsError.self) {
                try await ProgressTracker(store: store).start(project)
            }
            #expect(error?.code == .accessRefused && "\(String(describing: error))".contains("wrong") == false)
        }
        _ = try await Program.run("redis-cli", ["-p", "\(port)", "ACL", "DELUSER", name])
    }

    @Test func `a project lives on while it is updated, and goes with its family when it is idle`() async throws {
        let port = try await SharedStack.current.redisPort
        var configuration = RedisConfiguration(host: "127.0.0.1", port: port, database: 10)
        configuration.timeToLive = .seconds(6)
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("idle")
            try await tracker.start(project)
            try await tracker.expect(1_000_000, of: project, batch: "all")
            let start = ContinuousClock.now
            var index = 0
            // Longer than it would live if it were left alone.
            while ContinuousClock.now - start < .seconds(9) {
                try await tracker.advance(project, item: .index(index), outcome: index == 0 ? .failure : .success)
                index += 1
                try await Task.sleep(for: .milliseconds(20))
            }
            #expect(try await tracker.progress(of: project)?.done == index)
            try await eventually("it goes") { try await tracker.progress(of: project) == nil }
            try await eventually("nothing is left of it") {
                try await Program.run("redis-cli", ["-p", "\(port)", "-n", "10", "DBSIZE"]).output.hasPrefix("0")
            }
            let error = await #expect(throws: EventsError.self) {
                try await tracker.advance(project, item: .index(index), outcome: .success)
            }
            #expect(error?.code == .unknownProject)
            #expect(try await store.projects(after: nil, deadline: .now + .seconds(5)).projects.isEmpty)
        }
    }

    @Test func `while the broker is away sweeps become rarer, and what is pending goes out when it is back`()
        async throws
    {
        try await withStore(7) { store, _ in
            let ledger = Ledger()
            ledger.isDown.withLock { $0 = true }
            let configuration = FinishLine.Configuration(
                interval: .milliseconds(20), longestInterval: .milliseconds(400))
            let finishLine = FinishLine(store: store, publisher: ledger, configuration: configuration)
            let tracker = ProgressTracker(store: store, finishLine: finishLine)
            for name in ["a", "b", "c"] {
                let id = try ProjectID(name)
                try await tracker.start(id)
                try await tracker.seal(id, total: 0)
            }
            try await withThrowingTaskGroup { group in
                group.addTask { await finishLine.run() }
                defer { group.cancelAll() }
                let start = ContinuousClock.now
                try await eventually("six attempts") { ledger.attempts.withLock { $0 } >= 6 }
                // 20, 40, 80, 160, 320 ms, less a quarter, lie between six attempts; without a back-off 100 ms do.
                #expect(ContinuousClock.now - start > .milliseconds(300))
                ledger.isDown.withLock { $0 = false }
                try await eventually("all go out") { ledger.events.withLock { $0.count } == 3 }
                // And no longer: what is decided now goes out at once.
                let id = try ProjectID("d")
                try await tracker.start(id)
                try await tracker.seal(id, total: 0)
                try await eventually("the fourth") { ledger.events.withLock { $0.count } == 4 }
            }
        }
    }
}
