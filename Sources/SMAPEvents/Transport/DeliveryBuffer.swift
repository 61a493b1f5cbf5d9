internal import DequeModule
internal import Synchronization

/// Where a consumer's deliveries wait until tasks take them. For the transports of this package.
///
/// It is bounded by the consumer's prefetch: no more than that is unsettled at a time.
package final class DeliveryBuffer: Sendable {
    private struct Waiting {
        let id: UInt64
        let continuation: CheckedContinuation<InboundDelivery?, any Error>
    }

    private struct State {
        var deliveries: Deque<InboundDelivery> = []
        var waiting: Deque<Waiting> = []
        var lastID: UInt64 = 0
        var watchers: [UInt64: CheckedContinuation<Void, any Error>] = [:]
        /// Set once no more deliveries are handed out: nil inside stands for an orderly stop.
        var end: EventsError??
    }

    private let state = Mutex(State())

    package init() {}

    /// The next delivery; nil after an orderly end.
    package func next() async throws -> InboundDelivery? {
        // Most deliveries are here already when a handler comes for the next one: no suspension, no handler.
        try Task.checkCancellation()
        if let delivery = state.withLock({ $0.end == nil ? $0.deliveries.popFirst() : nil }) { return delivery }
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
                    if let delivery = state.deliveries.popFirst() { return .success(delivery) }
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

    /// Hands deliveries to tasks. After the end they are dropped: unsettled, they go back to their queue.
    package func deliver(_ deliveries: [InboundDelivery]) {
        let taken = state.withLock { state -> [(Waiting, InboundDelivery)] in
            guard state.end == nil else { return [] }
            var taken: [(Waiting, InboundDelivery)] = []
            for delivery in deliveries {
                if let waiting = state.waiting.popFirst() {
                    taken.append((waiting, delivery))
                } else {
                    state.deliveries.append(delivery)
                }
            }
            return taken
        }
        for (waiting, delivery) in taken { waiting.continuation.resume(returning: delivery) }
    }

    /// Hands one delivery on.
    package func deliver(_ delivery: InboundDelivery) { deliver([delivery]) }

    /// Returns after an orderly end; throws why it ended otherwise.
    package func untilEnded() async throws {
        let id = state.withLock { state in
            state.lastID += 1
            return state.lastID
        }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
                let result = state.withLock { state -> Result<Void, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if let end = state.end { return end.map { .failure($0) } ?? .success(()) }
                    state.watchers[id] = continuation
                    return nil
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            let watcher = state.withLock { $0.watchers.removeValue(forKey: id) }
            watcher?.resume(throwing: CancellationError())
        }
    }

    /// Ends the stream: with an error, or in order. The first end stands.
    package func end(with error: EventsError?) {
        let (waiting, watchers) = state.withLock { state in
            guard state.end == nil else { return (Deque<Waiting>(), [CheckedContinuation<Void, any Error>]()) }
            state.end = .some(error)
            state.deliveries = []
            defer {
                state.waiting = []
                state.watchers = [:]
            }
            return (state.waiting, Array(state.watchers.values))
        }
        for watcher in watchers { watcher.resume(with: error.map { .failure($0) } ?? .success(())) }
        for entry in waiting {
            if let error {
                entry.continuation.resume(throwing: error)
            } else {
                entry.continuation.resume(returning: nil)
            }
        }
    }
}
