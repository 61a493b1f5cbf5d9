import CRabbitMQ
import ConnectionThread
import Foundation
import SMAPRabbitMQ

/// The smallest loop that publishes with confirms over a socket of its own, with librabbitmq as codec: what the transport is
/// compared with. It logs in, lays messages out as frames, sends a window of them at once, and counts confirms.
///
/// Sound as `Sendable`: it is used by one thread at a time.
final class OwnSocketLoop: @unchecked Sendable {
    struct Failure: Error { let doing: String }

    private let stream: SocketStream
    private let state: amqp_connection_state_t
    private var input: [UInt8] = []
    private var position = 0

    init(_ configuration: RabbitMQConfiguration) throws {
        guard let state = amqp_new_connection() else { throw Failure(doing: "memory") }
        self.state = state
        stream = try SocketStream(
            host: configuration.host, port: configuration.port, tls: nil,
            deadline: .now.advanced(by: .seconds(10)))
        stream.append { $0 += Array("AMQP".utf8) + [0, 0, 9, 1] }
        try expect(AMQP_CONNECTION_START_METHOD)
        try withStrings(["PLAIN", "en_US", configuration.virtualHost]) { names in
            let response = [UInt8](("\0\(configuration.username)\0\(configuration.password)").utf8)
            try response.withUnsafeBytes { raw in
                var ok = amqp_connection_start_ok_t()
                ok.mechanism = names[0]
                ok.response = amqp_bytes_t(len: raw.count, bytes: UnsafeMutableRawPointer(mutating: raw.baseAddress))
                ok.locale = names[1]
                try send(AMQP_CONNECTION_START_OK_METHOD, 0, &ok)
            }
            try expect(AMQP_CONNECTION_TUNE_METHOD)
            // Only the local limit for what comes in.
            amqp_tune_connection(state, 2_047, 1 << 20, 0)
            var tune = amqp_connection_tune_ok_t(channel_max: 2_047, frame_max: 131_072, heartbeat: 0)
            try send(AMQP_CONNECTION_TUNE_OK_METHOD, 0, &tune)
            var open = amqp_connection_open_t()
            open.virtual_host = names[2]
            try send(AMQP_CONNECTION_OPEN_METHOD, 0, &open)
            try expect(AMQP_CONNECTION_OPEN_OK_METHOD)
        }
        var open = amqp_channel_open_t()
        try send(AMQP_CHANNEL_OPEN_METHOD, 1, &open)
        try expect(AMQP_CHANNEL_OPEN_OK_METHOD)
        var select = amqp_confirm_select_t()
        try send(AMQP_CONFIRM_SELECT_METHOD, 1, &select)
        try expect(AMQP_CONFIRM_SELECT_OK_METHOD)
    }

    deinit {
        stream.close()
        amqp_destroy_connection(state)
    }

    /// Publishes messages with the properties that typed events have.
    func publish(exchange: String, key: String, body: [UInt8], count: Int, window: Int) throws {
        try withStrings([
            exchange, key, "application/json", "evt_6f9c1b9e-6d0a-4a53-9f0b-0d7c2a1c9b11", "bench",
            "x-smap-schema-version",
        ]) { texts in
            var version = amqp_field_value_t()
            version.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
            version.value.i64 = 1
            var header = amqp_table_entry_t(key: texts[5], value: version)
            try withUnsafeMutablePointer(to: &header) { header in
                var properties = amqp_basic_properties_t()
                properties._flags = amqp_flags_t(
                    AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG
                        | AMQP_BASIC_TYPE_FLAG | AMQP_BASIC_APP_ID_FLAG | AMQP_BASIC_TIMESTAMP_FLAG
                        | AMQP_BASIC_HEADERS_FLAG)
                properties.content_type = texts[2]
                properties.delivery_mode = 2
                properties.message_id = texts[3]
                properties.type = texts[1]
                properties.app_id = texts[4]
                properties.timestamp = UInt64(Date().timeIntervalSince1970)
                properties.headers = amqp_table_t(num_entries: 1, entries: header)
                var method = amqp_basic_publish_t()
                method.exchange = texts[0]
                method.routing_key = texts[1]
                method.mandatory = 1
                var sent = 0
                var confirmed = 0
                while confirmed < count {
                    try stream.append { output in
                        while sent < count, sent - confirmed < window {
                            try frame(AMQP_BASIC_PUBLISH_METHOD, 1, &method, into: &output)
                            try frame(&properties, bodySize: body.count, into: &output)
                            let share = 131_072 - 8
                            var start = 0
                            while start < body.count {
                                let end = min(body.count, start + share)
                                output += [3, 0, 1]
                                withUnsafeBytes(of: UInt32(end - start).bigEndian) { output += $0 }
                                output += body[start..<end]
                                output.append(0xCE)
                                start = end
                            }
                            sent += 1
                        }
                    }
                    try stream.wait(until: .now.advanced(by: .seconds(60))) { "the broker does not answer" }
                    confirmed = try readConfirms(confirmed)
                }
            }
        }
    }

