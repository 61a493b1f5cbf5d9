#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif
internal import SMAPEvents

/// A message checked and laid out for the wire: all its text in one block of bytes, so that the connection thread hands
/// pointers into it to the C library, and neither converts strings nor finds out too late that one is too long.
///
/// librabbitmq reports an encoding error only after the method frame is out, and the connection is then lost: that is
/// why everything is checked here, before.
struct PackedMessage: Sendable {
    enum Value: Sendable {
        case string(Range<Int>)
        case integer(Int64)
        case boolean(Bool)
    }

    private(set) var bytes: [UInt8]
    private(set) var exchange: Range<Int>
    private(set) var routingKey: Range<Int>
    private(set) var contentType: Range<Int>?
    private(set) var messageID: Range<Int>?
    private(set) var type: Range<Int>?
    private(set) var appID: Range<Int>?
    private(set) var correlationID: Range<Int>?
    private(set) var headers: [(name: Range<Int>, value: Value)] = []
    private(set) var timestamp: UInt64?
    private(set) var body: Range<Int>

    /// Header tables must fit a frame; RabbitMQ's smallest usual one is 128 KiB.
    static let headerLimit = 64 * 1024

    /// Throws `invalidEvent` or `eventTooLarge`, naming the field.
    init(_ message: OutboundMessage) throws {
        let properties = message.properties
        var bytes: [UInt8] = []
        bytes.reserveCapacity(message.body.count + 256)

        func append(_ text: String, _ field: String, limit: Int = 255) throws -> Range<Int> {
            let start = bytes.count
            bytes.append(contentsOf: text.utf8)
            guard bytes.count - start <= limit else {
                throw EventsError(.eventTooLarge, "\(field) has more than \(limit) bytes", operation: "publish")
            }
            for index in start..<bytes.count where bytes[index] < 0x20 || bytes[index] == 0x7F {
                throw EventsError(.invalidEvent, "\(field) has a control character", operation: "publish")
            }
            return start..<bytes.count
        }
        exchange = try append(message.exchange, "the exchange's name")
        routingKey = try append(message.routingKey, "the routing key")
        contentType = try properties.contentType.map { try append($0, "content_type") }
        messageID = try properties.messageID.map { try append($0, "message_id") }
        type = try properties.type.map { try append($0, "type") }
        appID = try properties.appID.map { try append($0, "app_id") }
        correlationID = try properties.correlationID.map { try append($0, "correlation_id") }
        timestamp = properties.timestamp.map { UInt64(max(0, $0.timeIntervalSince1970)) }

        let headerStart = bytes.count
        for (name, value) in properties.headers {
            // They route a message beyond its key, and around topic permissions.
            guard name.lowercased() != "cc", name.lowercased() != "bcc" else {
                throw EventsError(.invalidEvent, "a header \(name) is not sent", operation: "publish")
            }
            let range = try append(name, "a header's name", limit: 128)
            switch value {
            case .string(let text):
                headers.append((range, .string(try append(text, "header \(name)", limit: Self.headerLimit))))
            case .integer(let number): headers.append((range, .integer(number)))
            case .boolean(let flag): headers.append((range, .boolean(flag)))
            }
        }
        guard bytes.count - headerStart + headers.count * 16 <= Self.headerLimit else {
            throw EventsError(
                .eventTooLarge, "the headers have more than \(Self.headerLimit) bytes", operation: "publish")
        }
        let bodyStart = bytes.count
        bytes.append(contentsOf: message.body)
        body = bodyStart..<bytes.count
        self.bytes = bytes
    }

    var exchangeName: String { text(exchange) }

    /// Whether this is the message that a broker returned.
    func matches(exchange name: String, routingKey key: String, messageID id: String?) -> Bool {
        text(exchange) == name && text(routingKey) == key && messageID.map(text) == id
    }

    private func text(_ range: Range<Int>) -> String {
        String(decoding: bytes[range], as: UTF8.self)
    }
}
