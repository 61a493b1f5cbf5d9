internal import SMAPEvents
internal import Synchronization

/// One consumer on a channel of its own.
final class Consumer: TransportConsumer {
    private enum Widening {
        case none
        case wanted
        /// It is cancelled, and consumes again when the broker has answered.
        case begun
    }

    private struct State {
        var tracker = AckTracker()
        var widening = Widening.none
        /// Whether settlements can still reach the broker.
        var isChannelOpen = true
    }

    let queue: QueueName
    var prefetch: Int { limit.load(ordering: .relaxed) }
    private let limit: Atomic<Int>
    private let buffer = DeliveryBuffer()
    private let state = Mutex(State())
    private let connection: RabbitMQConnection

    init(queue: QueueName, prefetch: Int, connection: RabbitMQConnection) {
        self.queue = queue
        limit = Atomic(prefetch)
        self.connection = connection
    }

    // MARK: TransportConsumer

    func next() async throws -> InboundDelivery? {
        try await buffer.next()
    }

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        let isTaken = state.withLock { $0.isChannelOpen && $0.tracker.settle(delivery.tag, settlement) }
        guard isTaken else {
            throw EventsError(
                .deliveryExpired, "the delivery is settled already, or its channel is gone",
                operation: "settle on \(queue)")
        }
        connection.wake()
    }

    func flushSettlements(deadline: ContinuousClock.Instant) async throws {
        _ = try await connection.request(.flushSettlements(self), name: "settle on \(queue)", deadline: deadline)
    }

    func untilEnded() async throws { try await buffer.untilEnded() }

    func widen(to prefetch: Int) {
        limit.store(prefetch, ordering: .relaxed)
        state.withLock { if $0.widening == .none { $0.widening = .wanted } }
        connection.wake()
    }

    /// Whether the broker still knows of this consumer's channel.
    var isChannelOpen: Bool { state.withLock { $0.isChannelOpen } }

    func stop() async {
        buffer.end(with: nil)
        // With its channel gone, there is nothing to cancel.
        guard isChannelOpen else { return }
        await connection.finish(.stopConsumer(self), name: "stop consuming from \(queue)")
    }

    // MARK: The connection thread

    /// Hands deliveries on. False if a tag is out of order, or if there are many more than the prefetch allows. A quorum queue
    /// whose nodes have lost sight of each other may deliver again what a consumer still has.
    func deliver(_ deliveries: [InboundDelivery]) -> Bool {
        let areOrdered = state.withLock { state in
            deliveries.allSatisfy { state.tracker.delivered($0.tag) } && state.tracker.unsettledCount <= 2 * prefetch
        }
        guard areOrdered else { return false }
        buffer.deliver(deliveries)
        return true
    }

    /// Whether so many deliveries are unsettled that it pays to send their settlements together, a millisecond later.
    var isBusy: Bool { state.withLock { $0.tracker.count >= 64 } }

    /// What is to be sent for what was settled. Nothing while the consumer is widened: what RabbitMQ sends to a consumer just when
    /// that is cancelled reaches no client (seen on 3.10), so it must not be made to send anything.
    ///
    /// - Parameter isLast: Whether the channel is closed behind it.
    func settlements(isLast: Bool = false) -> [AckTracker.Frame] {
        state.withLock { $0.widening == .none || isLast ? $0.tracker.flush() : [] }
    }

    /// Whether settlements wait until it has been widened.
    var withholdsSettlements: Bool { state.withLock { $0.widening != .none } }

    /// Whether it is to be cancelled now, to consume again with more.
    func beginsWidening() -> Bool {
        state.withLock { state in
            guard state.widening == .wanted else { return false }
            state.widening = .begun
            return true
        }
    }

    /// The broker has cancelled it as asked: from here on settlements make it send nothing to the old consumer.
    func widened() { state.withLock { $0.widening = .none } }

    /// The broker, or the loss of the connection, has ended this consumer.
    func fail(_ error: EventsError, isChannelOpen: Bool = false) {
        if !isChannelOpen { state.withLock { $0.isChannelOpen = false } }
        buffer.end(with: error)
    }
}
