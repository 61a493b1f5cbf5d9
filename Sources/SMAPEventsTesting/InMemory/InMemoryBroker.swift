internal import DequeModule
public import SMAPEvents
internal import Synchronization

/// A broker in memory, for tests that need no server: topic, fanout and direct exchanges, prefetch, redelivery, dead
/// letters, and messages that reach no queue.
///
/// It answers as RabbitMQ does; `TransportContract` holds both to the same promises. Nothing is persistent, and nothing
/// takes time but the pauses of queues with `x-message-ttl`, in which retries wait: those pass on a clock of your choice.
public final class InMemoryBroker: EventTransport {
    private struct Message {
        let position: UInt64
        let queue: QueueName
        let content: OutboundMessage
        var deliveries = 0
    }

    private struct Queue {
        let declaration: QueueDeclaration
        /// In the order of their positions: a message that comes back takes its old place.
        var ready: Deque<Message> = []
        var consumers: Deque<InMemoryConsumer> = []
    }

    private struct Binding: Hashable {
        let exchange: String
        let queue: QueueName
        let key: String
    }

    private struct State {
        var exchanges: [String: ExchangeDeclaration.Kind] = [:]
        var queues: [QueueName: Queue] = [:]
        var bindings: [Binding] = []
        var lastPosition: UInt64 = 0
        /// What each consumer has in hand, by tag.
        var unsettled: [ObjectIdentifier: [UInt64: Message]] = [:]
        var lastTags: [ObjectIdentifier: UInt64] = [:]
    }

    private let state = Mutex(State())
    private let stopwatch: Stopwatch
    private let replies = ReplyRegistry()
    private static let directReplyTo = "amq.rabbitmq.reply-to.memory.0"

    /// Makes an empty broker: no exchanges, no queues.
    ///
    /// - Parameter clock: What the pauses of delay queues are measured by; a ``ManualClock`` passes them in no time.
    public init(clock: any Clock<Duration> = ContinuousClock()) { stopwatch = Stopwatch(clock) }

    /// The messages that wait in a queue, oldest first; those in the hands of consumers are not among them.
    public func messages(in queue: QueueName) -> [OutboundMessage] {
        state.withLock { $0.queues[queue]?.ready.map(\.content) ?? [] }
    }

    /// Whether a queue is empty, and nothing that was delivered from it is in the hands of a consumer.
    public func isSettled(_ queue: QueueName) -> Bool {
        state.withLock { state in
            guard let entry = state.queues[queue] else { return true }
            // In hand also of those who take no more.
            return entry.ready.isEmpty
                && state.unsettled.values.allSatisfy { $0.values.allSatisfy { $0.queue != queue } }
        }
    }

    // MARK: EventTransport

