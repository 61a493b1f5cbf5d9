#if canImport(FoundationEssentials)
package import FoundationEssentials
#else
package import Foundation
#endif

/// A message as a transport sends it: persistent and mandatory, always.
public struct OutboundMessage: Sendable, Hashable {
    /// What stands before the body. Most messages are like many others of their publisher, and are kept as what differs.
    package enum Content: Sendable {
        case template(MessageTemplate, messageID: EventID, timestamp: Date)
        indirect case own(exchange: String, routingKey: String, MessageProperties)
    }

    package private(set) var content: Content
    /// The headers of a copy, which are sent instead of those in ``properties``: they hold what that cannot express.
    package private(set) var headerTable: HeaderTable?
    /// Properties of a copy that are no UTF-8, by their names in AMQP: they are sent instead of the texts in ``properties``,
    /// which are repaired, and longer.
    package private(set) var rawTexts: [String: [UInt8]] = [:]
    /// The message itself.
    public var body: [UInt8]

    /// The exchange to publish to.
    public var exchange: String {
        get {
            switch content {
            case .template(let template, _, _): template.destination.exchange
            case .own(let exchange, _, _): exchange
            }
        }
        set { content = .own(exchange: newValue, routingKey: routingKey, properties) }
    }

    /// The key to route by; empty for a fanout exchange.
    public var routingKey: String {
        get {
            switch content {
            case .template(let template, _, _): template.destination.routingKey
            case .own(_, let routingKey, _): routingKey
            }
        }
        set { content = .own(exchange: exchange, routingKey: newValue, properties) }
    }

    /// The message's properties.
    public var properties: MessageProperties {
        get {
            switch content {
            case .template(let template, let messageID, let timestamp):
                var properties = template.properties
                properties.messageID = messageID.rawValue
                properties.timestamp = timestamp
                return properties
            case .own(_, _, let properties): return properties
            }
        }
        set {
            content = .own(exchange: exchange, routingKey: routingKey, newValue)
            headerTable = nil
            rawTexts = [:]
        }
    }

    /// Puts a message together.
    public init(exchange: String, routingKey: String, properties: MessageProperties, body: [UInt8]) {
        content = .own(exchange: exchange, routingKey: routingKey, properties)
        self.body = body
    }

    /// A copy of a message that was received, whatever its headers are.
    package init(
        copyTo exchange: String, routingKey: String, properties: MessageProperties, headers: HeaderTable,
        rawTexts: [String: [UInt8]] = [:], body: [UInt8]
    ) {
        content = .own(exchange: exchange, routingKey: routingKey, properties)
        headerTable = headers
        self.rawTexts = rawTexts
        self.body = body
    }

    /// A message like many others.
    package init(_ template: MessageTemplate, messageID: EventID, timestamp: Date, body: [UInt8]) {
        content = .template(template, messageID: messageID, timestamp: timestamp)
        self.body = body
    }

    /// Whether two messages are the same on the wire.
    public static func == (left: OutboundMessage, right: OutboundMessage) -> Bool {
        left.exchange == right.exchange && left.routingKey == right.routingKey && left.properties == right.properties
            && left.headerTable == right.headerTable && left.rawTexts == right.rawTexts && left.body == right.body
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
    ///
    /// Of a copy only the sizes are checked: a broker has taken the original.
    package func validate() throws {
        let isCopy = headerTable != nil
        func check(_ text: String?, _ field: @autoclosure () -> String, limit: Int = 255) throws {
            guard let text, rawTexts.isEmpty || rawTexts[field()] == nil else { return }
            guard text.utf8.count <= limit else {
                throw EventsError(.eventTooLarge, "\(field()) has more than \(limit) bytes", operation: "publish")
            }
            guard isCopy || Self.isPlain(text) else {
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
        try check(properties.contentEncoding, "content_encoding")
        try check(properties.expiration, "expiration")
        try check(properties.userID, "user_id")
        var size = headerTable?.bytes.count ?? 0
        for (name, value) in isCopy ? [:] : properties.headers {
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
