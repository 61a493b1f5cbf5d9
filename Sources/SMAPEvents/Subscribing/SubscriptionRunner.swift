internal import Logging
internal import ServiceLifecycle
internal import Synchronization
internal import Waiting

/// Keeps a consumer of a subscription going, and has workers handle what it brings: those of its queue, or those that are
/// suspected to kill their consumers, one at a time.
final class SubscriptionRunner: Sendable {
    /// Which of the subscription's queues is consumed.
    enum Role {
        case main
        case suspects
    }

    /// What the runners of a subscription share.
    struct Context: Sendable {
        let transport: any EventTransport
        let subscription: EventSubscription
        let processor: DeliveryProcessor
        let breaker: CircuitBreaker?
        let metrics: ConsumerMetrics
        let stopwatch: Stopwatch
        let logger: Logger
        let keys: OrderingKeys
        let gate = HandlerGate()
        /// Opened when the queues have been declared.
        let isDeclared = Latch()
        /// Told how the consumer of the subscription's queue stands; nil when the circuit breaker has opened or closed.
        let phaseChanged: @Sendable (EventSubscriber.Phase?) -> Void
    }

    /// Why a consumer was ended in order.
    private enum End {
        case shutdown
        /// Another one is wanted.
        case renewal
    }

    private let role: Role
    private let context: Context
    private let queue: QueueName
    private let intake = ConsumerIntake()
    private let pool = Mutex<HandlerPool?>(nil)
    /// How often what had been fetched was given back, or lost with its consumer: that counted as a delivery of each such message,
    /// and killed no process.
    private let returns = Atomic<Int>(0)
    /// Whether the next consumer has one delivery at a time at first: what comes first may be what killed the process before
    /// this one.
    private let isCautious = Atomic<Bool>(true)
    private let isConsuming = Atomic<Bool>(false)
    /// Opened by the first delivery: until then there is nothing whose time could be up.
    private let hasHandled = Latch()

    private var subscription: EventSubscription { context.subscription }

    init(_ role: Role, _ context: Context) {
        self.role = role
        self.context = context
        queue = role == .main ? context.subscription.queue : context.subscription.queue.suspectQueue
    }

    /// How many handlers are past their deadline.
    var overdueCount: Int { pool.withLock { $0?.load.overdue ?? 0 } }

