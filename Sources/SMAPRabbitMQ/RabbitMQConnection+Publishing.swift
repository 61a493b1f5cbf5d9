internal import ConnectionThread
internal import Logging
internal import SMAPEvents
internal import Synchronization

/// Publishing: reserve, encode, submit, wait.
extension RabbitMQConnection {
    /// Waits for room in the window. Mostly there is some: then this costs no suspension. Whether there is a connection does
    /// not matter yet.
    func reserve(
        _ count: Int, bytes: Int, for destination: PublishDestination, deadline: ContinuousClock.Instant
    ) async throws -> PublishReservation {
        let wanted = PublishWindow.Grant(count: count, bytes: bytes)
        if let granted = try window.withLock({ try $0.reserve(wanted, for: destination.hash) }) {
            return PublishReservation(count: granted.count, bytes: granted.bytes, hasWaited: false, owner: self)
        }
        let limit = MonotonicTime(deadline)
        let reservation = PublishWindow.Reservation(wanted, destination: destination.hash, deadline: limit)
        resume(try window.withLock { try $0.wait(reservation) })
        Watchdog.shared.schedule(at: limit)
        let granted = try await reservation.waiter.value { window.withLock { $0.cancel(reservation) } }
        return PublishReservation(count: granted.count, bytes: granted.bytes, hasWaited: true, owner: self)
    }

    func release(count: Int, bytes: Int, hasWaited: Bool) {
        resume(
            window.withLock { $0.release(PublishWindow.Grant(count: count, bytes: bytes, hasWaited: hasWaited)) })
    }

    /// Publishes a message for which there is room. Returns whether it was routed to a queue.
    func publish(
        _ message: OutboundMessage, using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async throws -> Bool {
        let waiter = Waiter<Bool>()
        let publish = PendingPublish(
            try EncodedMessage(message), destination: Self.destination(of: message),
            deadline: MonotonicTime(deadline), caller: .task(waiter))
        // From here on the window accounts for it; an error above has given the room back.
        let (count, bytes, hasWaited) = reservation.use()
        let granted = PublishWindow.Grant(count: count, bytes: bytes, hasWaited: hasWaited)
        let (resumptions, needsWake) = window.withLock { window in
            (window.submit(publish, granted: granted), window.needsWake)
        }
        submitted(resumptions, needsWake, deadline: publish.deadline)
        return try await waiter.value { cancel([publish]) }
    }

    /// Publishes messages for which there is room: one result each, in their order.
    func publish(
        contentsOf messages: [OutboundMessage], using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async -> [Result<Bool, EventsError>] {
        let batch = PublishBatch(count: messages.count)
        let limit = MonotonicTime(deadline)
        var publishes: [PendingPublish] = []
        publishes.reserveCapacity(messages.count)
        for (index, message) in messages.enumerated() {
            do {
                publishes.append(
                    PendingPublish(
                        try EncodedMessage(message), destination: Self.destination(of: message), deadline: limit,
                        caller: .batch(batch, index)))
            } catch {
                batch.resolve(index, .failure(error))
            }
        }
        let (count, bytes, hasWaited) = reservation.use()
        let granted = PublishWindow.Grant(count: count, bytes: bytes, hasWaited: hasWaited)
        let submitting = publishes
        let (resumptions, needsWake) = window.withLock { window in
            (window.submit(submitting, granted: granted), window.needsWake)
        }
        submitted(resumptions, needsWake, deadline: limit)
        return await withTaskCancellationHandler {
            await batch.results()
        } onCancel: {
            cancel(submitting)
        }
    }

    private static func destination(of message: OutboundMessage) -> UInt64 {
        message.template?.destination.hash
            ?? PublishDestination(exchange: message.exchange, routingKey: message.routingKey).hash
    }

    private func submitted(_ resumptions: PublishWindow.Resumptions, _ needsWake: Bool, deadline: MonotonicTime) {
        resume(resumptions)
        Watchdog.shared.schedule(at: deadline)
        if needsWake { wake() }
    }

    private func cancel(_ publishes: [PendingPublish]) {
        resume(
            window.withLock { window in
                window.cancel(publishes) { isWritten in
                    isWritten
                        ? EventsError(.unknownOutcome, "cancelled before it was confirmed", operation: "publish")
                        : EventsError(.unsent, "cancelled before it was written", operation: "publish")
                }
            })
    }

    /// Hands results to those who wait for them.
    func resume(_ resumptions: PublishWindow.Resumptions) {
        var resumptions = resumptions
        while true {
            // Before anything else that this thread may read.
            for id in resumptions.requests { replies.sent(id) }
            for (publish, result) in resumptions.publishes { publish.resume(result.mapError { $0 }) }
            for waiter in resumptions.drained { waiter.resolve(.success(())) }
            var unwanted: [PublishWindow.Grant] = []
            for (waiter, result) in resumptions.reservations {
                // A caller that was cancelled meanwhile does not take its room.
                if !waiter.resolve(result.mapError { $0 }), case .success(let grant) = result { unwanted.append(grant) }
            }
            guard !unwanted.isEmpty else { return }
            resumptions = window.withLock { [unwanted] window in
                var next = PublishWindow.Resumptions()
                for grant in unwanted { next.append(window.release(grant)) }
                return next
            }
        }
    }

    // MARK: The connection thread

    /// The publishing channel can be used.
    func publishingOpened() {
        shared.withLock { $0.publishingProblem = nil }
        window.withLock { $0.connected() }
    }

    /// The publishing channel cannot be opened, and is tried again.
    func publishingBlocked(_ error: EventsError, retryIn delay: Duration) {
        shared.withLock { $0.publishingProblem = error }
        let reason = EventsError(
            .connectionLost, "the channel for publishing cannot be opened: \(error.message)", operation: "publish")
        window.withLock { $0.blocked(reason) }
        logger.warning(
            "the channel for publishing cannot be opened",
            metadata: ["reason": "\(error.message)", "next_attempt_in": "\(delay)"])
    }

    /// The broker has closed the publishing channel. Returns whether there was anything on it.
    ///
    /// - Parameter isFaultOfMessage: Whether it did so because of a message.
    func publishingChannelClosed(_ code: Int, _ text: String, isFaultOfMessage: Bool) -> Bool {
        // Replies come to the channel that has asked.
        repliesLost(EventsError(.connectionLost, "the channel was closed: \(text)", operation: "request"))
        let kind: EventsError.Code =
            switch AMQPFailure.brokerCode(code) {
            case .notFound: .exchangeNotFound
            case .accessRefused: .accessRefused
            default: .eventRefused
            }
        let error = EventsError(kind, text, operation: "publish", outcome: .nacked)
        let (resumptions, wasInUse) = window.withLock { window in
            let wasInUse = window.sentCount > 0
            return (isFaultOfMessage ? window.channelClosed(error) : window.channelLost(), wasInUse)
        }
        resume(resumptions)
        logger.warning("the broker has closed the channel for publishing", metadata: ["reason": "\(text)"])
        return wasInUse
    }

    /// The publishing channel is being closed by us, because the broker does not confirm.
    func publishingReset(_ now: MonotonicTime) {
        repliesLost(EventsError(.connectionLost, "the channel is opened again", operation: "request"))
        let (resumptions, destination) = window.withLock { window in
            (window.channelReset(now: now), window.unconfirmedDestination?.name ?? "")
        }
        resume(resumptions)
        logger.warning(
            "the broker does not confirm: the channel for publishing is opened again",
            metadata: ["destination": "\(destination)"])
    }
}
