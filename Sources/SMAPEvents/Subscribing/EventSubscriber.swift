public import Logging
internal import Metrics
public import ServiceLifecycle
internal import Synchronization
public import Tracing

/// Consumes events from a queue and gives them to handlers.
///
/// Invariant (P3): each delivery is settled once, and only after its handler has decided. A delivery whose handler was
/// cut short, or whose connection was lost, is not settled at all: the broker delivers it again.
///
/// When the connection is lost, or the broker ends the consumer, the queue is declared and consumed again, after a delay
/// that grows. Handlers that run meanwhile are left to finish.
public final class EventSubscriber: Service {
    private enum Phase {
        case idle
        case starting
        case consuming
        case recovering(EventsError)
        case stopping
        case ended
    }

    private let transport: any EventTransport
    private let subscription: EventSubscription
    private let router: EventRouter
    private let logger: Logger
    private let tracing: MessageTracing
    private let metrics: ConsumerMetrics
    private let phase = Mutex(Phase.idle)

    /// Makes a subscriber; ``run()`` starts it.
    ///
    /// - Parameter tracer: Makes a span around each handler; the bootstrapped tracer by default.
    public init(
        transport: any EventTransport, subscription: EventSubscription, router: EventRouter, logger: Logger = .silent,
        tracer: any Tracer = InstrumentationSystem.tracer
    ) {
        self.transport = transport
        self.subscription = subscription
        self.router = router
        self.logger = logger
        self.tracing = MessageTracing(tracer)
        self.metrics = ConsumerMetrics(subscription.queue)
    }

    /// Declares the queue and its dead letter queue, then handles deliveries until graceful shutdown or cancellation.
    ///
    /// On graceful shutdown it takes no more deliveries, lets those in hand be finished for up to
    /// ``EventSubscription/drainTimeout``, settles them, and gives the rest back to the queue. While the broker is away it
    /// goes on trying; ``health()`` tells.
    ///
    /// - Throws: ``EventsError`` for what trying again does not mend: the queue exists with other arguments, access is
    ///   refused, the transport was closed; and when the queue was deleted, if
    ///   ``EventSubscription/resumesWhenCancelled`` is off.
    public func run() async throws {
        try subscription.validate()
        try subscription.topology.validate()
        enter(.starting)
        defer { enter(.ended) }
        let intake = ConsumerIntake(workers: subscription.concurrency)
        try await withThrowingTaskGroup(of: IsOver.self) { group in
            for _ in 0..<subscription.concurrency {
                group.addTask {
                    defer { intake.leave() }
                    try await self.work(intake)
                    return false
                }
            }
            group.addTask {
                try await self.consume(intake)
                return true
            }
            defer { group.cancelAll() }
            // Once the consumer has been shut down, handlers that still run have used up their time.
            while let isOver = try await group.next(), !isOver {}
        }
    }

    private typealias IsOver = Bool

    /// Declares the queue, its bindings, and the queue that its dead letters go to. ``run()`` does it by itself; call
    /// it before publishers start, if no event may be missed.
    public func declare() async throws {
        try await subscription.topology.apply(to: transport, deadline: subscription.deadline)
    }

    /// Whether the broker has an active consumer for this subscription, and if not, why.
    public func health() async -> Health {
        let problem: String? =
            switch phase.withLock({ $0 }) {
            case .consuming: nil
            case .idle: "is not running"
            case .starting: "is starting"
            case .recovering(let error): "is not consuming: \(error)"
            case .stopping: "is shutting down"
            case .ended: "has ended"
            }
        return Health(problems: problem.map { ["subscription \(subscription.queue) \($0)"] } ?? [])
    }

    private func enter(_ next: Phase) {
        phase.withLock { $0 = next }
        let isConsuming = if case .consuming = next { 1 } else { 0 }
        Gauge(label: "events_subscription_active", dimensions: [("queue", subscription.queue.rawValue)])
            .record(isConsuming)
    }

    // MARK: Consumers