    /// Consumes until graceful shutdown or cancellation.
    func run() async throws {
        let pool = HandlerPool { [self] pool, worker in try? await work(pool, worker) }
        self.pool.withLock { $0 = pool }
        for _ in 0..<(role == .main ? subscription.concurrency : 1) { pool.start() }
        let result: Result<Void, any Error>
        do {
            try await withTaskCancellationHandler {
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await self.consume(pool) }
                    group.addTask { try await self.watch(pool) }
                    if role == .main, let breaker = context.breaker {
                        group.addTask { try await self.pace(breaker) }
                    }
                    defer { group.cancelAll() }
                    // The consumer ends; the watch does not.
                    try await group.next()
                }
            } onCancel: {
                // A suspect that is put back is not to come again to this consumer: that is stopped first.
                if role == .main { pool.cancel() }
            }
            result = .success(())
        } catch {
            result = .failure(error)
        }
        await cancelHandlers(pool)
        // It holds this runner too.
        self.pool.withLock { $0 = nil }
        try result.get()
    }

    private func enter(_ phase: EventSubscriber.Phase?) {
        if role == .main { context.phaseChanged(phase) }
    }

    // MARK: Consumers

    /// Keeps a consumer going until graceful shutdown, which ends it in order.
    private func consume(_ pool: HandlerPool) async throws {
        var failures = 0
        var hasConsumed = role == .suspects
        while !Task.isShuttingDownGracefully {
            isConsuming.store(false, ordering: .relaxed)
            do {
                let isResumed = failures > 0
                try await cancelWhenGracefulShutdown { try await self.declare(isResumed: isResumed) }
                let isCautious = isCautious.load(ordering: .relaxed)
                let end = try await context.transport.withConsumer(
                    on: queue, prefetch: isCautious || role == .suspects ? 1 : subscription.unsettledLimit,
                    deadline: .now + subscription.deadline
                ) { consumer in
                    if isResumed {
                        context.logger.notice("subscription resumed", metadata: ["queue": "\(queue)"])
                    }
                    isConsuming.store(true, ordering: .relaxed)
                    enter(.consuming)
                    return try await serve(consumer, isCautious: isCautious, pool)
                }
                guard end == .renewal else { return }
                hasConsumed = true
                failures = 0
                returns.add(1, ordering: .relaxed)
            } catch is CancellationError where Task.isShuttingDownGracefully {
                break
            } catch let error as EventsError {
                if isConsuming.load(ordering: .relaxed) {
                    hasConsumed = true
                    failures = 0
                    returns.add(1, ordering: .relaxed)
                }
                guard isRecoverable(error, hasConsumed: hasConsumed) else { throw error }
                failures += 1
                enter(.recovering(error))
                context.logger.warning(
                    "subscription interrupted", metadata: ["queue": "\(queue)", "reason": "\(error)"])
                let delay = subscription.retryDelay(after: failures)
                try? await cancelWhenGracefulShutdown { try await Task.sleep(for: delay) }
                try Task.checkCancellation()
            }
        }
        // There is no consumer, but handlers of the last one may be at work.
        enter(.stopping)
        await drain(pool)
    }

    /// The runner of the subscription's queue declares for both.
    private func declare(isResumed: Bool) async throws {
        switch role {
        case .main:
            try await subscription.topology.apply(to: context.transport, deadline: subscription.deadline)
            context.isDeclared.open()
        case .suspects:
            await context.isDeclared.wait()
            try Task.checkCancellation()
            // An operator may have deleted it.
            if isResumed {
                try await subscription.topology.apply(to: context.transport, deadline: subscription.deadline)
            }
        }
    }

    private func isRecoverable(_ error: EventsError, hasConsumed: Bool) -> Bool {
        switch error.code {
        case .subscriptionCancelled: role == .suspects || subscription.resumesWhenCancelled
        // The queue was there: it was deleted a moment ago, or its node is coming up.
        case .notFound: hasConsumed
        default: error.isRetriable
        }
    }

    /// Has the workers take deliveries from a consumer, in order if so wanted.
    private func serve(_ consumer: any TransportConsumer, isCautious: Bool, _ pool: HandlerPool) async throws -> End {
        let renewal = Latch()
        func offer(_ source: any DeliverySource) -> ConsumerIntake.Offer {
            intake.offer {
                ConsumerIntake.Offer(
                    generation: $0, source: source, consumer: consumer, renewal: renewal, isCautious: isCautious,
                    prefetch: subscription.unsettledLimit)
            }
        }
        guard role == .main, subscription.orderingKey != nil || subscription.isSingleActive else {
            return try await untilEnd(consumer, offer(UnorderedSource(consumer: consumer)), pool) {
                await consumer.stop()
            }
        }
        let partitioned = PartitionedConsumer(
            consumer, keys: context.keys, stopwatch: context.stopwatch, renewal: renewal
        ) { [self] delivery in
            // The key of a suspect is not asked for: reading it may be what kills this process.
            guard let orderingKey = subscription.orderingKey,
                delivery.earlierDeaths + deaths(delivery) < subscription.isolationThreshold
            else { return nil }
            return (try? context.processor.router.envelope(of: delivery.restored())).flatMap(orderingKey.key)
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
                try await self.untilEnd(consumer, offer(partitioned), pool) {
                    // If it were cancelled, the next process would get what comes behind that which is in hand here. All goes back at
                    // once, in its order, when the channel is closed.
                    if !self.subscription.isSingleActive { await consumer.stop() }
                    partitioned.end()
                }
            }
            defer {
                partitioned.end()
                group.cancelAll()
            }
            while let end = try await group.next() {
                if let end { return end }
            }
            return .shutdown
        }
    }

    /// Waits until the consumer has ended, which is an error, or is to be ended.
    ///
    /// - Parameter stop: Has the workers get nothing more of it.
    private func untilEnd(
        _ consumer: any TransportConsumer, _ offer: ConsumerIntake.Offer, _ pool: HandlerPool,
        stop: @escaping @Sendable () async -> Void
    ) async throws -> End {
        defer { intake.withdraw(offer) }
        let end: End
        do {
            end = try await withThrowingTaskGroup(of: End.self) { group in
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
        } catch is CancellationError {
            // The channel stays open until the handlers have noticed, so that what is put back can be settled; and that is not to come
            // back to this consumer.
            if role == .suspects { await Task { await stop() }.value }
            await cancelHandlers(pool)
            throw CancellationError()
        }
        // The channel stays open while handlers finish, so that what they decide still goes out.
        if end == .renewal {
            intake.withdraw(offer)
            await stop()
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
            await drain(pool)
        } else {
            enter(.stopping)
            await withTaskGroup { group in
                group.addTask { await stop() }
                group.addTask { await self.drain(pool) }
            }
        }
        return .shutdown
    }

    /// Lets the handlers finish what they have in hand, and no more. Those that go on have used up their time.
    private func drain(_ pool: HandlerPool) async {
        intake.finish()
        context.breaker?.stop()
        await pool.until(within: subscription.drainTimeout) { $0.workers == 0 && $0.concluding == 0 }
        await cancelHandlers(pool)
    }

    /// Cancels the handlers, and gives them a second to notice.
    private func cancelHandlers(_ pool: HandlerPool) async {
        pool.cancel()
        // Not in this task, which may be cancelled: then nothing would be waited for.
        await Task { await pool.until(within: .seconds(1)) { $0.workers == 0 && $0.concluding == 0 } }.value
    }

    /// Lets one delivery be tried after each pause of the circuit breaker.
    private func pace(_ breaker: CircuitBreaker) async throws {
        while let since = await breaker.untilOpen() {
            enter(nil)
            context.logger.warning(
                "subscription paused", metadata: ["queue": "\(queue)", "for": "\(breaker.policy.pause)"])
            try await context.stopwatch.sleepUntil(since + breaker.policy.pause)
            // First of all it is withdrawn, so that nothing that goes back is tried.
            if breaker.hasHeld(for: DeliveryProcessor.holdLimit), let offer = intake.current {
                intake.withdraw(offer)
                offer.renewal.open()
            }
            breaker.beginTrial()
            enter(nil)
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

    private func work(_ pool: HandlerPool, _ worker: Int) async throws {
        var generation = 0
        while let offer = try await intake.consumer(after: generation) {
            generation = offer.generation
            do {
                deliveries: while let delivery = try await offer.source.next() {
                    switch await handle(delivery, offer, pool, worker) {
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

    /// How often consumers have died with a delivery since it was put into its queue, as far as is known.
    private func deaths(_ delivery: InboundDelivery) -> Int {
        max(0, delivery.redeliveries - returns.load(ordering: .relaxed))
    }

    /// Takes one delivery from its consumer to its settlement.
    private func handle(
        _ delivery: InboundDelivery, _ offer: ConsumerIntake.Offer, _ pool: HandlerPool, _ worker: Int
    ) async -> Next {
        let start = ContinuousClock.now
        let deaths = deaths(delivery)
        let inHand = DeliveryInHand(
            delivery.restored(), offer, isAlone: role == .suspects,
            earlierDeaths: role == .suspects
                ? max(subscription.suspicion, delivery.earlierDeaths) : delivery.earlierDeaths, redeliveries: deaths)
        let verdict: DeliveryProcessor.Verdict
        var isInGate = false
        do {
            defer { offer.source.handlerEnded(delivery) }
            // One that was in hand when a consumer died must first be answered: it may kill this one too.
            if deaths == 0, !subscription.isSingleActive { widen(offer) }
            if let next = await admission(of: inHand) { return next }
            pool.hold(inHand, worker)
            if let early = context.processor.earlyVerdict(on: inHand) {
                verdict = early
            } else {
                isInGate = true
                if role == .suspects {
                    hasHandled.open()
                    context.logger.notice(
                        "a message that may have killed its consumers is handled alone",
                        metadata: ["queue": "\(queue)", "event_id": "\(delivery.properties.messageID ?? "")"])
                    await context.gate.enterAlone(within: subscription.handlerDeadline, context.stopwatch)
                } else {
                    await context.gate.enter()
                }
                verdict = await context.processor.verdict(on: inHand)
            }
        }
        // Otherwise its time was up, it is being retried, and this worker is replaced.
        guard inHand.decide() else { return .end }
        if isInGate { leaveGate(inHand) }
        // Before it is settled, so that no other one is on its way meanwhile. One that was cut short has told nothing.
        if case .abandon = verdict {} else { widen(offer) }
        // Before it is settled: in a trial the broker sends the next one only then.
        record(verdict, inHand)
        if verdict.needsCopy {
            // The copy may take its time: the handler's place is free for others, within the prefetch.
            if case .isolate = verdict {
                // No suspect is handled before the original is gone.
                await context.gate.enter()
                pool.conclude { [self] in
                    await conclude(inHand, verdict, since: start)
                    context.gate.leave()
                }
            } else {
                pool.conclude { [self] in await conclude(inHand, verdict, since: start) }
            }
        } else {
            await conclude(inHand, verdict, since: start)
        }
        pool.hold(nil, worker)
        return .delivery
    }

    /// Asks the circuit breaker. Nil if the delivery may be handled.
    private func admission(of inHand: DeliveryInHand) async -> Next? {
        guard let breaker = context.breaker else { return nil }
        var admission: CircuitBreaker.Admission? = nil
        if role == .main {
            admission = await breaker.admit()
        } else {
            // It is not held for so long that the broker takes it back, which would count as a death.
            admission = await withTaskGroup(of: CircuitBreaker.Admission?.self) { [context] group in
                group.addTask { await breaker.admit() }
                group.addTask {
                    let limit = context.stopwatch.elapsed() + DeliveryProcessor.holdLimit
                    return (try? await context.stopwatch.sleepUntil(limit)) == nil ? .refused : nil
                }
                let first = await group.next() ?? nil
                group.cancelAll()
                // One that was admitted just then is not tried.
                if first == nil, case .trial? = await group.next() ?? nil { breaker.trialEnded() }
                return first
            }
        }
        switch admission {
        case .granted: break
        case .trial: inHand.isTrial = true
        case .refused, nil:
            if role == .suspects { await context.processor.putBack(inHand) }
            return admission == nil ? .delivery : .end
        }
        // It comes again if its consumer has ended meanwhile.
        guard intake.isCurrent(inHand.offer) else {
            if inHand.isTrial { breaker.trialEnded() }
            return .consumer
        }
        return nil
    }

    private func leaveGate(_ inHand: DeliveryInHand) {
        if inHand.isAlone { context.gate.leaveAlone() } else { context.gate.leave() }
    }

    private func conclude(
        _ inHand: DeliveryInHand, _ verdict: DeliveryProcessor.Verdict, since start: ContinuousClock.Instant
    ) async {
        await context.processor.conclude(inHand, verdict, since: start)
        if inHand.wasGivenBack { returns.add(1, ordering: .relaxed) }
    }

    /// Has more than one delivery at a time from now on.
    private func widen(_ offer: ConsumerIntake.Offer) {
        guard role == .main, offer.isCautious, subscription.unsettledLimit > 1 else { return }
        isCautious.store(false, ordering: .relaxed)
        if subscription.isSingleActive {
            // The consumer begins again: widened, it would leave its place to another process while it holds something. The next
            // delivery, which comes when this one is settled, goes back with it.
            offer.source.end()
            offer.renewal.open()
        } else {
            offer.widen()
        }
    }

    /// Has the circuit breaker take note of how a delivery ends.
    private func record(_ verdict: DeliveryProcessor.Verdict, _ inHand: DeliveryInHand) {
        if let failure = verdict.isFailure {
            context.breaker?.record(failure: failure, isTrial: inHand.isTrial)
        } else if inHand.isTrial {
            context.breaker?.trialEnded()
        }
    }

    /// Takes deliveries from handlers that are past their deadline.
    private func watch(_ pool: HandlerPool) async throws {
        let limit = subscription.handlerDeadline
        if role == .suspects { await hasHandled.wait() }
        while true {
            let now = context.stopwatch.elapsed()
            let (overdue, next) = pool.takeOverdue(now: now)
            for inHand in overdue {
                context.processor.log("handler is past its deadline", inHand.delivery, reason: "\(limit)")
                leaveGate(inHand)
                // It has answered, if not in time.
                widen(inHand.offer)
                let verdict = DeliveryProcessor.Verdict.retry(nil, cause: "handlerDeadline")
                record(verdict, inHand)
                pool.conclude(isCounted: true) { [self] in
                    await conclude(inHand, verdict, since: .now - limit)
                }
            }
            if role == .main { context.metrics.overdue(pool.load.overdue) }
            // What begins after this cannot be due before then.
            try await context.stopwatch.sleepUntil(min(next ?? now + limit, now + limit))
        }
    }
}
