internal import CRabbitMQ

/// Finished frames of methods and message headers, encoded by librabbitmq.
enum MethodEncoder {
    /// A method's frame. Throws ``AMQPFailure`` when something does not fit: then nothing was sent, and only this call fails.
    static func frame<Method: BitwiseCopyable>(
        _ id: amqp_method_number_t, on channel: amqp_channel_t, _ method: Method
    ) throws -> [UInt8] {
        var method = method
        return try withUnsafeTemporaryAllocation(byteCount: frameLimit, alignment: 8) { buffer in
            let count = try put(id, on: channel, &method, into: buffer)
            return [UInt8](buffer[..<count])
        }
    }

    /// Names have 255 bytes at most, and the arguments of a queue 32 KiB together: all methods of ours fit.
    private static let frameLimit = 64 * 1024

    /// Writes a method's frame at the start of a buffer; returns its length.
    static func put<Method: BitwiseCopyable>(
        _ id: amqp_method_number_t, on channel: amqp_channel_t, _ method: inout Method,
        into buffer: UnsafeMutableRawBufferPointer
    ) throws -> Int {
        let room = room(in: buffer, after: 11)
        let status = withUnsafeMutablePointer(to: &method) { amqp_encode_method(id, $0, room) }
        guard status >= 0 else { throw AMQPFailure.library(status: status, doing: "encoding") }
        buffer.put(id, at: 7)
        return close(buffer, .method, channel, payload: Int(status) + 4)
    }

    /// Writes a message's header frame at the start of a buffer; returns its length.
    static func put(
        _ properties: inout amqp_basic_properties_t, bodySize: Int, on channel: amqp_channel_t,
        into buffer: UnsafeMutableRawBufferPointer
    ) throws -> Int {
        let room = room(in: buffer, after: 19)
        let status = withUnsafeMutablePointer(to: &properties) {
            amqp_encode_properties(UInt16(AMQP_BASIC_CLASS), $0, room)
        }
        guard status >= 0 else { throw AMQPFailure.library(status: status, doing: "encoding") }
        buffer.put(UInt16(AMQP_BASIC_CLASS), at: 7)
        buffer.put(UInt16(0), at: 9)
        buffer.put(UInt64(bodySize), at: 11)
        return close(buffer, .header, channel, payload: Int(status) + 12)
    }

    private static func room(in buffer: UnsafeMutableRawBufferPointer, after start: Int) -> amqp_bytes_t {
        amqp_bytes_t(len: max(0, buffer.count - start - 1), bytes: buffer.baseAddress.map { $0 + start })
    }

    private static func close(
        _ buffer: UnsafeMutableRawBufferPointer, _ kind: Frame.Kind, _ channel: amqp_channel_t, payload: Int
    ) -> Int {
        buffer[0] = kind.rawValue
        buffer.put(channel, at: 1)
        buffer.put(UInt32(payload), at: 3)
        buffer[7 + payload] = FrameParser.end
        return payload + FrameParser.overhead
    }
}

extension UnsafeMutableRawBufferPointer {
    /// Stores a number in network order. The caller has checked that it lies within the buffer.
    func put<Value: FixedWidthInteger & BitwiseCopyable>(_ value: Value, at offset: Int) {
        storeBytes(of: value.bigEndian, toByteOffset: offset, as: Value.self)
    }
}

extension [UInt8] {
    /// Appends the frames of a body, none larger than what was agreed on, headers and ends included.
    mutating func append(body: [UInt8], on channel: UInt16, frameLimit: Int) {
        let share = frameLimit - FrameParser.overhead
        var start = 0
        while start < body.count {
            let end = Swift.min(body.count, start + share)
            append(Frame.Kind.body.rawValue)
            append(bigEndian: channel)
            append(bigEndian: UInt32(end - start))
            append(contentsOf: body[start..<end])
            append(FrameParser.end)
            start = end
        }
    }
}
