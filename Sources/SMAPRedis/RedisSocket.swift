internal import CHiredis
internal import ConnectionThread
internal import SMAPEvents

/// A connection to a Redis server, with hiredis as the codec, which does not touch the socket. For one thread at a time.
final class RedisSocket {
    /// The reader has no limit of its own. No reply of ours comes near this.
    private static let replyLimit = 64 << 20

    private let stream: SocketStream
    private let reader: UnsafeMutablePointer<redisReader>
    private var pendingInput = 0

    var descriptor: Int32 { stream.descriptor }
    /// Whether all that was to be written is.
    var isFlushed: Bool { stream.isFlushed }
    var hasFailed: Bool { stream.hasFailed }

    /// Connects, and agrees on the encryption if there is to be one; blocks, bounded by the deadline.
    ///
    /// - Throws: `SocketError` or `TLSError`.
    init(
        _ address: RedisConfiguration.Address, _ tls: ServerTLS?, deadline: MonotonicTime, interrupt: Wakeup?
    ) throws {
        guard let reader = redisReaderCreate() else { throw SocketError(.outOfDescriptors, "out of memory") }
        self.reader = reader
        do {
            stream = try SocketStream(
                host: address.host, port: address.port, tls: tls?.options, deadline: deadline, interrupt: interrupt)
        } catch {
            redisReaderFree(reader)
            throw error
        }
    }

    /// To be called once, at the end.
    func close() {
        redisReaderFree(reader)
        stream.close()
    }

    /// Lets `append` add to what is to be written, and writes what the socket takes.
    func write(_ append: (inout [UInt8]) -> Void = { _ in }) throws {
        stream.append(append)
        try stream.flush()
    }

    /// Sends one command and waits for its reply; blocks, bounded by the deadline.
    func ask(_ arguments: [String], deadline: MonotonicTime, interrupt: Wakeup?) throws -> RedisReply {
        try write { $0 += RedisCommand(arguments).bytes }
        while true {
            if let reply = try read()?.first { return reply }
            try stream.wait(until: deadline, interrupt: interrupt) { "no answer in time" }
        }
    }

    /// The replies that one read has completed, which may be none; nil when the socket is silent.
    func read() throws -> [RedisReply]? {
        var replies: [RedisReply] = []
        let reading = try stream.receive { try parse($0, &replies) }
        if case .silent = reading { return nil }
        return replies
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

extension ServerTLS {
    var options: TLSOptions {
        TLSOptions(
            authorityFile: authorityFile, certificateFile: certificateFile, privateKeyFile: privateKeyFile,
            verifiesPeer: verification.peer, verifiesHost: verification.host)
    }
}
