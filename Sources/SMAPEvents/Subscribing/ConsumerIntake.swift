internal import Synchronization

/// Where the workers of a subscription find the consumer to take deliveries from. Consumers come and go with
/// connections; workers stay, so that a handler is not cut short because a connection was lost meanwhile.
final class ConsumerIntake: Sendable {
    private struct State {
        /// Grows with each consumer.
        var generation = 0
        var consumer: (any TransportConsumer)?
        var isFinished = false
        var waiting: [UInt64: CheckedContinuation<Void, any Error>] = [:]
        var lastID: UInt64 = 0
    }

    private let state = Mutex(State())

    /// Offers a new consumer to the workers.
    func offer(_ consumer: any TransportConsumer) {
        let waiting = state.withLock { state in
            state.generation += 1
            state.consumer = consumer
            defer { state.waiting = [:] }
            return Array(state.waiting.values)
        }
        for worker in waiting { worker.resume() }
    }

    /// No more consumers: the workers end.
    func finish() {
        let waiting = state.withLock { state in
            state.isFinished = true
            defer { state.waiting = [:] }
            return Array(state.waiting.values)
        }
        for worker in waiting { worker.resume() }
    }

    /// The next consumer after the one of `generation`; waits for it. Nil when there will be none.
    func consumer(after generation: Int) async throws -> (generation: Int, consumer: any TransportConsumer)? {
        while true {
            let (found, isFinished) = state.withLock { state in
                let found = state.consumer.map { (generation: state.generation, consumer: $0) }
                return (state.generation > generation ? found : nil, state.isFinished)
            }
            if isFinished { return nil }
            if let found { return found }
            try await change(after: generation)
        }
    }

    private func change(after generation: Int) async throws {
        let id = state.withLock { state in
            state.lastID += 1
            return state.lastID
        }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
                let result = state.withLock { state -> Result<Void, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if state.isFinished || state.generation > generation { return .success(()) }
                    state.waiting[id] = continuation
                    return nil
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            let worker = state.withLock { $0.waiting.removeValue(forKey: id) }
            worker?.resume(throwing: CancellationError())
        }
    }
}
