import Foundation
import SMAPEvents
import SMAPRedis
import Synchronization
import Testing

@testable import SMAPEventsTesting

/// The tracker on servers in every condition: each test has a Redis of its own.
@Suite(.timeLimit(.minutes(10))) struct RedisServerTests {
    private func withRedis(
        _ arguments: [String], _ body: (LocalStack, RedisProgressStore) async throws -> Void
    ) async throws {
        var options = LocalStack.Options()
        options.rabbitMQ = false
        options.redisArguments = arguments
        try await LocalStack.withStack(options) { stack in
            let store = try RedisProgressStore(
                configuration: RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
            try await body(stack, store)
            await store.close()
        }
    }

    @Test func `a server that may lose what it holds is warned of`() async throws {
        var options = LocalStack.Options()
        options.rabbitMQ = false
        try await LocalStack.withStack(options) { stack in
            let store = try RedisProgressStore(
                configuration: RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
            func set(_ setting: String, _ value: String) async throws {
                _ = try await Program.run("redis-cli", ["-p", "\(stack.redisPort)", "CONFIG", "SET", setting, value])
            }
            try await set("appendonly", "yes")
            #expect(await store.health().warnings.isEmpty)
            try await set("appendonly", "no")
            try await set("maxmemory-policy", "allkeys-lru")
            let health = await store.health()
            #expect(health.isHealthy)
            #expect(health.warnings.map { $0.contains("appendonly") || $0.contains("allkeys-lru") } == [true, true])
            await store.close()
        }
    }

    private func cli(_ stack: LocalStack, _ arguments: String...) async throws -> String {
        let result = try await Program.run("redis-cli", ["-p", "\(stack.redisPort)"] + arguments)
        return result.output + result.error
    }

    @Test func `a server that cannot work now is waited out, up to the deadline, and is not healthy`() async throws {
        // While it loads it looks at its clients every 1,024 commands, which then takes a third of a second.
        // All is written before it is answered; `everysec` may put that off while the disk is slow.
        let arguments = [
            "--appendonly", "yes", "--appendfsync", "no", "--busy-reply-threshold", "20", "--key-load-delay", "300",
        ]
        try await withRedis(arguments) { stack, store in
            let tracker = ProgressTracker(store: store, deadline: .seconds(30))
            let impatient = ProgressTracker(store: store, deadline: .milliseconds(300))
            let project = try ProjectID("waits")
            try await tracker.start(project)
            try await tracker.seal(project, total: 800)
            for index in 0..<798 {
                try await tracker.advance(project, item: .index(index), outcome: .success)
            }
            async let script = cli(stack, "EVAL", "while true do end", "0")
            try await eventually("it is busy") { try await cli(stack, "PING").contains("BUSY") }
            #expect(await store.health().problems.contains { $0.contains("BUSY") })
            let error = await #expect(throws: EventsError.self) {
                try await impatient.advance(project, item: .index(798), outcome: .success)
            }
            // The deadline may pass while the server is asked once more.
            #expect([.storeUnavailable, .deadlineExceeded].contains(error?.code) && error?.isRetriable == true)
            async let patient = tracker.advance(project, item: .index(798), outcome: .success)
            #expect(try await cli(stack, "SCRIPT", "KILL").contains("OK"))
            #expect(try await patient.verdict == .counted)
            _ = try await script

            try await stack.kill(.redis)
            async let restart: Void = stack.restart(.redis)
            try await eventually("it loads") { try await cli(stack, "PING").contains("LOADING") }
            #expect(try await tracker.advance(project, item: .index(799), outcome: .success).didFinish)
            try await restart
        }
    }

    @Test func `a server that is gone without a word is given up, and the next call finds it where it is now`()
        async throws
    {
        try await FaultProxy.withProxy(to: try await SharedStack.current.redisPort) { proxy in
            var configuration = RedisConfiguration(host: "127.0.0.1", port: proxy.port)
            configuration.connections = 1
            configuration.silenceLimit = .seconds(3)
            try await RedisProgressStore.withStore(configuration: configuration) { store in
                let tracker = ProgressTracker(store: store, deadline: .seconds(20))
                let project = try ProjectID("silent_\(EventID())")
                try await tracker.start(project)
                // An idle connection is not a silent one.
                try await Task.sleep(for: .milliseconds(3_500))
                try await tracker.expect(10, of: project, batch: "all")
                #expect(proxy.acceptedCount == 1)
                proxy.fault = .stall
                let errors = await withTaskGroup(of: (any Error)?.self) { group in
                    for index in 0..<10 {
                        group.addTask {
                            do {
                                try await tracker.advance(project, item: .index(index), outcome: .success)
                                return nil
                            } catch { return error }
                        }
                    }
                    return await group.reduce(into: []) { $0.append($1 as? EventsError) }
                }
                // Long before their deadline.
                #expect(errors.allSatisfy { $0?.code == .connectionLost && $0?.isRetriable == true }, "\(errors)")
                proxy.fault = .none
                for index in 0..<10 {
                    try await tracker.advance(project, item: .index(index), outcome: .success)
                }
                #expect(try await tracker.progress(of: project)?.done == 10)
            }
        }
    }

    @Test func `an update tells how many replicas have it, and waits no longer for one that is away`() async throws {
        try await withRedis(["--repl-diskless-sync-delay", "0"]) { master, _ in
            var options = LocalStack.Options()
            options.rabbitMQ = false
            options.redisArguments = ["--replicaof", "127.0.0.1 \(master.redisPort)"]
            try await LocalStack.withStack(options) { replica in
                var configuration = RedisConfiguration(host: "127.0.0.1", port: master.redisPort)
                configuration.connections = 1
                configuration.replicas = 1
                configuration.replicaTimeout = .seconds(2)
                try await RedisProgressStore.withStore(configuration: configuration) { store in
                    let project = try ProjectID("replicated")
                    // A deadline in which three or four `WAIT`s end that nobody answers.
                    let tracker = ProgressTracker(store: store, deadline: .seconds(8))
                    try await eventually("the replica answers") { try await tracker.start(project).replicas == 1 }
                    try await tracker.expect(400, of: project, batch: "all")
                    func advance(_ items: Range<Int>) async throws -> [ProgressUpdate] {
                        try await withThrowingTaskGroup(of: ProgressUpdate.self) { group in
                            for index in items {
                                group.addTask {
                                    try await tracker.advance(project, item: .index(index), outcome: .success)
                                }
                            }
                            return try await group.reduce(into: []) { $0.append($1) }
                        }
                    }
                    let replicated = try await advance(0..<200)
                    #expect(replicated.allSatisfy { $0.verdict == .counted && $0.replicas == 1 })
                    replica.suspend(.redis)
                    let alone = try await advance(200..<400)
                    replica.resume(.redis)
                    #expect(alone.allSatisfy { $0.verdict == .counted && $0.replicas == 0 })
                    #expect(try await tracker.progress(of: project)?.done == 400)
                    #expect(try await tracker.advance(project, item: .index(0), outcome: .success).replicas == 1)

                    // Not to be told of replicas is no reason to be told that it failed.
                    replica.suspend(.redis)
                    let hurried = ProgressTracker(store: store, deadline: .seconds(1))
                    let update = try await hurried.advance(project, item: .index(400), outcome: .success)
                    replica.resume(.redis)
                    #expect(update.verdict == .counted && update.replicas == 0)
                }
            }
        }
    }

    @Test func `what a Redis with append-only on has answered is there after kill -9`() async throws {
        try await withRedis(["--appendonly", "yes", "--appendfsync", "always"]) { stack, store in
            let tracker = ProgressTracker(store: store, deadline: .seconds(5))
            let project = try ProjectID("killed")
            try await tracker.start(project)
            try await tracker.seal(project, total: 5_000)
            let answered = Locked<Set<Int>>([])
            let failed = Locked(0)
            try await withThrowingTaskGroup { group in
                for task in 0..<8 {
                    group.addTask {
                        for index in stride(from: task, to: 5_000, by: 8) {
                            do {
                                try await tracker.advance(project, item: .index(index), outcome: .success)
                                answered.withLock { _ = $0.insert(index) }
                            } catch let error as EventsError where error.isRetriable {
                                failed.withLock { $0 += 1 }
                                return
                            }
                        }
                    }
                }
                try await eventually("it counts") { answered.withLock { $0.count } > 1_000 }
                try await stack.kill(.redis)
                try await group.waitForAll()
            }
            #expect(failed.withLock { $0 } == 8, "each of them noticed")
            try await stack.restart(.redis)
            let known = answered.withLock { $0 }
            // Nothing that was answered counts again; what was under way may have been counted or not.
            for index in known.sorted() {
                let update = try await tracker.advance(project, item: .index(index), outcome: .success)
                #expect(update.verdict == .duplicate)
            }
            let done = try #require(try await tracker.progress(of: project)?.done)
            #expect(done >= known.count && done <= known.count + 8)
            for index in 0..<5_000 { try await tracker.advance(project, item: .index(index), outcome: .success) }
            #expect(try await tracker.progress(of: project)?.status == .done)
        }
    }

    @Test func `a Redis that is full refuses before anything is written, and goes on when there is room`() async throws
    {
        try await withRedis([]) { stack, store in
            func limit(_ value: String) async throws {
                _ = try await Program.run(
                    "redis-cli", ["-p", "\(stack.redisPort)", "CONFIG", "SET", "maxmemory", value])
            }
            let tracker = ProgressTracker(store: store)
            let project = try ProjectID("full")
            try await tracker.start(project)
            try await tracker.seal(project, total: 2)
            try await tracker.advance(project, item: .index(0), outcome: .success)
            let other = try ProjectID("empty")
            try await tracker.start(other)
            try await tracker.seal(other, total: 0)
            try await limit("1")
            let error = await #expect(throws: EventsError.self) {
                try await tracker.advance(project, item: .index(1), outcome: .success)
            }
            #expect(error?.code == .storeFull && error?.isRetriable == true)
            #expect(await store.health().problems.contains { $0.contains("memory is full") })
            #expect(try await tracker.progress(of: project)?.done == 1, "reading goes on")
            // What is pending is published, and clearing it gives room; what cannot be looked at holds nothing back.
            let foreign = try ProjectID("foreign")
            try await limit("0")
            _ = try await Program.run(
                "redis-cli",
                ["-p", "\(stack.redisPort)", "-n", "1", "HSET", "smap:proj:\(foreign)", "status", "PROCESSING_WAIT"])
            try await limit("1")
            let ledger = Ledger()
            let finishLine = FinishLine(store: store, publisher: ledger)
            #expect(try await finishLine.sweep() == 1)
            #expect(ledger.events.withLock { $0.map(\.project) } == [other])
            #expect(try await store.pendingFinishes(limit: 10, deadline: .now + .seconds(5)).isEmpty)
            try await limit("0")
            #expect(try await finishLine.sweep() == 1, "the one that a sibling sealed")
            #expect(try await tracker.advance(project, item: .index(1), outcome: .success).didFinish)
        }
    }

    @Test func `when the master becomes a replica calls wait until there is one, and no item is counted twice`()
        async throws
    {
        try await withRedis([]) { stack, store in
            func replicate(_ of: String...) async throws {
                _ = try await Program.run("redis-cli", ["-p", "\(stack.redisPort)", "REPLICAOF"] + of)
            }
            let tracker = ProgressTracker(store: store, deadline: .seconds(60))
            let project = try ProjectID("demoted")
            try await tracker.start(project)
            try await tracker.seal(project, total: 10_000)
            let failures = Locked<[EventsError]>([])
            let counted = Locked(0)
            try await withThrowingTaskGroup { group in
                for task in 0..<32 {
                    group.addTask {
                        for index in stride(from: task, to: 10_000, by: 32) {
                            do {
                                try await tracker.advance(project, item: .index(index), outcome: .success)
                                counted.withLock { $0 += 1 }
                            } catch let error as EventsError {
                                failures.withLock { $0.append(error) }
                            }
                        }
                    }
                }
                try await eventually("it counts") { counted.withLock { $0 } > 500 }
                try await replicate("127.0.0.1", "1")
                let impatient = ProgressTracker(store: store, deadline: .milliseconds(300))
                let refused = await #expect(throws: EventsError.self) {
                    while true { try await impatient.advance(project, item: .index(0), outcome: .success) }
                }
                #expect(refused?.isRetriable == true, "\(refused as Any)")
                #expect(await store.health().problems.contains { $0.contains("replica") })
                try await replicate("NO", "ONE")
                try await group.waitForAll()
            }
            // Behind the address there may be another master by now: a connection to a replica is not used again.
            try await FaultProxy.withProxy(to: stack.redisPort) { proxy in
                var configuration = RedisConfiguration(host: "127.0.0.1", port: proxy.port)
                configuration.connections = 1
                try await RedisProgressStore.withStore(configuration: configuration) { store in
                    let tracker = ProgressTracker(store: store, deadline: .seconds(60))
                    try await tracker.advance(project, item: .index(0), outcome: .success)
                    #expect(proxy.acceptedCount == 1)
                    let start = ContinuousClock.now
                    try await replicate("127.0.0.1", "1")
                    try await withThrowingTaskGroup { group in
                        for _ in 0..<200 {
                            group.addTask {
                                try await tracker.advance(project, item: .index(0), outcome: .success)
                            }
                        }
                        try await eventually("it connects anew") { proxy.acceptedCount > 3 }
                        try await replicate("NO", "ONE")
                        try await group.waitForAll()
                    }
                    // However many wait, one at a time connects, and pauses.
                    let pauses = (ContinuousClock.now - start) / .milliseconds(100)
                    #expect(Double(proxy.acceptedCount) <= pauses + 2)
                }
            }
            #expect(failures.withLock { $0 }.isEmpty, "all waited for it to be a master again")
            for index in 0..<10_000 { try await tracker.advance(project, item: .index(index), outcome: .success) }
            #expect(try await tracker.progress(of: project)?.status == .done)
        }
    }
}
