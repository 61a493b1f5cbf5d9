internal import DequeModule
internal import Synchronization

/// A consumer whose deliveries are handed out in lanes: those with one key one after the other, in the order of the queue;
/// those with different keys side by side.
///
/// A failed delivery waits for its next attempt in its lane, and holds up nothing but that: neither a handler nor another
/// lane. What waits here is bounded by the consumer's prefetch.
final class LanedConsumer: TransportConsumer {
    private struct State {
        /// Lanes with a delivery in hand or waiting, and what comes after it.
        var lanes: [String: Deque<InboundDelivery>] = [:]
        /// The lane of each delivery, by tag.
        var keys: [UInt64: String] = [:]
        var lastTimer: UInt64 = 0
        var timers: [UInt64: Task<Void, Never>] = [:]
        var isEnded = false
    }

    private let consumer: any TransportConsumer
    private let key: @Sendable (InboundDelivery) -> String
    private let stopwatch: Stopwatch
    private let ready = DeliveryBuffer()
    private let state = Mutex(State())

    init(
        _ consumer: any TransportConsumer, stopwatch: Stopwatch, key: @escaping @Sendable (InboundDelivery) -> String
    ) {
        self.consumer = consumer
        self.stopwatch = stopwatch
        self.key = key
    }

    /// Sorts deliveries into lanes until the consumer ends.
    func sort() async {
        do {
            while let delivery = try await consumer.next() {
                let key = key(delivery)
                let isFirst = state.withLock { state in
                    state.keys[delivery.tag] = key
                    if state.lanes[key] != nil {
                        state.lanes[key]?.append(delivery)
                        return false
                    }
                    state.lanes[key] = []
                    return true
                }
                if isFirst { ready.deliver(delivery) }
            }
            end(nil)
        } catch {
            end(error as? EventsError ?? EventsError(.closed, "the consumer has ended", operation: "lanes"))
        }
    }

    /// What waits goes back to the queue, in its order.
    func end(_ error: EventsError?) {
        ready.end(with: error)
        let timers = state.withLock { state in
            state.isEnded = true
            defer { state.timers = [:] }
            return Array(state.timers.values)
        }
        for timer in timers { timer.cancel() }
    }

    func next() async throws -> InboundDelivery? { try await ready.next() }

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        defer { leave(delivery.tag) }
        try consumer.settle(delivery, settlement)
    }

    /// Hands a delivery out again after a pause; its lane waits.
    func postpone(_ delivery: InboundDelivery, for pause: Duration) {
        let due = stopwatch.elapsed() + pause
        state.withLock { state in
            guard !state.isEnded else { return }
            state.lastTimer += 1
            let id = state.lastTimer
            state.timers[id] = Task { [self] in
                guard (try? await stopwatch.sleepUntil(due)) != nil else { return }
                self.state.withLock { state in _ = state.timers.removeValue(forKey: id) }
                ready.deliver(delivery)
            }
        }
    }

    func untilEnded() async throws { try await consumer.untilEnded() }

    func widen(to prefetch: Int, deadline: ContinuousClock.Instant) async throws {
        try await consumer.widen(to: prefetch, deadline: deadline)
    }

    func stop() async {
        await consumer.stop()
        end(nil)
    }

    /// The lane's next one.
    private func leave(_ tag: UInt64) {
        let next = state.withLock { state -> InboundDelivery? in
            guard let key = state.keys.removeValue(forKey: tag) else { return nil }
            let next = state.lanes[key]?.popFirst()
            if next == nil { state.lanes[key] = nil }
            return next
        }
        if let next { ready.deliver(next) }
    }
}
