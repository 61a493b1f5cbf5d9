internal import CHiredis
internal import ConnectionThread
internal import SMAPEvents

/// A socket to a Redis server, with hiredis as the codec. For one thread at a time.
///
/// hiredis does not touch the socket: it would write with `write()`, and a broken connection would raise SIGPIPE and kill
/// the process.
final class RedisWire {
    /// The reader has no limit of its own. No reply of ours comes near this.
    private static let replyLimit = 64 << 20

    let descriptor: Int32
    private let reader: UnsafeMutablePointer<redisReader>
    private var output: [UInt8] = []
    private var written = 0
    private var input = [UInt8](repeating: 0, count: 64 * 1024)
    private var pendingInput = 0
    private let tls: TLSSession?

    /// Connects, and agrees on the encryption if there is to be one; blocks, bounded by the deadline.
    init(_ address: RedisConfiguration.Address, _ tls: ServerTLS?, deadline: MonotonicTime) throws {
        self.tls = try tls.map { try TLSSession($0, host: address.host) }
        let descriptor = try Socket.connect(host: address.host, port: address.port, deadline: deadline)
        guard let reader = redisReaderCreate() else {
            Socket.close(descriptor)
            throw SocketError(.outOfDescriptors, "out of memory")
        }
        self.descriptor = descriptor
        self.reader = reader
        do {
            try shakeHands(deadline)
        } catch {
            close()
            throw error
        }
    }

    private func shakeHands(_ deadline: MonotonicTime) throws {
        guard let tls else { return }
        while try !tls.shakeHands() {
            try write()
            guard Socket.wait(descriptor, toWrite: !isFlushed, until: deadline) else {
                throw EventsError(
                    .connectionFailed, "the server does not answer the TLS handshake (is this its TLS port?)",
                    operation: "redis")
            }
            switch input.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
            case .wouldBlock: break
            case .bytes(let count):
                try input.withUnsafeBytes { try tls.received(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
            case .closed(let reason): throw EventsError(.connectionFailed, reason, operation: "redis")
            }
        }
    }

    /// To be called once, at the end.
    func close() {
        if let tls {
            // Should the socket be full or broken, the server will see for itself.
            tls.end()
            try? write()
        }
        redisReaderFree(reader)
        Socket.close(descriptor)
    }

    /// Whether all that was to be written is.
    var isFlushed: Bool { written == output.count }

    /// Lets `append` add to what is to be written, and writes what the socket takes.
    func write(_ append: (inout [UInt8]) -> Void = { _ in }) throws {
        if isFlushed {
            output.removeAll(keepingCapacity: output.count <= 1 << 20)
            written = 0
        }
        if let tls {
            var plain: [UInt8] = []
            append(&plain)
            try tls.encrypt(plain)
            tls.takeOutput(into: &output)
        } else {
            append(&output)
        }
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

    /// Sends one command and waits for its reply; blocks, bounded by the deadline.
    func ask(_ arguments: [String], _ operation: String, deadline: MonotonicTime) throws -> RedisReply {
        try write { $0 += RedisCommand(arguments).bytes }
        while true {
            if let reply = try read()?.first { return reply }
            guard Socket.wait(descriptor, toWrite: !isFlushed, until: deadline) else {
                throw EventsError(.connectionFailed, "no answer in time", operation: operation)
            }
            try write()
        }
    }

    /// The replies that one read has completed, which may be none; nil when the socket is silent.
    func read() throws -> [RedisReply]? {
        switch input.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
        case .wouldBlock: return nil
        case .closed(let reason): throw EventsError(.connectionLost, reason, operation: "redis")
        case .bytes(let count):
            var replies: [RedisReply] = []
            try input.withUnsafeBytes { bytes in
                let bytes = UnsafeRawBufferPointer(rebasing: bytes[..<count])
                guard let tls else { return try parse(bytes, &replies) }
                try tls.received(bytes)
                try tls.decrypt { try parse($0, &replies) }
                // What the protocol itself has to answer goes out with the next write.
                tls.takeOutput(into: &output)
            }
            return replies
        }
    }

    private func parse(_ bytes: UnsafeRawBufferPointer, _ replies: inout [RedisReply]) throws {
        pendingInput += bytes.count
        guard pendingInput <= Self.replyLimit else {
            throw EventsError(.protocolViolation, "a reply of more than 64 MiB", operation: "redis")
        }
        let status = redisReaderFeed(reader, bytes.baseAddress?.assumingMemoryBound(to: CChar.self), bytes.count)
        guard status == REDIS_OK else { throw Self.malformed }
        while let reply = try nextReply() {
            replies.append(reply)
            pendingInput = 0
        }
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
