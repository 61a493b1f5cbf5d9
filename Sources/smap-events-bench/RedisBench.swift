import CHiredis
import Foundation
import SMAPEvents
import SMAPRedis

/// Reports items by index: through the tracker, and with hiredis pipelining the same script.
final class RedisBench: Sendable {
    let configuration: RedisConfiguration
    let options: BenchCommand.Options
    private let store: RedisProgressStore
    let tracker: ProgressTracker

    init(_ configuration: RedisConfiguration, _ options: BenchCommand.Options) throws {
        self.configuration = configuration
        self.options = options
        store = try RedisProgressStore(configuration: configuration)
        tracker = ProgressTracker(store: store)
    }

    func close() async { await store.close() }

    /// A project that will not finish.
    func freshProject(_ items: Int) async throws -> ProjectID {
        let project = try ProjectID("bench_\(EventID())")
        try await tracker.start(project)
        try await tracker.seal(project, total: items + 1)
        return project
    }

    func typed() async throws -> Measurement {
        let project = try await freshProject(options.messages)
        return try await report(options.messages) { (project, .index($0)) }
    }

    /// Reports so many items, one after the other in each task.
    func report(
        _ count: Int, _ item: @escaping @Sendable (Int) -> (ProjectID, ItemReference)
    ) async throws -> Measurement {
        try await Measurement.of(count) {
            try await withThrowingTaskGroup(of: [UInt64].self) { group in
                let tasks = options.tasks
                for task in 0..<tasks {
                    group.addTask { [tracker] in
                        var latencies: [UInt64] = []
                        for number in stride(from: task, to: count, by: tasks) {
                            let start = ContinuousClock.now
                            let (project, item) = item(number)
                            let update = try await tracker.advance(project, item: item, outcome: .success)
                            guard update.verdict == .counted else { throw RawRedis.Failure(text: "\(update.verdict)") }
                            latencies.append(nanoseconds(since: start))
                        }
                        return latencies
                    }
                }
                return try await group.reduce(into: []) { $0 += $1 }
            }
        }
    }

    func raw() async throws -> Measurement {
        let project = try await freshProject(options.messages)
        let (configuration, options) = (configuration, options)
        let raw = try await blocking { try RawRedis(configuration) }
        return try await Measurement.of(options.messages) {
            try await blocking {
                try raw.advance(project, count: options.messages, depth: options.tasks)
                return []
            }
        }
    }
}

/// The bare hiredis loop with a pipeline.
///
/// Sound as Sendable: made on one thread and used by one call at a time on another, never by two at once.
final class RawRedis: @unchecked Sendable {
    struct Failure: Error {
        let text: String
    }

    private let context: UnsafeMutablePointer<redisContext>
    private var hash = ""

    init(_ configuration: RedisConfiguration) throws {
        guard let context = redisConnect(configuration.host, Int32(configuration.port)), context.pointee.err == 0 else {
            throw Failure(text: "connect")
        }
        self.context = context
        try append(["SELECT", String(configuration.database)])
        try append(["SCRIPT", "LOAD", TrackerScript.advance.source])
        _ = try reply()
        hash = try reply()
    }

    deinit { redisFree(context) }

    func command(_ arguments: [String]) throws -> String {
        try append(arguments)
        return try reply()
    }

    /// Keeps `depth` commands under way, each with an event id of its own as the tracker sends it.
    func advance(_ project: ProjectID, count: Int, depth: Int) throws {
        let keys = RedisProgressStore.keys(project)
        var sent = 0
        var answered = 0
        while answered < count {
            while sent < count, sent - answered < depth {
                try append(
                    ["EVALSHA", hash, String(keys.count)] + keys + [
                        "604800", "flat", "evt_6f9c1b9e-6d0a-4a53-9f0b-0d7c2a1c9b11", project.rawValue, "", "", "i",
                        "s\(sent)",
                    ])
                sent += 1
            }
            let half = max(1, (sent - answered) / 2)
            for _ in 0..<half {
                _ = try reply()
                answered += 1
            }
        }
    }

    private func append(_ arguments: [String]) throws {
        let texts = arguments.map { strdup($0) }
        defer { for text in texts { free(text) } }
        var pointers: [UnsafePointer<CChar>?] = texts.map { $0.map { UnsafePointer($0) } }
        guard redisAppendCommandArgv(context, Int32(arguments.count), &pointers, nil) == REDIS_OK else {
            throw Failure(text: "append")
        }
    }

    private func reply() throws -> String {
        var raw: UnsafeMutableRawPointer?
        guard redisGetReply(context, &raw) == REDIS_OK, let raw else { throw Failure(text: "reply") }
        defer { freeReplyObject(raw) }
        let reply = raw.assumingMemoryBound(to: redisReply.self).pointee
        let text = reply.str.map { String(cString: $0) } ?? String(reply.integer)
        if reply.type == REDIS_REPLY_ERROR { throw Failure(text: text) }
        return text
    }
}
