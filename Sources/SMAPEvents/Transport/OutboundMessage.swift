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
}
