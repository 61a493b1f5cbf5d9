internal import CRabbitMQ
internal import SMAPEvents
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// A message as it goes over the wire: its method and header as finished frames, and its body, which is cut into frames
/// when it is sent, since only the connection knows how large they may be.
///
/// All checks come before: an encoding error concerns this message only.
struct EncodedMessage: Sendable {
    static let channel: amqp_channel_t = AMQPDriver.publishingChannel
    /// The length of the ids that ``EventID`` makes.
    private static let idLength = 40

    let head: [UInt8]
    let body: [UInt8]
    /// The larger of the two frames in ``head``.
    let largestHeadFrame: Int
    let destination: PublishDestination
    let messageID: String?
    /// The correlation id, if a reply is expected.
    let requestID: String?

    /// What it counts for in the window.
    var size: Int { head.count + body.count }

    /// How many bytes its frames have together.
    func length(frameLimit: Int) -> Int {
        let share = frameLimit - FrameParser.overhead
        return head.count + body.count + (body.count + share - 1) / share * FrameParser.overhead
    }

    /// Throws `invalidEvent` or `eventTooLarge`, naming the field.
    init(_ message: OutboundMessage) throws(EventsError) {
        do {
            try self.init(encoding: message)
        } catch let error as EventsError {
            throw error
        } catch {
            // The checks have missed something. The message is at fault, not the connection, and is not to be tried again.
            let reason = AMQPFailure.error(from: error, server: "", connecting: false).message
            throw EventsError(
                .invalidEvent, "the message to \(message.exchange) cannot be encoded: \(reason)", operation: "publish")
        }
    }

    private init(encoding message: OutboundMessage) throws {
        body = message.body
        if case .template(let template, let id, let date) = message.content, id.rawValue.utf8.count == Self.idLength,
            let timestamp = Self.seconds(date)
        {
            let layout = try Self.layout(template)
            head = layout.head(messageID: id.rawValue, timestamp: timestamp, bodySize: body.count)
            largestHeadFrame = layout.largestFrame
            destination = template.destination
            messageID = id.rawValue
            requestID = nil
            return
        }
        try message.validate()
        (head, largestHeadFrame) = try Self.head(message)
        destination = PublishDestination(exchange: message.exchange, routingKey: message.routingKey)
        let properties = message.properties
        messageID = properties.messageID
        requestID = properties.replyTo == nil ? nil : properties.correlationID
    }

    /// Whole seconds from 1970 on; nil for dates before that, or beyond any clock.
    private static func seconds(_ date: Date?) -> UInt64? {
        date.flatMap { UInt64(exactly: $0.timeIntervalSince1970.rounded(.down)) }
    }

    // MARK: Templates

    private static func layout(_ template: MessageTemplate) throws -> MessageTemplate.Layout {
        if let layout = template.layout.withLock({ $0 }) { return layout }
        var properties = template.properties
        properties.messageID = String(repeating: "0", count: idLength)
        properties.timestamp = Date(timeIntervalSince1970: 0)
        let model = OutboundMessage(
            exchange: template.destination.exchange, routingKey: template.destination.routingKey,
            properties: properties, body: [])
        try model.validate()
        let (head, largestFrame) = try head(model)
        // The fields stand in the order of AMQP 0-9-1, class basic: behind the id come the timestamp, `type` and `app_id`.
        let behind = [properties.type, properties.appID].reduce(0) { $0 + ($1.map { 1 + $0.utf8.count } ?? 0) }
        let timestampOffset = head.count - 1 - behind - 8
        let methodLength = FrameParser.overhead + Int(head.withUnsafeBytes { $0.bigEndian(at: 3, as: UInt32.self) })
        let layout = MessageTemplate.Layout(
            head: head, largestFrame: largestFrame, messageIDOffset: timestampOffset - idLength,
            timestampOffset: timestampOffset, bodySizeOffset: methodLength + 11)
        template.layout.withLock { $0 = layout }
        return layout
    }

    /// Puts headers into a finished header frame, behind `content_type` and `content_encoding`.
    ///
    /// - Parameter header: Where the frame begins.
    private static func insert(
        _ table: HeaderTable, into frames: inout [UInt8], header: Int
    ) {
        // Type, channel, size, class, weight, body size (AMQP 0-9-1, 2.3.5.2).
        let flags = header + 19
        var position = flags + 2
        for flag in [AMQP_BASIC_CONTENT_TYPE_FLAG, AMQP_BASIC_CONTENT_ENCODING_FLAG]
        where frames[flags] & UInt8(flag >> 8) != 0 {
            position += 1 + Int(frames[position])
        }
        frames[flags] |= UInt8(AMQP_BASIC_HEADERS_FLAG >> 8)
        var field: [UInt8] = []
        field.reserveCapacity(4 + table.bytes.count)
        field.append(bigEndian: UInt32(table.bytes.count))
        field += table.bytes
        frames.insert(contentsOf: field, at: position)
        let size = frames.withUnsafeBytes { $0.bigEndian(at: header + 3, as: UInt32.self) } + UInt32(field.count)
        frames.withUnsafeMutableBytes { $0.put(size, at: header + 3) }
    }

    // MARK: Any message

    private enum Value {
        case string(Range<Int>)
        case integer(Int64)
        case boolean(Bool)
    }

