import Foundation
import SMAPEvents
import SMAPRedis
import Testing

@testable import SMAPEventsTesting

/// Starts a sentinel that watches one master, over the ports as `port` and `settings` say.
func sentinel(_ port: String, of master: Int, _ settings: [String] = []) async throws -> LeashedProcess {
    let folder = FileManager.default.temporaryDirectory.appending(path: "smap-sentinel-\(UUID())/sentinel").path
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
    let file = "\(folder)/sentinel.conf"
    let lines =
        [
            port, "bind 127.0.0.1", "dir \(folder)", "sentinel monitor mymaster 127.0.0.1 \(master) 2",
            "sentinel down-after-milliseconds mymaster 1000", "sentinel failover-timeout mymaster 5000",
        ] + settings
    try lines.joined(separator: "\n").write(toFile: file, atomically: true, encoding: .utf8)
    // It removes its folder at the end.
    return try await LeashedProcess(
        ["redis-server", file, "--sentinel"], environment: [:], folder: folder, patience: 20)
}

@Suite struct SentinelTests {
    /// Runs `body` with the sentinels of a master and two replicas, and stops all of them afterwards.
    private func withTrio(
        _ body: @escaping @Sendable (_ master: LocalStack, _ sentinels: [Int]) async throws -> Void
    ) async throws {
        func options(_ arguments: [String]) -> LocalStack.Options {
            var options = LocalStack.Options()
            options.rabbitMQ = false
            options.redisArguments = arguments
            return options
        }
        try await LocalStack.withStack(options(["--repl-diskless-sync-delay", "0"])) { master in
            let of = options(["--replicaof", "127.0.0.1 \(master.redisPort)"])
            try await LocalStack.withStack(of) { _ in
                try await LocalStack.withStack(of) { _ in
                    // Ports that were free a moment ago: a sentinel has no other way to be given one.
                    try await LocalStack.withStack(options([])) { first in
                        try await LocalStack.withStack(options([])) { second in
                            try await LocalStack.withStack(options([])) { third in
                                let ports = [first, second, third].map { $0.redisPort }
                                for stack in [first, second, third] { await stack.stop() }
                                var sentinels: [LeashedProcess] = []
                                do {
                                    for port in ports {
                                        sentinels.append(try await sentinel("port \(port)", of: master.redisPort))
                                    }
                                    try await ready(master, ports)
                                    try await body(master, ports)
                                } catch {
                                    for sentinel in sentinels { await sentinel.stop() }
                                    throw error
                                }
                                for sentinel in sentinels { await sentinel.stop() }
                            }
                        }
                    }
                }
            }
        }
    }

    private func ready(_ master: LocalStack, _ sentinels: [Int]) async throws {
        try await eventually("both replicas have what the master has") {
            let said = try await Program.run("redis-cli", ["-p", "\(master.redisPort)", "INFO", "replication"])
            return said.output.split(separator: "state=online").count == 3
        }
        for port in sentinels {
            try await eventually("sentinel \(port) knows all") {
                let said = try await Program.run("redis-cli", ["-p", "\(port)", "SENTINEL", "MASTER", "mymaster"])
                    .output.split(separator: "\n")
                func value(_ key: Substring) -> Substring? { said.firstIndex(of: key).map { said[$0 + 1] } }
                return value("num-slaves") == "2" && value("num-other-sentinels") == "2"
            }
        }
    }

    @Test(.timeLimit(.minutes(10)), arguments: [false, true])
    func `a failover goes by, and what replication lost is counted when the items come again`(
        isSilent: Bool
    )
        async throws
    {
        try await withTrio { master, sentinels in
            var configuration = RedisConfiguration()
            // Nobody listens at the first.
            configuration.sentinels = ([1] + sentinels).map { .init(host: "127.0.0.1", port: $0) }
            let store = try RedisProgressStore(configuration: configuration)
            let tracker = ProgressTracker(store: store, deadline: .seconds(2))
            let project = try ProjectID("failover")
            let total = 20_000
            try await tracker.start(project)
            try await tracker.seal(project, total: total)
            let counted = Locked(0)
            let failures = Locked<[EventsError.Code: Int]>([:])
            /// As a queue does: a report that fails comes again.
            @Sendable func report(_ index: Int) async throws -> Bool {
                while true {
                    do {
                        let update = try await tracker.advance(project, item: .index(index), outcome: .success)
                        counted.withLock { $0 += 1 }
                        return update.didFinish
                    } catch let error as EventsError where error.isRetriable {
                        failures.withLock { $0[error.code, default: 0] += 1 }
                        // The pause of a retry.
                        try await Task.sleep(for: .milliseconds(50))
                    }
                }
            }
            @Sendable func reportAll() async throws -> Int {
                try await withThrowingTaskGroup { group in
                    for task in 0..<8 {
                        group.addTask {
                            var finishes = 0
                            for index in stride(from: task, to: total, by: 8) where try await report(index) {
                                finishes += 1
                            }
                            return finishes
                        }
                    }
                    return try await group.reduce(0, +)
                }
            }
            let end = ContinuousClock.now + .seconds(120)
            async let first = reportAll()
            try await eventually("half is counted") { counted.withLock { $0 } > total / 3 }
            if isSilent { master.suspend(.redis) } else { try await master.kill(.redis) }
            _ = try await first
            #expect(failures.withLock { !$0.isEmpty }, "the failover was noticed")
            let before = try #require(try await tracker.progress(of: project))
            #expect(before.done <= total)
            // The new master has what had reached it; the rest comes again.
            _ = try await reportAll()
            #expect(ContinuousClock.now < end)
            let after = try #require(try await tracker.progress(of: project))
            #expect(after.done == total && after.status == .done)
            let finishes = try await store.pendingFinishes(of: project, deadline: .now + .seconds(5))
            #expect(finishes.map(\.eventID) == [try #require(after.finishEventID)])
            #expect(finishes.first?.eventID == after.finishEventID)
            if isSilent { master.resume(.redis) }
            await store.close()
        }
    }

    @Test func `without a sentinel that answers the error names each`() async throws {
        var configuration = RedisConfiguration(password: "s3cret")
        configuration.sentinels = [.init(host: "127.0.0.1", port: 1), .init(host: "::1", port: 2)]
        let store = try RedisProgressStore(configuration: configuration)
        let error = await #expect(throws: EventsError.self) {
            try await ProgressTracker(store: store).start(ProjectID("nowhere"))
        }
        #expect(error?.code == .connectionFailed)
        let text = "\(String(describing: error))"
        #expect(text.contains("127.0.0.1:1") && text.contains("[::1]:2") && !text.contains("s3cret"), "\(text)")
        await store.close()
    }
}
