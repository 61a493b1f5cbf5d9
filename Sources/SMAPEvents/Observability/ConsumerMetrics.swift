internal import Metrics

/// `events_consumed_total{queue,outcome}`, `events_duplicates_total{queue}` and `event_handling_duration_seconds{queue}`.
struct ConsumerMetrics: Sendable {
    /// How a delivery ended.
    enum Outcome: String, CaseIterable {
        case acknowledged
        case retried
        case deadLettered = "dead_lettered"
        case givenBack = "given_back"
        /// It may have killed its consumers, and was moved to where it is handled alone.
        case isolated
        /// It could not be settled, and comes again.
        case unsettled
    }

    private let counters: [Outcome: Counter]
    private let duplicates: Counter
    private let duration: Timer
    private let stuck: Gauge

    init(_ queue: QueueName) {
        counters = Dictionary(
            uniqueKeysWithValues: Outcome.allCases.map {
                (
                    $0,
                    Counter(
                        label: "events_consumed_total",
                        dimensions: [("queue", queue.rawValue), ("outcome", $0.rawValue)])
                )
            })
        duplicates = Counter(label: "events_duplicates_total", dimensions: [("queue", queue.rawValue)])
        duration = Timer(label: "event_handling_duration_seconds", dimensions: [("queue", queue.rawValue)])
        stuck = Gauge(label: "events_handlers_overdue", dimensions: [("queue", queue.rawValue)])
    }

    func handled(_ outcome: Outcome, since start: ContinuousClock.Instant) {
        counters[outcome]?.increment()
        duration.record(duration: .now - start)
    }

    /// The inbox knew the event already.
    func duplicate() { duplicates.increment() }

    /// How many handlers are past their deadline and have not ended.
    func overdue(_ count: Int) { stuck.record(count) }
}