    /// The two frames before the body.
    private static func head(_ message: OutboundMessage) throws -> (frames: [UInt8], largest: Int) {
        // All texts in one block, so that the library gets pointers into it.
        var texts: [UInt8] = []
        texts.reserveCapacity(512)
        func append(_ text: String) -> Range<Int> {
            let start = texts.count
            texts.append(contentsOf: text.utf8)
            return start..<texts.count
        }
        /// What a copy has received, where that is no UTF-8.
        func append(_ text: String?, _ name: StaticString) -> Range<Int>? {
            guard let text else { return nil }
            guard !message.rawTexts.isEmpty, let raw = message.rawTexts["\(name)"] else { return append(text) }
            let start = texts.count
            texts += raw
            return start..<texts.count
        }
        let source = message.properties
        let exchange = append(message.exchange)
        let routingKey = append(message.routingKey)
        let contentType = append(source.contentType, "content_type")
        let contentEncoding = append(source.contentEncoding, "content_encoding")
        let expiration = source.expiration.map(append)
        let userID = source.userID.map(append)
        let correlationID = append(source.correlationID, "correlation_id")
        let replyTo = append(source.replyTo, "reply_to")
        let messageID = append(source.messageID, "message_id")
        let type = append(source.type, "type")
        let appID = append(source.appID, "app_id")
        // A copy has its headers laid out already.
        let sourceHeaders = message.headerTable == nil ? source.headers : [:]
        let headers = sourceHeaders.map { name, value -> (name: Range<Int>, value: Value) in
            let name = append(name)
            switch value {
            case .string(let text): return (name, .string(append(text)))
            case .integer(let number): return (name, .integer(number))
            case .boolean(let flag): return (name, .boolean(flag))
            }
        }
        let bound = texts.count + headers.count * 16 + 256
        return try texts.withUnsafeBytes { raw in
            // Sound: the library only reads through these pointers, and only during the calls below.
            let base = UnsafeMutableRawPointer(mutating: raw.baseAddress)
            func bytes(_ range: Range<Int>) -> amqp_bytes_t {
                amqp_bytes_t(len: range.count, bytes: base.map { $0 + range.lowerBound })
            }
            var method = amqp_basic_publish_t()
            method.exchange = bytes(exchange)
            method.routing_key = bytes(routingKey)
            method.mandatory = 1
            var properties = amqp_basic_properties_t()
            properties._flags = amqp_flags_t(AMQP_BASIC_DELIVERY_MODE_FLAG)
            properties.delivery_mode = 2
            func set(
                _ range: Range<Int>?, _ field: WritableKeyPath<amqp_basic_properties_t, amqp_bytes_t>, _ flag: Int32
            ) {
                guard let range else { return }
                properties[keyPath: field] = bytes(range)
                properties._flags |= amqp_flags_t(flag)
            }
            set(contentType, \.content_type, AMQP_BASIC_CONTENT_TYPE_FLAG)
            set(contentEncoding, \.content_encoding, AMQP_BASIC_CONTENT_ENCODING_FLAG)
            set(expiration, \.expiration, AMQP_BASIC_EXPIRATION_FLAG)
            set(userID, \.user_id, AMQP_BASIC_USER_ID_FLAG)
            if let priority = source.priority {
                properties.priority = priority
                properties._flags |= amqp_flags_t(AMQP_BASIC_PRIORITY_FLAG)
            }
            set(correlationID, \.correlation_id, AMQP_BASIC_CORRELATION_ID_FLAG)
            set(replyTo, \.reply_to, AMQP_BASIC_REPLY_TO_FLAG)
            set(messageID, \.message_id, AMQP_BASIC_MESSAGE_ID_FLAG)
            set(type, \.type, AMQP_BASIC_TYPE_FLAG)
            set(appID, \.app_id, AMQP_BASIC_APP_ID_FLAG)
            if let timestamp = seconds(source.timestamp) {
                properties.timestamp = timestamp
                properties._flags |= amqp_flags_t(AMQP_BASIC_TIMESTAMP_FLAG)
            }
            return try withUnsafeTemporaryAllocation(of: amqp_table_entry_t.self, capacity: headers.count) { entries in
                for (index, header) in headers.enumerated() {
                    var value = amqp_field_value_t()
                    switch header.value {
                    case .string(let range):
                        value.kind = UInt8(AMQP_FIELD_KIND_UTF8.rawValue)
                        value.value.bytes = bytes(range)
                    case .integer(let number):
                        value.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
                        value.value.i64 = number
                    case .boolean(let flag):
                        value.kind = UInt8(AMQP_FIELD_KIND_BOOLEAN.rawValue)
                        value.value.boolean = flag ? 1 : 0
                    }
                    entries.initializeElement(at: index, to: amqp_table_entry_t(key: bytes(header.name), value: value))
                }
                if !headers.isEmpty {
                    properties.headers = amqp_table_t(num_entries: Int32(headers.count), entries: entries.baseAddress)
                    properties._flags |= amqp_flags_t(AMQP_BASIC_HEADERS_FLAG)
                }
                var methodLength = 0
                var frames = try [UInt8](unsafeUninitializedCapacity: bound) { buffer, count in
                    let room = UnsafeMutableRawBufferPointer(buffer)
                    methodLength = try MethodEncoder.put(
                        AMQP_BASIC_PUBLISH_METHOD, on: channel, &method, into: room)
                    let headerLength = try MethodEncoder.put(
                        &properties, bodySize: message.body.count, on: channel,
                        into: UnsafeMutableRawBufferPointer(rebasing: room[methodLength...]))
                    count = methodLength + headerLength
                }
                if let table = message.headerTable {
                    insert(table, into: &frames, header: methodLength)
                }
                return (frames, max(methodLength, frames.count - methodLength))
            }
        }
    }
}
