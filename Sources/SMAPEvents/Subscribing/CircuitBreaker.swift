internal import DequeModule
internal import Synchronization
internal import Waiting

/// When a subscription pauses because what its handlers depend on seems to be down.
///
/// While it is open nothing is handled: what was fetched stays in hand, and the rest in the queue, where it costs no attempts.
/// After the pause one delivery is tried; if that fails too, without counting as an attempt, there is another pause; if it
/// succeeds, all goes on. So an outage never drains a queue into its dead letters. An outage that goes on gives what is in
/// hand back every 20 minutes, before RabbitMQ takes it back (`consumer_timeout`, half an hour).
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

/// Counts failures, and tells who may handle a delivery.
final class CircuitBreaker: Sendable {
    enum Phase {
        case closed
        case open
        /// One delivery at a time.
        case trial
    }

    /// Whether a delivery may be handled now.
    enum Admission {
        case granted
        /// It is the one that is tried.
        case trial
        /// The subscription ends.
        case refused
    }

    private struct State {
        var phase = Phase.closed
        var recent: Deque<Bool> = []
        var failures = 0
        /// Whether a delivery is being tried.
        var isTrying = false
        var isStopped = false
        /// Opened at the next change.
        var change = Latch()
        /// When it opened, as the stopwatch counts.
        var openSince: Duration = .zero
        /// Since when deliveries have been held, or were given back last.
        var heldSince: Duration = .zero
    }

    let policy: CircuitBreakerPolicy
    private let stopwatch: Stopwatch
    private let state = Mutex(State())

    init(_ policy: CircuitBreakerPolicy, _ stopwatch: Stopwatch) {
        self.policy = policy
        self.stopwatch = stopwatch
    }

    var phase: Phase { state.withLock { $0.phase } }

    /// Takes note of how a delivery ended. While one is tried, what was in hand before says nothing.
    func record(failure: Bool, isTrial: Bool) {
        let now = stopwatch.elapsed()
        change { state in
            switch state.phase {
            case .open: return false
            case .trial:
                guard isTrial else { return false }
                state.phase = failure ? .open : .closed
                state.isTrying = false
            case .closed:
                state.recent.append(failure)
                if failure { state.failures += 1 }
                if state.recent.count > policy.window, state.recent.removeFirst() { state.failures -= 1 }
                guard state.recent.count == policy.window,
                    Double(state.failures) >= policy.failureShare * Double(policy.window)
                else { return false }
                state.phase = .open
                state.heldSince = now
            }
            state.recent = []
            state.failures = 0
            state.openSince = now
            return true
        }
    }

    /// The pause is over: one delivery may be tried.
    func beginTrial() {
        change { state in
            guard state.phase == .open else { return false }
            state.phase = .trial
            state.isTrying = false
            return true
        }
    }

    /// The delivery that was tried has said nothing about handlers: the next one is.
    func trialEnded() {
        change { state in
            guard state.phase == .trial, state.isTrying else { return false }
            state.isTrying = false
            return true
        }
    }

    /// No delivery is admitted any more, and those that wait are refused.
    func stop() {
        change { state in
            state.isStopped = true
            return true
        }
    }

    /// Returns when a delivery may be handled, or never will be.
    func admit() async -> Admission {
        while true {
            let (admission, change) = state.withLock { state -> (Admission?, Latch) in
                if state.isStopped { return (.refused, state.change) }
                switch state.phase {
                case .closed: return (.granted, state.change)
                case .trial where !state.isTrying:
                    state.isTrying = true
                    return (.trial, state.change)
                case .trial, .open: return (nil, state.change)
                }
            }
            if let admission { return admission }
            await change.wait()
            if Task.isCancelled { return .refused }
        }
    }

    /// Since when it has been open; waits until it is. Nil when the task is cancelled.
    func untilOpen() async -> Duration? {
        while !Task.isCancelled {
            let (since, change) = state.withLock { ($0.phase == .open ? $0.openSince : nil, $0.change) }
            if let since { return since }
            await change.wait()
        }
        return nil
    }

    /// Whether deliveries have been held for so long that they are to be given back now.
    func hasHeld(for limit: Duration) -> Bool {
        let now = stopwatch.elapsed()
        return state.withLock { state in
            guard now - state.heldSince >= limit else { return false }
            state.heldSince = now
            return true
        }
    }

    private func change(_ body: (inout State) -> Bool) {
        let latch = state.withLock { state -> Latch? in
            guard body(&state) else { return nil }
            defer { state.change = Latch() }
            return state.change
        }
        latch?.open()
    }
}
