internal import Metrics
internal import Synchronization

/// `events_published_total`, `event_publish_failures_total` and `event_publish_duration_seconds`.
final class PublisherMetrics: Sendable {
    private struct FailureKey: Hashable {
        let routingKey: RoutingKey
        let code: EventsError.Code
    }

    private struct Handles {
        // A metric is looked up once: making one goes through a factory's lock.
        var published: [RoutingKey: Counter] = [:]
        var failures: [FailureKey: Counter] = [:]
    }

    private let handles = Mutex(Handles())
    private let duration = Timer(label: "event_publish_duration_seconds")

    func published(_ key: RoutingKey, since start: ContinuousClock.Instant) {
        let counter = handles.withLock { handles in
            if let known = handles.published[key] { return known }
            let counter = Counter(label: "events_published_total", dimensions: [("routing_key", key.rawValue)])
            // Keys are few in a service; one that makes them up must not make memory grow.
            if handles.published.count < 1000 { handles.published[key] = counter }
            return counter
        }
        counter.increment()
        duration.record(duration: .now - start)
    }

    func failed(_ key: RoutingKey, _ code: EventsError.Code) {
        let counter = handles.withLock { handles in
            let failure = FailureKey(routingKey: key, code: code)
            if let known = handles.failures[failure] { return known }
            let counter = Counter(
                label: "event_publish_failures_total",
                dimensions: [("routing_key", key.rawValue), ("error_type", code.description)])
            if handles.failures.count < 1000 { handles.failures[failure] = counter }
            return counter
        }
        counter.increment()
    }
}
