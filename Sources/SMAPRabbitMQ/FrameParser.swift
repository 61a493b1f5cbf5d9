/// One frame as it came from the broker (AMQP 0-9-1, 2.3.5).
struct Frame {
    enum Kind: UInt8 {
        case method = 1
        case header = 2
        case body = 3
        case heartbeat = 8
    }

    let kind: Kind
    let channel: UInt16
    /// Valid until the call that hands out the frame returns.
    let payload: UnsafeRawBufferPointer
}

/// Cuts what has arrived into frames, and checks their outside: kind, length and end.
struct FrameParser {
    /// The largest payload that is read. Larger than what is agreed on with the broker (131,064): headers cannot be split
    /// into frames, and the broker adds its own (`x-death`, `x-delivery-count`) to those that it accepted at the limit.
    static let payloadLimit = 512 * 1024
    /// Type, channel and length before the payload; one end byte after it.
    static let overhead = 8
    static let end: UInt8 = 0xCE

    private var buffer: [UInt8] = []
    private var start = 0

    mutating func append(_ bytes: UnsafeRawBufferPointer) {
        if start == buffer.count {
            buffer.removeAll(keepingCapacity: buffer.capacity <= 1 << 20)
        } else if start > 0 {
            buffer.removeSubrange(..<start)
        }
        start = 0
        buffer.append(contentsOf: bytes)
    }

    /// Hands out all complete frames, until `body` returns false; what follows then stays for the next call.
    ///
    /// - Throws: ``AMQPFailure`` for what is no frame, and what `body` throws.
    mutating func forEachFrame(_ body: (Frame) throws -> Bool) throws {
        let limit = buffer.count
        var position = start
        defer { start = position }
        try buffer.withUnsafeBytes { bytes in
            while limit - position >= Self.overhead {
                let length = Int(bytes.bigEndian(at: position + 3, as: UInt32.self))
                guard let kind = Frame.Kind(rawValue: bytes[position]) else {
                    // A server that does not speak this version answers with the version that it speaks.
                    if bytes[position] == UInt8(ascii: "A") {
                        throw AMQPFailure.unexpected("the server does not speak AMQP 0-9-1")
                    }
                    throw AMQPFailure.unexpected("the server sends something that is no AMQP frame")
                }
                guard length <= Self.payloadLimit else {
                    throw AMQPFailure.unexpected("a frame of \(length) bytes, more than \(Self.payloadLimit)")
                }
                guard limit - position >= length + Self.overhead else { return }
                guard bytes[position + 7 + length] == Self.end else {
                    throw AMQPFailure.unexpected("a frame without its end")
                }
                let frame = Frame(
                    kind: kind, channel: bytes.bigEndian(at: position + 1, as: UInt16.self),
                    payload: UnsafeRawBufferPointer(rebasing: bytes[position + 7..<position + 7 + length]))
                position += length + Self.overhead
                guard try body(frame) else { return }
            }
        }
    }
}

extension UnsafeRawBufferPointer {
    /// A number in network order. The caller has checked that it lies within the buffer.
    func bigEndian<Value: FixedWidthInteger & BitwiseCopyable>(at offset: Int, as type: Value.Type) -> Value {
        Value(bigEndian: loadUnaligned(fromByteOffset: offset, as: type))
    }
}
