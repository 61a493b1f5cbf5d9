public import SMAPEvents
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Keeps the progress of projects in Redis 7: the hash `smap:proj:<id>` that sibling services read and write too, and a
/// family of keys beside it.
///
/// Each operation is one Lua script. It keeps ``RedisConfiguration/connections`` connections, each on a thread of its own,
/// opened when first needed, and one more while projects are watched; when one is lost, whatever was under way on it ends
/// with a retriable error, and the next call connects again.
public final class RedisProgressStore: ProgressStore {
    /// At least one. A project's operations go over one and the same, so they are carried out in the order of the calls.
    private let clients: [RedisClient]
    /// A connection of its own: one that subscribes can do nothing else. Opened by the first who watches.
    private let subscriptions: RedisClient
    private let hub: ProgressHub
    private let timeToLive: String
    private let assumedLayout: ProgressLayout

    /// Makes a store. Throws ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public init(configuration: RedisConfiguration) throws {
        try configuration.validate()
        let clients = try (0..<configuration.connections).map { _ in try RedisClient(configuration) }
        let timeToLive = String(configuration.timeToLive.components.seconds)
        let assumedLayout = configuration.assumedLayout
        let messages = Messages()
        let subscriptions = try RedisClient(configuration) { messages.came(on: $0) }
        let hub = ProgressHub(interval: configuration.watchInterval) { project in
            try await Self.progress(of: project, clients, timeToLive, assumedLayout, .now + .seconds(10))
        } subscribe: { project in
            // Without the permission, or the connection, there is still the look from time to time.
            _ = try? await subscriptions.command(["SUBSCRIBE", Self.channel(project)], "subscribe", .now + .seconds(5))
        } unsubscribe: { project in
            _ = try? await subscriptions.command(
                ["UNSUBSCRIBE", Self.channel(project)], "unsubscribe", .now + .seconds(5))
        }
        messages.hub.withLock { $0 = WeakHub(hub: hub) }
        (self.clients, self.timeToLive, self.assumedLayout) = (clients, timeToLive, assumedLayout)
        (self.subscriptions, self.hub) = (subscriptions, hub)
    }

    /// Closes the connections. Every later call throws ``SMAPEvents/EventsError/Code/closed``.
    public func close() async {
        for client in clients { await client.close() }
        await subscriptions.close()
    }

    private struct WeakHub { weak var hub: ProgressHub? }

    /// Brings messages from the connection to the hub, which does not exist yet when that is made.
    private final class Messages: Sendable {
        let hub = Mutex(WeakHub())

        func came(on channel: String) {
            guard let project = RedisProgressStore.project(ofKey: channel) else { return }
            hub.withLock { $0.hub }?.nudge(project)
        }
    }

    private static func channel(_ project: ProjectID) -> String { "{smap:proj:\(project.rawValue)}:progress" }

    /// See ``SMAPEvents/ProgressStore``.
    public func updates(of project: ProjectID) -> AsyncThrowingStream<ProjectProgress, any Error> {
        hub.watch(project)
    }

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
        await clients[0].health(deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func start(
        _ project: ProjectID, layout: ProgressLayout, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.start, project, [finishEventID.rawValue], layout: layout, deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func restart(
        _ project: ProjectID, from generation: Int, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.restart, project, [finishEventID.rawValue, String(generation)], deadline)
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
        _ project: ProjectID, _ items: AdvanceRequest, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        var kind = "i"
        let reports = items.reports.map { report in
            let outcome = report.outcome == .failure ? "f" : "s"
            switch report.item {
            case .index(let index): return outcome + String(index)
            case .named(let name):
                kind = "n"
                return outcome + name
            }
        }
        let head = [
            finishEventID.rawValue, project.rawValue, items.generation.map(String.init) ?? "",
            items.stage?.rawValue ?? "", kind,
        ]
        return try await update(.advance, project, head + reports, deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func abandon(
        _ project: ProjectID, isCancelled: Bool, reason: String, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.abandon, project, [isCancelled ? "cancelled" : "failed", reason], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func settle(
        _ project: ProjectID, finishEventID: EventID, deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        try await update(.settle, project, [finishEventID.rawValue, project.rawValue], deadline)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func progress(of project: ProjectID, deadline: ContinuousClock.Instant) async throws -> ProjectProgress? {
        try await Self.progress(of: project, clients, timeToLive, assumedLayout, deadline)
    }

    private static func progress(
        of project: ProjectID, _ clients: [RedisClient], _ timeToLive: String, _ layout: ProgressLayout,
        _ deadline: ContinuousClock.Instant
    ) async throws -> ProjectProgress? {
        let answer = try await client(for: project, clients).run(
            TrackerScript.progress.lua, keys: keys(project), [timeToLive, layout.rawValue], "progress \(project)",
            deadline)
        let update = try update(from: answer, .progress, project)
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
    public func pendingFinishes(limit: Int, deadline: ContinuousClock.Instant) async throws -> [ProjectID] {
        // A random choice, so that finishes which cannot be published do not hide the others for ever.
        let reply = try await clients[0].command(
            ["SRANDMEMBER", Self.index, String(limit)], "pending finishes", deadline)
        guard case .array(let names) = reply else { return [] }
        return names.compactMap { $0.text.flatMap { try? ProjectID($0) } }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func pendingFinishes(
        of project: ProjectID, deadline: ContinuousClock.Instant
    ) async throws -> [PendingFinish] {
        let operation = "pending finishes of \(project)"
        let reply = try await Self.client(for: project, clients).command(
            ["HGETALL", Self.keys(project)[4]], operation, deadline)
        guard case .array(let fields) = reply else { return [] }
        return try stride(from: 0, to: fields.count - 1, by: 2).map { index in
            // Generation, milliseconds, data.
            let parts = fields[index + 1].text?.split(separator: " ", maxSplits: 2) ?? []
            guard let id = fields[index].text.flatMap({ try? EventID($0) }), parts.count == 3,
                let generation = Int(parts[0]), let decided = Int(parts[1])
            else { throw EventsError(.corruptProgress, "a pending finish is incomplete", operation: operation) }
            return PendingFinish(
                project: project, generation: generation, eventID: id, data: Array(parts[2].utf8),
                decidedAt: Date(timeIntervalSince1970: Double(decided) / 1000))
        }
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func clear(_ finish: PendingFinish, deadline: ContinuousClock.Instant) async throws -> Bool {
        let answer = try await run(
            .clear, finish.project, [finish.eventID.rawValue, finish.project.rawValue], nil, deadline)
        return answer.reply.number == 1
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func projects(after cursor: String?, deadline: ContinuousClock.Instant) async throws -> ProjectPage {
        let reply = try await clients[0].command(
            ["SCAN", cursor ?? "0", "MATCH", "*smap:proj:*", "COUNT", "200"], "list projects", deadline)
        guard case .array(let parts) = reply, parts.count == 2, let next = parts[0].text,
            case .array(let keys) = parts[1]
        else { throw EventsError(.protocolViolation, "an unexpected reply", operation: "list projects") }
        let projects = keys.compactMap { $0.text.flatMap(Self.project(ofKey:)) }
        return ProjectPage(projects: Array(Set(projects)), next: next == "0" ? nil : next)
    }

    /// See ``SMAPEvents/ProgressStore``.
    public func inspect(
        _ project: ProjectID, finishEventID: EventID, isDryRun: Bool, deadline: ContinuousClock.Instant
    ) async throws -> ProjectFindings {
        let reply: RedisReply
        do {
            reply = try await run(
                .inspect, project, [finishEventID.rawValue, project.rawValue, isDryRun ? "1" : ""], nil, deadline
            ).reply
        } catch let error as EventsError where error.code == .corruptProgress {
            return ProjectFindings(findings: [.corrupt], mended: [], progress: nil, idle: nil)
        }
        guard case .array(let parts) = reply, parts.count == 4, let found = parts[0].text, let mended = parts[1].text,
            let left = parts[2].number
        else { throw EventsError(.protocolViolation, "an unexpected reply", operation: "inspect \(project)") }
        func findings(_ text: String) -> [ProjectFindings.Finding] {
            text.split(separator: ",").map { ProjectFindings.Finding(String($0)) }
        }
        let update = try Self.update(from: RedisPipeline.Answer(reply: parts[3]), .inspect, project)
        let isThere = update.verdict != .unknownProject && update.verdict != .corrupt
        let life = Int(timeToLive) ?? 0
        return ProjectFindings(
            findings: findings(found), mended: findings(mended), progress: isThere ? update.progress : nil,
            idle: isThere && left >= 0 ? .seconds(max(0, life - left)) : nil)
    }

    // MARK: Scripts

    /// The index of projects whose finish is pending.
    static let index = "smap:finish:pending"

    /// The keys of a project, in the order of the scripts. All but the hash and the index carry the whole main key as their
    /// hash tag.
    package static func keys(_ project: ProjectID) -> [String] {
        let main = "smap:proj:\(project.rawValue)"
        return [main]
            + ["ok", "err", "batches", "finish"].map { "{\(main)}:\($0)" } + [index]
            + ["ok2", "err2"].map { "{\(main)}:\($0)" }
    }

    private func update(
        _ script: TrackerScript, _ project: ProjectID, _ arguments: [String], layout: ProgressLayout? = nil,
        _ deadline: ContinuousClock.Instant
    ) async throws -> ProgressUpdate {
        let answer = try await run(script, project, arguments, layout, isUpdate: true, deadline)
        return try Self.update(from: answer, script, project)
    }

    /// The project that a key or channel belongs to: the hash's, or one of its family, which carries that in braces.
    private static func project(ofKey key: String) -> ProjectID? {
        var name = key[...]
        if name.hasPrefix("{"), let end = name.firstIndex(of: "}") {
            name = name[name.index(after: name.startIndex)..<end]
        }
        guard name.hasPrefix("smap:proj:") else { return nil }
        return try? ProjectID(String(name.dropFirst("smap:proj:".count)))
    }

    private static func update(
        from answer: RedisPipeline.Answer, _ script: TrackerScript, _ project: ProjectID
    ) throws -> ProgressUpdate {
        guard case .array(let fields) = answer.reply, fields.count >= 12, let verdict = fields[0].text,
            let items = fields[1].text, let status = fields[2].text, let layout = fields[3].text,
            let generation = fields[5].number, let finish = fields[6].text, let reason = fields[8].text
        else { throw EventsError(.protocolViolation, "an unexpected reply", operation: "\(script.name) \(project)") }
        let stages = stride(from: 9, to: fields.count - 2, by: 3).map { index in
            ProjectProgress.Counters(
                total: fields[index].number ?? 0, done: fields[index + 1].number ?? 0,
                errors: fields[index + 2].number ?? 0)
        }
        return ProgressUpdate(
            verdict: ProgressUpdate.Verdict(verdict),
            items: items.isEmpty ? [] : items.split(separator: ",").map { ProgressUpdate.Verdict(String($0)) },
            progress: ProjectProgress(
                project: project, status: ProjectProgress.Status(status), layout: ProgressLayout(layout),
                stages: stages, isSealed: fields[4].number == 1, generation: generation,
                finishEventID: finish.isEmpty ? nil : try EventID(finish), isCancelled: fields[7].number == 1,
                reason: reason.isEmpty ? nil : reason), replicas: answer.replicas)
    }

    private static func client(for project: ProjectID, _ clients: [RedisClient]) -> RedisClient {
        clients[Int(UInt(bitPattern: project.hashValue) % UInt(clients.count))]
    }

    private func run(
        _ script: TrackerScript, _ project: ProjectID, _ arguments: [String], _ layout: ProgressLayout?,
        isUpdate: Bool = false, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisPipeline.Answer {
        try await Self.client(for: project, clients).run(
            script.lua, keys: Self.keys(project),
            [timeToLive, (layout ?? assumedLayout).rawValue] + arguments, "\(script.name) \(project)",
            isUpdate: isUpdate, deadline)
    }
}
