internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// Sends commands and scripts to one Redis server, over one connection that is opened when it is first needed, and again
/// by the next call after it was lost.
final class RedisClient: Sendable {
    private enum Slot {
        case idle
        case connection(RedisConnection)
        /// The server could not work, or was no master: nobody connects before that time.
        case resting(until: ContinuousClock.Instant, EventsError)
        case closed
    }

    private let configuration: RedisConfiguration
    private let onMessage: (@Sendable (String) -> Void)?
    private let slot = Mutex(Slot.idle)
    /// The hashes under which the server knows the scripts; it tells them when they are loaded.
    private let hashes = Mutex<[ObjectIdentifier: String]>([:])

    /// Throws `invalidConfiguration`.
    /// - Parameter onMessage: Told of the channel of each message that comes by subscription; nothing else is to be sent
    ///   then but subscriptions, one channel each.
    init(_ configuration: RedisConfiguration, onMessage: (@Sendable (String) -> Void)? = nil) throws {
        self.onMessage = onMessage
        try configuration.validate()
        self.configuration = configuration
    }

    deinit {
        guard case .connection(let connection) = slot.withLock({ $0 }) else { return }
        connection.drop(EventsError(.closed, "the store is gone", operation: "redis"))
    }

    /// Closes the connection. Every later call throws `closed`.
    func close() async {
        let old = slot.withLock { slot in
            defer { slot = .closed }
            return slot
        }
        if case .connection(let connection) = old { await connection.close() }
    }

    /// Whether the server answers a PING now and takes writes, and what may make it forget.
    func health(_ deadline: ContinuousClock.Instant) async -> Health {
        do {
            try check(try await attempt(RedisCommand(["PING"]), "health", deadline).reply, "health")
            return await condition(deadline)
        } catch {
            return Health(problems: ["redis: \((error as? EventsError)?.description ?? "\(type(of: error))")"])
        }
    }

    /// What the server says of itself.
    private func condition(_ deadline: ContinuousClock.Instant) async -> Health {
        var health = Health()
        if let tls = configuration.tls, tls.verification != .full {
            health.warnings.append("redis: that the server is who it should be is not verified in full")
        }
        var settings: [Substring: Substring] = [:]
        do {
            for section in ["persistence", "memory", "replication"] {
                let text = try await command(["INFO", section], "health", deadline).text ?? ""
                for line in text.split(whereSeparator: \.isNewline) {
                    let parts = line.split(separator: ":", maxSplits: 1)
                    if parts.count == 2 { settings[parts[0]] = parts[1] }
                }
            }
        } catch {
            health.warnings.append("redis: persistence, eviction and its role cannot be looked up")
            return health
        }
        func number(_ setting: Substring) -> Int { settings[setting].flatMap { Int($0) } ?? 0 }
        let policy = settings["maxmemory_policy"] ?? "noeviction"
        if policy == "noeviction", number("maxmemory") > 0, number("used_memory") >= number("maxmemory") {
            health.problems.append("redis: its memory is full, so that it refuses writes")
        }
        if settings["role"] == "slave" {
            health.problems.append("redis: it is a replica, so that it refuses writes")
        }
        if settings["aof_last_write_status"] == "err" {
            health.problems.append("redis: it cannot write to its disk, so that it refuses writes")
        }
        if settings["rdb_last_bgsave_status"] == "err" {
            health.warnings.append("redis: its last snapshot failed; it may refuse writes until one succeeds")
        }
        if settings["aof_enabled"] == "0" {
            health.warnings.append(
                "redis: appendonly is off: what was counted since the last snapshot is lost in a crash")
        }
        if policy != "noeviction" {
            health.warnings.append(
                "redis: maxmemory-policy is \(policy): Redis may drop projects; it should be noeviction")
        }
        return health
    }

