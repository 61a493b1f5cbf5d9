internal import Metrics
internal import Synchronization

/// `events_published_total`, `events_returned_total`, `event_publish_failures_total` and `event_publish_duration_seconds`.
final class PublisherMetrics: Sendable {
    /// The handles of one routing key. A metric is looked up once: making one goes through a factory's lock.
    final class Key: Sendable {
        private let label: String
        private let published: Counter
        private let returned: Counter
        private let duration: Timer
        private let failures = Mutex<[EventsError.Code: Counter]>([:])

        fileprivate init(label: String, duration: Timer) {
            self.label = label
            self.duration = duration
            published = Counter(label: "events_published_total", dimensions: [("routing_key", label)])
            returned = Counter(label: "events_returned_total", dimensions: [("routing_key", label)])
        }

        /// An event was confirmed.
        ///
        /// - Parameter routed: Whether it reached a queue.
        func published(routed: Bool, after time: Duration) {
            published.increment()
            if !routed { returned.increment() }
            duration.record(duration: time)
        }

        /// A publish has ended with an error.
        func failed(_ code: EventsError.Code) {
            let counter = failures.withLock { failures in
                if let known = failures[code] { return known }
                let counter = Counter(
                    label: "event_publish_failures_total",
                    dimensions: [("routing_key", label), ("error_type", code.description)])
                failures[code] = counter
                return counter
            }
            counter.increment()
        }
    }

    /// Keys are few in a service. One that makes them up must not make the memory of the metrics' backend grow: what is
    /// beyond has the label `other`.
    private static let keyLimit = 1_000

    private let keys = Mutex<[RoutingKey: Key]>([:])
    private let duration = Timer(label: "event_publish_duration_seconds")
    private let other: Key

    init() { other = Key(label: "other", duration: duration) }

    func key(_ routingKey: RoutingKey) -> Key {
        keys.withLock { keys in
            if let known = keys[routingKey] { return known }
            guard keys.count < Self.keyLimit else { return other }
            let key = Key(label: routingKey.rawValue, duration: duration)
            keys[routingKey] = key
            return key
        }
    }
}
