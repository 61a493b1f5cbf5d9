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
    /// What happens when a handler fails. See ``RetryPolicy``.
    public var retry: RetryPolicy
    /// How often a message may die alone before it is dead-lettered as `poison`, 3 by default; 1 or more.
    ///
    /// A message that has come three times without an answer (20 times with ``orderingKey``) may be what kills its consumers. It is
    /// moved to the queue `<queue>.suspects`, from which one process at a time handles one message at a time, with no other
    /// handler of the subscription beside it, and out of its order: so no other message pays for it, and none is dead-lettered
    /// because of what others did. What this process has given back or lost with a connection does not count. A classic queue
    /// does not count deliveries: there each process begins with one message alone, and puts none aside.
    public var maximumRedeliveries = 3
    /// How long a handler may take, 60 s by default. Then its task is cancelled, and the delivery goes to retry. A handler
    /// that ignores its cancellation keeps its place until it ends; when all places are held so, the subscription is not
    /// healthy.
    public var handlerDeadline: Duration = .seconds(60)
    /// When to pause because handlers fail; never by default.
    public var circuitBreaker: CircuitBreakerPolicy?
    /// By what deliveries are ordered: those with one key are handled one after the other, in the order of the queue, those
    /// with different keys side by side. Nil by default: no order.
    ///
    /// No two handlers of one key run at a time in this process, also after a reconnect, and also when the first one is past its
    /// deadline. The order holds for one consumer: to keep it across reconnects and processes, set ``isSingleActive`` too, since
    /// otherwise RabbitMQ may send later messages to the next consumer before it takes back those of the last one. A failed delivery is tried again here, after a pause of at most a quarter of an hour, and those behind it
    /// wait. RabbitMQ takes back what is unsettled for longer than half an hour (`consumer_timeout`); it then comes again, in
    /// order. A crash repeats what was not settled, with attempts counted from 1.
    public var orderingKey: OrderingKey?
    /// With ``orderingKey``: how many deliveries are fetched beyond ``prefetch``, so that those that wait for a slow or
    /// failing key do not hold up the other keys. 4,096 by default; together with ``prefetch`` 65,535 at most.
    ///
    /// They are held in memory: 4,096 events of 2 kB take 8 MiB. When as many wait, all keys do: ``EventSubscriber/health()``
    /// warns, and the gauge `events_ordered_waiting` tells how many wait.
    public var orderedBacklog = 4_096
    /// Whether the broker gives the queue's messages to one consumer at a time, and to the next one when that is gone
    /// (`x-single-active-consumer`). With ``orderingKey`` this is what keeps the order across reconnects and processes. Off by default.
    ///
    /// There is no order over several queues: a topic exchange cannot spread one key over queues without the plugin
    /// `rabbitmq_consistent_hash_exchange`, which this platform does not ask for.
    public var isSingleActive = false
    /// How an inbox is used, if the subscriber is given one.
    public var inbox = InboxPolicy()
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
        kind: QueueDeclaration.Kind = .quorum, prefetch: Int = 256, concurrency: Int = 16,
        retry: RetryPolicy = RetryPolicy(), deadline: Duration = .seconds(30)
    ) {
        self.queue = queue
        self.bindings = bindings
        self.exchange = exchange
        self.kind = kind
        self.prefetch = prefetch
        self.concurrency = concurrency
        self.retry = retry
        self.deadline = deadline
    }

    /// What deliveries are ordered by.
    public struct OrderingKey: Sendable {
        let key: @Sendable (EventEnvelope) -> String?

        /// The event's project. Events without one have no order.
        public static let project = OrderingKey { $0.projectID?.rawValue }

        /// A key of your own.
        ///
        /// - Parameter key: Returns the key of an event; nil if it has no order.
        public init(key: @escaping @Sendable (EventEnvelope) -> String?) { self.key = key }
    }

    /// How many deliveries may be unsettled at a time.
    var unsettledLimit: Int { prefetch + (orderingKey == nil ? 0 : orderedBacklog) }

    /// Whether messages that may have killed their consumers are handled alone. Not where another consumer's queue is looked at.
    package var isolatesSuspects: Bool {
        get { isolates && kind == .quorum }
        set { isolates = newValue }
    }
    private var isolates = true

    /// After so many unanswered deliveries a message may be what kills its consumers.
    let suspicion = 3

    /// After so many it is handled alone. There it is out of its order: so where there is one, only what can hardly have another
    /// reason, such as deployments while it waited.
    var isolationThreshold: Int { orderingKey == nil ? suspicion : 20 }

    /// How long a lease on an event lasts: as long as its handler may take, and then some for its settlement.
    var lease: Duration { handlerDeadline + deadline }

    /// What the subscription needs at the broker: its queue, its bindings, a queue for its dead letters, and those in which
    /// retries wait.
    public var topology: Topology {
        var topology = Topology(exchanges: [.deadLetters])
        topology.insert(retry.topology)
        // Other exchanges than ours are whoever's they are.
        if exchange == ExchangeName.events {
            topology.insert(.events)
        } else {
            topology.foreignExchanges = [exchange]
        }
        topology.insert(QueueDeclaration(queue.deadLetterQueue, kind: kind))
        topology.insert(
            QueueBinding(
                queue: queue.deadLetterQueue, exchange: ExchangeName.deadLetters, routingKey: queue.rawValue))
        topology.insert(
            QueueDeclaration(
                queue, kind: kind, deadLetters: true,
                additionalArguments: isSingleActive ? ["x-single-active-consumer": .boolean(true)] : [:]))
        topology.insert(QueueBinding(queue: queue, exchange: ExchangeName.requeue, routingKey: queue.rawValue))
        if isolatesSuspects {
            topology.insert(
                QueueDeclaration(
                    queue.suspectQueue, deadLetters: false,
                    additionalArguments: [
                        "x-single-active-consumer": .boolean(true), "x-delivery-limit": .integer(1_000_000),
                        "x-dead-letter-exchange": .string(ExchangeName.deadLetters),
                        "x-dead-letter-routing-key": .string(queue.rawValue),
                        "x-dead-letter-strategy": .string("at-least-once"), "x-overflow": .string("reject-publish"),
                    ]))
            topology.insert(
                QueueBinding(
                    queue: queue.suspectQueue, exchange: ExchangeName.requeue, routingKey: queue.suspectQueue.rawValue))
        }
        for pattern in bindings {
            topology.insert(QueueBinding(queue: queue, exchange: exchange, routingKey: pattern.rawValue))
        }
        return topology
    }

    /// How long to wait after so many failures in a row.
    func retryDelay(after failures: Int) -> Duration {
        Backoff(first: retryDelay, longest: maximumRetryDelay).delay(after: failures)
    }

    func validate(usesInbox: Bool) throws {
        let operation = "subscribe to \(queue)"
        func require(_ condition: Bool, _ rule: String) throws {
            guard condition else { throw EventsError(.invalidConfiguration, rule, operation: operation) }
        }
        try require((1...65_535).contains(prefetch), "prefetch is 1 to 65535")
        try require(
            orderedBacklog >= 0 && unsettledLimit <= 65_535, "prefetch and orderedBacklog are 65535 together at most")
        try require((1...prefetch).contains(concurrency), "concurrency is 1 to prefetch")
        try require(maximumRedeliveries > 0, "maximumRedeliveries is 1 or more")
        try require(handlerDeadline > .zero && drainTimeout >= .zero, "deadlines are above zero")
        try require(retryDelay > .zero && maximumRetryDelay >= retryDelay, "pauses are above zero")
        try retry.validate(operation)
        try require(
            orderingKey == nil || (retry.usedRungs.last ?? .zero) <= .seconds(900),
            "with an ordering key a pause is 15 min at most")
        try require(circuitBreaker?.isValid ?? true, "the circuit breaker has a window, a share above 0, and a pause")
        try require(
            !usesInbox || (inbox.timeToLive > retry.longestSpan && inbox.deadline > .zero),
            "the inbox forgets after \(inbox.timeToLive), but a retry may come after \(retry.longestSpan)")
        try require(
            (1...245).contains((inbox.scope ?? queue.rawValue).utf8.count), "an inbox's scope has 1 to 245 bytes")
    }
}
