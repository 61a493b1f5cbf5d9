internal import Synchronization
internal import Waiting

/// Lets the handlers of a subscription run side by side, or one of them alone.
final class HandlerGate: Sendable {
    private struct State {
        var running = 0
        /// How many want to run alone, or do: meanwhile no other one begins.
        var lone = 0
        var isAlone = false
        /// Opened at the next change; nil if none is awaited, as is nearly always so.
        var change: Latch?
    }

    private let state = Mutex(State())

    /// A handler may run beside others; waits while one runs alone. Returns as well when the task is cancelled. It counts until
    /// ``leave()`` is called, once: when the handler has ended, or its time was up.
    func enter() async {
        await wait { state in
            guard state.lone == 0 else { return false }
            state.running += 1
            return true
        } otherwise: {
            $0.running += 1
        }
    }

    /// A handler that ran beside others has ended, or its time was up.
    func leave() { change { $0.running -= 1 } }

    /// A handler may run alone; waits for those that run, for up to `limit`, and keeps others from beginning. Those whose time was
    /// up are not waited for.
    func enterAlone(within limit: Duration, _ stopwatch: Stopwatch) async {
        state.withLock { $0.lone += 1 }
        await withTaskGroup { group in
            group.addTask {
                await self.wait { state in
                    guard state.running == 0, !state.isAlone else { return false }
                    state.isAlone = true
                    return true
                } otherwise: {
                    $0.isAlone = true
                }
            }
            group.addTask { try? await stopwatch.sleepUntil(stopwatch.elapsed() + limit) }
            await group.next()
            group.cancelAll()
        }
    }

    /// The handler that ran alone has ended.
    func leaveAlone() {
        change { state in
            state.lone -= 1
            state.isAlone = false
        }
    }

    private func wait(
        _ isDone: @Sendable (inout State) -> Bool, otherwise: @Sendable (inout State) -> Void
    ) async {
        while true {
            let change = state.withLock { state -> Latch? in
                if isDone(&state) { return nil }
                guard Task.isCancelled else {
                    let change = state.change ?? Latch()
                    state.change = change
                    return change
                }
                otherwise(&state)
                return nil
            }
            guard let change else { return }
            await change.wait()
        }
    }

    private func change(_ body: (inout State) -> Void) {
        let latch = state.withLock { state in
            body(&state)
            defer { state.change = nil }
            return state.change
        }
        latch?.open()
    }
}
