#if canImport(FoundationEssentials)
package import FoundationEssentials
#else
package import Foundation
#endif

/// A message as a transport sends it: persistent and mandatory, always.
public struct OutboundMessage: Sendable, Hashable {
    /// The exchange to publish to.
    public var exchange: String { didSet { template = nil } }
    /// The key to route by; empty for a fanout exchange.
    public var routingKey: String { didSet { template = nil } }
    /// The message's properties.
    public var properties: MessageProperties { didSet { template = nil } }
    /// The message itself.
    public var body: [UInt8]
    /// What everything but the id, the timestamp and the body was taken from, as long as that is so.
    package private(set) var template: MessageTemplate?

    /// Puts a message together.
    public init(exchange: String, routingKey: String, properties: MessageProperties, body: [UInt8]) {
        self.exchange = exchange
        self.routingKey = routingKey
        self.properties = properties
        self.body = body
    }

    /// A message like many others. The id must be one that ``EventID`` accepts.
    package init(_ template: MessageTemplate, messageID: EventID, timestamp: Date, body: [UInt8]) {
        self.exchange = template.destination.exchange
        self.routingKey = template.destination.routingKey
        var properties = template.properties
        properties.messageID = messageID.rawValue
        properties.timestamp = timestamp
        self.properties = properties
        self.body = body
        self.template = template
    }

    /// Whether two messages are the same on the wire.
    public static func == (left: OutboundMessage, right: OutboundMessage) -> Bool {
        left.exchange == right.exchange && left.routingKey == right.routingKey && left.properties == right.properties
            && left.body == right.body
    }

    /// Hashes what is sent.
    public func hash(into hasher: inout Hasher) {
        hasher.combine(exchange)
        hasher.combine(routingKey)
        hasher.combine(properties)
        hasher.combine(body)
    }

    /// Whether a text has no control characters.
    package static func isPlain(_ text: String) -> Bool { text.utf8.allBytes { $0 >= 0x20 && $0 != 0x7F } }

    /// The largest header table that is sent, in bytes: it must fit an AMQP frame.
    package static let headerLimit = 64 * 1024

    /// Checks what the wire cannot carry, before anything is sent: texts over their limits, control characters, and the
    /// headers `CC` and `BCC`, which route a message beyond its key. Throws ``EventsError/Code/invalidEvent`` or
    /// ``EventsError/Code/eventTooLarge``, naming the field.
    package func validate() throws {
        func check(_ text: String?, _ field: @autoclosure () -> String, limit: Int = 255) throws {
            guard let text else { return }
            guard text.utf8.count <= limit else {
                throw EventsError(.eventTooLarge, "\(field()) has more than \(limit) bytes", operation: "publish")
            }
            guard Self.isPlain(text) else {
                throw EventsError(.invalidEvent, "\(field()) has a control character", operation: "publish")
            }
        }
        try check(exchange, "the exchange's name")
        try check(routingKey, "the routing key")
        try check(properties.contentType, "content_type")
        try check(properties.messageID, "message_id")
        try check(properties.type, "type")
        try check(properties.appID, "app_id")
        try check(properties.correlationID, "correlation_id")
        try check(properties.replyTo, "reply_to")
        var size = 0
        for (name, value) in properties.headers {
            try check(name, "a header's name", limit: 128)
            guard name.lowercased() != "cc", name.lowercased() != "bcc" else {
                throw EventsError(.invalidEvent, "a header \(name) is not sent", operation: "publish")
            }
            size += name.utf8.count + 16
            if case .string(let text) = value {
                try check(text, "header \(name)", limit: Self.headerLimit)
                size += text.utf8.count
            }
        }
        guard size <= Self.headerLimit else {
            throw EventsError(
                .eventTooLarge, "the headers have more than \(Self.headerLimit) bytes", operation: "publish")
        }
    }
}
