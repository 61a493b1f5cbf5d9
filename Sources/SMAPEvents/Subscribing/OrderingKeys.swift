internal import Metrics
internal import Synchronization

/// The ordering keys of a subscription that are busy. It outlives the subscription's consumers.
///
/// Invariant: no two handlers of one key run at the same time, whichever consumers their deliveries came from, and also when
/// the first of them has outlived its deadline.
final class OrderingKeys: Sendable {
    private struct State {
        /// The keys with a running handler, and what is called when it has ended.
        var running: [String: @Sendable () -> Void] = [:]
        /// What of each key has failed and is to be tried again.
        var failed: [String: Failure] = [:]
        /// How many deliveries wait behind others of their key.
        var waiting = 0
    }

    private struct Failure {
        let messageID: String
        let attempts: Int
        let first: String?
    }

    /// Failures of messages that another process has taken over stay here until their key comes again.
    private static let failureLimit = 10_000

    private let state = Mutex(State())
    private let gauge: Gauge

    init(_ queue: QueueName) {
        gauge = Gauge(label: "events_ordered_waiting", dimensions: [("queue", queue.rawValue)])
    }

    /// A handler of the key is about to run. False while another one does.
    ///
    /// - Parameter whenFree: Called when the other one has ended. Of several only the last one given: those before belong to
    ///   consumers that are gone.
    func begin(_ key: String, whenFree: @escaping @Sendable () -> Void) -> Bool {
        state.withLock { state in
            guard state.running[key] == nil else {
                state.running[key] = whenFree
                return false
            }
            state.running[key] = {}
            return true
        }
    }

    /// The handler of the key has ended.
    func end(_ key: String) { state.withLock { $0.running.removeValue(forKey: key) }?() }

    // MARK: Attempts

    /// The delivery has failed and is to be tried again.
    func failed(_ delivery: InboundDelivery, _ key: String) {
        guard let id = delivery.properties.messageID else { return }
        let failure = Failure(
            messageID: id, attempts: delivery.failedAttempts, first: delivery.text(HistoryHeader.firstFailure))
        state.withLock { state in
            if state.failed[key] == nil, state.failed.count >= Self.failureLimit { state.failed = [:] }
            state.failed[key] = failure
        }
    }

    /// What was first in its partition has been settled.
    func settled(_ key: String) {
        state.withLock { state in
            if !state.failed.isEmpty { state.failed[key] = nil }
        }
    }

    /// The delivery, with the attempts that the same message had with an earlier consumer.
    func resumed(_ delivery: InboundDelivery, _ key: String) -> InboundDelivery {
        guard delivery.isRedelivered, let failure = state.withLock({ $0.failed[key] }),
            delivery.properties.messageID == failure.messageID
        else { return delivery }
        return delivery.withFailures(max(failure.attempts, delivery.failedAttempts), since: failure.first)
    }

    // MARK: What waits

    /// How many deliveries wait behind others of their key.
    var waiting: Int { state.withLock { $0.waiting } }

    /// So many more deliveries wait, or fewer.
    func addWaiting(_ count: Int) {
        guard count != 0 else { return }
        gauge.record(
            state.withLock { state in
                state.waiting += count
                return state.waiting
            })
    }
}