    /// Runs a script by its hash; by its text where the server does not know it (any more).
    /// - Parameter isUpdate: Whether replicas are to have it, where the configuration asks for some.
    func run(
        _ script: RedisScript, keys: [String], _ arguments: [String], _ operation: String, isUpdate: Bool = false,
        _ deadline: ContinuousClock.Instant
    ) async throws -> RedisPipeline.Answer {
        let tail = [String(keys.count)] + keys + arguments
        let hash: String
        if let known = hashes.withLock({ $0[ObjectIdentifier(script)] }) {
            hash = known
        } else {
            let reply = try await command(["SCRIPT", "LOAD", script.text], operation, deadline)
            guard let loaded = reply.text else {
                throw EventsError(.protocolViolation, "an unexpected reply", operation: operation)
            }
            hashes.withLock { $0[ObjectIdentifier(script)] = loaded }
            hash = loaded
        }
        let awaitsReplicas = isUpdate && configuration.replicas > 0
        var answer = try await send(["EVALSHA", hash] + tail, operation, awaitsReplicas, deadline)
        // Nothing was run: the cache is empty after a restart, a failover or SCRIPT FLUSH. EVAL fills it again.
        if case .error(let text) = answer.reply, text.hasPrefix("NOSCRIPT") {
            answer = try await send(["EVAL", script.text] + tail, operation, awaitsReplicas, deadline)
        }
        try check(answer.reply, operation)
        return answer
    }

    /// Sends a command; an error that the server answers is thrown.
    func command(
        _ arguments: [String], _ operation: String, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisReply {
        let reply = try await send(arguments, operation, false, deadline).reply
        try check(reply, operation)
        return reply
    }

    private func check(_ reply: RedisReply, _ operation: String) throws {
        if case .error(let text) = reply { throw RedisFailure.error(text, operation: operation) }
    }

    /// Sends a command. What the server cannot do just now it has not done: that is waited out, up to the deadline.
    private func send(
        _ arguments: [String], _ operation: String, _ awaitsReplicas: Bool, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisPipeline.Answer {
        let command = RedisCommand(arguments, awaitsReplicas: awaitsReplicas)
        var failures = 0
        while true {
            let outcome: Result<RedisPipeline.Answer, any Error>
            do {
                let answer = try await attempt(command, operation, deadline)
                guard case .error(let text) = answer.reply, RedisFailure.isPassing(text) else { return answer }
                outcome = .success(answer)
            } catch let error as EventsError where error.code == .storeUnavailable {
                // So it said when we logged in, or to others that were under way with this.
                outcome = .failure(error)
            }
            failures += 1
            let delay = Self.backoff.delay(after: failures)
            guard .now + delay < deadline else { return try outcome.get() }
            try await Task.sleep(for: delay)
        }
    }

    private static let backoff = Backoff(first: .milliseconds(50), longest: .seconds(1))

    /// Lets nobody connect for a while, when the server behind a connection could not work: however many wait, one of them
    /// asks it, ten times a second at most.
    private func rest(_ connection: RedisConnection, _ error: EventsError) {
        slot.withLock { slot in
            guard case .connection(let current) = slot, current === connection else { return }
            slot = .resting(until: .now + .milliseconds(100), error)
        }
    }

    private func attempt(
        _ command: RedisCommand, _ operation: String, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisPipeline.Answer {
        let connection = try slot.withLock { slot in
            switch slot {
            case .connection(let connection) where !connection.isClosed: return connection
            case .closed: throw EventsError(.closed, "the store is closed", operation: operation)
            case .resting(let end, let error) where .now < end:
                throw EventsError(error.code, error.message, operation: operation)
            case .idle, .connection, .resting:
                let connection = try RedisConnection(configuration, onMessage: onMessage)
                slot = .connection(connection)
                return connection
            }
        }
        do {
            let answer = try await connection.send(command, deadline: MonotonicTime(deadline))
            // It was a master, and another one is now: the next attempt connects anew. So do those of the others that are
            // under way: all can be repeated.
            if case .error(let text) = answer.reply, text.hasPrefix("READONLY") {
                let error = EventsError(.storeUnavailable, "it has become a replica", operation: "redis")
                connection.drop(error)
                rest(connection, placed(error, operation))
            }
            return answer
        } catch let error as EventsError {
            let error = placed(error, operation)
            if error.code == .storeUnavailable { rest(connection, error) }
            throw error
        }
    }

    /// Names the server and the operation in an error that the connection has made for whoever is under way.
    private func placed(_ error: EventsError, _ operation: String) -> EventsError {
        guard error.operation == "redis" else { return error }
        return EventsError(
            error.code, "\(configuration): \(error.message)", operation: operation, underlying: error.underlying)
    }
}
