import Foundation
import SMAPEvents
import Testing

@testable import SMAPRabbitMQ

/// Copies of a message (to be retried, as a dead letter, replayed) on the wire.
@Suite struct CopiedMessageTests {
    /// A header of each type of RabbitMQ's table of types, as bytes.
    private static let headers: [(name: String, value: [UInt8])] = [
        ("true", [0x74, 1]), ("i8", [0x62, 0xFF]), ("u8", [0x42, 0xFF]), ("i16", [0x73, 0xFF, 0xFE]),
        ("u16", [0x75, 0xFF, 0xFE]), ("i32", [0x49, 0xFF, 0, 0, 1]), ("u32", [0x69, 0xFF, 0, 0, 1]),
        ("i64", [0x6C, 0xFF, 0, 0, 0, 0, 0, 0, 1]), ("float", [0x66, 0x3F, 0, 0, 0]),
        ("double", [0x64, 0x3F, 0xE0, 0, 0, 0, 0, 0, 0]), ("decimal", [0x44, 2, 0, 0, 1, 0x3A]),
        ("text", [0x53, 0, 0, 0, 4] + Array("a\n\tb".utf8)), ("not utf8", [0x53, 0, 0, 0, 2, 0xC3, 0x28]),
        ("array", [0x41, 0, 0, 0, 4, 0x74, 1, 0x62, 7]), ("time", [0x54, 0, 0, 0, 0, 0x69, 0x30, 0, 0]),
        ("table", [0x46, 0, 0, 0, 4, 1, 0x61, 0x74, 1]), ("nothing", [0x56]), ("bytes", [0x78, 0, 0, 0, 2, 0, 0xFF]),
        ("x-request-id", [0x53, 0, 0, 0, 1, 0x72]),
    ]

    private static func table(_ headers: [(name: String, value: [UInt8])]) -> [UInt8] {
        headers.reduce(into: []) { $0 += [UInt8($1.name.utf8.count)] + Array($1.name.utf8) + $1.value }
    }

    /// What goes over the wire, as the other side reads it.
    private func arrived(_ message: OutboundMessage) throws -> InboundDelivery {
        let encoded = try EncodedMessage(message)
        var parser = FrameParser()
        encoded.head.withUnsafeBytes { parser.append($0) }
        var header: [UInt8] = []
        try parser.forEachFrame { frame in
            if frame.kind == .header { header = Array(frame.payload) }
            return true
        }
        return try received(header, exchange: message.exchange, routingKey: message.routingKey, body: encoded.body)
    }

    /// A delivery with a content header of these bytes.
    private func received(
        _ header: [UInt8], exchange: String = "x", routingKey: String = "a.b", body: [UInt8] = []
    ) throws -> InboundDelivery {
        var parser = FrameParser()
        AMQPFrame(type: AMQPFrame.header, channel: 2, payload: header).encoded.withUnsafeBytes { parser.append($0) }
        let decoder = MethodDecoder()
        var delivery: InboundDelivery?
        try parser.forEachFrame { frame in
            let header = try decoder.header(frame)
            #expect(header.bodySize == UInt64(body.count))
            let (properties, rawTexts) = AMQPDriver.properties(header.properties)
            delivery = InboundDelivery(
                tag: 1, exchange: exchange, routingKey: routingKey, isRedelivered: false, properties: properties,
                body: body, isTruncated: false, headerTable: AMQPDriver.headerTable(frame.payload), rawTexts: rawTexts)
            return true
        }
        return try #require(delivery)
    }

