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
    private enum Phase {
        case idle
        case starting
        case consuming
        case recovering(EventsError)
        case stopping
        case ended
    }

    /// Why a consumer was ended in order.
    private enum End {
        case shutdown
        /// Another one is wanted.
        case renewal
    }

    private let transport: any EventTransport
    private let subscription: EventSubscription
    private let logger: Logger
    private let stopwatch: Stopwatch
    private let processor: DeliveryProcessor
    private let metrics: ConsumerMetrics
    private let breaker: CircuitBreaker?
    private let hasInbox: Bool
    private let phase = Mutex(Phase.idle)
    private let pool = Mutex<HandlerPool?>(nil)
    /// How often this subscriber has given back, or lost with its consumer, what it had fetched: that counted as a delivery of
    /// each such message, and killed no process.
    private let returns = Atomic<Int>(0)
    /// Whether the next consumer has one delivery at a time at first: what comes first may be what killed the process before
    /// this one, or is known to be suspect.
    private let isCautious = Atomic<Bool>(true)
    private let keys: OrderingKeys

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
            logger: logger, tracing: MessageTracing(tracer), metrics: metrics)
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
        let intake = ConsumerIntake()
        let pool = HandlerPool { [self] pool, worker in try? await work(intake, pool, worker) }
        self.pool.withLock { $0 = pool }
        for _ in 0..<subscription.concurrency { pool.start() }
        let result: Result<Void, any Error>
        do {
            try await withTaskCancellationHandler {
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await self.consume(intake, pool) }
                    group.addTask { try await self.watch(pool) }
                    if let breaker { group.addTask { try await self.pace(breaker, intake) } }
                    defer { group.cancelAll() }
                    // The consumer ends; the watch does not.
                    try await group.next()
                }
            } onCancel: {
                pool.cancel()
            }
            result = .success(())
        } catch {
            result = .failure(error)
        }
        // Handlers that still run have used up their time.
        pool.cancel()
        // Not in this task, which may be cancelled: then nothing would be waited for.
        await Task { await pool.until(within: .seconds(1)) { $0.workers == 0 } }.value
        // It holds this subscriber too.
        self.pool.withLock { $0 = nil }
        try result.get()
    }

    /// Declares the queue, its bindings, the queue that its dead letters go to, and those in which retries wait. ``run()``
    /// does it by itself; call it before publishers start, if no event may be missed.
    public func declare() async throws {
        try await subscription.topology.apply(to: transport, deadline: subscription.deadline)
    }

    /// Whether the broker has an active consumer for this subscription and there is a handler free to work, and if not, why.
    public func health() async -> Health {
        let problem: String? =
            switch phase.withLock({ $0 }) {
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
        let subject = "subscription \(subscription.queue)"
        return Health(
            problems: problem.map { ["\(subject) \($0)"] } ?? [],
            warnings: warning.map { ["\(subject) \($0)"] } ?? [])
    }

    private var isStuck: Bool {
        pool.withLock { $0?.load.overdue ?? 0 } >= subscription.concurrency
    }

    private func enter(_ next: Phase) {
        phase.withLock { $0 = next }
        recordActivity()
    }

    private func recordActivity() {
        let isConsuming = phase.withLock { if case .consuming = $0 { true } else { false } } && breaker?.phase != .open
        Gauge(label: "events_subscription_active", dimensions: [("queue", subscription.queue.rawValue)])
            .record(isConsuming ? 1 : 0)
    }

    // MARK: Consumers

    /// Keeps a consumer going until graceful shutdown, which ends it in order.
    private func consume(_ intake: ConsumerIntake, _ pool: HandlerPool) async throws {
        var failures = 0
        var hasConsumed = false
        while !Task.isShuttingDownGracefully {
            do {
                try await cancelWhenGracefulShutdown { try await self.declare() }
                let isCautious = isCautious.load(ordering: .relaxed)
                let end = try await transport.withConsumer(
                    on: subscription.queue, prefetch: isCautious ? 1 : subscription.unsettledLimit,
                    deadline: .now + subscription.deadline
                ) { consumer in
                    if case .recovering = phase.withLock({ $0 }) {
                        logger.notice("subscription resumed", metadata: ["queue": "\(subscription.queue)"])
                    }
                    enter(.consuming)
                    return try await serve(consumer, isCautious: isCautious, intake, pool)
                }
                guard end == .renewal else { return }
                hasConsumed = true
                failures = 0
                returns.add(1, ordering: .relaxed)
            } catch is CancellationError where Task.isShuttingDownGracefully {
                break
            } catch let error as EventsError {
                if case .consuming = phase.withLock({ $0 }) {
                    hasConsumed = true
                    failures = 0
                }
                guard isMendable(error, hasConsumed: hasConsumed) else { throw error }
                failures += 1
                returns.add(1, ordering: .relaxed)
                enter(.recovering(error))
                logger.warning(
                    "subscription interrupted", metadata: ["queue": "\(subscription.queue)", "reason": "\(error)"])
                let delay = subscription.retryDelay(after: failures)
                try? await cancelWhenGracefulShutdown { try await Task.sleep(for: delay) }
                try Task.checkCancellation()
            }
        }
        // There is no consumer, but handlers of the last one may be at work.
        enter(.stopping)
        await drain(intake, pool)
    }

    private func isMendable(_ error: EventsError, hasConsumed: Bool) -> Bool {
        switch error.code {
        case .subscriptionCancelled: subscription.resumesWhenCancelled
        // The queue was there: it was deleted a moment ago, or its node is coming up.
        case .notFound: hasConsumed
        default: error.isRetriable
        }
    }

    /// Has the workers take deliveries from a consumer, in order if so wanted.
    private func serve(
        _ consumer: any TransportConsumer, isCautious: Bool, _ intake: ConsumerIntake, _ pool: HandlerPool
    ) async throws -> End {
        let renewal = Latch()
        func offer(_ source: any DeliverySource) -> ConsumerIntake.Offer {
            intake.offer {
                ConsumerIntake.Offer(
                    generation: $0, source: source, consumer: consumer, renewal: renewal, isCautious: isCautious,
                    prefetch: subscription.unsettledLimit)
            }
        }
        guard let orderingKey = subscription.orderingKey else {
            return try await attend(consumer, offer(UnorderedSource(consumer: consumer)), intake, pool)
        }
        let partitioned = PartitionedConsumer(consumer, keys: keys, stopwatch: stopwatch, renewal: renewal) {
            [processor] delivery in
            (try? processor.router.envelope(of: delivery.restored())).flatMap(orderingKey.key)
        } whenBusy: { [self] in
            // What is handled alone would hold up all keys, while it waits for a handler of the last consumer.
            if !subscription.isSingleActive, let offer = intake.current { widen(offer) }
        }
        return try await withThrowingTaskGroup(of: End?.self) { group in
            group.addTask {
                await partitioned.run()
                return nil
            }
            group.addTask {
                try await self.attend(consumer, offer(partitioned), intake, pool)
            }
            defer {
                partitioned.end(nil)
                group.cancelAll()
            }
            while let end = try await group.next() {
                if let end { return end }
            }
            return .shutdown
        }
    }

    /// Waits until the consumer has ended, which is an error, or is to be ended.
    private func attend(
        _ consumer: any TransportConsumer, _ offer: ConsumerIntake.Offer, _ intake: ConsumerIntake, _ pool: HandlerPool
    ) async throws -> End {
        defer { intake.withdraw(offer) }
        let end = try await withThrowingTaskGroup(of: End.self) { group in
            group.addTask {
                try await consumer.untilEnded()
                return .shutdown
            }
            group.addTask {
                try await gracefulShutdown()
                return .shutdown
            }
            group.addTask {
                await offer.renewal.wait()
                try Task.checkCancellation()
                return .renewal
            }
            defer { group.cancelAll() }
            return try await group.next() ?? .shutdown
        }
        // The channel stays open while handlers finish, so that what they decide still goes out.
        if end == .renewal {
            intake.withdraw(offer)
            await consumer.stop()
            await withTaskGroup { [subscription] group in
                let limit = subscription.handlerDeadline + subscription.deadline
                group.addTask {
                    await pool.until(within: limit) { $0.busy == $0.overdue && $0.concluding == 0 }
                }
                // A shutdown has less patience.
                group.addTask { try? await gracefulShutdown() }
                await group.next()
                group.cancelAll()
            }
            if !Task.isShuttingDownGracefully { return .renewal }
        } else {
            enter(.stopping)
            await consumer.stop()
        }
        await drain(intake, pool)
        return .shutdown
    }

    /// Lets the handlers finish what they have in hand, and no more.
    private func drain(_ intake: ConsumerIntake, _ pool: HandlerPool) async {
        intake.finish()
        breaker?.stop()
        await pool.until(within: subscription.drainTimeout) { $0.workers == 0 && $0.concluding == 0 }
    }

    /// Lets one delivery be tried after each pause of the circuit breaker.
    private func pace(_ breaker: CircuitBreaker, _ intake: ConsumerIntake) async throws {
        while let since = await breaker.untilOpen() {
            recordActivity()
            logger.warning(
                "subscription paused",
                metadata: ["queue": "\(subscription.queue)", "for": "\(breaker.policy.pause)"])
            try await stopwatch.sleepUntil(since + breaker.policy.pause)
            // First of all it is withdrawn, so that nothing that goes back is tried.
            if breaker.hasHeld(for: DeliveryProcessor.holdLimit), let offer = intake.current {
                intake.withdraw(offer)
                offer.renewal.open()
            }
            breaker.beginTrial()
            recordActivity()
        }
        try Task.checkCancellation()
    }

    // MARK: Workers

    /// What a worker does after a delivery.
    private enum Next {
        case delivery
        /// The consumer is about to be replaced.
        case consumer
        case end
    }

    private func work(_ intake: ConsumerIntake, _ pool: HandlerPool, _ worker: Int) async throws {
        var generation = 0
        while let offer = try await intake.consumer(after: generation) {
            generation = offer.generation
            do {
                deliveries: while let delivery = try await offer.source.next() {
                    switch await handle(delivery, offer, intake, pool, worker) {
                    case .delivery: continue
                    case .consumer: break deliveries
                    case .end: return
                    }
                }
            } catch is EventsError {
                // This consumer is gone; there will be another.
            }
        }
    }

    /// Takes one delivery from its consumer to its settlement.
    private func handle(
        _ delivery: InboundDelivery, _ offer: ConsumerIntake.Offer, _ intake: ConsumerIntake, _ pool: HandlerPool,
        _ worker: Int
    ) async -> Next {
        let deaths = delivery.earlierDeaths + max(0, delivery.redeliveries - returns.load(ordering: .relaxed))
        let isSuspect = deaths >= subscription.suspicion
        let start: ContinuousClock.Instant
        let inHand: DeliveryInHand
        let verdict: DeliveryProcessor.Verdict
        do {
            defer { offer.source.handlerEnded(delivery) }
            if isSuspect, !offer.isCautious {
                // Not with others in hand: it goes back with them, and comes first.
                isCautious.store(true, ordering: .relaxed)
                offer.renewal.open()
                return .consumer
            }
            // Where another process would take over meanwhile, the order is kept by waiting.
            if offer.isCautious, !isSuspect, !subscription.isSingleActive { widen(offer) }
            var isTrial = false
            if let breaker {
                switch await breaker.admit() {
                case .refused: return .end
                case .trial: isTrial = true
                case .granted: break
                }
                // It comes again if its consumer has ended meanwhile.
                guard intake.isCurrent(offer) else {
                    if isTrial { breaker.trialEnded() }
                    return .consumer
                }
            }
            start = .now
            inHand = DeliveryInHand(delivery.restored(), offer.source, isTrial: isTrial, deaths: deaths)
            pool.hold(inHand, worker)
            verdict = await processor.verdict(on: inHand)
        }
        // Otherwise its time was up, it is being retried, and this worker is replaced.
        guard inHand.decide() else { return .end }
        // Before it is settled, so that no other one is on its way meanwhile.
        if offer.isCautious, !isSuspect { widen(offer) }
        await conclude(inHand, verdict, since: start)
        pool.hold(nil, worker)
        return .delivery
    }

    private func widen(_ offer: ConsumerIntake.Offer) {
        isCautious.store(false, ordering: .relaxed)
        offer.widen()
    }

    private func conclude(
        _ inHand: DeliveryInHand, _ verdict: DeliveryProcessor.Verdict, since start: ContinuousClock.Instant
    ) async {
        // Before it is settled: in a trial the broker sends the next one only then.
        if let failure = verdict.isFailure {
            breaker?.record(failure: failure, isTrial: inHand.isTrial)
        } else if inHand.isTrial {
            breaker?.trialEnded()
        }
        await processor.conclude(inHand, verdict, since: start)
    }

    /// Takes deliveries from handlers that are past their deadline.
    private func watch(_ pool: HandlerPool) async throws {
        let limit = subscription.handlerDeadline
        try await withThrowingDiscardingTaskGroup { group in
            while true {
                let now = stopwatch.elapsed()
                let (overdue, next) = pool.takeOverdue(now: now)
                for inHand in overdue {
                    processor.log("handler is past its deadline", inHand.delivery, reason: "\(limit)")
                    group.addTask {
                        await self.conclude(inHand, .retry(nil, cause: "handlerDeadline"), since: .now - limit)
                        pool.concluded()
                    }
                }
                metrics.overdue(pool.load.overdue)
                // What begins after this cannot be due before then.
                try await stopwatch.sleepUntil(min(next ?? now + limit, now + limit))
            }
        }
    }
}
