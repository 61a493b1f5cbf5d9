internal import Synchronization

/// Something that happens once, and that any number of tasks may wait for.
public final class Latch: Sendable {
    private struct State {
        var isOpen = false
        var waiting: [Waiter<Void>] = []
    }

    private let state = Mutex(State())

    /// A latch that is not open yet.
    public init() {}

    /// It has happened.
    public func open() {
        let waiting = state.withLock { state in
            state.isOpen = true
            defer { state.waiting = [] }
            return state.waiting
        }
        for waiter in waiting { waiter.resolve(.success(())) }
    }

    /// Returns once it has happened, or when the task is cancelled.
    public func wait() async {
        let waiter = Waiter<Void>()
        let isOpen = state.withLock { state in
            if !state.isOpen {
                // Those that were cancelled stay no longer than until the next one comes.
                state.waiting.removeAll(where: \.isResolved)
                state.waiting.append(waiter)
            }
            return state.isOpen
        }
        if !isOpen { try? await waiter.value() }
    }

    /// Returns once it has happened, at the deadline, or when the task is cancelled.
    public func wait(until deadline: ContinuousClock.Instant) async {
        await withTaskGroup { group in
            group.addTask { await self.wait() }
            group.addTask { try? await Task.sleep(until: deadline) }
            await group.next()
            group.cancelAll()
        }
    }
}
