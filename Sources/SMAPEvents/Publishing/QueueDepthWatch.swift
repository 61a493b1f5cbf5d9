public import Logging
internal import Metrics
public import ServiceLifecycle
internal import Synchronization

/// Watches how deep queues are, and holds publishers back before a consumer that has fallen behind fills the broker.
///
/// Each queue is asked passively at an interval. Its depth is the gauge `events_queue_depth{queue}`: alert on it. At
/// ``Limits/warning`` a warning is logged; at ``Limits/refusal`` publishers that were made with this watch refuse, with
/// ``EventsError/Code/queueTooDeep``, which is retriable, until the queue is below it again.
///
/// ```swift
/// let depth = QueueDepthWatch(transport: rabbit, queues: ["notification.email"], limits: .init(refusal: 100_000))
/// let publisher = EventPublisher(transport: rabbit, configuration: configuration, depth: depth)
/// // and run both in the ServiceGroup
/// ```
public final class QueueDepthWatch: Service {
    /// When to warn and when to refuse.
    public struct Limits: Sendable {
        /// A warning is logged from so many waiting messages on, 1,000 by default.
        public var warning: Int
        /// Publishing is refused from so many on; never by default.
        public var refusal: Int?
        /// How often the queues are asked, 5 s by default.
        public var interval: Duration

        /// Sets limits.
        public init(warning: Int = 1_000, refusal: Int? = nil, interval: Duration = .seconds(5)) {
            self.warning = warning
            self.refusal = refusal
            self.interval = interval
        }
    }

    private struct State {
        var depths: [QueueName: Int] = [:]
        var refusal: EventsError?
    }

    private let transport: any EventTransport
    private let queues: [QueueName]
    private let limits: Limits
    private let logger: Logger
    private let state = Mutex(State())

    /// Makes a watch; ``run()`` starts it.
    public init(
        transport: any EventTransport, queues: [QueueName], limits: Limits = Limits(), logger: Logger = .silent
    ) {
        self.transport = transport
        self.queues = queues
        self.limits = limits
        self.logger = logger
    }

    /// Asks until graceful shutdown or cancellation. Afterwards nothing is refused any more.
    public func run() async {
        defer { state.withLock { $0.refusal = nil } }
        await cancelWhenGracefulShutdown {
            while !Task.isCancelled {
                await self.measure()
                // The interval is the point here.
                try? await Task.sleep(for: self.limits.interval)
            }
        }
    }

    /// How many messages waited in each queue when it was last asked.
    public var depths: [QueueName: Int] { state.withLock { $0.depths } }

    /// Asks each queue once. ``run()`` does so at the interval.
    public func measure() async {
        var depths: [QueueName: Int] = [:]
        for queue in queues {
            do {
                let status = try await transport.status(of: queue, deadline: .now + .seconds(5))
                depths[queue] = status.messages
                Gauge(label: "events_queue_depth", dimensions: [("queue", queue.rawValue)]).record(status.messages)
                if status.messages >= limits.warning {
                    logger.warning(
                        "a queue is deep", metadata: ["queue": "\(queue)", "messages": "\(status.messages)"])
                }
            } catch {
                // What cannot be asked holds nobody back: publishing has its own answer to a broker that is away.
                logger.warning(
                    "a queue's depth is unknown",
                    metadata: [
                        "queue": "\(queue)",
                        "reason": "\((error as? EventsError)?.description ?? "\(type(of: error))")",
                    ])
            }
        }
        let deepest = depths.max { $0.value < $1.value }
        state.withLock { state in
            state.depths = depths
            state.refusal = nil
            guard let deepest, let limit = limits.refusal, deepest.value >= limit else { return }
            state.refusal = EventsError(
                .queueTooDeep, "\(deepest.key) holds \(deepest.value) messages, and the limit is \(limit)",
                operation: "publish")
        }
    }

    /// Throws when a queue is too deep.
    func check() throws {
        if let refusal = state.withLock({ $0.refusal }) { throw refusal }
    }
}
