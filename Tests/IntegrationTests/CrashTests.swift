import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis
import Subprocess
import Testing

@Suite struct CrashTests {
    private struct Item: SMAPEvent {
        static let routingKey: RoutingKey = "counter.item"
        var project: String
        var number: Int
    }

    private struct Finish: Decodable {
        var id: String
        var total: Int
        var done: Int
        var errors: Int
    }

    private static let points = ["before-script", "after-script", "decided", "unpublished", "published", "confirmed"]

    /// Servers of its own: its workers' finish lines sweep whatever there is.
    @Test(.timeLimit(.minutes(10)))
    func `workers killed at every point and at random count each item once, and each project has one finish event`()
        async throws
    {
        let (deaths, randomKills, workers, total) = (20, 100, 3, 10_000)
        // Each project is decided once, so there are as many more as deaths are wanted there.
        let projects = ["big"] + (1...deaths + 5).map { "small_\($0)" }
        let totals = Dictionary(uniqueKeysWithValues: projects.map { ($0, $0 == "big" ? total : 20) })
        try await LocalStack.withStack { stack in
            let folder = FileManager.default.temporaryDirectory.appending(path: "smap-crash-\(UUID())").path
            try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
            defer { try? FileManager.default.removeItem(atPath: folder) }
            let environment = stack.environment
            let store = try RedisProgressStore(
                configuration: RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
            let tracker = ProgressTracker(store: store)
            let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: stack.rabbitMQURL))
            let publisher = EventPublisher(
                transport: transport, configuration: PublisherConfiguration(service: "test"))
            let subscription = EventSubscription(queue: "counter.items", bindings: ["counter.item"])
            try await publisher.declareExchanges()
            try await subscription.topology.apply(to: transport)
            for (project, total) in totals {
                try await tracker.start(ProjectID(project))
                try await tracker.seal(ProjectID(project), total: total)
            }
            func send(_ items: [Item]) async throws {
                try await withThrowingTaskGroup { group in
                    for item in items { group.addTask { try await publisher.publish(item) } }
                    try await group.waitForAll()
                }
            }
            func hits(_ point: String) -> Int {
                (try? FileManager.default.attributesOfItem(atPath: "\(folder)/\(point)")[.size] as? Int) ?? 0
            }
            func isOver() async throws -> Bool {
                for project in projects {
                    guard try await tracker.progress(of: ProjectID(project))?.status == .done else { return false }
                }
                let queue = try await transport.status(of: subscription.queue, deadline: .now + .seconds(20))
                guard queue.messages == 0 else { return false }
                return try await store.pendingFinishes(limit: 1, deadline: .now + .seconds(20)).isEmpty
            }

            /// False where it has not begun, or has just died.
            func signal(_ signal: Int32, worker: Int) -> Bool {
                guard let text = try? String(contentsOfFile: "\(folder)/pid-\(worker)", encoding: .utf8),
                    let process = pid_t(text.trimmingCharacters(in: .whitespacesAndNewlines))
                else { return false }
                return kill(process, signal) == 0
            }

            let isEnding = Locked(false)
            let running = Locked(workers)
            let killed = Locked(0)
            let observed = try await Subprocess.run(
                .name("sh"),
                arguments: Arguments(["-c", "exec \"$@\"", "test", Program.python, Program.script("finishes")]),
                environment: .inherit.updating(Program.changes(environment)), input: .inputWriter, output: .sequence,
                error: .discarded
            ) { observer in
                var last = ""
                for try await line in observer.standardOutput.strings() {
                    last = line.trimmingCharacters(in: .newlines)
                    guard last == "ready" else { continue }
                    try await withThrowingTaskGroup { group in
                        for worker in 1...workers {
                            group.addTask {
                                defer { running.withLock { $0 -= 1 } }
                                // Started again whenever it has died, as an orchestrator does.
                                while !isEnding.withLock({ $0 }), !Task.isCancelled {
                                    let run = try await Program.run(
                                        Program.built("smap-events-bench"),
                                        [
                                            "counter", "--queue", "counter.items", "--budget", folder, "--deaths",
                                            "\(deaths)",
                                        ],
                                        environment: environment, processFile: "\(folder)/pid-\(worker)")
                                    #expect(run.status == 128 + SIGKILL || run.status == 128 + SIGTERM, "\(run.error)")
                                }
                            }
                        }
                        for round in 0..<randomKills {
                            let size = total / randomKills
                            var items = (0..<size).map { Item(project: "big", number: round * size + $0) }
                            // One in ten comes twice, and the small projects in between.
                            items += items.prefix(size / 10)
                            if round % 4 == 0, round / 4 + 1 < projects.count {
                                items += (0..<20).map { Item(project: projects[round / 4 + 1], number: $0) }
                            }
                            try await send(items)
                            // In the midst of it.
                            try await eventually("they count", within: .seconds(60)) {
                                let done = try await tracker.progress(of: ProjectID("big"))?.done ?? 0
                                return done >= round * size + Int.random(in: 1..<size / 2)
                            }
                            try await eventually("a worker is killed") {
                                signal(SIGKILL, worker: Int.random(in: 1...workers))
                            }
                            killed.withLock { $0 += 1 }
                        }
                        try await eventually("all is counted and published", within: .seconds(120), isOver)
                        isEnding.withLock { $0 = true }
                        try await eventually("the workers end") {
                            for worker in 1...workers { _ = signal(SIGTERM, worker: worker) }
                            return running.withLock { $0 } == 0
                        }
                        try await group.waitForAll()
                    }
                    _ = try await observer.standardInputWriter.write("now\n")
                }
                return last
            }
            #expect(killed.withLock { $0 } == randomKills)
            for point in Self.points { #expect(hits(point) == deaths, "\(point)") }
            let seen = try JSONDecoder().decode(
                [String: [Finish]].self, from: Data(observed.closureResult.utf8))
            #expect(Set(seen.keys) == Set(projects))
            for (project, finishes) in seen {
                let progress = try #require(try await tracker.progress(of: ProjectID(project)))
                #expect(progress.done == totals[project] && progress.total == totals[project], "\(progress)")
                #expect(Set(finishes.map(\.id)) == [progress.finishEventID?.rawValue ?? ""], "one id for \(project)")
                let errors = project == "big" ? total / 50 : 1
                #expect(finishes.allSatisfy { $0.done == totals[project] && $0.errors == errors })
            }
            await store.close()
            await transport.close()
        }
    }
}