    /// Keeps a consumer going until graceful shutdown, which ends it in order.
    private func consume(_ intake: ConsumerIntake) async throws {
        var failures = 0
        var hasConsumed = false
        while !Task.isShuttingDownGracefully {
            do {
                try await cancelWhenGracefulShutdown { try await self.declare() }
                try await transport.withConsumer(
                    on: subscription.queue, prefetch: subscription.prefetch, deadline: .now + subscription.deadline
                ) { consumer in
                    enter(.consuming)
                    intake.offer(consumer)
                    try await serve(consumer, intake)
                }
                return
            } catch is CancellationError where Task.isShuttingDownGracefully {
                return
            } catch let error as EventsError {
                if case .consuming = phase.withLock({ $0 }) {
                    hasConsumed = true
                    failures = 0
                }
                guard isMendable(error, hasConsumed: hasConsumed) else { throw error }
                failures += 1
                enter(.recovering(error))
                logger.warning(
                    "subscription interrupted", metadata: ["queue": "\(subscription.queue)", "reason": "\(error)"])
                let delay = subscription.retryDelay(after: failures)
                try? await cancelWhenGracefulShutdown { try await Task.sleep(for: delay) }
                try Task.checkCancellation()
            }
        }
    }

    private func isMendable(_ error: EventsError, hasConsumed: Bool) -> Bool {
        switch error.code {
        case .subscriptionCancelled: subscription.resumesWhenCancelled
        // The queue was there: it was deleted a moment ago, or its node is coming up.
        case .notFound: hasConsumed
        default: error.isRetriable
        }
    }

    /// Waits until the consumer has ended, which is an error, or is to be ended.
    private func serve(_ consumer: any TransportConsumer, _ intake: ConsumerIntake) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await consumer.untilEnded() }
            group.addTask { try await gracefulShutdown() }
            defer { group.cancelAll() }
            try await group.next()
        }
        enter(.stopping)
        await consumer.stop()
        intake.finish()
        // The channel stays open meanwhile, so that what handlers decide still goes out.
        await withTaskGroup { group in
            group.addTask { await intake.untilEmpty() }
            group.addTask { [subscription] in try? await Task.sleep(for: subscription.drainTimeout) }
            await group.next()
            group.cancelAll()
        }
    }

    // MARK: Workers

    private func work(_ intake: ConsumerIntake) async throws {
        var generation = 0
        while let (next, consumer) = try await intake.consumer(after: generation) {
            generation = next
            do {
                while let delivery = try await consumer.next() {
                    let start = ContinuousClock.now
                    let settlement = try await decide(delivery)
                    let isSettled = settle(delivery, settlement, consumer)
                    metrics.handled(isSettled ? settlement : nil, since: start)
                }
            } catch is EventsError {
                // This consumer is gone; there will be another.
            }
        }
    }

    private func settle(
        _ delivery: InboundDelivery, _ settlement: Settlement, _ consumer: any TransportConsumer
    ) -> Bool {
        do {
            try consumer.settle(delivery, settlement)
            return true
        } catch {
            logger.warning(
                "delivery could not be settled and will come again",
                metadata: ["event_id": "\(delivery.properties.messageID ?? "")", "queue": "\(subscription.queue)"])
            return false
        }
    }

    private func decide(_ delivery: InboundDelivery) async throws -> Settlement {
        let outcome: HandlerOutcome
        do {
            outcome = try await tracing.process(delivery, from: subscription.queue) {
                try await router.outcome(of: delivery, from: subscription.queue)
            }
        } catch is CancellationError {
            throw CancellationError()
        } catch {
            // The type only: a handler's own error may quote the event.
            log("handler failed", delivery, reason: (error as? EventsError)?.description ?? "\(type(of: error))")
            outcome = .retry()
        }
        switch outcome.decision {
        case .acknowledge:
            return .acknowledge
        case .deadLetter(let reason):
            log("event dead-lettered", delivery, reason: reason)
            return .reject
        case .retry(let delay):
            guard delivery.attempt < subscription.maximumAttempts else {
                log("event dead-lettered", delivery, reason: "gave up after \(delivery.attempt) attempts")
                return .reject
            }
            // The delay is the point here. It holds this handler's place, so retries cannot crowd out what works.
            try await Task.sleep(for: delay)
            return .requeue
        }
    }

    private func log(_ message: Logger.Message, _ delivery: InboundDelivery, reason: String) {
        logger.warning(
            message,
            metadata: [
                "event_id": "\(delivery.properties.messageID ?? "")", "routing_key": "\(delivery.routingKey)",
                "queue": "\(subscription.queue)", "attempt": "\(delivery.attempt)", "reason": "\(reason)",
            ])
    }
}
