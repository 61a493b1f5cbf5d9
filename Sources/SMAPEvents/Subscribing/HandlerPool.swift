internal import Synchronization

/// The tasks in which the handlers of a subscription run.
///
/// They are no children of ``EventSubscriber/run()``, which cancels them and waits for them, but only for so long: a handler
/// that ignores its cancellation keeps its place here, and must not hold up a shutdown.
final class HandlerPool: Sendable {
    private struct Worker {
        var task: Task<Void, Never>?
        var inHand: DeliveryInHand?
        /// Its delivery's time was up: it is to end as soon as its handler does.
        var isOverdue = false
    }

    private struct State {
        var workers: [Int: Worker] = [:]
        var lastID = 0
        var isClosed = false
        /// Deliveries that are being settled while their workers go on.
        var concluding = 0
        /// The tasks that do so.
        var conclusions: [Int: Task<Void, Never>?] = [:]
        var waiting:
            [UInt64: (isDone: @Sendable (HandlerPool.Load) -> Bool, continuation: CheckedContinuation<Void, Never>)] =
                [:]
        var lastWaiting: UInt64 = 0

        var load: Load {
            Load(
                workers: workers.count, busy: workers.values.count { $0.inHand != nil },
                overdue: workers.values.count { $0.isOverdue }, concluding: concluding)
        }
    }

    /// How many workers there are, how many have a delivery in hand, how many of those are past its deadline, and how many
    /// deliveries are being settled while their workers go on.
    struct Load: Sendable {
        var workers: Int
        var busy: Int
        var overdue: Int
        var concluding: Int
    }

    private let state = Mutex(State())
    private let body: @Sendable (_ pool: HandlerPool, _ worker: Int) async -> Void

    /// - Parameter body: What a worker does until there is nothing left to do.
    init(_ body: @escaping @Sendable (_ pool: HandlerPool, _ worker: Int) async -> Void) { self.body = body }

    var load: Load { state.withLock { $0.load } }

    /// Starts a worker.
    func start() {
        let id = state.withLock { state -> Int? in
            guard !state.isClosed else { return nil }
            state.lastID += 1
            state.workers[state.lastID] = Worker()
            return state.lastID
        }
        guard let id else { return }
        let task = Task {
            await body(self, id)
            ended(id)
        }
        let isCancelled = state.withLock { state in
            state.workers[id]?.task = task
            return state.isClosed
        }
        if isCancelled { task.cancel() }
    }

    private func ended(_ id: Int) {
        let wasOverdue = state.withLock { $0.workers.removeValue(forKey: id)?.isOverdue ?? false }
        notify()
        // Its place is free again.
        if wasOverdue { start() }
    }

    /// What a worker has in hand from now on; nil for nothing.
    func hold(_ inHand: DeliveryInHand?, _ id: Int) {
        let isWatched = state.withLock { state in
            state.workers[id]?.inHand = inHand
            return inHand == nil && !state.waiting.isEmpty
        }
        if isWatched { notify() }
    }

    /// Takes the deliveries whose time is up by `now` from their workers, which are cancelled. Also returns when to look
    /// again, if any handler runs.
    func takeOverdue(now: Duration) -> (overdue: [DeliveryInHand], next: Duration?) {
        let (found, next) = state.withLock { state in
            var found: [(DeliveryInHand, Task<Void, Never>?)] = []
            var next: Duration?
            for (id, worker) in state.workers {
                guard let inHand = worker.inHand, let due = inHand.due else { continue }
                if due <= now, inHand.decide() {
                    state.workers[id]?.isOverdue = true
                    state.concluding += 1
                    found.append((inHand, worker.task))
                } else {
                    next = min(next ?? due, due)
                }
            }
            return (found, next)
        }
        for (_, task) in found { task?.cancel() }
        return (found.map(\.0), next)
    }

    /// Has a delivery settled while its worker goes on.
    ///
    /// - Parameter isCounted: Whether it is among those that are being settled already.
    func conclude(isCounted: Bool = false, _ body: @escaping @Sendable () async -> Void) {
        let id = state.withLock { state in
            state.lastID += 1
            if !isCounted { state.concluding += 1 }
            state.conclusions[state.lastID] = .some(nil)
            return state.lastID
        }
        // It is no child of the worker, which may be cancelled because its time is up.
        let task = Task {
            await body()
            state.withLock { state in
                state.concluding -= 1
                state.conclusions.removeValue(forKey: id)
            }
            notify()
        }
        let isCancelled = state.withLock { state in
            // It may have ended already.
            if state.conclusions[id] != nil { state.conclusions[id] = .some(task) }
            return state.isClosed
        }
        if isCancelled { task.cancel() }
    }

    /// Cancels all workers and settlements; no more workers are started.
    func cancel() {
        let tasks = state.withLock { state in
            state.isClosed = true
            return state.workers.values.compactMap(\.task) + state.conclusions.values.compactMap { $0 }
        }
        for task in tasks { task.cancel() }
    }

    /// Returns when the load is as asked for, or the task is cancelled.
    func until(_ isDone: @escaping @Sendable (Load) -> Bool) async {
        let id = state.withLock { state in
            state.lastWaiting += 1
            return state.lastWaiting
        }
        await withTaskCancellationHandler {
            await withCheckedContinuation { continuation in
                let isOver = state.withLock { state in
                    if Task.isCancelled || isDone(state.load) { return true }
                    state.waiting[id] = (isDone, continuation)
                    return false
                }
                if isOver { continuation.resume() }
            }
        } onCancel: {
            state.withLock { $0.waiting.removeValue(forKey: id) }?.continuation.resume()
        }
    }

    /// As ``until(_:)``, but for no longer than `limit`.
    func until(within limit: Duration, _ isDone: @escaping @Sendable (Load) -> Bool) async {
        await withTaskGroup { group in
            group.addTask { await self.until(isDone) }
            group.addTask { try? await Task.sleep(for: limit) }
            await group.next()
            group.cancelAll()
        }
    }

    private func notify() {
        let done = state.withLock { state in
            let load = state.load
            let done = state.waiting.filter { $0.value.isDone(load) }
            for id in done.keys { state.waiting[id] = nil }
            return done.values.map(\.continuation)
        }
        for continuation in done { continuation.resume() }
    }
}
