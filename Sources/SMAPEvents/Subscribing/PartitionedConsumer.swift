internal import DequeModule
internal import Synchronization
internal import Waiting

/// A source whose deliveries are partitioned by an ordering key: those with one key are handled one after the other, in the
/// order of the queue; those with different keys, and those without one, side by side.
///
/// A failed delivery stays first in its partition until its next attempt, and holds up nothing but that: neither a handler nor
/// another partition. What waits here is bounded by the consumer's prefetch.
final class PartitionedConsumer: DeliverySource {
    private struct State {
        /// Partitions with a delivery handed out or waiting, and what comes after it.
        var partitions: [String: Deque<InboundDelivery>] = [:]
        /// The key of each unsettled delivery, by tag.
        var keys: [UInt64: String] = [:]
        /// The key of each delivery whose handler runs, by tag.
        var running: [UInt64: String] = [:]
        var waiting = 0
        var lastTimer: UInt64 = 0
        var timers: [UInt64: Task<Void, Never>] = [:]
        var isEnded = false
    }

    private let consumer: any TransportConsumer
    private let keys: OrderingKeys
    private let key: @Sendable (InboundDelivery) -> String?
    private let whenBusy: @Sendable () -> Void
    private let stopwatch: Stopwatch
    private let renewal: Latch
    private let ready = DeliveryBuffer()
    private let state = Mutex(State())

    /// - Parameters:
    ///   - keys: The keys of the subscription that are busy.
    ///   - renewal: Opened when a delivery is to go back to the queue: the order is kept only if all go back with it.
    ///   - key: The ordering key of a delivery; nil for none.
    ///   - whenBusy: Called when a delivery waits for a handler that is not one of this consumer's.
    init(
        _ consumer: any TransportConsumer, keys: OrderingKeys, stopwatch: Stopwatch, renewal: Latch,
        key: @escaping @Sendable (InboundDelivery) -> String?, whenBusy: @escaping @Sendable () -> Void
    ) {
        self.consumer = consumer
        self.keys = keys
        self.stopwatch = stopwatch
        self.renewal = renewal
        self.key = key
        self.whenBusy = whenBusy
    }

    /// Partitions deliveries until the consumer ends.
    func run() async {
        do {
            while let delivery = try await consumer.next() { partition(delivery) }
            end(nil)
        } catch {
            end(error as? EventsError ?? EventsError(.closed, "the consumer has ended", operation: "consume"))
        }
    }

    private func partition(_ delivery: InboundDelivery) {
        guard let key = key(delivery) else { return ready.deliver(delivery) }
        let delivery = keys.resumed(delivery, key)
        let isFirst = state.withLock { state -> Bool in
            guard !state.isEnded else { return false }
            state.keys[delivery.tag] = key
            guard state.partitions[key] == nil else {
                state.partitions[key]?.append(delivery)
                state.waiting += 1
                // Under the lock, so that the end of this consumer takes off what was added.
                keys.addWaiting(1)
                return false
            }
            state.partitions[key] = []
            return true
        }
        if isFirst { ready.deliver(delivery) }
    }

    func end() { end(nil) }

    /// What waits goes back to the queue, in its order.
    private func end(_ error: EventsError?) {
        ready.end(with: error)
        let timers = state.withLock { state in
            state.isEnded = true
            keys.addWaiting(-state.waiting)
            state.waiting = 0
            defer { state.timers = [:] }
            return Array(state.timers.values)
        }
        for timer in timers { timer.cancel() }
    }

    func next() async throws -> InboundDelivery? {
        while let delivery = try await ready.next() {
            guard let key = state.withLock({ $0.keys[delivery.tag] }) else { return delivery }
            // A handler of an earlier consumer, or one that is past its deadline, may still run.
            guard keys.begin(key, whenFree: { [ready] in ready.deliver(delivery) }) else {
                whenBusy()
                continue
            }
            state.withLock { $0.running[delivery.tag] = key }
            return delivery
        }
        return nil
    }

    func handlerEnded(_ delivery: InboundDelivery) {
        if let key = state.withLock({ $0.running.removeValue(forKey: delivery.tag) }) { keys.end(key) }
    }

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        guard let key = state.withLock({ $0.keys[delivery.tag] }) else {
            return try consumer.settle(delivery, settlement)
        }
        if settlement == .requeue { return renewal.open() }
        defer {
            keys.settled(key)
            advance(key, past: delivery.tag)
        }
        try consumer.settle(delivery, settlement)
    }

    func flushSettlements(deadline: ContinuousClock.Instant) async throws {
        try await consumer.flushSettlements(deadline: deadline)
    }

    func isOrdered(_ delivery: InboundDelivery) -> Bool { state.withLock { $0.keys[delivery.tag] != nil } }

    func scheduleRetry(_ delivery: InboundDelivery, after pause: Duration) {
        let due = stopwatch.elapsed() + pause
        state.withLock { state in
            guard let key = state.keys[delivery.tag] else { return }
            keys.failed(delivery, key)
            // If its consumer is gone, it comes again with the next one.
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

    /// Hands out what comes next in the partition.
    private func advance(_ key: String, past tag: UInt64) {
        let next = state.withLock { state -> InboundDelivery? in
            guard state.keys.removeValue(forKey: tag) != nil else { return nil }
            let next = state.partitions[key]?.popFirst()
            if next == nil {
                state.partitions[key] = nil
            } else if !state.isEnded {
                state.waiting -= 1
                keys.addWaiting(-1)
            }
            return next
        }
        if let next { ready.deliver(next) }
    }
}
