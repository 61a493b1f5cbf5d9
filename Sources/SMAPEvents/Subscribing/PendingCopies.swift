internal import Metrics
internal import Synchronization

/// The copies of a subscription's messages that are not confirmed yet: retries and dead letters that the broker does not take.
final class PendingCopies: Sendable {
    private struct Copy {
        let limit: ContinuousClock.Instant
        var reason: String?
    }

    private struct State {
        var copies: [UInt64: Copy] = [:]
        var lastID: UInt64 = 0
    }

    private let state = Mutex(State())
    private let gauge: Gauge

    init(_ queue: QueueName) {
        gauge = Gauge(label: "events_copies_pending", dimensions: [("queue", queue.rawValue)])
    }

    /// A copy is to be published.
    ///
    /// - Parameter limit: How long that may take before it is a problem.
    func begin(after limit: Duration) -> UInt64 {
        change { state in
            state.lastID += 1
            state.copies[state.lastID] = Copy(limit: .now + limit)
            return state.lastID
        }
    }

    /// The broker has not taken it, and it will be tried again.
    func failed(_ id: UInt64, _ reason: String) { state.withLock { $0.copies[id]?.reason = reason } }

    /// It is confirmed, or given up.
    func end(_ id: UInt64) { change { $0.copies[id] = nil } }

    /// What is wrong, if anything is, and for how many events.
    var problem: (text: String, count: Int)? {
        let now = ContinuousClock.now
        return state.withLock { state in
            let overdue = state.copies.values.filter { $0.reason != nil || $0.limit < now }
            guard let first = overdue.first(where: { $0.reason != nil }) ?? overdue.first else { return nil }
            let reason = first.reason ?? "the broker does not confirm the copies"
            return ("cannot retry or dead-letter \(overdue.count) events: \(reason)", overdue.count)
        }
    }

    private func change<Result>(_ body: (inout State) -> Result) -> Result {
        state.withLock { state in
            defer { gauge.record(state.copies.count) }
            return body(&state)
        }
    }
}
