internal import ConnectionThread
internal import SMAPEvents

/// Speaks RESP2 with the server that is the master now. Lives on its connection thread only.
final class RedisDriver: ConnectionDriver {
    private let connection: RedisConnection
    private let socket: RedisSocket
    var descriptor: Int32 { socket.descriptor }

    /// Connects and logs in; blocks, bounded by the deadline.
    init(connection: RedisConnection, thread: ConnectionThread, deadline: MonotonicTime) throws {
        let configuration = connection.configuration
        let socket = try RedisSocket(
            try Self.master(configuration, deadline: deadline, interrupt: thread.interrupt), configuration.tls,
            deadline: deadline, interrupt: thread.interrupt)
        self.connection = connection
        self.socket = socket
        do {
            try thread.registerSocket(socket.descriptor)
            try logIn(configuration, deadline: deadline, interrupt: thread.interrupt)
        } catch {
            socket.close()
            throw error
        }
    }

    /// Where the master is: asked of the sentinels in turn, each time anew, as Redis's guide for sentinel clients has it.
    private static func master(
        _ configuration: RedisConfiguration, deadline: MonotonicTime, interrupt: Wakeup
    ) throws -> RedisConfiguration.Address {
        guard !configuration.sentinels.isEmpty else {
            return RedisConfiguration.Address(host: configuration.host, port: configuration.port)
        }
        let operation = "look up \(configuration)"
        var failures: [EventsError] = []
        for sentinel in configuration.sentinels.shuffled() {
            // One that does not answer must not use up the time of the others.
            let limit = min(deadline, MonotonicTime.now.advanced(by: .seconds(1)))
            do {
                let socket = try RedisSocket(sentinel, configuration.tls, deadline: limit, interrupt: interrupt)
                defer { socket.close() }
                if let password = configuration.sentinelPassword {
                    if case .error = try socket.ask(["AUTH", password], deadline: limit, interrupt: interrupt) {
                        throw EventsError(.accessRefused, "it refuses the password", operation: operation)
                    }
                }
                let reply = try socket.ask(
                    ["SENTINEL", "get-master-addr-by-name", configuration.masterName], deadline: limit,
                    interrupt: interrupt)
                if case .array(let parts) = reply, parts.count == 2, let host = parts[0].text,
                    let port = parts[1].number
                {
                    return RedisConfiguration.Address(host: host, port: port)
                }
                if case .error(let text) = reply { throw RedisFailure.error(text, operation: operation) }
                throw EventsError(
                    .connectionFailed, "it does not know \(configuration.masterName)", operation: operation)
            } catch let error as EventsError {
                failures.append(
                    EventsError(error.code, "\(sentinel): \(error.message)", operation: operation))
            } catch let error as SocketError {
                if error.kind == .interrupted { throw error }
                failures.append(
                    EventsError(.connectionFailed, "\(sentinel): \(error.description)", operation: operation))
            } catch let error as TLSError {
                failures.append(RedisFailure.error(error, "\(sentinel): ", operation: operation))
            }
        }
        // Where all refuse for the same reason, which time does not mend, it is that.
        let codes = Set(failures.map(\.code))
        let permanent = codes.count == 1 ? failures.first.flatMap { $0.isRetriable ? nil : $0.code } : nil
        throw EventsError(
            permanent ?? .connectionFailed, failures.map(\.message).joined(separator: "; "), operation: operation)
    }

    private func logIn(_ configuration: RedisConfiguration, deadline: MonotonicTime, interrupt: Wakeup) throws {
        let operation = "connect to \(configuration)"
        if let password = configuration.password {
            let user = configuration.username.map { [$0] } ?? []
            if case .error(let text) = try socket.ask(
                ["AUTH"] + user + [password], deadline: deadline, interrupt: interrupt)
            {
                guard text.hasPrefix("LOADING") else {
                    // What a wrong password is called differs: WRONGPASS with an ACL, ERR invalid password before.
                    throw EventsError(
                        .accessRefused,
                        text.contains("without any password")
                            ? "there is a password, and this Redis has none" : "Redis refuses the user or the password",
                        operation: operation)
                }
                throw RedisFailure.error(text, operation: operation)
            }
        }
        let selected = try socket.ask(
            ["SELECT", String(configuration.database)], deadline: deadline, interrupt: interrupt)
        if case .error(let text) = selected {
            guard !text.contains("DB index") else {
                throw EventsError(
                    .invalidConfiguration, "REDIS_STATE_DB: the server has no database \(configuration.database)",
                    operation: operation)
            }
            throw RedisFailure.error(text, operation: operation)
        }
        if configuration.replicas > 0 {
            // Whether it is permitted shows before anything has been written.
            let wait = try socket.ask(["WAIT", "0", "1"], deadline: deadline, interrupt: interrupt)
            if case .error(let text) = wait { throw RedisFailure.error(text, operation: operation) }
        }
        guard !configuration.sentinels.isEmpty else { return }
        // Sentinels may be late: what they name may have become a replica.
        let role = try socket.ask(["ROLE"], deadline: deadline, interrupt: interrupt)
        if case .error(let text) = role { throw RedisFailure.error(text, operation: operation) }
        guard case .array(let parts) = role, parts.first?.text == "master" else {
            throw EventsError(.storeUnavailable, "it is a replica: a failover is under way", operation: operation)
        }
    }

    func runOnce(now: MonotonicTime, isReadable: Bool) throws -> PollInterest {
        // Read before written: a reply to `WAIT` lets go what was held back meanwhile.
        if isReadable { try takeReplies() }
        try socket.write { connection.takeUnsent(into: &$0, now: now) }
        // Replies that have come before the end count.
        if socket.hasFailed { try takeReplies() }
        return PollInterest(writable: !socket.isFlushed)
    }

    private func takeReplies() throws {
        while let replies = try socket.read() {
            guard connection.replied(replies, now: .now) else {
                throw EventsError(.protocolViolation, "a reply that was not asked for", operation: "redis")
            }
        }
    }

    func finish(_ error: (any Error)?) {
        let reason: EventsError
        switch error {
        case let error as EventsError: reason = error
        // The certificate has been accepted long ago: what fails now is this connection.
        case let error as TLSError: reason = EventsError(.connectionLost, error.description, operation: "redis")
        case let error as SocketError: reason = EventsError(.connectionLost, error.description, operation: "redis")
        case let error?: reason = EventsError(.connectionLost, "\(type(of: error))", operation: "redis")
        case nil: reason = EventsError(.closed, "the store was closed", operation: "redis")
        }
        connection.end(reason)
        socket.close()
    }
}
