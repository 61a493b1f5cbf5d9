/// A queue bound to an exchange.
public struct QueueBinding: Sendable, Hashable {
    /// The queue that receives.
    public var queue: QueueName
    /// The exchange that it receives from.
    public var exchange: String
    /// The pattern or key; empty for a fanout exchange.
    public var routingKey: String

    /// Describes a binding.
    public init(queue: QueueName, exchange: String, routingKey: String) {
        self.queue = queue
        self.exchange = exchange
        self.routingKey = routingKey
    }
}
