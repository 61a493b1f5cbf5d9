internal import Synchronization

/// Puts deliveries that arrive one by one together, and hands each its own outcome.
final class BatchCollector<Event: Sendable>: Sendable {
    private struct Waiting {
        let id: UInt64
        let delivery: EventDelivery<Event>
        let continuation: CheckedContinuation<HandlerOutcome, any Error>
    }

    private struct State {
        var waiting: [Waiting] = []
        var lastID: UInt64 = 0
        /// Which batch is being filled: a timer of an earlier one finds that it is too late.
        var generation = 0
        var timer: Task<Void, Never>?
        /// Those whose batch is being handled, by id.
        var running: [UInt64: Running] = [:]
        /// The batches being handled: the task, and how many still wait for it.
        var tasks: [Int: (task: Task<Void, Never>, waiting: Int)] = [:]
    }

    private struct Running {
        let batch: Int
        let continuation: CheckedContinuation<HandlerOutcome, any Error>
    }

    private let size: Int
    private let wait: Duration
    private let stopwatch: Stopwatch
    private let handler: @Sendable ([EventDelivery<Event>]) async throws -> [HandlerOutcome]
    private let state = Mutex(State())

    init(
        size: Int, wait: Duration, stopwatch: Stopwatch,
        _ handler: @escaping @Sendable ([EventDelivery<Event>]) async throws -> [HandlerOutcome]
    ) {
        self.size = size
        self.wait = wait
        self.stopwatch = stopwatch
        self.handler = handler
    }

    /// Waits for a batch with this delivery to be handled.
    func handle(_ delivery: EventDelivery<Event>) async throws -> HandlerOutcome {
        let id = state.withLock { state in
            state.lastID += 1
            return state.lastID
        }
        return try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let isCancelled = state.withLock { state in
                    if Task.isCancelled { return true }
                    state.waiting.append(Waiting(id: id, delivery: delivery, continuation: continuation))
                    if state.waiting.count >= size {
                        begin(&state)
                    } else if state.waiting.count == 1 {
                        let due = stopwatch.elapsed() + wait
                        state.timer = Task { [self, generation = state.generation] in
                            guard (try? await stopwatch.sleepUntil(due)) != nil else { return }
                            self.state.withLock { if $0.generation == generation { begin(&$0) } }
                        }
                    }
                    return false
                }
                if isCancelled { continuation.resume(throwing: CancellationError()) }
            }
        } onCancel: {
            // One whose batch is being handled waits for that: only then is its place free again.
            let continuation = state.withLock { state -> CheckedContinuation<HandlerOutcome, any Error>? in
                if let index = state.waiting.firstIndex(where: { $0.id == id }) {
                    return state.waiting.remove(at: index).continuation
                }
                guard let running = state.running[id] else { return nil }
                state.tasks[running.batch]?.waiting -= 1
                if state.tasks[running.batch]?.waiting == 0 { state.tasks[running.batch]?.task.cancel() }
                return nil
            }
            continuation?.resume(throwing: CancellationError())
        }
    }

    /// Handles what waits, in a task of its own: none of those who wait owns it.
    private func begin(_ state: inout State) {
        let batch = state.waiting
        state.waiting = []
        state.generation += 1
        state.timer?.cancel()
        state.timer = nil
        guard !batch.isEmpty else { return }
        let number = state.generation
        for entry in batch { state.running[entry.id] = Running(batch: number, continuation: entry.continuation) }
        let ids = batch.map(\.id)
        let deliveries = batch.map(\.delivery)
        let task = Task {
            let result: Result<[HandlerOutcome], any Error>
            do {
                let outcomes = try await handler(deliveries)
                guard outcomes.count == deliveries.count else {
                    throw EventsError(
                        .invalidConfiguration,
                        "the batch handler returned \(outcomes.count) outcomes for \(deliveries.count) events",
                        operation: "handle a batch")
                }
                result = .success(outcomes)
            } catch {
                result = .failure(error)
            }
            finish(number, ids, result)
        }
        // It cannot have finished before: that takes the lock.
        state.tasks[number] = (task, batch.count)
    }

    private func finish(_ batch: Int, _ ids: [UInt64], _ result: Result<[HandlerOutcome], any Error>) {
        let waiting = self.state.withLock { state in
            state.tasks[batch] = nil
            return ids.map { state.running.removeValue(forKey: $0) }
        }
        for (index, running) in waiting.enumerated() {
            running?.continuation.resume(with: result.map { $0[index] })
        }
    }
}
