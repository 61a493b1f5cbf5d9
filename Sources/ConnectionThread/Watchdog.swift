internal import Synchronization

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// What a watchdog looks after.
package protocol WatchdogTarget: AnyObject, Sendable {
    /// Ends whatever is overdue. Returns when to look again, or nil when nothing is waiting.
    /// Called on the watchdog's thread: it must not block.
    func check(now: MonotonicTime) -> MonotonicTime?
}

/// One thread that ends what is overdue: calls past their deadline, and connection threads that hang in the C library.
///
/// It sleeps until the earliest moment that any target named, without a timeout when there is none. Invariant: whoever
/// creates an earlier deadline stores it first and calls ``schedule(at:)`` after, so a deadline is never slept through.
package final class Watchdog: Sendable {
    package static let shared = Watchdog()

    private struct WeakTarget {
        weak var target: (any WatchdogTarget)?
    }

    private struct State {
        var targets: [ObjectIdentifier: WeakTarget] = [:]
        var wakeup: Wakeup?
    }

    private let state = Mutex(State())
    private let sleepingUntil = Atomic<UInt64>(0)

    package func add(_ target: any WatchdogTarget) throws(SocketError) {
        let failure = state.withLock { state -> SocketError? in
            do throws(SocketError) {
                if state.wakeup == nil {
                    let wakeup = try Wakeup()
                    try startThread(name: "smap-watchdog", stackSize: 1 << 20) { [self] in run(wakeup) }
                    state.wakeup = wakeup
                }
                state.targets[ObjectIdentifier(target)] = WeakTarget(target: target)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
    }

    package func remove(_ target: any WatchdogTarget) {
        state.withLock { state in _ = state.targets.removeValue(forKey: ObjectIdentifier(target)) }
    }

    /// Makes sure that the watchdog looks at its targets at `time` at the latest. Cheap when it would anyway.
    package func schedule(at time: MonotonicTime) {
        guard time.nanoseconds < sleepingUntil.load(ordering: .sequentiallyConsistent) else { return }
        // A lower bound first, so that a thousand callers with the same deadline wake the thread once.
        sleepingUntil.store(time.nanoseconds, ordering: .sequentiallyConsistent)
        state.withLock { $0.wakeup }?.signal()
    }

    private func run(_ wakeup: Wakeup) {
        while true {
            wakeup.drain()
            // While the targets are asked nobody needs to signal...
            sleepingUntil.store(0, ordering: .sequentiallyConsistent)
            var next = earliestOfTargets()
            sleepingUntil.store(next.nanoseconds, ordering: .sequentiallyConsistent)
            // ...so they are asked once more: what was stored meanwhile is found now, what comes later signals.
            next = min(next, earliestOfTargets())
            _ = sleepingUntil.min(next.nanoseconds, ordering: .sequentiallyConsistent)
            let timeout: Int32 = next == .distantFuture ? -1 : MonotonicTime.now.pollTimeout(until: next)
            var entry = pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0)
            _ = poll(&entry, 1, timeout)
        }
    }

    private func earliestOfTargets() -> MonotonicTime {
        let targets = state.withLock { state in
            state.targets = state.targets.filter { $0.value.target != nil }
            return state.targets.values.compactMap(\.target)
        }
        return targets.compactMap { $0.check(now: .now) }.min() ?? .distantFuture
    }
}