    /// See ``SMAPEvents/EventTransport``.
    public func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        try state.withLock { state in
            if let kind = state.exchanges[exchange.name], kind != exchange.kind {
                throw EventsError(
                    .topologyConflict, "inequivalent arg 'type' for exchange '\(exchange.name)'",
                    operation: "declare exchange \(exchange.name)")
            }
            state.exchanges[exchange.name] = exchange.kind
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    @discardableResult
    public func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        try state.withLock { state in
            if let known = state.queues[queue.name] {
                let difference = Set(known.declaration.arguments.keys).union(queue.arguments.keys).sorted()
                    .first { known.declaration.arguments[$0] != queue.arguments[$0] }
                if let difference {
                    throw EventsError(
                        .topologyConflict, "inequivalent arg '\(difference)' for queue '\(queue.name)'",
                        operation: "declare queue \(queue.name)")
                }
                return QueueStatus(messages: known.ready.count, consumers: known.consumers.count)
            }
            state.queues[queue.name] = Queue(declaration: queue)
            return QueueStatus(messages: 0, consumers: 0)
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant
    ) async throws {
        try state.withLock { state in
            let operation = "bind \(queue) to \(exchange)"
            guard state.exchanges[exchange] != nil else {
                throw EventsError(.notFound, "no exchange '\(exchange)'", operation: operation)
            }
            guard state.queues[queue] != nil else {
                throw EventsError(.notFound, "no queue '\(queue)'", operation: operation)
            }
            let binding = Binding(exchange: exchange, queue: queue, key: routingKey)
            if !state.bindings.contains(binding) { state.bindings.append(binding) }
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func checkExchange(_ name: String, deadline: ContinuousClock.Instant) async throws {
        guard state.withLock({ $0.exchanges[name] != nil }) else {
            throw EventsError(.notFound, "no exchange '\(name)'", operation: "check exchange \(name)")
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func status(of queue: QueueName, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        let entry = state.withLock { $0.queues[queue] }
        guard let entry else {
            throw EventsError(.notFound, "no queue '\(queue)'", operation: "check queue \(queue)")
        }
        return QueueStatus(messages: entry.ready.count, consumers: entry.consumers.count)
    }

    /// Always healthy: there is nothing that could fail.
    public func health() async -> Health { Health() }

    /// See ``SMAPEvents/EventTransport``.
    public func publish(
        _ message: consuming OutboundMessage, using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async throws -> Bool {
        try Task.checkCancellation()
        try message.validate()
        return try state.withLock { state in
            if message.exchange.isEmpty {
                // The default exchange: by queue, and back to whoever asked.
                if message.routingKey == Self.directReplyTo {
                    replies.deliver(
                        InboundDelivery(
                            tag: 0, exchange: "", routingKey: message.routingKey, isRedelivered: false,
                            properties: message.properties, body: message.body))
                    return true
                }
                guard let queue = try? QueueName(message.routingKey), state.queues[queue] != nil else { return false }
                put(message, into: queue, &state)
                return true
            }
            guard state.exchanges[message.exchange] != nil else {
                throw EventsError(
                    .exchangeNotFound, "no exchange '\(message.exchange)'", operation: "publish")
            }
            return route(message, &state)
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func request(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> InboundDelivery {
        var message = message
        let correlationID = message.properties.correlationID ?? EventID().rawValue
        message.properties.correlationID = correlationID
        message.properties.replyTo = Self.directReplyTo
        return try await replies.request(correlationID, deadline: deadline) { [message] in
            try await self.publish(message, deadline: deadline)
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func withConsumer<Result: Sendable>(
        on queue: QueueName, prefetch: Int, deadline: ContinuousClock.Instant,
        _ body: @Sendable (any TransportConsumer) async throws -> Result
    ) async throws -> Result {
        guard (1...65_535).contains(prefetch) else {
            throw EventsError(.invalidConfiguration, "prefetch is 1 to 65535", operation: "consume from \(queue)")
        }
        let consumer = InMemoryConsumer(broker: self, queue: queue, prefetch: prefetch)
        try state.withLock { state in
            guard state.queues[queue] != nil else {
                throw EventsError(.notFound, "no queue '\(queue)'", operation: "consume from \(queue)")
            }
            state.unsettled[ObjectIdentifier(consumer)] = [:]
            state.queues[queue]?.consumers.append(consumer)
            Self.dispatch(queue, &state)
        }
        defer { close(consumer) }
        return try await body(consumer)
    }

    /// Deletes a queue, as an operator might. Its consumers end with
    /// ``SMAPEvents/EventsError/Code/subscriptionCancelled``.
    public func delete(_ queue: QueueName) {
        let consumers = state.withLock { state in
            state.bindings.removeAll { $0.queue == queue }
            return state.queues.removeValue(forKey: queue)?.consumers ?? []
        }
        for consumer in consumers {
            consumer.buffer.end(
                with: EventsError(
                    .subscriptionCancelled, "the broker has cancelled the consumer: its queue is gone",
                    operation: "consume from \(queue)"))
        }
    }

    /// Ends all consumers as a lost connection does, with ``SMAPEvents/EventsError/Code/connectionLost``: what they have
    /// not settled comes again, and they cannot settle it any more. Nor do replies come to requests that are under way.
    public func interrupt() {
        replies.connectionLost(
            EventsError(.connectionLost, "the connection was interrupted", operation: "request"))
        let consumers = state.withLock { $0.queues.values.flatMap(\.consumers) }
        for consumer in consumers {
            consumer.buffer.end(
                with: EventsError(
                    .connectionLost, "the connection was interrupted", operation: "consume from \(consumer.queue)"))
            close(consumer)
        }
    }

    // MARK: Consumers

    func settle(_ tag: UInt64, of consumer: InMemoryConsumer, _ settlement: Settlement) throws {
        try state.withLock { state in
            guard let message = state.unsettled[ObjectIdentifier(consumer)]?.removeValue(forKey: tag) else {
                throw EventsError(
                    .deliveryExpired, "the delivery is settled already, or its consumer is gone",
                    operation: "settle on \(consumer.queue)")
            }
            switch settlement {
            case .acknowledge: break
            case .requeue: Self.putBack(message, consumer.queue, &state)
            case .reject:
                deadLetter(message.content, from: consumer.queue, &state)
            }
            Self.dispatch(consumer.queue, &state)
        }
    }

    /// No more deliveries for this consumer; those that no task has taken go back.
    func stop(_ consumer: InMemoryConsumer) {
        state.withLock { state in
            state.queues[consumer.queue]?.consumers.removeAll { $0 === consumer }
            // A single active consumer leaves its place to the next.
            Self.dispatch(consumer.queue, &state)
        }
        consumer.buffer.end(with: nil)
    }

    /// The channel of a consumer is gone: what it has not settled goes back, before the next consumer gets anything.
    private func close(_ consumer: InMemoryConsumer) {
        state.withLock { state in
            state.queues[consumer.queue]?.consumers.removeAll { $0 === consumer }
            for message in (state.unsettled.removeValue(forKey: ObjectIdentifier(consumer)) ?? [:]).values {
                Self.putBack(message, consumer.queue, &state)
            }
            state.lastTags[ObjectIdentifier(consumer)] = nil
            Self.dispatch(consumer.queue, &state)
        }
        consumer.buffer.end(with: nil)
    }

    // MARK: Routing

    /// Hands a message on to the dead letter exchange of its queue, if that has one.
    private func deadLetter(_ message: OutboundMessage, from queue: QueueName, _ state: inout State) {
        let arguments = state.queues[queue]?.declaration.arguments ?? [:]
        guard case .string(let exchange) = arguments["x-dead-letter-exchange"] else { return }
        var dead = message
        dead.exchange = exchange
        if case .string(let key) = arguments["x-dead-letter-routing-key"] { dead.routingKey = key }
        _ = route(dead, &state)
    }

    /// Hands a message on when its time in a delay queue is over, unless it has left before.
    private func expire(_ position: UInt64, in queue: QueueName) {
        state.withLock { state in
            guard let index = state.queues[queue]?.ready.firstIndex(where: { $0.position == position }),
                let message = state.queues[queue]?.ready.remove(at: index)
            else { return }
            deadLetter(message.content, from: queue, &state)
        }
    }

    private func route(_ message: OutboundMessage, _ state: inout State) -> Bool {
        let kind = state.exchanges[message.exchange]
        var targets: Set<QueueName> = []
        for binding in state.bindings where binding.exchange == message.exchange {
            let isMatch =
                switch kind {
                case .fanout: true
                case .direct: binding.key == message.routingKey
                case .topic: (try? TopicPattern(binding.key))?.matches(message.routingKey) ?? false
                case nil: false
                }
            if isMatch { targets.insert(binding.queue) }
        }
        for queue in targets { put(message, into: queue, &state) }
        return !targets.isEmpty
    }

    private func put(_ message: OutboundMessage, into queue: QueueName, _ state: inout State) {
        state.lastPosition += 1
        let position = state.lastPosition
        state.queues[queue]?.ready.append(Message(position: position, queue: queue, content: message))
        if case .integer(let pause) = state.queues[queue]?.declaration.arguments["x-message-ttl"] {
            let due = stopwatch.elapsed() + .milliseconds(pause)
            Task { [stopwatch, weak self] in
                try? await stopwatch.sleepUntil(due)
                self?.expire(position, in: queue)
            }
        }
        Self.dispatch(queue, &state)
    }

    private static func putBack(_ message: Message, _ queue: QueueName, _ state: inout State) {
        guard let ready = state.queues[queue]?.ready else { return }
        let index = ready.firstIndex { $0.position > message.position } ?? ready.endIndex
        state.queues[queue]?.ready.insert(message, at: index)
    }

    /// A consumer of the queue may have more.
    func dispatch(_ queue: QueueName) { state.withLock { Self.dispatch(queue, &$0) } }

    /// Gives what is ready to consumers that may have more, in turn.
    private static func dispatch(_ name: QueueName, _ state: inout State) {
        while let queue = state.queues[name], !queue.ready.isEmpty {
            let isSingle = queue.declaration.arguments["x-single-active-consumer"] == .boolean(true)
            let candidates = isSingle ? queue.consumers.prefix(1) : queue.consumers[...]
            let free = candidates.firstIndex {
                (state.unsettled[ObjectIdentifier($0)]?.count ?? .max) < $0.prefetch
            }
            guard let free, var message = state.queues[name]?.ready.popFirst() else { return }
            let consumer = queue.consumers[free]
            if !isSingle {
                state.queues[name]?.consumers.remove(at: free)
                state.queues[name]?.consumers.append(consumer)
            }
            let id = ObjectIdentifier(consumer)
            let tag = (state.lastTags[id] ?? 0) + 1
            state.lastTags[id] = tag
            var properties = message.content.properties
            // As quorum queues do; classic ones do not count.
            if message.deliveries > 0, queue.declaration.kind == .quorum {
                properties.headers["x-delivery-count"] = .integer(Int64(message.deliveries))
            }
            let delivery = InboundDelivery(
                tag: tag, exchange: message.content.exchange, routingKey: message.content.routingKey,
                isRedelivered: message.deliveries > 0, properties: properties, body: message.content.body)
            message.deliveries += 1
            state.unsettled[id]?[tag] = message
            consumer.buffer.deliver(delivery)
        }
    }
}

/// A consumer of an in-memory queue.
final class InMemoryConsumer: TransportConsumer {
    let queue: QueueName
    var prefetch: Int { limit.load(ordering: .relaxed) }
    private let limit: Atomic<Int>
    let buffer = DeliveryBuffer()
    private let broker: InMemoryBroker

    init(broker: InMemoryBroker, queue: QueueName, prefetch: Int) {
        self.broker = broker
        self.queue = queue
        limit = Atomic(prefetch)
    }

    func widen(to prefetch: Int) {
        limit.store(prefetch, ordering: .relaxed)
        broker.dispatch(queue)
    }

    func next() async throws -> InboundDelivery? { try await buffer.next() }

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        try broker.settle(delivery.tag, of: self, settlement)
    }

    /// Settlements are carried out at once.
    func flushSettlements(deadline: ContinuousClock.Instant) async throws {}

    func untilEnded() async throws { try await buffer.untilEnded() }

    func stop() async { broker.stop(self) }
}
