/// Publishes events: ``EventPublisher`` to one exchange, ``DualPublisher`` to two. Code that publishes should ask for
/// this, so that it does not change when the migration moves on.
public protocol EventPublishing: Sendable {
    /// Makes sure that what this publishes to exists. Call it once at start.
    func declareExchanges() async throws

    /// Publishes an event and returns once the broker has confirmed it.
    ///
    /// - Throws: ``EventsError``; ``EventsError/publishOutcome`` says how the publish ended. After
    ///   ``PublishOutcome/unknown`` repeat it under the error's ``EventsError/eventID``. `CancellationError` when the
    ///   calling task is cancelled.
    @discardableResult
    func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt

    /// Publishes an event whose data is JSON already. As ``publish(_:options:)-(E,_)``.
    @discardableResult
    func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt
}

extension EventPublishing {
    /// Publishes with the default options.
    @discardableResult
    public func publish<E: SMAPEvent>(_ event: E) async throws -> PublishReceipt {
        try await publish(event, options: PublishOptions())
    }

    /// Publishes with the default options.
    @discardableResult
    public func publish(_ event: UntypedEvent) async throws -> PublishReceipt {
        try await publish(event, options: PublishOptions())
    }
}
