internal import ConnectionThread
internal import Logging
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// Publishing: reserve, encode, submit, wait. As few asynchronous functions as possible stand in between: each costs.
extension RabbitMQConnection {
    /// Takes room in the window if there is some. Whether there is a connection does not matter yet.
    func reserveNow(_ wanted: PublishGrant, for destination: PublishDestination) throws -> PublishReservation? {
        guard let granted = try window.withLock({ try $0.reserve(wanted, for: destination.hash) }) else { return nil }
        return PublishReservation(count: granted.count, bytes: granted.bytes, hasWaited: false, owner: self)
    }

    /// Waits for room in the window.
    func waitForRoom(
        _ wanted: PublishGrant, for destination: PublishDestination, deadline: ContinuousClock.Instant
    ) async throws -> PublishReservation {
        let limit = MonotonicTime(deadline)
        let reservation = ReservationQueue.Reservation(wanted, destination: destination.hash, deadline: limit)
        resume(try window.withLock { try $0.wait(reservation) })
        Watchdog.shared.schedule(at: limit)
        let granted = try await reservation.waiter.value { window.withLock { $0.cancel(reservation) } }
        return PublishReservation(count: granted.count, bytes: granted.bytes, hasWaited: true, owner: self)
    }

    func release(count: Int, bytes: Int, hasWaited: Bool) {
        resume(
            window.withLock { $0.release(PublishGrant(count: count, bytes: bytes, hasWaited: hasWaited)) })
    }

    /// Hands over a message for which there is room; its result is awaited next.
    func submit(
        _ message: consuming OutboundMessage, using reservation: consuming PublishReservation, deadline: MonotonicTime,
        _ waiter: Waiter<Bool>
    ) throws -> PendingPublish {
        let publish = PendingPublish(
            try EncodedMessage(message), deadline: deadline, caller: .task(waiter))
        // From here on the window accounts for it; an error above has given the room back.
        let granted = grant(reservation)
        let (resumptions, needsWake) = window.withLock { window in
            (window.submit(publish, granted: granted), window.needsWake)
        }
        submitted(resumptions, needsWake, deadline: deadline)
        return publish
    }

    /// Publishes messages for which there is room: one result each, in their order.
    func publish(
        contentsOf messages: consuming [OutboundMessage], using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async -> [Result<Bool, EventsError>] {
        guard !messages.isEmpty else { return [] }
        let batch = PublishBatch(count: messages.count)
        let limit = MonotonicTime(deadline)
        var publishes: [PendingPublish] = []
        publishes.reserveCapacity(messages.count)
        for (index, message) in messages.enumerated() {
            do {
                publishes.append(
                    PendingPublish(
                        try EncodedMessage(message), deadline: limit, caller: .batch(batch, index)))
            } catch {
                batch.resolve(index, .failure(error))
            }
        }
        let granted = grant(reservation)
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

    /// The room that a reservation stands for: none, if it is of another transport.
    private func grant(_ reservation: consuming PublishReservation) -> PublishGrant {
        guard reservation.isOwned(by: self) else {
            // It goes back to the transport that gave it.
            return PublishGrant(count: 0, bytes: 0)
        }
        let (count, bytes, hasWaited) = reservation.use()
        return PublishGrant(count: count, bytes: bytes, hasWaited: hasWaited)
    }

    private func submitted(_ resumptions: PublishWindow.Resumptions, _ needsWake: Bool, deadline: MonotonicTime) {
        if !resumptions.isEmpty { resume(resumptions) }
        Watchdog.shared.schedule(at: deadline)
        if needsWake { wake() }
    }

    /// Publishes to an exchange that was missing are not refused any longer.
    func exchangeDeclared(_ name: String) { window.withLock { $0.exchangeDeclared(name) } }

    /// The callers of messages were cancelled.
    func cancel(_ publishes: [PendingPublish]) {
        let (resumptions, needsReset) = window.withLock { window in
            let resumptions = window.cancel(publishes) { isWritten in
                isWritten
                    ? EventsError(.unknownOutcome, "cancelled before it was confirmed", operation: "publish")
                    : EventsError(.unsent, "cancelled before it was written", operation: "publish")
            }
            return (resumptions, window.resetTime < .distantFuture)
        }
        resume(resumptions)
        // The thread does not know of the time yet.
        if needsReset { wake() }
    }

    /// Hands results to those who wait for them.
    func resume(_ resumptions: PublishWindow.Resumptions) {
        var resumptions = resumptions
        while true {
            // Before anything else that this thread may read.
            for id in resumptions.requests { replies.sent(id) }
            for (publish, result) in resumptions.publishes { publish.resume(result) }
            for tell in resumptions.drained { tell() }
            var unwanted: [PublishGrant] = []
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
        set(.failingChannel, nil)
        set(.openingChannel, nil)
        noteUse()
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
        publishingOpensAgain("the broker has closed it: \(text)")
        let (resumptions, wasInUse) = window.withLock { window in
            let wasInUse = window.sentCount > 0
            return (isFaultOfMessage ? window.channelClosed(error, now: .now) : window.channelLost(), wasInUse)
        }
        resume(resumptions)
        logger.warning("the broker has closed the channel for publishing", metadata: ["reason": "\(text)"])
        return wasInUse
    }

    private func publishingOpensAgain(_ reason: String) {
        set(
            .openingChannel,
            EventsError(
                .connectionLost, "the channel for publishing is being opened again: \(reason)", operation: "publish"))
    }

    /// The publishing channel is being closed by us, because the broker does not confirm.
    func publishingReset(_ now: MonotonicTime) {
        repliesLost(EventsError(.connectionLost, "the channel is opened again", operation: "request"))
        publishingOpensAgain("the broker did not confirm")
        let (resumptions, destination) = window.withLock { $0.channelReset(now: now) }
        resume(resumptions)
        logger.warning(
            "the broker does not confirm: the channel for publishing is opened again",
            metadata: destination.map { ["destination": "\($0)"] })
    }
}
