import CRabbitMQ
import Foundation
import SMAPRabbitMQ

/// The bare librabbitmq loop: what the C library does on this machine when nothing is around it.
///
/// Sound as Sendable: made on one thread and used by one call at a time on another, never by two at once.
final class RawRabbitMQ: @unchecked Sendable {
    struct Failure: Error {
        let doing: String
        let status: Int32
    }

    private let handle: amqp_connection_state_t
    private let descriptor: Int32

    init(_ configuration: RabbitMQConfiguration) throws {
        guard let handle = amqp_new_connection(), let socket = amqp_tcp_socket_new(handle) else {
            throw Failure(doing: "memory", status: 0)
        }
        self.handle = handle
        try Self.check(amqp_socket_open(socket, configuration.host, Int32(configuration.port)), "connect")
        descriptor = amqp_socket_get_sockfd(socket)
        var properties = amqp_empty_table
        let reply = smap_amqp_login_plain(
            handle, configuration.virtualHost, 0, 131_072, 0, &properties, configuration.username,
            configuration.password)
        guard reply.reply_type == AMQP_RESPONSE_NORMAL else { throw Failure(doing: "login", status: 0) }
        guard amqp_channel_open(handle, 1) != nil else { throw Failure(doing: "open", status: 0) }
    }

    deinit {
        _ = amqp_connection_close(handle, 200)
        amqp_destroy_connection(handle)
    }

    /// Publishes with confirms: fills the window, corked, then reads until there is room again.
    func publish(exchange: String, key: String, body: [UInt8], count: Int, window: Int) throws {
        guard amqp_confirm_select(handle, 1) != nil else { throw Failure(doing: "confirm.select", status: 0) }
        let texts = [
            exchange, key, "application/json", "evt_6f9c1b9e-6d0a-4a53-9f0b-0d7c2a1c9b11", "bench",
            "x-smap-schema-version",
        ].map { (text: String) in strdup(text) }
        defer { for text in texts { free(text) } }
        func bytes(_ index: Int) -> amqp_bytes_t { amqp_cstring_bytes(texts[index]) }
        var version = amqp_field_value_t()
        version.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
        version.value.i64 = 1
        var header = amqp_table_entry_t(key: bytes(5), value: version)
        var properties = amqp_basic_properties_t()
        properties._flags = amqp_flags_t(
            AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG
                | AMQP_BASIC_TYPE_FLAG | AMQP_BASIC_APP_ID_FLAG | AMQP_BASIC_TIMESTAMP_FLAG | AMQP_BASIC_HEADERS_FLAG)
        properties.content_type = bytes(2)
        properties.delivery_mode = 2
        properties.message_id = bytes(3)
        properties.type = bytes(1)
        properties.app_id = bytes(4)
        properties.timestamp = UInt64(Date().timeIntervalSince1970)

        try withUnsafeMutablePointer(to: &header) { header in
            properties.headers = amqp_table_t(num_entries: 1, entries: header)
            try body.withUnsafeBytes { raw in
                let content = amqp_bytes_t(len: raw.count, bytes: UnsafeMutableRawPointer(mutating: raw.baseAddress))
                var sent: UInt64 = 0
                var confirmed: UInt64 = 0
                while confirmed < count {
                    if sent < count, sent - confirmed < window {
                        cork(true)
                        while sent < count, sent - confirmed < window {
                            try Self.check(
                                amqp_basic_publish(handle, 1, bytes(0), bytes(1), 1, 0, &properties, content),
                                "publish")
                            sent += 1
                        }
                        cork(false)
                    }
                    confirmed = try readConfirms(confirmed)
                }
            }
        }
    }

    func delete(queue: String) {
        guard let name = strdup(queue) else { return }
        defer { free(name) }
        _ = amqp_queue_delete(handle, 1, amqp_cstring_bytes(name), 0, 0)
    }

    private func readConfirms(_ confirmed: UInt64) throws -> UInt64 {
        var confirmed = confirmed
        var frame = amqp_frame_t()
        var status = amqp_simple_wait_frame(handle, &frame)
        while true {
            try Self.check(status, "read")
            if Int32(frame.frame_type) == AMQP_FRAME_METHOD, frame.payload.method.id == AMQP_BASIC_ACK_METHOD,
                let ack = frame.payload.method.decoded?.load(as: amqp_basic_ack_t.self)
            {
                confirmed = ack.multiple != 0 ? ack.delivery_tag : confirmed + 1
            }
            amqp_maybe_release_buffers(handle)
            var immediately = timeval()
            status = amqp_simple_wait_frame_noblock(handle, &frame, &immediately)
            if status == AMQP_STATUS_TIMEOUT.rawValue { return confirmed }
        }
    }

    /// Consumes, copies each body, and acknowledges in batches with `multiple`.
    func consume(queue: String, count: Int, prefetch: Int) throws {
        guard let name = strdup(queue) else { throw Failure(doing: "memory", status: 0) }
        defer { free(name) }
        _ = amqp_basic_qos(handle, 1, 0, UInt16(clamping: prefetch), 0)
        _ = amqp_basic_consume(handle, 1, amqp_cstring_bytes(name), amqp_empty_bytes, 0, 0, 0, amqp_empty_table)
        var body: [UInt8] = []
        var expected: UInt64 = 0
        var done = 0
        var tag: UInt64 = 0
        let batch = max(1, prefetch / 4)
        while done < count {
            var frame = amqp_frame_t()
            try Self.check(amqp_simple_wait_frame(handle, &frame), "read")
            switch Int32(frame.frame_type) {
            case AMQP_FRAME_METHOD:
                if let deliver = frame.payload.method.decoded?.load(as: amqp_basic_deliver_t.self),
                    frame.payload.method.id == AMQP_BASIC_DELIVER_METHOD
                {
                    tag = deliver.delivery_tag
                }
            case AMQP_FRAME_HEADER:
                expected = frame.payload.properties.body_size
                body.removeAll(keepingCapacity: true)
            case AMQP_FRAME_BODY:
                let fragment = frame.payload.body_fragment
                body.append(contentsOf: UnsafeRawBufferPointer(start: fragment.bytes, count: fragment.len))
                guard body.count >= expected else { break }
                done += 1
                if done % batch == 0 || done == count {
                    try Self.check(amqp_basic_ack(handle, 1, tag, 1), "ack")
                }
                amqp_maybe_release_buffers(handle)
            default: break
            }
        }
    }

    private func cork(_ corked: Bool) {
        var value: Int32 = corked ? 1 : 0
        #if os(Linux)
        setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_CORK, &value, socklen_t(MemoryLayout<Int32>.size))
        #else
        setsockopt(descriptor, IPPROTO_TCP, TCP_NOPUSH, &value, socklen_t(MemoryLayout<Int32>.size))
        #endif
    }

    private static func check(_ status: Int32, _ doing: String) throws {
        guard status == AMQP_STATUS_OK.rawValue else { throw Failure(doing: doing, status: status) }
    }
}
