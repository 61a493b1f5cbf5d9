internal import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// A message checked and laid out for the wire: all its text in one block of bytes, so that the connection thread hands
/// pointers into it to the C library, and neither converts strings nor finds out too late that one is too long.
///
/// librabbitmq reports an encoding error only after the method frame is out, and the connection is then lost: that is
/// why everything is checked here, before.
///
/// A class, so that it moves through queues as one reference.
final class PackedMessage: Sendable {
    enum Value: Sendable {
        case string(Range<Int>)
        case integer(Int64)
        case boolean(Bool)
    }

    let bytes: [UInt8]
    let exchange: Range<Int>
    let routingKey: Range<Int>
    let contentType: Range<Int>?
    let messageID: Range<Int>?
    let type: Range<Int>?
    let appID: Range<Int>?
    let correlationID: Range<Int>?
    let replyTo: Range<Int>?
    let headers: [(name: Range<Int>, value: Value)]
    let timestamp: UInt64?
    let body: Range<Int>

    /// Throws `invalidEvent` or `eventTooLarge`, naming the field.
    init(_ message: OutboundMessage) throws {
        try message.validate()
        let properties = message.properties
        var bytes: [UInt8] = []
        bytes.reserveCapacity(message.body.count + 256)

        func append(_ text: String) -> Range<Int> {
            let start = bytes.count
            bytes.append(contentsOf: text.utf8)
            return start..<bytes.count
        }
        exchange = append(message.exchange)
        routingKey = append(message.routingKey)
        contentType = properties.contentType.map(append)
        messageID = properties.messageID.map(append)
        type = properties.type.map(append)
        appID = properties.appID.map(append)
        correlationID = properties.correlationID.map(append)
        replyTo = properties.replyTo.map(append)
        // Whole seconds from 1970 on; dates that no clock shows are left out, as a conversion would trap.
        timestamp = properties.timestamp.flatMap { UInt64(exactly: $0.timeIntervalSince1970.rounded(.down)) }
        headers = properties.headers.map { name, value in
            let name = append(name)
            switch value {
            case .string(let text): return (name, .string(append(text)))
            case .integer(let number): return (name, .integer(number))
            case .boolean(let flag): return (name, .boolean(flag))
            }
        }
        let start = bytes.count
        bytes.append(contentsOf: message.body)
        body = start..<bytes.count
        self.bytes = bytes
    }

    var exchangeName: String { text(exchange) }

    /// The correlation id, if a reply is expected.
    var requestID: String? { replyTo == nil ? nil : correlationID.map(text) }

    /// Whether this is the message that a broker returned.
    func matches(exchange name: String, routingKey key: String, messageID id: String?) -> Bool {
        text(exchange) == name && text(routingKey) == key && messageID.map(text) == id
    }

    private func text(_ range: Range<Int>) -> String {
        String(decoding: bytes[range], as: UTF8.self)
    }
}
