internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents
internal import Synchronization

/// One consumer on a channel of its own: deliveries wait in it until tasks take them.
///
/// Its buffer is bounded by the prefetch: the broker sends no more than that unsettled.
final class Consumer: TransportConsumer {
    private struct Waiting {
        let id: UInt64
        let continuation: CheckedContinuation<InboundDelivery?, any Error>
    }

    private struct State {
        var buffer: Deque<InboundDelivery> = []
        var waiting: Deque<Waiting> = []
        var lastID: UInt64 = 0
        var ledger = SettlementLedger()
        /// Set once no more deliveries are handed out: nil stands for an orderly stop.
        var end: EventsError??
        /// Whether settlements can still reach the broker.
        var isChannelOpen = true
    }

    let queue: QueueName
    let prefetch: Int
    private let state = Mutex(State())
    private let connection: RabbitMQConnection

    init(queue: QueueName, prefetch: Int, connection: RabbitMQConnection) {
        self.queue = queue
        self.prefetch = prefetch
        self.connection = connection
    }

    // MARK: TransportConsumer

    func next() async throws -> InboundDelivery? {
        let id = state.withLock { state in
            state.lastID += 1
            return state.lastID
        }
        return try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let result = state.withLock { state -> Result<InboundDelivery?, any Error>? in
                    // Under the lock: the handler below runs after the flag is up, and finds what is left here.
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if let end = state.end { return end.map { .failure($0) } ?? .success(nil) }
                    if let delivery = state.buffer.popFirst() { return .success(delivery) }
                    state.waiting.append(Waiting(id: id, continuation: continuation))
                    return nil
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            let waiting = state.withLock { state in
                state.waiting.firstIndex { $0.id == id }.map { state.waiting.remove(at: $0) }
            }
            waiting?.continuation.resume(throwing: CancellationError())
        }
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

    func stop() async {
        end(with: nil)
        await connection.finish(.stopConsumer(self), "stop consuming from \(queue)")
    }

    // MARK: The connection thread

    /// Hands a delivery to a task. False if its tag is out of order.
    func deliver(_ delivery: InboundDelivery) -> Bool {
        let (isOrdered, waiting) = state.withLock { state -> (Bool, Waiting?) in
            guard state.ledger.delivered(delivery.tag) else { return (false, nil) }
            // After the end it stays unsettled, and goes back to the queue with the channel.
            guard state.end == nil else { return (true, nil) }
            if let waiting = state.waiting.popFirst() { return (true, waiting) }
            state.buffer.append(delivery)
            return (true, nil)
        }
        waiting?.continuation.resume(returning: delivery)
        return isOrdered
    }

    /// Takes note of a delivery that is too large to be taken into memory: it is rejected.
    func refuse(_ tag: UInt64) -> Bool {
        state.withLock { $0.ledger.delivered(tag) && $0.ledger.settle(tag, .reject) }
    }

    func settlements() -> [SettlementLedger.Frame] {
        state.withLock { $0.ledger.flush() }
    }

    /// The broker, or the loss of the connection, has ended this consumer.
    func fail(_ error: EventsError, isChannelOpen: Bool = false) {
        if !isChannelOpen { state.withLock { $0.isChannelOpen = false } }
        end(with: error)
    }

    private func end(with error: EventsError?) {
        let waiting = state.withLock { state in
            guard state.end == nil else { return Deque<Waiting>() }
            state.end = .some(error)
            state.buffer = []
            defer { state.waiting = [] }
            return state.waiting
        }
        for entry in waiting {
            if let error { entry.continuation.resume(throwing: error) } else { entry.continuation.resume(returning: nil) }
        }
    }
}
