internal import CHiredis
internal import ConnectionThread
internal import SMAPEvents

/// Speaks RESP2 over a socket of our own, with hiredis as the codec. Lives on its connection thread only.
///
/// hiredis does not touch the socket: it would write with `write()`, and a broken connection would raise SIGPIPE and kill
/// the process.
final class RedisDriver: ConnectionDriver {
    /// The reader has no limit of its own. No reply of ours comes near this.
    private static let replyLimit = 64 << 20

    let descriptor: Int32
    private let connection: RedisConnection
    private let reader: UnsafeMutablePointer<redisReader>
    private var output: [UInt8] = []
    private var written = 0
    private var input = [UInt8](repeating: 0, count: 64 * 1024)
    private var pendingInput = 0

    /// Connects and logs in; blocks, bounded by the deadline.
    init(connection: RedisConnection, thread: ConnectionThread, deadline: MonotonicTime) throws {
        let configuration = connection.configuration
        let descriptor = try Socket.connect(host: configuration.host, port: configuration.port, deadline: deadline)
        guard let reader = redisReaderCreate() else {
            Socket.close(descriptor)
            throw SocketError(.outOfDescriptors, "out of memory")
        }
        self.connection = connection
        self.descriptor = descriptor
        self.reader = reader
        thread.guardSocket(descriptor)
        do {
            try logIn(configuration, deadline: deadline)
        } catch {
            release()
            throw error
        }
    }

    private func logIn(_ configuration: RedisConfiguration, deadline: MonotonicTime) throws {
        let operation = "connect to \(configuration)"
        var commands = [["SELECT", String(configuration.database)]]
        if let password = configuration.password {
            commands.insert(["AUTH"] + (configuration.username.map { [$0] } ?? []) + [password], at: 0)
        }
        for command in commands {
            output += RedisCommand(command).bytes
            var replies: [RedisReply] = []
            while replies.isEmpty {
                try write()
                replies = try read()
                guard replies.isEmpty else { break }
                guard Socket.wait(descriptor, toWrite: written < output.count, until: deadline) else {
                    throw EventsError(.connectionFailed, "no answer in time", operation: operation)
                }
            }
            if case .error(let text) = replies[0] {
                // What a wrong password is called differs: WRONGPASS with an ACL, ERR invalid password before.
                if command[0] == "AUTH", !text.hasPrefix("LOADING") {
                    throw EventsError(.accessRefused, "Redis refuses the user or the password", operation: operation)
                }
                throw RedisFailure.error(text, operation: operation)
            }
        }
    }

    func round(now: MonotonicTime) throws -> Interest {
        if written == output.count {
            output.removeAll(keepingCapacity: output.count <= 1 << 20)
            written = 0
        }
        connection.takeUnsent(into: &output)
        try write()
        while true {
            let replies = try read()
            if replies.isEmpty { break }
            guard connection.replied(replies) else {
                throw EventsError(.protocolViolation, "a reply that nobody asked for", operation: "redis")
            }
        }
        return Interest(writable: written < output.count)
    }

    func finish(_ error: (any Error)?) {
        let reason: EventsError
        switch error {
        case let error as EventsError: reason = error
        case let error as SocketError: reason = EventsError(.connectionLost, error.description, operation: "redis")
        case let error?: reason = EventsError(.connectionLost, "\(type(of: error))", operation: "redis")
        case nil: reason = EventsError(.closed, "the store was closed", operation: "redis")
        }
        connection.end(reason)
        release()
    }

    private func release() {
        redisReaderFree(reader)
        Socket.close(descriptor)
    }

    private func write() throws {
        while written < output.count {
            let transfer = output.withUnsafeBytes {
                Socket.send(descriptor, UnsafeRawBufferPointer(rebasing: $0[written...]))
            }
            switch transfer {
            case .bytes(let count): written += count
            case .wouldBlock: return
            case .closed(let reason): throw EventsError(.connectionLost, reason, operation: "redis")
            }
        }
    }

    /// The replies that are complete after one read; none when the socket is silent.
    private func read() throws -> [RedisReply] {
        var replies: [RedisReply] = []
        while replies.isEmpty {
            switch input.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
            case .wouldBlock: return []
            case .closed(let reason): throw EventsError(.connectionLost, reason, operation: "redis")
            case .bytes(let count):
                pendingInput += count
                guard pendingInput <= Self.replyLimit else {
                    throw EventsError(.protocolViolation, "a reply of more than 64 MiB", operation: "redis")
                }
                let status = input.withUnsafeBytes {
                    redisReaderFeed(reader, $0.baseAddress?.assumingMemoryBound(to: CChar.self), count)
                }
                guard status == REDIS_OK else { throw Self.malformed }
                while let reply = try nextReply() {
                    replies.append(reply)
                    pendingInput = 0
                }
            }
        }
        return replies
    }

    private func nextReply() throws -> RedisReply? {
        var raw: UnsafeMutableRawPointer?
        guard redisReaderGetReply(reader, &raw) == REDIS_OK else { throw Self.malformed }
        guard let raw else { return nil }
        defer { freeReplyObject(raw) }
        // Sound: the reader was made with hiredis's own functions, which make redisReply objects.
        return RedisReply(UnsafePointer(raw.assumingMemoryBound(to: redisReply.self)))
    }

    private static let malformed = EventsError(.protocolViolation, "a malformed reply", operation: "redis")
}