    private func readConfirms(_ confirmed: Int) throws -> Int {
        var confirmed = confirmed
        while true {
            if case .silent = try stream.receive({ input.append(contentsOf: $0) }) { return confirmed }
            while let frame = try nextFrame() {
                if Int32(frame.frame_type) == AMQP_FRAME_METHOD, frame.payload.method.id == AMQP_BASIC_ACK_METHOD,
                    let ack = frame.payload.method.decoded?.load(as: amqp_basic_ack_t.self)
                {
                    confirmed = ack.multiple != 0 ? Int(ack.delivery_tag) : confirmed + 1
                }
                amqp_maybe_release_buffers(state)
            }
        }
    }

    /// The next frame of what has been read; nil when it is not complete.
    private func nextFrame() throws -> amqp_frame_t? {
        var frame = amqp_frame_t()
        while position < input.count {
            let used = input.withUnsafeBytes { raw in
                amqp_handle_input(
                    state,
                    amqp_bytes_t(
                        len: raw.count - position,
                        bytes: UnsafeMutableRawPointer(mutating: raw.baseAddress.map { $0 + position })), &frame)
            }
            guard used >= 0 else { throw Failure(doing: "reading") }
            position += Int(used)
            if frame.frame_type != 0 { return frame }
        }
        input.removeAll(keepingCapacity: true)
        position = 0
        return nil
    }

    private func expect(_ method: amqp_method_number_t) throws {
        while true {
            if let frame = try nextFrame() {
                guard Int32(frame.frame_type) == AMQP_FRAME_METHOD, frame.payload.method.id == method else {
                    throw Failure(doing: "login")
                }
                return
            }
            try stream.wait(until: .now.advanced(by: .seconds(10))) { "the broker does not answer" }
            _ = try stream.receive { input.append(contentsOf: $0) }
        }
    }

    private func send<Method>(_ id: amqp_method_number_t, _ channel: UInt16, _ method: inout Method) throws {
        try stream.append { try frame(id, channel, &method, into: &$0) }
    }

    private func frame<Method>(
        _ id: amqp_method_number_t, _ channel: UInt16, _ method: inout Method, into output: inout [UInt8]
    ) throws {
        try frame(kind: 1, channel, prefix: 4, into: &output) { room in
            room.storeBytes(of: id.bigEndian, as: UInt32.self)
            let rest = amqp_bytes_t(len: room.count - 4, bytes: room.baseAddress.map { $0 + 4 })
            return withUnsafeMutablePointer(to: &method) { amqp_encode_method(id, $0, rest) }
        }
    }

    private func frame(_ properties: inout amqp_basic_properties_t, bodySize: Int, into output: inout [UInt8]) throws {
        try frame(kind: 2, 1, prefix: 12, into: &output) { room in
            room.storeBytes(of: UInt32(60 << 16).bigEndian, as: UInt32.self)
            room.storeBytes(of: UInt64(bodySize).bigEndian, toByteOffset: 4, as: UInt64.self)
            let rest = amqp_bytes_t(len: room.count - 12, bytes: room.baseAddress.map { $0 + 12 })
            return withUnsafeMutablePointer(to: &properties) {
                amqp_encode_properties(UInt16(AMQP_BASIC_CLASS), $0, rest)
            }
        }
    }

    /// Appends a frame whose payload `fill` writes behind a prefix; it returns the length of the rest.
    private func frame(
        kind: UInt8, _ channel: UInt16, prefix: Int, into output: inout [UInt8],
        _ fill: (UnsafeMutableRawBufferPointer) -> Int32
    ) throws {
        try withUnsafeTemporaryAllocation(byteCount: 4_096, alignment: 8) { room in
            let rest = fill(room)
            guard rest >= 0 else { throw Failure(doing: "encoding") }
            let length = prefix + Int(rest)
            output += [kind, UInt8(truncatingIfNeeded: channel >> 8), UInt8(truncatingIfNeeded: channel)]
            withUnsafeBytes(of: UInt32(length).bigEndian) { output += $0 }
            output += room[..<length]
            output.append(0xCE)
        }
    }
}

/// Hands out strings as the C library takes them, for as long as `body` runs.
private func withStrings<Result>(_ texts: [String], _ body: ([amqp_bytes_t]) throws -> Result) rethrows -> Result {
    let copies = texts.map { strdup($0) }
    defer { for copy in copies { free(copy) } }
    return try body(copies.map { amqp_cstring_bytes($0) })
}
