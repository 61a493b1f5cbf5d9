internal import SMAPEvents
internal import Synchronization

/// One consumer on a channel of its own.
final class Consumer: TransportConsumer {
    private struct State {
        var ledger = SettlementLedger()
        /// Whether settlements can still reach the broker.
        var isChannelOpen = true
    }

    let queue: QueueName
    let prefetch: Int
    private let buffer = DeliveryBuffer()
    private let state = Mutex(State())
    private let connection: RabbitMQConnection

    init(queue: QueueName, prefetch: Int, connection: RabbitMQConnection) {
        self.queue = queue
        self.prefetch = prefetch
        self.connection = connection
    }

    // MARK: TransportConsumer

    func next() async throws -> InboundDelivery? {
        try await buffer.next()
    }

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        let isTaken = state.withLock { $0.isChannelOpen && $0.ledger.settle(delivery.tag, settlement) }
        guard isTaken else {
            throw EventsError(
                .deliveryExpired, "the delivery is settled already, or its channel is gone",
                operation: "settle on \(queue)")
        }
        connection.wake()
    }

    func untilEnded() async throws { try await buffer.untilEnded() }

    /// Whether the broker still knows of this consumer's channel.
    var isChannelOpen: Bool { state.withLock { $0.isChannelOpen } }

    func stop() async {
        buffer.end(with: nil)
        await connection.finish(.stopConsumer(self), "stop consuming from \(queue)")
    }

    // MARK: The connection thread

    /// Hands a delivery on. False if its tag is out of order.
    func deliver(_ delivery: InboundDelivery) -> Bool {
        guard state.withLock({ $0.ledger.delivered(delivery.tag) }) else { return false }
        buffer.deliver(delivery)
        return true
    }

    /// Whether so many deliveries are in hand that a millisecond more makes no difference to anyone.
    var isBusy: Bool { state.withLock { $0.ledger.count >= 64 } }

    func settlements() -> [SettlementLedger.Frame] {
        state.withLock { $0.ledger.flush() }
    }

    /// The broker, or the loss of the connection, has ended this consumer.
    func fail(_ error: EventsError, isChannelOpen: Bool = false) {
        if !isChannelOpen { state.withLock { $0.isChannelOpen = false } }
        buffer.end(with: error)
    }
}
