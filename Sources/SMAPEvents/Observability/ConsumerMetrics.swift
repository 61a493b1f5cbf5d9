internal import Metrics

/// `events_consumed_total{queue,outcome}` and `event_handling_duration_seconds{queue}`.
struct ConsumerMetrics: Sendable {
    private let counters: [Settlement: Counter]
    private let interrupted: Counter
    private let duration: Timer

    init(_ queue: QueueName) {
        func counter(_ outcome: String) -> Counter {
            Counter(label: "events_consumed_total", dimensions: [("queue", queue.rawValue), ("outcome", outcome)])
        }
        counters = [
            .acknowledge: counter("acknowledged"), .requeue: counter("retried"), .reject: counter("dead_lettered"),
        ]
        interrupted = counter("unsettled")
        duration = Timer(label: "event_handling_duration_seconds", dimensions: [("queue", queue.rawValue)])
    }

    /// - Parameter settlement: Nil for a delivery that could not be settled, and will come again.
    func handled(_ settlement: Settlement?, since start: ContinuousClock.Instant) {
        (settlement.flatMap { counters[$0] } ?? interrupted).increment()
        duration.record(duration: .now - start)
    }
}
