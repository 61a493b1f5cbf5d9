/// A message as a transport sends it: persistent and mandatory, always.
public struct OutboundMessage: Sendable, Hashable {
    /// The exchange to publish to.
    public var exchange: String
    /// The key to route by; empty for a fanout exchange.
    public var routingKey: String
    /// The message's properties.
    public var properties: MessageProperties
    /// The message itself.
    public var body: [UInt8]

    /// Puts a message together.
    public init(exchange: String, routingKey: String, properties: MessageProperties, body: [UInt8]) {
        self.exchange = exchange
        self.routingKey = routingKey
        self.properties = properties
        self.body = body
    }

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
            guard text.utf8.allBytes({ $0 >= 0x20 && $0 != 0x7F }) else {
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
