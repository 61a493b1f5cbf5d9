internal import CRabbitMQ
internal import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Values as the C library has them, and as the rest of this module does.
extension AMQPDriver {
    static func string(_ bytes: amqp_bytes_t) -> String {
        // Sound: they point into the frame, which is valid while it is taken in.
        String(decoding: UnsafeRawBufferPointer(start: bytes.bytes, count: bytes.len), as: UTF8.self)
    }

    /// A text of the broker's for errors and logs: one line, of 255 bytes at most.
    static func text(_ bytes: amqp_bytes_t) -> String {
        let scalars = string(amqp_bytes_t(len: min(bytes.len, 255), bytes: bytes.bytes)).unicodeScalars
        return String(String.UnicodeScalarView(scalars.map { isShown($0) ? $0 : " " }))
    }

    /// Whether a character is no control character, and neither ends a line nor turns the direction of a text.
    private static func isShown(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.properties.generalCategory {
        case .control, .format, .lineSeparator, .paragraphSeparator: false
        default: true
        }
    }

    /// The properties, and as they came those that are no UTF-8; but for `expiration` and `user_id`, which brokers look at.
    static func properties(
        _ raw: amqp_basic_properties_t
    ) -> (properties: MessageProperties, rawTexts: [String: [UInt8]]) {
        var rawTexts: [String: [UInt8]] = [:]
        func text(_ flag: Int32, _ value: amqp_bytes_t, _ name: StaticString? = nil) -> String? {
            guard raw._flags & amqp_flags_t(flag) != 0 else { return nil }
            let text = string(value)
            // Sound: as in `string`.
            let bytes = UnsafeRawBufferPointer(start: value.bytes, count: value.len)
            if let name, !text.utf8.elementsEqual(bytes) { rawTexts["\(name)"] = Array(bytes) }
            return text
        }
        var properties = MessageProperties(
            contentType: text(AMQP_BASIC_CONTENT_TYPE_FLAG, raw.content_type, "content_type"),
            messageID: text(AMQP_BASIC_MESSAGE_ID_FLAG, raw.message_id, "message_id"),
            type: text(AMQP_BASIC_TYPE_FLAG, raw.type, "type"),
            appID: text(AMQP_BASIC_APP_ID_FLAG, raw.app_id, "app_id"),
            correlationID: text(AMQP_BASIC_CORRELATION_ID_FLAG, raw.correlation_id, "correlation_id"),
            replyTo: text(AMQP_BASIC_REPLY_TO_FLAG, raw.reply_to, "reply_to"),
            contentEncoding: text(AMQP_BASIC_CONTENT_ENCODING_FLAG, raw.content_encoding, "content_encoding"),
            priority: raw._flags & amqp_flags_t(AMQP_BASIC_PRIORITY_FLAG) != 0 ? raw.priority : nil,
            expiration: text(AMQP_BASIC_EXPIRATION_FLAG, raw.expiration),
            userID: text(AMQP_BASIC_USER_ID_FLAG, raw.user_id))
        if raw._flags & amqp_flags_t(AMQP_BASIC_TIMESTAMP_FLAG) != 0 {
            properties.timestamp = Date(timeIntervalSince1970: Double(raw.timestamp))
        }
        if raw._flags & amqp_flags_t(AMQP_BASIC_HEADERS_FLAG) != 0 {
            for entry in UnsafeBufferPointer(start: raw.headers.entries, count: Int(raw.headers.num_entries)) {
                // Nested tables and arrays are left out: nothing of ours is in them.
                if let value = headerValue(entry.value) { properties.headers[string(entry.key)] = value }
            }
        }
        return (properties, rawTexts)
    }

    /// The headers in the payload of a header frame, which stand behind `content_type` and `content_encoding` (AMQP 0-9-1,
    /// class basic). The library has decoded it before.
    static func headerTable(_ payload: UnsafeRawBufferPointer) -> HeaderTable? {
        let flags = amqp_flags_t(payload.bigEndian(at: 12, as: UInt16.self))
        // The lowest bit: another word of flags follows, which no property of this class needs.
        guard flags & amqp_flags_t(AMQP_BASIC_HEADERS_FLAG) != 0, flags & 1 == 0 else { return nil }
        var position = 14
        for flag in [AMQP_BASIC_CONTENT_TYPE_FLAG, AMQP_BASIC_CONTENT_ENCODING_FLAG]
        where flags & amqp_flags_t(flag) != 0 {
            guard position < payload.count else { return nil }
            position += 1 + Int(payload[position])
        }
        guard payload.count - position >= 4 else { return nil }
        let length = Int(payload.bigEndian(at: position, as: UInt32.self))
        guard length <= payload.count - position - 4 else { return nil }
        return HeaderTable(bytes: Array(payload[position + 4..<position + 4 + length]))
    }

    static func headerValue(_ field: amqp_field_value_t) -> MessageProperties.HeaderValue? {
        switch UInt32(field.kind) {
        case AMQP_FIELD_KIND_UTF8.rawValue, AMQP_FIELD_KIND_BYTES.rawValue: .string(string(field.value.bytes))
        case AMQP_FIELD_KIND_BOOLEAN.rawValue: .boolean(field.value.boolean != 0)
        case AMQP_FIELD_KIND_I8.rawValue: .integer(Int64(field.value.i8))
        case AMQP_FIELD_KIND_U8.rawValue: .integer(Int64(field.value.u8))
        case AMQP_FIELD_KIND_I16.rawValue: .integer(Int64(field.value.i16))
        case AMQP_FIELD_KIND_U16.rawValue: .integer(Int64(field.value.u16))
        case AMQP_FIELD_KIND_I32.rawValue: .integer(Int64(field.value.i32))
        case AMQP_FIELD_KIND_U32.rawValue: .integer(Int64(field.value.u32))
        case AMQP_FIELD_KIND_I64.rawValue: .integer(field.value.i64)
        case AMQP_FIELD_KIND_U64.rawValue, AMQP_FIELD_KIND_TIMESTAMP.rawValue:
            .integer(Int64(clamping: field.value.u64))
        default: nil
        }
    }
}
