/// A queue to consume from, and how.
public struct EventSubscription: Sendable {
    /// The queue, `<service>.<purpose>`. Declared at start, with its dead letter queue.
    public var queue: QueueName
    /// The keys it receives from ``exchange``.
    public var bindings: [TopicPattern]
    /// The exchange it is bound to, ``ExchangeName/events`` by default.
    public var exchange: String
    /// How the queue is stored, ``QueueDeclaration/Kind/quorum`` by default.
    public var kind: QueueDeclaration.Kind
    /// How many deliveries are buffered here at most, handled ones included, until they are settled. 1 to 65,535; 256
    /// by default.
    public var prefetch: Int
    /// How many handlers run at a time. 1 to ``prefetch``; 16 by default.
    public var concurrency: Int
    /// After so many attempts a message is dead-lettered instead of retried, 20 by default. Needs a quorum queue, which
    /// counts deliveries.
    public var maximumAttempts: Int
    /// How long declaring the queue, and at the end draining the handlers, may take each. 30 s by default.
    public var deadline: Duration

    /// Describes a subscription.
    public init(
        queue: QueueName, bindings: [TopicPattern], exchange: String = ExchangeName.events,
        kind: QueueDeclaration.Kind = .quorum, prefetch: Int = 256, concurrency: Int = 16, maximumAttempts: Int = 20,
        deadline: Duration = .seconds(30)
    ) {
        self.queue = queue
        self.bindings = bindings
        self.exchange = exchange
        self.kind = kind
        self.prefetch = prefetch
        self.concurrency = concurrency
        self.maximumAttempts = maximumAttempts
        self.deadline = deadline
    }

    func validate() throws {
        guard (1...65_535).contains(prefetch), (1...prefetch).contains(concurrency), maximumAttempts > 0 else {
            throw EventsError(
                .invalidConfiguration,
                "prefetch is 1 to 65535, concurrency 1 to prefetch, and maximumAttempts 1 or more",
                operation: "subscribe to \(queue)")
        }
    }
}
