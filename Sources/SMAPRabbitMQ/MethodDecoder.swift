internal import CRabbitMQ

/// Decodes methods and message headers with librabbitmq. What it returns points into the frame and into its own memory:
/// both are valid until the next call. For one thread at a time.
final class MethodDecoder {
    private var pool = amqp_pool_t()

    init() { init_amqp_pool(&pool, 16 * 1024) }

    deinit { empty_amqp_pool(&pool) }

    /// Throws ``AMQPFailure`` for what no broker should send.
    func method(_ frame: Frame) throws -> amqp_method_t {
        guard frame.payload.count >= 4 else { throw AMQPFailure.unexpected("a method frame of 3 bytes or fewer") }
        recycle_amqp_pool(&pool)
        let id = frame.payload.bigEndian(at: 0, as: UInt32.self)
        var decoded: UnsafeMutableRawPointer?
        let status = amqp_decode_method(id, &pool, Self.bytes(frame.payload, from: 4), &decoded)
        guard status >= 0 else { throw AMQPFailure.library(status: status, doing: "method \(id >> 16).\(id & 0xFFFF)") }
        return amqp_method_t(id: id, decoded: decoded)
    }

    /// The size of the body, and the properties. Throws ``AMQPFailure``.
    func header(_ frame: Frame) throws -> (bodySize: UInt64, properties: amqp_basic_properties_t) {
        // Class, weight, size of the body, flags (AMQP 0-9-1, 2.3.5.2).
        guard frame.payload.count >= 14, frame.payload.bigEndian(at: 0, as: UInt16.self) == AMQP_BASIC_CLASS else {
            throw AMQPFailure.unexpected("a header frame that is too short, or of another class")
        }
        recycle_amqp_pool(&pool)
        var decoded: UnsafeMutableRawPointer?
        let status = amqp_decode_properties(
            UInt16(AMQP_BASIC_CLASS), &pool, Self.bytes(frame.payload, from: 12), &decoded)
        guard status >= 0, let decoded else { throw AMQPFailure.library(status: status, doing: "a message's header") }
        return (
            frame.payload.bigEndian(at: 4, as: UInt64.self), decoded.load(as: amqp_basic_properties_t.self)
        )
    }

    private static func bytes(_ payload: UnsafeRawBufferPointer, from start: Int) -> amqp_bytes_t {
        // Sound: the library only reads what it decodes; its own type has no const.
        amqp_bytes_t(
            len: payload.count - start,
            bytes: UnsafeMutableRawPointer(mutating: payload.baseAddress.map { $0 + start }))
    }
}
