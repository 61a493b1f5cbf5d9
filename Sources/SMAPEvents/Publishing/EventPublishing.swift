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

    /// Publishes many events in one call, for outbox relays and bulk producers: it costs much less than one call for each.
    ///
    /// A list that is larger than half of the publish window goes in parts. The broker receives the events in their order;
    /// after a lost connection some may come twice.
    ///
    /// - Parameters:
    ///   - events: The events.
    ///   - ids: Their ids, as many as there are events; new ones by default. Give the ids of an earlier attempt to repeat it.
    ///   - options: What holds for all of them. ``PublishOptions/eventID`` is not used. The deadline is that of the whole call.
    /// - Returns: For each event, in order, its receipt or its error. An event that is invalid or refused fails alone. At the
    ///   deadline, and when the task is cancelled, the rest ends as ``PublishOutcome/unsent`` or ``PublishOutcome/unknown``.
    func publish<E: SMAPEvent>(
        contentsOf events: [E], ids: [EventID]?, options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>]

    /// Publishes many events whose data is JSON already; see ``publish(contentsOf:ids:options:)``. Their ids are
    /// ``UntypedEvent/eventID``.
    func publish(
        contentsOf events: [UntypedEvent], options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>]
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

    /// Publishes many events with new ids.
    public func publish<E: SMAPEvent>(
        contentsOf events: [E], options: PublishOptions = PublishOptions()
    ) async -> [Result<PublishReceipt, EventsError>] {
        await publish(contentsOf: events, ids: nil, options: options)
    }

    /// Publishes many events with the default options.
    public func publish(contentsOf events: [UntypedEvent]) async -> [Result<PublishReceipt, EventsError>] {
        await publish(contentsOf: events, options: PublishOptions())
    }

    /// Publishes the events one by one, 64 at a time: for publishers that have nothing better.
    public func publish<E: SMAPEvent>(
        contentsOf events: [E], ids: [EventID]?, options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        await publishEach(events, ids: ids, options: options)
    }

    /// Publishes the events one by one, 64 at a time: for publishers that have nothing better.
    public func publish(
        contentsOf events: [UntypedEvent], options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        await publishEach(events, options: options)
    }

    func publishEach<E: SMAPEvent>(
        _ events: [E], ids: [EventID]?, options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        guard ids?.count ?? events.count == events.count else {
            let error = EventsError(
                .invalidEvent, "there are \(ids?.count ?? 0) ids for \(events.count) events", operation: "publish")
            return Array(repeating: .failure(error), count: events.count)
        }
        return await publishEach(events.count, options) { index, options in
            var options = options
            options.eventID = ids?[index]
            return try await publish(events[index], options: options)
        }
    }

    func publishEach(
        _ events: [UntypedEvent], options: PublishOptions
    ) async -> [Result<PublishReceipt, EventsError>] {
        await publishEach(events.count, options) { index, options in
            var options = options
            options.eventID = nil
            return try await publish(events[index], options: options)
        }
    }

    private func publishEach(
        _ count: Int, _ options: PublishOptions,
        _ publish: @escaping @Sendable (Int, PublishOptions) async throws -> PublishReceipt
    ) async -> [Result<PublishReceipt, EventsError>] {
        let end = options.deadline.map { ContinuousClock.now + $0 }
        return await withTaskGroup(of: (Int, Result<PublishReceipt, EventsError>).self) { group in
            var results = [Result<PublishReceipt, EventsError>?](repeating: nil, count: count)
            var next = 0
            func add() {
                guard next < count else { return }
                group.addTask { [next] in
                    var options = options
                    if let end { options.deadline = end - .now }
                    do {
                        return (next, .success(try await publish(next, options)))
                    } catch {
                        let cancelled = EventsError(
                            .unknownOutcome, "cancelled before it was confirmed", operation: "publish")
                        return (next, .failure(error as? EventsError ?? cancelled))
                    }
                }
                next += 1
            }
            for _ in 0..<64 { add() }
            for await (index, result) in group {
                results[index] = result
                add()
            }
            return results.compactMap { $0 }
        }
    }
}
