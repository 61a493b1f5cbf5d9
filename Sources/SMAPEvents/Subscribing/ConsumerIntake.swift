internal import Synchronization
internal import Waiting

/// Where the workers of a subscription find the consumer to take deliveries from. Consumers come and go with
/// connections; workers stay, so that a handler is not cut short because a connection was lost meanwhile.
final class ConsumerIntake: Sendable {
    /// A consumer, as long as it is the newest.
    final class Offer: Sendable {
        /// Grows with each consumer.
        let generation: Int
        let source: any DeliverySource
        private let consumer: any TransportConsumer
        /// Opened when another consumer is wanted.
        let renewal: Latch
        private let cautious: Atomic<Bool>
        private let prefetch: Int

        init(
            generation: Int, source: any DeliverySource, consumer: any TransportConsumer, renewal: Latch,
            isCautious: Bool, prefetch: Int
        ) {
            self.generation = generation
            self.source = source
            self.consumer = consumer
            self.renewal = renewal
            cautious = Atomic(isCautious)
            self.prefetch = prefetch
        }

        /// Whether it has one delivery at a time.
        var isCautious: Bool { cautious.load(ordering: .relaxed) }

        /// It may have more than one delivery at a time: the first one is none that may kill its consumers.
        func widen() {
            guard cautious.exchange(false, ordering: .relaxed), prefetch > 1 else { return }
            consumer.widen(to: prefetch)
        }
    }

    private struct State {
        var generation = 0
        var offer: Offer?
        var isFinished = false
        var waiting: [UInt64: CheckedContinuation<Void, any Error>] = [:]
        var lastID: UInt64 = 0
    }

    private let state = Mutex(State())

    /// Offers a new consumer to the workers.
    ///
    /// - Parameter offer: Makes it, of the generation that it is given.
    func offer(_ makeOffer: (Int) -> Offer) -> Offer {
        let (offer, waiting) = state.withLock { state in
            state.generation += 1
            let offer = makeOffer(state.generation)
            state.offer = offer
            defer { state.waiting = [:] }
            return (offer, Array(state.waiting.values))
        }
        for worker in waiting { worker.resume() }
        return offer
    }

    /// The consumer has ended: what it handed out and is not being handled yet comes again.
    func withdraw(_ offer: Offer) {
        state.withLock { if $0.offer?.generation == offer.generation { $0.offer = nil } }
    }

    /// Whether the consumer is still there.
    func isCurrent(_ offer: Offer) -> Bool { state.withLock { $0.offer?.generation == offer.generation } }

    /// The consumer that is there, if any.
    var current: Offer? { state.withLock { $0.offer } }

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
    func consumer(after generation: Int) async throws -> Offer? {
        while true {
            let (found, isFinished) = state.withLock { state in
                (state.offer.flatMap { $0.generation > generation ? $0 : nil }, state.isFinished)
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
                    if state.isFinished || (state.offer?.generation ?? 0) > generation { return .success(()) }
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