    @Test func `properties and headers of every type survive retries, a dead letter and a replay`() throws {
        let steering: [(name: String, value: [UInt8])] = [
            ("CC", [0x41, 0, 0, 0, 6, 0x53, 0, 0, 0, 1, 0x71]), ("BCC", [0x41, 0, 0, 0, 0]),
            ("x-delay", [0x49, 0, 0, 0, 1]),
            ("x-death", [0x41, 0, 0, 0, 0]), ("x-first-death-queue", [0x53, 0, 0, 0, 1, 0x71]),
            ("x-last-death-reason", [0x53, 0, 0, 0, 1, 0x71]), ("x-delivery-count", [0x6C, 0, 0, 0, 0, 0, 0, 0, 20]),
        ]
        let original = MessageProperties(
            contentType: "application/json", messageID: "id\n", type: "a.b", appID: "app", correlationID: "c",
            replyTo: "r", timestamp: Date(timeIntervalSince1970: 7), contentEncoding: "gzip", priority: 9,
            expiration: "300", userID: "someone")
        var delivery = InboundDelivery(
            tag: 1, exchange: "smap.events", routingKey: "a.b", isRedelivered: false, properties: original,
            body: [1, 0, 255], isTruncated: false,
            headerTable: HeaderTable(bytes: Self.table(steering + Self.headers)))
        for attempt in 1...10 {
            let copy = delivery.copy(
                to: "smap.retry.1s", queue: "q", headers: ["x-smap-attempts": .integer(Int64(attempt))])
            #expect(copy.properties.expiration == nil && copy.properties.userID == nil, "the broker would act on them")
            var next = try arrived(copy)
            #expect(next.headerTable?.bytes.starts(with: Self.table(Self.headers)) == true)
            // The delay queue hands it on.
            next = InboundDelivery(
                tag: 1, exchange: ExchangeName.requeue, routingKey: "q", isRedelivered: false,
                properties: next.properties, body: next.body, isTruncated: false, headerTable: next.headerTable)
            delivery = next.restored()
            #expect(delivery.exchange == "smap.events" && delivery.routingKey == "a.b")
            #expect(delivery.failedAttempts == attempt)
            var properties = delivery.properties
            properties.headers = [:]
            #expect(properties == original)
            #expect(delivery.body == [1, 0, 255])
        }
        let dead = try arrived(delivery.copy(to: ExchangeName.deadLetters, queue: "q", headers: [:]))
        #expect(dead.properties.expiration == nil, "it would be deleted")
        let replayed = try arrived(
            dead.restored().copy(to: ExchangeName.requeue, queue: "q", headers: [:], reset: true))
        #expect(replayed.properties.expiration == "300")
        var table = try #require(replayed.headerTable)
        for name in ["x-smap-original-exchange", "x-smap-original-key", "x-smap-user-id"] {
            #expect(replayed.properties.headers[name] != nil)
        }
        #expect(replayed.properties.headers["x-smap-attempts"] == nil)
        #expect(table.bytes.starts(with: Self.table(Self.headers)))
        table = try #require(HeaderTable(bytes: Array(table.bytes.dropFirst(Self.table(Self.headers).count))))
        #expect(!table.bytes.isEmpty)
    }

    @Test func `where a message was published before another consumer rejected it is read from x-death`() throws {
        func text(_ text: String) -> [UInt8] { [0x53, 0, 0, 0, UInt8(text.utf8.count)] + Array(text.utf8) }
        func sized(_ type: UInt8, _ content: [UInt8]) -> [UInt8] { [type, 0, 0, 0, UInt8(content.count)] + content }
        func death(_ exchange: String, _ key: String) -> [UInt8] {
            sized(
                0x46,
                Self.table([
                    ("count", [0x6C, 0, 0, 0, 0, 0, 0, 0, 1]), ("exchange", text(exchange)),
                    ("routing-keys", sized(0x41, text(key))),
                ]))
        }
        let deaths = sized(0x41, death("smap.requeue", "q") + death("smap.events", "a.b"))
        let delivery = InboundDelivery(
            tag: 1, exchange: ExchangeName.deadLetters, routingKey: "q", isRedelivered: false,
            properties: MessageProperties(), body: [], isTruncated: false,
            headerTable: HeaderTable(bytes: Self.table([("x-death", deaths)])))
        #expect(delivery.restored().exchange == "smap.events")
        #expect(delivery.restored().routingKey == "a.b")
    }

