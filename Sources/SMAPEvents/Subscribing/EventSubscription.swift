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
    /// How long declaring the queue and starting its consumer may take, 30 s by default.
    public var deadline: Duration
    /// How long handlers may go on after graceful shutdown has begun, 25 s by default: a little less than the 30 s that
    /// Kubernetes grants. Then they are cancelled, and what they have not settled comes again.
    public var drainTimeout: Duration = .seconds(25)
    /// Whether the queue is declared and consumed again after the broker has cancelled the consumer, because the queue was
    /// deleted. On by default; off, ``EventSubscriber/run()`` then throws
    /// ``EventsError/Code/subscriptionCancelled``.
    public var resumesWhenCancelled = true
    /// The pause before a lost subscription is tried again, 100 ms by default; it doubles with each failure up to
    /// ``maximumRetryDelay``, with full jitter.
    public var retryDelay: Duration = .milliseconds(100)
    /// The longest such pause, 10 s by default.
    public var maximumRetryDelay: Duration = .seconds(10)

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

    /// What the subscription needs at the broker: its queue, its bindings, and a queue for its dead letters.
    public var topology: Topology {
        var topology = Topology(exchanges: [.deadLetters])
        // Other exchanges than ours are whoever's they are.
        if exchange == ExchangeName.events { topology.insert(.events) }
        topology.insert(QueueDeclaration(queue.deadLetterQueue, kind: kind))
        topology.insert(
            QueueBinding(
                queue: queue.deadLetterQueue, exchange: ExchangeName.deadLetters, routingKey: queue.rawValue))
        topology.insert(QueueDeclaration(queue, kind: kind, deadLetters: true))
        for pattern in bindings {
            topology.insert(QueueBinding(queue: queue, exchange: exchange, routingKey: pattern.rawValue))
        }
        return topology
    }

    /// How long to wait after so many failures in a row.
    func retryDelay(after failures: Int) -> Duration {
        Backoff(first: retryDelay, longest: maximumRetryDelay).delay(after: failures)
    }

    func validate() throws {
        guard (1...65_535).contains(prefetch), (1...prefetch).contains(concurrency), maximumAttempts > 0,
            drainTimeout >= .zero, retryDelay > .zero, maximumRetryDelay >= retryDelay
        else {
            throw EventsError(
                .invalidConfiguration,
                "prefetch is 1 to 65535, concurrency 1 to prefetch, maximumAttempts 1 or more, and delays are not negative",
                operation: "subscribe to \(queue)")
        }
    }
}
