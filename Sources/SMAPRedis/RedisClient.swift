internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// Sends commands and scripts to one Redis server, over one connection that is opened when it is first needed, and again
/// by the next call after it was lost.
final class RedisClient: Sendable {
    private enum Slot {
        case idle
        case connection(RedisConnection)
        case closed
    }

    private let configuration: RedisConfiguration
    private let onMessage: (@Sendable (String) -> Void)?
    private let slot = Mutex(Slot.idle)
    /// The hashes under which the server knows the scripts, by their texts; it tells them when they are loaded.
    private let hashes = Mutex<[String: String]>([:])

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

    /// Whether the server answers a PING.
    func health(_ deadline: ContinuousClock.Instant) async -> Health {
        do {
            _ = try await command(["PING"], "health", deadline)
            return Health(warnings: await dangers(deadline))
        } catch {
            return Health(problems: ["redis: \((error as? EventsError)?.description ?? "\(type(of: error))")"])
        }
    }

    /// Settings of the server under which progress can be lost.
    private func dangers(_ deadline: ContinuousClock.Instant) async -> [String] {
        var warnings: [String] = []
        if let tls = configuration.tls, tls.verification != .full {
            warnings.append("redis: that the server is who it should be is not verified in full")
        }
        do {
            var settings: [Substring: Substring] = [:]
            for section in ["persistence", "memory"] {
                let text = try await command(["INFO", section], "health", deadline).text ?? ""
                for line in text.split(whereSeparator: \.isNewline) {
                    let parts = line.split(separator: ":", maxSplits: 1)
                    if parts.count == 2 { settings[parts[0]] = parts[1] }
                }
            }
            if settings["aof_enabled"] == "0" {
                warnings.append("redis: appendonly is off: what was counted since the last snapshot is lost in a crash")
            }
            if let policy = settings["maxmemory_policy"], policy != "noeviction" {
                warnings.append(
                    "redis: maxmemory-policy is \(policy): Redis may drop projects; it should be noeviction")
            }
        } catch {
            warnings.append("redis: persistence and eviction cannot be looked up")
        }
        return warnings
    }

    /// Runs a script by its hash; by its text where the server does not know it (any more).
    func run(
        _ script: String, keys: [String], _ arguments: [String], _ operation: String,
        _ deadline: ContinuousClock.Instant
    ) async throws -> RedisReply {
        let tail = [String(keys.count)] + keys + arguments
        let hash: String
        if let known = hashes.withLock({ $0[script] }) {
            hash = known
        } else {
            let reply = try await command(["SCRIPT", "LOAD", script], operation, deadline)
            guard let loaded = reply.text else {
                throw EventsError(.protocolViolation, "an unexpected reply", operation: operation)
            }
            hashes.withLock { $0[script] = loaded }
            hash = loaded
        }
        let reply = try await send(["EVALSHA", hash] + tail, operation, deadline)
        // Nothing was run: the cache is empty after a restart, a failover or SCRIPT FLUSH. EVAL fills it again.
        if case .error(let text) = reply, text.hasPrefix("NOSCRIPT") {
            return try await command(["EVAL", script] + tail, operation, deadline)
        }
        return try check(reply, operation)
    }

    /// Sends a command; an error that the server answers is thrown.
    func command(
        _ arguments: [String], _ operation: String, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisReply {
        try check(try await send(arguments, operation, deadline), operation)
    }

    private func check(_ reply: RedisReply, _ operation: String) throws -> RedisReply {
        guard case .error(let text) = reply else { return reply }
        throw RedisFailure.error(text, operation: operation)
    }

    private func send(
        _ arguments: [String], _ operation: String, _ deadline: ContinuousClock.Instant
    ) async throws -> RedisReply {
        let connection = try slot.withLock { slot in
            switch slot {
            case .connection(let connection) where !connection.isClosed: return connection
            case .closed: throw EventsError(.closed, "the store is closed", operation: operation)
            case .idle, .connection:
                let connection = try RedisConnection(configuration, onMessage: onMessage)
                slot = .connection(connection)
                return connection
            }
        }
        do {
            let reply = try await connection.send(RedisCommand(arguments), deadline: MonotonicTime(deadline))
            // A replica that was a master, or a master that has become one: the next call connects anew.
            if case .error(let text) = reply, text.hasPrefix("READONLY") {
                connection.drop(because: "the master has become a replica")
            }
            return reply
        } catch let error as EventsError where error.operation == "redis" {
            throw EventsError(
                error.code, "\(configuration): \(error.message)", operation: operation, underlying: error.underlying)
        }
    }
}
