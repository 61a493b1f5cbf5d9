public import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Keeps the progress of projects in Redis 7: the hash `smap:proj:<id>` that sibling services read and write too, and a
/// family of keys beside it.
///
/// Each operation is one Lua script. It keeps one connection, on a thread of its own, opened when first needed; when it
/// is lost, whatever was under way ends with a retriable error, and the next call connects again.
public final class RedisProgressStore: ProgressStore {
    private let client: RedisClient
    private let timeToLive: String

    /// Makes a store. Throws ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public init(configuration: RedisConfiguration) throws {
        client = try RedisClient(configuration)
        timeToLive = String(configuration.timeToLive.components.seconds)
    }

    /// Closes the connection. Every later call throws ``SMAPEvents/EventsError/Code/closed``.
    public func close() async { await client.close() }

    /// Runs `body` with a store and closes it afterwards, whatever happens.
    public static func withStore<Result: Sendable>(
        configuration: RedisConfiguration, _ body: (RedisProgressStore) async throws -> Result
    ) async throws -> Result {
        let store = try RedisProgressStore(configuration: configuration)
        do {
            let result = try await body(store)
            await store.close()
            return result
        } catch {
            await store.close()
            throw error
        }
    }

    // MARK: ProgressStore

    /// Whether Redis answers a PING.
    public func health(deadline: ContinuousClock.Instant = .now + .seconds(5)) async -> Health {
        await client.health(deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func start(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.start, project, [finishEventID.rawValue], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.expect, project, [String(count), batch], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(
            .seal, project, [finishEventID.rawValue, project.rawValue, total.map(String.init) ?? ""], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func advance(
        _ project: ProjectID, item: ItemReference, outcome: ItemOutcome, finishEventID: EventID,
        deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        let (kind, name) =
            switch item {
            case .index(let index): ("i", String(index))
            case .named(let name): ("n", name)
            }
        return try await update(
            .advance, project, [finishEventID.rawValue, project.rawValue, kind, name, outcome == .failure ? "f" : "s"],
            deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func fail(_ project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProgressUpdate {
        try await update(.fail, project, [], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress? {
        let update = try await update(.progress, project, [], deadline)
        switch update.verdict {
        case .unknownProject: return nil
        case .corrupt:
            throw EventsError(
                .corruptProgress, "a field of the hash is no number, or the hash is incomplete",
                operation: "progress \(project)")
        default: return update.progress
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [PendingFinish] {
        // A random choice, so that finishes which cannot be published do not hide the others for ever.
        let reply = try await client.command(["SRANDMEMBER", Self.index, String(limit)], "pending finishes", deadline)
        guard case .array(let names) = reply else { return [] }
        var finishes: [PendingFinish] = []
        for name in names {
            guard let project = name.text.flatMap({ try? ProjectID($0) }) else { continue }
            if let finish = try await pendingFinish(of: project, deadline: deadline) { finishes.append(finish) }
        }
        return finishes
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinish(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> PendingFinish? {
        let key = Self.keys(project)[4]
        let reply = try await client.command(
            ["HMGET", key, "event_id", "data", "decided_ms"], "pending finish of \(project)", deadline)
        guard case .array(let fields) = reply, fields.count == 3, let id = fields[0].text else { return nil }
        guard let data = fields[1].text, let decided = fields[2].number else {
            throw EventsError(
                .corruptProgress, "the pending finish is incomplete", operation: "pending finish of \(project)")
        }
        return PendingFinish(
            project: project, eventID: try EventID(id), data: Array(data.utf8),
            decidedAt: Date(timeIntervalSince1970: Double(decided) / 1000))
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool {
        let reply = try await run(
            .clear, finish.project, [finish.eventID.rawValue, finish.project.rawValue], deadline)
        return reply.number == 1
    }

    // MARK: Scripts

    /// The index of projects whose finish is pending.
    static let index = "smap:finish:pending"

    /// The keys of a project, in the order of the scripts: hash, items that succeeded, items that failed, batches, pending
    /// finish, index. All but the first and the last carry the whole main key as their hash tag.
    package static func keys(_ project: ProjectID) -> [String] {
        let main = "smap:proj:\(project.rawValue)"
        return [main, "{\(main)}:ok", "{\(main)}:err", "{\(main)}:batches", "{\(main)}:finish", index]
    }

    private func update(
        _ script: TrackerScript, _ project: ProjectID, _ arguments: [String], _ deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        let reply = try await run(script, project, arguments, deadline)
        guard case .array(let fields) = reply, fields.count == 7, let verdict = fields[0].text,
            let status = fields[1].text, let total = fields[2].number, let done = fields[3].number,
            let errors = fields[4].number, let sealed = fields[5].number, let finish = fields[6].text
        else {
            throw EventsError(
                .protocolViolation, "an unexpected reply", operation: "\(script.name) \(project)")
        }
        return ProgressUpdate(
            verdict: ProgressUpdate.Verdict(verdict),
            progress: ProjectProgress(
                project: project, status: ProjectProgress.Status(status), total: total, done: done, errors: errors,
                isSealed: sealed == 1, finishEventID: finish.isEmpty ? nil : try EventID(finish)))
    }

    private func run(
        _ script: TrackerScript, _ project: ProjectID, _ arguments: [String], _ deadline: ContinuousClock.Instant
    ) async throws -> RedisReply {
        try await client.run(
            script.source, keys: Self.keys(project), [timeToLive] + arguments, "\(script.name) \(project)", deadline)
    }
}
