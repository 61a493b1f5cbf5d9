public import Logging
public import ServiceLifecycle

/// Consumes events from a queue and gives them to handlers.
///
/// Invariant (P3): each delivery is settled once, and only after its handler has decided. A delivery whose handler was
/// cut short is not settled at all: the broker delivers it again.
public struct EventSubscriber: Service {
    private let transport: any EventTransport
    private let subscription: EventSubscription
    private let router: EventRouter
    private let logger: Logger

    /// Makes a subscriber; ``run()`` starts it.
    public init(
        transport: any EventTransport, subscription: EventSubscription, router: EventRouter, logger: Logger = .silent
    ) {
        self.transport = transport
        self.subscription = subscription
        self.router = router
        self.logger = logger
    }

    /// Declares the queue and its dead letter queue, then handles deliveries until graceful shutdown or cancellation.
    ///
    /// On graceful shutdown it takes no more deliveries, and lets those in hand be finished.
    ///
    /// - Throws: ``EventsError`` when the queue cannot be declared or consumed from, or when the connection is lost.
    public func run() async throws {
        try subscription.validate()
        try await declare()
        try await transport.withConsumer(
            on: subscription.queue, prefetch: subscription.prefetch, deadline: .now + subscription.deadline
        ) { consumer in
            try await withTaskCancellationOrGracefulShutdownHandler {
                try await withThrowingTaskGroup(of: Void.self) { group in
                    for _ in 0..<subscription.concurrency {
                        group.addTask { try await work(consumer) }
                    }
                    try await group.waitForAll()
                }
            } stop: {
                await consumer.stop()
            }
        }
    }

    /// Declares the queue, its bindings, and the queue that its dead letters go to. ``run()`` does it by itself; call
    /// it before publishers start, if no event may be missed.
    public func declare() async throws {
        let deadline = ContinuousClock.now + subscription.deadline
        try await transport.declare(.deadLetters, deadline: deadline)
        try await transport.declare(
            QueueDeclaration(subscription.queue.deadLetterQueue, kind: subscription.kind), deadline: deadline)
        try await transport.bind(
            subscription.queue.deadLetterQueue, to: ExchangeName.deadLetters, routingKey: subscription.queue.rawValue,
            deadline: deadline)
        if subscription.exchange == ExchangeName.events {
            try await transport.declare(.events, deadline: deadline)
        }
        try await transport.declare(
            QueueDeclaration(subscription.queue, kind: subscription.kind, deadLetters: true), deadline: deadline)
        for pattern in subscription.bindings {
            try await transport.bind(
                subscription.queue, to: subscription.exchange, routingKey: pattern.rawValue, deadline: deadline)
        }
    }

    private func work(_ consumer: any TransportConsumer) async throws {
        while let delivery = try await consumer.next() {
            let settlement: Settlement
            do {
                settlement = try await decide(delivery)
            } catch is CancellationError {
                return
            }
            do {
                try consumer.settle(delivery, settlement)
            } catch let error as EventsError where error.code == .deliveryExpired {
                logger.warning(
                    "delivery could not be settled and will come again",
                    metadata: ["event_id": "\(delivery.properties.messageID ?? "")", "queue": "\(subscription.queue)"])
            }
        }
    }

    private func decide(_ delivery: InboundDelivery) async throws -> Settlement {
        let outcome: HandlerOutcome
        do {
            outcome = try await router.outcome(of: delivery, from: subscription.queue)
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

/// Runs `body`, and `stop` beside it once the task is cancelled or the service is asked to shut down gracefully.
private func withTaskCancellationOrGracefulShutdownHandler(
    _ body: @escaping @Sendable () async throws -> Void, stop: @escaping @Sendable () async -> Void
) async throws {
    try await withThrowingTaskGroup(of: Bool.self) { group in
        group.addTask {
            try await body()
            return true
        }
        group.addTask {
            // Returns on graceful shutdown; throws on cancellation, which ends the handlers by itself.
            try? await gracefulShutdown()
            await stop()
            return false
        }
        defer { group.cancelAll() }
        while let isBodyDone = try await group.next() {
            if isBodyDone { return }
        }
    }
}
