/// A connected socket, encrypted or not, that never blocks: bytes to send are buffered here, and how many of them may have
/// left is known. For one thread at a time.
///
/// Both protocols of this package use it; their C libraries are codecs and never see the socket. They would write with
/// `write()`, and a broken connection would raise SIGPIPE and kill the process.
package final class SocketStream {
    /// What one read came to.
    package enum Reading: Sendable {
        /// The socket is silent.
        case silent
        /// There were some bytes, and there may be more if the buffer was filled.
        case bytes(mayHaveMore: Bool)
    }

    /// So much plain text is encrypted at a time, one TLS record: what is encrypted counts as sent.
    private static let recordSize = 16 * 1024

    /// So many bytes of TLS's own answers may wait for the socket.
    private static let answerLimit = 1 << 20

    /// So many bytes that were sent may stay in memory.
    private static let sentLimit = 256 * 1024

    package let descriptor: Int32
    /// Bytes of the protocol that are still to be sent.
    private var output: [UInt8] = []
    private var outputStart = 0
    /// What the socket gets instead, when the connection is encrypted.
    private var records: [UInt8] = []
    private var recordsStart = 0
    private var input = [UInt8](repeating: 0, count: 64 * 1024)
    private let tls: TLSSession?
    /// Why nothing can be sent any more. It is thrown once everything that had come before was read: that may tell more.
    private var sendFailure: SocketError?
    /// How many bytes of the protocol may have left; exact without TLS, rounded up to whole records with it.
    package private(set) var sentCount: UInt64 = 0

    /// Connects, and agrees on the encryption if there is to be one. Blocks, until the deadline at most; `interrupt` ends
    /// it at once when it is signalled.
    ///
    /// - Throws: ``SocketError`` or ``TLSError``.
    package init(
        host: String, port: Int, tls options: TLSOptions?, deadline: MonotonicTime, interrupt: Wakeup? = nil
    ) throws {
        tls = try options.map { try TLSSession($0, host: host) }
        descriptor = try Socket.connect(host: host, port: port, deadline: deadline, interrupt: interrupt)
        do {
            try shakeHands(deadline, interrupt)
        } catch {
            // Why we refuse the server is in OpenSSL's alert.
            tls?.takeOutput(into: &records)
            _ = try? sendRecords()
            Socket.close(descriptor)
            throw error
        }
    }

    private func shakeHands(_ deadline: MonotonicTime, _ interrupt: Wakeup?) throws {
        guard let tls else { return }
        while try !tls.shakeHands() {
            tls.takeOutput(into: &records)
            let isFlushed = try flush()
            try Socket.wait(descriptor, toWrite: !isFlushed, until: deadline, interrupt: interrupt) {
                "the server does not answer the TLS handshake (is this its TLS port?)"
            }
            switch input.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
            case .wouldBlock: if let sendFailure { throw sendFailure }
            case .bytes(let count):
                try input.withUnsafeBytes { try tls.received(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
            case .closed(let reason): throw SocketError(.refused, reason)
            }
        }
        tls.takeOutput(into: &records)
    }

    /// Ends the connection. To be called once, at the end.
    package func close() {
        if let tls {
            // Should the socket be full or broken, the server will see for itself.
            tls.end()
            tls.takeOutput(into: &records)
            _ = try? sendRecords()
        }
        Socket.close(descriptor)
    }

    // MARK: Writing

    /// How many bytes were appended so far: the position in the stream of what is appended next.
    package var appendedCount: UInt64 { sentCount + UInt64(unsentCount) }

    /// How many bytes are held in memory, those that were sent included.
    package var heldCount: Int { output.count + records.count }

    /// How many bytes are waiting for the socket to take them.
    package var unsentCount: Int { output.count - outputStart }

    /// Whether everything has been handed to the kernel.
    package var isFlushed: Bool { unsentCount == 0 && recordsStart == records.count }

    /// Whether nothing can be sent any more. The next read that finds nothing throws why.
    package var hasFailed: Bool { sendFailure != nil }

    /// Adds to what is to be sent. ``flush()`` sends it.
    package func append(_ add: (inout [UInt8]) throws -> Void) rethrows {
        if outputStart == output.count {
            output.removeAll(keepingCapacity: output.capacity <= 1 << 20)
            outputStart = 0
        } else if outputStart > Self.sentLimit, outputStart > output.count / 2 {
            // A socket that is slower than its writer never takes everything: what it has taken must go all the same.
            output.removeSubrange(..<outputStart)
            outputStart = 0
        }
        try add(&output)
    }

    /// Sends what the socket takes. True when nothing is left; otherwise the socket is full, or broken, which shows when it
    /// is read.
    @discardableResult
    package func flush() throws -> Bool {
        guard let tls else {
            while outputStart < output.count {
                guard let count = try send(output, from: outputStart) else { return false }
                outputStart += count
                sentCount += UInt64(count)
            }
            return true
        }
        while try sendRecords() {
            guard outputStart < output.count else { return true }
            let end = min(output.count, outputStart + Self.recordSize)
            try output.withUnsafeBytes { try tls.encrypt(UnsafeRawBufferPointer(rebasing: $0[outputStart..<end])) }
            sentCount += UInt64(end - outputStart)
            outputStart = end
            tls.takeOutput(into: &records)
        }
        return false
    }

    private func sendRecords() throws -> Bool {
        while recordsStart < records.count {
            guard let count = try send(records, from: recordsStart) else { return false }
            recordsStart += count
        }
        records.removeAll(keepingCapacity: true)
        recordsStart = 0
        return true
    }

    private func send(_ bytes: [UInt8], from start: Int) throws -> Int? {
        guard sendFailure == nil else { return nil }
        let transfer = bytes.withUnsafeBytes { Socket.send(descriptor, UnsafeRawBufferPointer(rebasing: $0[start...])) }
        switch transfer {
        case .bytes(let count): return count
        case .wouldBlock: return nil
        case .closed(let reason):
            sendFailure = SocketError(.lost, reason)
            return nil
        }
    }

    // MARK: Reading

    /// Reads once, and hands on what has come.
    ///
    /// - Throws: ``SocketError`` when the connection has ended, ``TLSError``, and what `body` throws.
    package func receive(_ body: (UnsafeRawBufferPointer) throws -> Void) throws -> Reading {
        switch input.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
        case .wouldBlock:
            if let sendFailure { throw sendFailure }
            return .silent
        case .closed(let reason): throw SocketError(.lost, reason)
        case .bytes(let count):
            try input.withUnsafeBytes { bytes in
                let bytes = UnsafeRawBufferPointer(rebasing: bytes[..<count])
                guard let tls else { return try body(bytes) }
                try tls.received(bytes)
                try tls.decrypt(body)
                guard !tls.hasEnded else { throw SocketError(.lost, "the server closed the connection") }
                // What TLS itself has to answer goes out with the next flush.
                tls.takeOutput(into: &records)
                guard records.count - recordsStart <= Self.answerLimit else {
                    throw SocketError(.lost, "the server makes TLS answer, and does not read the answers")
                }
            }
            return .bytes(mayHaveMore: count == input.count)
        }
    }

    /// Sends what is left, and waits until something has come, or the socket takes more. Blocks, until the deadline.
    ///
    /// - Throws: ``SocketError`` with `timedOut` and `what` as its text, or when the connection has ended.
    package func wait(until deadline: MonotonicTime, interrupt: Wakeup? = nil, _ what: () -> String) throws {
        let isFlushed = try flush()
        try Socket.wait(descriptor, toWrite: !isFlushed, until: deadline, interrupt: interrupt, what)
    }
}