    @Test func `texts that are no UTF-8 survive retries, a dead letter and a replay`() throws {
        // Each becomes longer than a short string when it is repaired.
        let text = [UInt8](repeating: 0xFF, count: 86)
        // This one becomes as long as it was.
        let cut: [UInt8] = [0xF0, 0x9F, 0x98]
        func short(_ bytes: [UInt8]) -> [UInt8] { [UInt8(bytes.count)] + bytes }
        let table = Self.table([("h", [0x74, 1])])
        // content_type to app_id, without `expiration`.
        let fields =
            short(text) + short(cut) + [0, 0, 0, UInt8(table.count)] + table + [2, 9] + short(text) + short(text)
            + short(text) + [0, 0, 0, 0, 0, 0, 0, 7] + short(text) + short(text) + short(cut)
        let payload: [UInt8] = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFE, 0xF8] + fields
        let original = try received(payload)
        #expect(original.properties.contentType?.utf8.count == 258)

        var delivery = original
        for _ in 1...3 {
            let next = try arrived(delivery.copy(to: "smap.retry.1s", queue: "q", headers: [:]))
            delivery = InboundDelivery(
                tag: 1, exchange: ExchangeName.requeue, routingKey: "q", isRedelivered: false,
                properties: next.properties, body: next.body, isTruncated: false, headerTable: next.headerTable,
                rawTexts: next.rawTexts
            ).restored()
        }
        let dead = try arrived(delivery.copy(to: ExchangeName.deadLetters, queue: "q", headers: [:]))
        let replayed = try arrived(
            dead.restored().copy(to: ExchangeName.requeue, queue: "q", headers: [:], reset: true))
        // `user_id` cannot be sent: it would have to be our own.
        #expect(
            replayed.rawTexts == [
                "content_type": text, "content_encoding": cut, "correlation_id": text, "reply_to": text,
                "message_id": text, "type": text, "app_id": cut,
            ])
        #expect(replayed.properties.priority == 9)
        #expect(replayed.headerTable?.bytes.starts(with: table) == true)
        // What is changed is another message.
        var changed = delivery.copy(to: "x", queue: "q", headers: [:])
        changed.properties.contentType = "text/plain"
        changed.properties.correlationID = "c"
        changed.properties.replyTo = nil
        changed.properties.messageID = "m"
        changed.properties.type = "a.b"
        let texts = try arrived(changed)
        #expect(texts.properties.contentType == "text/plain" && texts.rawTexts.isEmpty)
    }

    @Test func `headers behind more than one word of flags are read where they are`() throws {
        let table = Self.table([("h", [0x74, 1])])
        // The lowest bit: another word of flags follows.
        let payload: [UInt8] =
            [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 1, 0, 0] + [0, 0, 0, UInt8(table.count)] + table
        let copy = try arrived(try received(payload).copy(to: "x", queue: "q", headers: [:]))
        #expect(copy.properties.headers["h"] == .boolean(true))
    }

    @Test(arguments: ["abc", "", "-1", "+1", "4294967296", "300 ", "\u{0663}", String(repeating: "1", count: 300)])
    func `an expiration that no broker has noted is not taken over`(text: String) throws {
        let delivery = InboundDelivery(
            tag: 1, exchange: ExchangeName.deadLetters, routingKey: "q", isRedelivered: false,
            properties: MessageProperties(headers: ["x-smap-expiration": .string(text)]), body: [])
        #expect(delivery.restored().properties.expiration == nil)
        let replayed = delivery.restored().copy(to: ExchangeName.requeue, queue: "q", headers: [:], reset: true)
        #expect(try arrived(replayed).properties.expiration == nil)
    }

    @Test func `bytes that are no table are none`() {
        let whole = Self.table(Self.headers)
        for end in whole.indices {
            // A prefix is a table only where an entry ends.
            let table = HeaderTable(bytes: Array(whole[..<end]))
            #expect(table == nil || table?.bytes.count == end)
        }
        for bytes in [[5], [1, 0x61], [1, 0x61, 0x3F], [1, 0x61, 0x53, 0xFF, 0xFF, 0xFF, 0xFF]] as [[UInt8]] {
            #expect(HeaderTable(bytes: bytes) == nil)
        }
    }
}
