internal import DequeModule
internal import Synchronization

/// When a subscription pauses because what its handlers depend on seems to be down.
///
/// A breaker that opens stops the consumer: the rest stays in the queue, where it costs no attempts. After the pause one
/// delivery is tried; if that fails too, without counting as an attempt, there is another pause; if it succeeds, all goes
/// on. So an outage never drains a queue into its dead letters.
public struct CircuitBreakerPolicy: Sendable, Hashable {
    /// How many of the last deliveries are looked at, 20 by default; 1 to 10,000.
    public var window: Int
    /// The share of them that must have failed, 0.5 by default; above 0, up to 1. A failure is a handler that throws, asks
    /// for a retry, or is out of time.
    public var failureShare: Double
    /// How long the subscription pauses, 30 s by default.
    public var pause: Duration

    /// Describes a breaker.
    public init(window: Int = 20, failureShare: Double = 0.5, pause: Duration = .seconds(30)) {
        self.window = window
        self.failureShare = failureShare
        self.pause = pause
    }

    var isValid: Bool {
        (1...10_000).contains(window) && failureShare > 0 && failureShare <= 1 && pause > .zero
    }
}

/// Counts failures, and tells when enough is enough.
final class CircuitBreaker: Sendable {
    enum Phase {
        case closed
        case open
        /// One delivery at a time.
        case trial
    }

    private struct State {
        var phase = Phase.closed
        var recent: Deque<Bool> = []
        var failures = 0
        var watcher: CheckedContinuation<Void, Never>?
        /// Whether the phase has changed since the consumer was started for it.
        var hasChanged = false
        /// When it opened, as the stopwatch counts.
        var openSince: Duration = .zero
    }

    let policy: CircuitBreakerPolicy
    private let stopwatch: Stopwatch
    private let state = Mutex(State())

    init(_ policy: CircuitBreakerPolicy, _ stopwatch: Stopwatch) {
        self.policy = policy
        self.stopwatch = stopwatch
    }

    /// Since when it has been open; nil if it is not.
    var openSince: Duration? { state.withLock { $0.phase == .open ? $0.openSince : nil } }

    var phase: Phase { state.withLock { $0.phase } }

    /// Takes note of how a delivery ended. While one is tried, what was in hand before says nothing.
    func record(failure: Bool, isTrial: Bool) {
        let now = stopwatch.elapsed()
        let watcher = state.withLock { state -> CheckedContinuation<Void, Never>? in
            switch state.phase {
            case .open: return nil
            case .trial:
                guard isTrial else { return nil }
                state.phase = failure ? .open : .closed
            case .closed:
                state.recent.append(failure)
                if failure { state.failures += 1 }
                if state.recent.count > policy.window, state.recent.removeFirst() { state.failures -= 1 }
                guard state.recent.count == policy.window,
                    Double(state.failures) >= policy.failureShare * Double(policy.window)
                else { return nil }
                state.phase = .open
            }
            state.recent = []
            state.failures = 0
            state.hasChanged = true
            state.openSince = now
            defer { state.watcher = nil }
            return state.watcher
        }
        watcher?.resume()
    }

    /// The pause is over: one delivery may be tried.
    func beginTrial() {
        state.withLock { state in
            state.phase = .trial
            state.hasChanged = false
        }
    }

    /// Returns at the next change of phase, or when the task is cancelled. For one task at a time.
    func untilChanged() async {
        await withTaskCancellationHandler {
            await withCheckedContinuation { continuation in
                let isOver = state.withLock { state in
                    if Task.isCancelled || state.hasChanged {
                        state.hasChanged = false
                        return true
                    }
                    state.watcher = continuation
                    return false
                }
                if isOver { continuation.resume() }
            }
            state.withLock { $0.hasChanged = false }
        } onCancel: {
            let watcher = state.withLock { state in
                defer { state.watcher = nil }
                return state.watcher
            }
            watcher?.resume()
        }
    }
}
