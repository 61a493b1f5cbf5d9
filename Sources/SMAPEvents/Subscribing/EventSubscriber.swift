public import Logging
internal import Metrics
public import ServiceLifecycle
internal import Synchronization
public import Tracing
internal import Waiting

/// Consumes events from a queue and gives them to handlers.
///
/// Invariant (P3): each delivery has one outcome, and is acknowledged only after its handler has decided so, or after the
/// copy that replaces it (to be retried, or as a dead letter) is confirmed. A delivery whose handler was cut short, or
/// whose connection was lost, is not settled at all: the broker delivers it again.
///
/// When the connection is lost, or the broker ends the consumer, the queue is declared and consumed again, after a delay
/// that grows. Handlers that run meanwhile are left to finish.
public final class EventSubscriber: Service {
    /// How the consumer of the queue stands.
    enum Phase {
        case idle
        case starting
        case consuming
        case recovering(EventsError)
        case stopping
        case ended
    }

    private struct State {
        var phase = Phase.idle
        var runners: [SubscriptionRunner] = []
    }

    private let transport: any EventTransport
    private let subscription: EventSubscription
    private let logger: Logger
    private let stopwatch: Stopwatch
    private let processor: DeliveryProcessor
    private let metrics: ConsumerMetrics
    private let breaker: CircuitBreaker?
    private let keys: OrderingKeys
    private let hasInbox: Bool
    private let state = Mutex(State())

    /// Makes a subscriber; ``run()`` starts it.
    ///
    /// - Parameters:
    ///   - inbox: Remembers what has been handled; without one, an event that comes twice is handled twice.
    ///   - tracer: Makes a span around each handler; the bootstrapped tracer by default.
    ///   - clock: Measures handlers and pauses; for tests.
    public init(
        transport: any EventTransport, subscription: EventSubscription, router: EventRouter,
        inbox: (any Inbox)? = nil, logger: Logger = .silent, tracer: any Tracer = InstrumentationSystem.tracer,
        clock: any Clock<Duration> = ContinuousClock()
    ) {
        self.transport = transport
        self.subscription = subscription
        self.logger = logger
        self.hasInbox = inbox != nil
        self.metrics = ConsumerMetrics(subscription.queue)
        self.keys = OrderingKeys(subscription.queue)
        self.stopwatch = Stopwatch(clock)
        self.breaker = subscription.circuitBreaker.map { [stopwatch] in CircuitBreaker($0, stopwatch) }
        self.processor = DeliveryProcessor(
            transport: transport, subscription: subscription, router: router, inbox: inbox, stopwatch: stopwatch,
            logger: logger, tracing: MessageTracing(tracer), metrics: metrics,
            pending: PendingCopies(subscription.queue))
    }

    /// Declares what the subscription needs, then handles deliveries until graceful shutdown or cancellation.
    ///
    /// On graceful shutdown it takes no more deliveries, lets those in hand be finished for up to
    /// ``EventSubscription/drainTimeout``, settles them, and gives the rest back to the queue. Handlers that go on are
    /// cancelled, and given a second to notice. While the broker is away it goes on trying; ``health()`` tells.
    ///
    /// - Throws: ``EventsError`` for what trying again does not mend: the queue exists with other arguments, access is
    ///   refused, the transport was closed; and when the queue was deleted, if
    ///   ``EventSubscription/resumesWhenCancelled`` is off.
    public func run() async throws {
        try subscription.validate(usesInbox: hasInbox)
        try subscription.topology.validate()
        enter(.starting)
        defer { enter(.ended) }
        let context = SubscriptionRunner.Context(
            transport: transport, subscription: subscription, processor: processor, breaker: breaker, metrics: metrics,
            stopwatch: stopwatch, logger: logger, keys: keys
        ) { [self] phase in
            if let phase { enter(phase) } else { recordActivity() }
        }
        let roles: [SubscriptionRunner.Role] = subscription.isolatesSuspects ? [.main, .suspects] : [.main]
        let runners = roles.map { SubscriptionRunner($0, context) }
        state.withLock { $0.runners = runners }
        defer { state.withLock { $0.runners = [] } }
        try await withThrowingTaskGroup(of: Void.self) { group in
            for runner in runners { group.addTask { try await runner.run() } }
            // If one of them fails, the other ends: `waitForAll` would wait for it.
            while try await group.next() != nil {}
        }
    }

    /// Declares the queue, its bindings, the queue that its dead letters go to, and those in which retries wait. ``run()``
    /// does it by itself; call it before publishers start, if no event may be missed.
    public func declare() async throws {
        try await subscription.topology.apply(to: transport, deadline: subscription.deadline)
    }

    /// Whether the broker has an active consumer for this subscription and there is a handler free to work, and if not, why.
    public func health() async -> Health {
        let problem: String? =
            switch state.withLock({ $0.phase }) {
            case .consuming where breaker?.phase == .open: "is paused: too many deliveries have failed"
            case .consuming: isStuck ? "has \(subscription.concurrency) handlers, all past their deadline" : nil
            case .idle: "is not running"
            case .starting: "is starting"
            case .recovering(let error): "is not consuming: \(error)"
            case .stopping: "is shutting down"
            case .ended: "has ended"
            }
        let waiting = keys.waiting
        let warning: String? =
            waiting >= subscription.unsettledLimit - subscription.concurrency && waiting > 0
            ? "fetches no more: \(waiting) events wait behind slow or failing ones of their ordering keys" : nil
        let pending = processor.pending.problem
        let isBlocked = (pending?.count ?? 0) >= subscription.concurrency
        let hasStuckSuspect = state.withLock { $0.runners.dropFirst().contains { $0.overdueCount > 0 } }
        let warnings = [
            warning, isBlocked ? nil : pending?.text,
            hasStuckSuspect
                ? "has a handler past its deadline that runs alone: \(subscription.queue.suspectQueue) waits" : nil,
        ]
        let subject = "subscription \(subscription.queue)"
        return Health(
            problems: [problem, isBlocked ? pending?.text : nil].compactMap { $0 }.map { "\(subject) \($0)" },
            warnings: warnings.compactMap { $0 }.map { "\(subject) \($0)" })
    }

    private var isStuck: Bool {
        (state.withLock { $0.runners.first }?.overdueCount ?? 0) >= subscription.concurrency
    }

    private func enter(_ next: Phase) {
        state.withLock { $0.phase = next }
        recordActivity()
    }

    private func recordActivity() {
        let isConsuming =
            state.withLock { if case .consuming = $0.phase { true } else { false } } && breaker?.phase != .open
        Gauge(label: "events_subscription_active", dimensions: [("queue", subscription.queue.rawValue)])
            .record(isConsuming ? 1 : 0)
    }
}
