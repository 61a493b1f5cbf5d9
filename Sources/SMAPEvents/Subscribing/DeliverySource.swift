/// Where the workers of a subscription take deliveries from, and settle them.
protocol DeliverySource: Sendable {
    /// The next delivery that may be handled; waits for one. Nil once the consumer has been stopped.
    func next() async throws -> InboundDelivery?

    /// Ends the stream of deliveries here. The consumer goes on, and what was handed out can still be settled.
    func end()

    /// The handler of a delivery that ``next()`` has returned has ended, or was not called. Called once for each of them, also
    /// when the delivery was settled before: a handler may outlive its deadline.
    func handlerEnded(_ delivery: InboundDelivery)

    /// Settles a delivery, as ``TransportConsumer/settle(_:_:)`` does.
    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws

    /// Returns once the broker has what was settled so far, as ``TransportConsumer/flushSettlements(deadline:)`` does.
    func flushSettlements(deadline: ContinuousClock.Instant) async throws

    /// Whether the deliveries behind this one wait until it is settled.
    func isOrdered(_ delivery: InboundDelivery) -> Bool

    /// Hands an ordered delivery that has failed out again after a pause. Those behind it go on waiting.
    func scheduleRetry(_ delivery: InboundDelivery, after pause: Duration)
}

/// A source whose deliveries may be handled in any order.
struct UnorderedSource: DeliverySource {
    let consumer: any TransportConsumer

    func next() async throws -> InboundDelivery? { try await consumer.next() }

    /// Its consumer is stopped instead.
    func end() {}

    func handlerEnded(_ delivery: InboundDelivery) {}

    func settle(_ delivery: InboundDelivery, _ settlement: Settlement) throws {
        try consumer.settle(delivery, settlement)
    }

    func flushSettlements(deadline: ContinuousClock.Instant) async throws {
        try await consumer.flushSettlements(deadline: deadline)
    }

    func isOrdered(_ delivery: InboundDelivery) -> Bool { false }

    func scheduleRetry(_ delivery: InboundDelivery, after pause: Duration) {}
}
