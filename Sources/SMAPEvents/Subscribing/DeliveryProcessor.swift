internal import Logging

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Takes a delivery through inbox, handler and settlement.
///
/// Invariant (P3): a delivery is acknowledged only after its event was handled, or after the copy that replaces it is
/// confirmed. What dies in between is delivered again: a duplicate, never a loss.
struct DeliveryProcessor: Sendable {
    /// What becomes of a delivery.
    enum Verdict {
        case acknowledge
        /// It may have killed its consumers: it is handled alone from now on.
        case isolate
        /// Another attempt, after a pause that the handler may have named.
        case retry(Duration?, cause: String)
        /// It could not be tried at all: later, and not counted.
        case later(Duration)
        case deadLetter(reason: String, errorType: String)
        case giveBack
        /// It is larger than the transport takes: the broker puts it aside, since no copy of it can be made.
        case reject
        /// Handled, and whoever asked is told: the body, or why there is none.
        case reply([UInt8], String?)
        /// Its handler was cut short: it is not settled, and comes again.
        case abandon

        /// Whether it is the failure of a handler; nil for what says nothing about handlers.
        var isFailure: Bool? {
            switch self {
            case .acknowledge, .reply: false
            case .retry: true
            case .later, .isolate, .deadLetter, .giveBack, .reject, .abandon: nil
            }
        }

        /// Whether a copy has to be confirmed before the delivery is settled.
        var needsCopy: Bool {
            switch self {
            case .retry, .later, .isolate, .deadLetter: true
            case .acknowledge, .reply, .giveBack, .reject, .abandon: false
            }
        }
    }

    let transport: any EventTransport
    let subscription: EventSubscription
    let router: EventRouter
    let inbox: (any Inbox)?
    let stopwatch: Stopwatch
    let logger: Logger
    let tracing: MessageTracing
    let metrics: ConsumerMetrics
    let pending: PendingCopies

    // MARK: Handling

    /// What becomes of a delivery whose event is not even read; nil if it is.
    func earlyVerdict(on inHand: DeliveryInHand) -> Verdict? {
        // First of all: a copy of it would be empty.
        if inHand.delivery.isTruncated { return .reject }
        if inHand.isAlone {
            let alone = inHand.deaths - subscription.suspicion
            guard alone < subscription.maximumRedeliveries else {
                return .deadLetter(
                    reason: "handled alone \(alone) times without an answer: it kills its consumers",
                    errorType: "poison")
            }
        } else if subscription.isolatesSuspects, inHand.deaths >= subscription.isolationThreshold {
            return .isolate
        }
        return nil
    }

    /// Asks the inbox, then the handler.
    func verdict(on inHand: DeliveryInHand) async -> Verdict {
        if Task.isCancelled { return .abandon }
        let delivery = inHand.delivery
        let envelope: EventEnvelope
        let handler: EventRouter.Handler
        do {
            envelope = try router.envelope(of: delivery)
            handler = try router.handler(of: envelope, in: delivery, from: subscription.queue)
        } catch let error as EventsError where error.code == .unhandled {
            return .deadLetter(reason: error.message, errorType: "unhandled")
        } catch {
            return .deadLetter(
                reason: "undecodable: \((error as? EventsError)?.message ?? "\(type(of: error))")",
                errorType: "undecodable")
        }
        if let inbox {
            switch await claim(envelope, inHand, inbox) {
            case nil: break
            case .some(let verdict): return verdict
            }
        }
        inHand.due = stopwatch.elapsed() + subscription.handlerDeadline
        do {
            let outcome = try await tracing.process(delivery, from: subscription.queue) { try await handler() }
            switch outcome.decision {
            case .acknowledge: return .acknowledge
            case .retry(let pause): return .retry(pause, cause: "retry")
            case .deadLetter(let reason): return .deadLetter(reason: reason, errorType: "rejected")
            case .giveBack: return .giveBack
            case .reply(let body, let refusal): return .reply(body, refusal)
            }
        } catch is CancellationError where Task.isCancelled {
            return .abandon
        } catch {
            // The type only: a handler's own error may quote the event.
            let cause = (error as? EventsError)?.code.description ?? "\(type(of: error))"
            let reason = (error as? EventsError)?.description ?? cause
            log("handler failed", delivery, reason: reason)
            return subscription.retry.isRetriable(error)
                ? .retry(nil, cause: cause) : .deadLetter(reason: "not worth a retry: \(cause)", errorType: cause)
        }
    }

    /// Nil when the event is ours to handle.
    private func claim(_ envelope: EventEnvelope, _ inHand: DeliveryInHand, _ inbox: any Inbox) async -> Verdict? {
        let policy = subscription.inbox
        let entry = InboxEntry(
            scope: policy.scope ?? subscription.queue.rawValue, eventID: envelope.eventID, body: inHand.delivery.body)
        do {
            let lease = subscription.lease
            let result = try await whateverHappens {
                try await inbox.claim(entry, lease: lease, deadline: .now + policy.deadline)
            }
            switch result {
            case .granted(let token):
                inHand.claim = (entry, token)
                return Task.isCancelled ? .abandon : nil
            case .busy(let remaining): return .later(remaining)
            case .done:
                metrics.duplicate()
                return .acknowledge
            }
        } catch {
            log("inbox does not answer", inHand.delivery, reason: "\(error)")
            return .later(.seconds(1))
        }
    }

    // MARK: Settling

    /// Carries a verdict out. Called once for a delivery, by whoever has decided.
    ///
    /// A failure in a trial of the circuit breaker is none of its attempts.
    func conclude(_ inHand: DeliveryInHand, _ verdict: Verdict, since start: ContinuousClock.Instant) async {
        let counts = !inHand.isTrial
        let delivery = inHand.delivery
        var outcome = ConsumerMetrics.Outcome.unsettled
        switch verdict {
        case .acknowledge:
            await complete(inHand)
            if settle(inHand, .acknowledge) { outcome = .acknowledged }
        case .retry(let pause, let cause):
            let attempts = delivery.failedAttempts + (counts ? 1 : 0)
            if attempts >= subscription.retry.maximumAttempts {
                outcome = await bury(
                    inHand, reason: "gave up after \(attempts) attempts: \(cause)", errorType: cause, attempts)
            } else {
                let pause =
                    pause.map(subscription.retry.rung(for:)) ?? subscription.retry.delay(after: max(1, attempts))
                outcome = await park(inHand, pause, attempts, counts: counts)
            }
        case .isolate: outcome = await isolate(inHand)
        case .later(let pause):
            outcome = await park(
                inHand, subscription.retry.rung(for: pause), delivery.failedAttempts, counts: false)
        case .deadLetter(let reason, let errorType):
            outcome = await bury(inHand, reason: reason, errorType: errorType, delivery.failedAttempts + 1)
        case .giveBack:
            await release(inHand)
            if settle(inHand, .requeue) { outcome = .givenBack }
        case .reject:
            log("event dead-lettered", delivery, reason: "it is larger than the transport takes")
            if settle(inHand, .reject) { outcome = .deadLettered }
        case .reply(let body, let refusal):
            await reply(to: delivery, body, refusal)
            await complete(inHand)
            if settle(inHand, .acknowledge) { outcome = .acknowledged }
        case .abandon:
            // Not settled, it would count as if it had killed its consumer.
            if inHand.isAlone { await putBack(inHand) } else { await release(inHand) }
        }
        metrics.handled(outcome, since: start)
    }

    /// Has the message come back after a pause.
    private func park(
        _ inHand: DeliveryInHand, _ pause: Duration, _ attempts: Int, counts: Bool
    ) async -> ConsumerMetrics.Outcome {
        let delivery = inHand.delivery
        if inHand.source.isOrdered(delivery) {
            // A copy would come back behind those that it belongs before. It comes again only when its lease is free.
            await release(inHand)
            inHand.source.scheduleRetry(counts ? delivery.failedOnce() : delivery, after: pause)
            return .retried
        }
        var headers =
            counts ? delivery.failureHeaders(attempts: attempts) : [HistoryHeader.attempts: .integer(Int64(attempts))]
        // Its queue counts the copy's deliveries from the beginning. A handler that has answered has survived it.
        if inHand.deaths > 0 { headers[HistoryHeader.deaths] = .integer(Int64(counts ? 0 : inHand.deaths)) }
        let copy = delivery.copy(
            to: RetryPolicy.parkingPlace(pause), queue: subscription.queue, headers: headers)
        return await replace(inHand, by: copy, otherwise: .reject) ? .retried : .unsettled
    }

    /// Moves the message to where it is handled alone. There its deaths are counted from ``EventSubscription/suspicion`` on,
    /// since others may have raised the count of its queue: reconnects, deployments, what another process gave back.
    private func isolate(_ inHand: DeliveryInHand) async -> ConsumerMetrics.Outcome {
        let copy = suspect(inHand, deaths: max(subscription.suspicion, inHand.earlierDeaths))
        log(
            "message may have killed its consumers", inHand.delivery,
            reason: "\(inHand.deaths) deliveries without an answer")
        guard await replace(inHand, by: copy, otherwise: .reject) else { return .unsettled }
        // Only then may the copy be handled, which may end this process: otherwise both would come again.
        try? await inHand.source.flushSettlements(deadline: .now + subscription.deadline)
        return .isolated
    }

    /// A copy that is handled alone.
    private func suspect(_ inHand: DeliveryInHand, deaths: Int) -> OutboundMessage {
        inHand.delivery.copy(
            to: ExchangeName.requeue, queue: subscription.queue.suspectQueue,
            headers: [
                HistoryHeader.attempts: .integer(Int64(inHand.delivery.failedAttempts)),
                HistoryHeader.deaths: .integer(Int64(deaths)),
            ])
    }

    /// Has a suspect that was not handled, or not to the end, come again, without a death more. On the way out, when the task is
    /// cancelled.
    func putBack(_ inHand: DeliveryInHand) async {
        let copy = suspect(inHand, deaths: inHand.deaths)
        await release(inHand)
        do {
            let isRouted = try await whateverHappens { [transport] in
                try await transport.publish(copy, deadline: .now + .seconds(1))
            }
            if isRouted { _ = settle(inHand, .acknowledge) }
        } catch {
            log("a suspect could not be put back, and will count one death more", inHand.delivery, reason: "\(error)")
        }
    }

    /// Puts the message aside, with its history.
    private func bury(
        _ inHand: DeliveryInHand, reason: String, errorType: String, _ attempts: Int
    ) async -> ConsumerMetrics.Outcome {
        log("event dead-lettered", inHand.delivery, reason: reason)
        var headers = inHand.delivery.failureHeaders(attempts: attempts)
        headers[HistoryHeader.reason] = .string(Self.headerText(reason))
        headers[HistoryHeader.errorType] = .string(Self.headerText(errorType))
        let copy = inHand.delivery.copy(to: ExchangeName.deadLetters, queue: subscription.queue, headers: headers)
        return await replace(inHand, by: copy, otherwise: .reject) ? .deadLettered : .unsettled
    }

    /// Publishes a copy, and acknowledges the original once that is confirmed to be in a queue.
    ///
    /// What cannot be copied now stays unsettled: given back it would come again at once, and count as if it killed its
    /// consumers. One publish lasts as long as that may take, since a second one while the first is unanswered would
    /// become a second copy.
    ///
    /// - Parameter otherwise: What is done with a message that can never be copied.
    private func replace(_ inHand: DeliveryInHand, by copy: OutboundMessage, otherwise: Settlement) async -> Bool {
        let begin = stopwatch.elapsed()
        let waiting = pending.begin(after: subscription.deadline)
        defer { pending.end(waiting) }
        var failures = 0
        while true {
            let left = Self.holdLimit - (stopwatch.elapsed() - begin)
            do {
                let isRouted = try await transport.publish(copy, deadline: .now + max(left, .seconds(1)))
                guard isRouted else {
                    throw EventsError(
                        .unroutable, "no queue is bound to \(copy.exchange) for \(copy.routingKey)",
                        operation: "copy a message")
                }
                await release(inHand)
                return settle(inHand, .acknowledge)
            } catch is CancellationError {
                await release(inHand)
                return false
            } catch {
                let failure = error as? EventsError
                log("message could not be put aside, and is kept", inHand.delivery, reason: "\(error)")
                pending.failed(waiting, "\(error)")
                switch failure?.code {
                case nil, .invalidEvent, .eventTooLarge:
                    await release(inHand)
                    return settle(inHand, otherwise)
                case .unroutable, .exchangeNotFound:
                    // An operator may have deleted the queue in which it is to wait.
                    try? await subscription.topology.apply(to: transport, deadline: subscription.deadline)
                default: break
                }
                failures += 1
                let now = stopwatch.elapsed()
                let pause = Self.copyBackoff.delay(after: failures)
                let isCancelled = (try? await stopwatch.sleepUntil(now + pause)) == nil
                // Of one whose outcome is unknown there may be a copy already.
                if isCancelled || failure?.publishOutcome == .unknown || now - begin >= Self.holdLimit {
                    await release(inHand)
                    if !Task.isCancelled { _ = settle(inHand, .requeue) }
                    return false
                }
            }
        }
    }

    private static let copyBackoff = Backoff(first: .seconds(1), longest: .seconds(30))
    /// RabbitMQ takes back what is unsettled for longer than half an hour (`consumer_timeout`).
    static let holdLimit = Duration.seconds(20 * 60)

    /// Publishes the reply to a request. It is dropped where the requester has gone: then no caller waits.
    ///
    /// Only addresses of direct reply-to are replied to: any other names a queue, and a publisher could make this service
    /// write into queues that it may not write to itself.
    private func reply(to delivery: InboundDelivery, _ body: [UInt8], _ refusal: String?) async {
        guard let address = delivery.properties.replyTo else { return }
        guard Self.isReplyAddress(address) else {
            log("reply dropped", delivery, reason: "reply_to is not an address of direct reply-to")
            return
        }
        var properties = MessageProperties(
            contentType: "application/json", messageID: EventID().rawValue,
            correlationID: delivery.properties.correlationID)
        if let refusal {
            properties.headers = [
                RequestHeader.errorType: .string("rejected"), HistoryHeader.reason: .string(Self.headerText(refusal)),
            ]
        }
        let message = OutboundMessage(exchange: "", routingKey: address, properties: properties, body: body)
        do {
            try await transport.publish(message, deadline: .now + subscription.deadline)
        } catch {
            log("reply could not be sent", delivery, reason: "\(error)")
        }
    }

    /// Whether an address can be one of RabbitMQ's for replies: a process and a key, both in base 64. What it cannot read
    /// crashes its channel, and the connection with that.
    static func isReplyAddress(_ address: String) -> Bool {
        guard address.hasPrefix(directReplyTo) else { return false }
        let parts = address.utf8.dropFirst(directReplyTo.utf8.count)
            .split(separator: UInt8(ascii: "."), omittingEmptySubsequences: false)
        return parts.count >= 2
            && parts.allSatisfy { part in
                !part.isEmpty
                    && part.allSatisfy { byte in
                        switch byte {
                        case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
                            UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "+"), UInt8(ascii: "/"),
                            UInt8(ascii: "="), UInt8(ascii: "_"), UInt8(ascii: "-"):
                            true
                        default: false
                        }
                    }
            }
    }

    /// How RabbitMQ's addresses for replies begin (RabbitMQ guide, "Direct Reply-to").
    private static let directReplyTo = "amq.rabbitmq.reply-to."

    private func settle(_ inHand: DeliveryInHand, _ settlement: Settlement) -> Bool {
        do {
            try inHand.source.settle(inHand.delivery, settlement)
            if settlement == .requeue { inHand.wasGivenBack = true }
            return true
        } catch {
            log("delivery could not be settled and will come again", inHand.delivery, reason: "\(error)")
            return false
        }
    }

    // MARK: The inbox

    private func complete(_ inHand: DeliveryInHand) async {
        guard let inbox, let claim = inHand.claim else { return }
        do {
            try await whateverHappens {
                try await inbox.complete(
                    claim.entry, timeToLive: subscription.inbox.timeToLive,
                    deadline: .now + subscription.inbox.deadline)
            }
        } catch {
            // It has been handled, and is acknowledged all the same. A repetition within the lease waits for its end.
            log("inbox could not be told", inHand.delivery, reason: "\(error)")
        }
    }

    private func release(_ inHand: DeliveryInHand) async {
        guard let inbox, let claim = inHand.claim else { return }
        do {
            try await whateverHappens {
                try await inbox.release(
                    claim.entry, token: claim.token, deadline: .now + subscription.inbox.deadline)
            }
        } catch {
            log("lease could not be given back and will run out", inHand.delivery, reason: "\(error)")
        }
    }

    /// The inbox is asked and told although this task is, or is just being, cancelled: a shutdown must not leave leases
    /// behind.
    private func whateverHappens<Result: Sendable>(
        _ body: @escaping @Sendable () async throws -> Result
    ) async throws -> Result {
        try await Task { try await body() }.value
    }

    // MARK: Texts

    /// What fits a header: no control characters, 1,000 bytes at most.
    private static func headerText(_ text: String) -> String {
        var result = ""
        for scalar in text.unicodeScalars {
            guard result.utf8.count < 997 else { break }
            result.unicodeScalars.append(scalar.value < 0x20 || scalar.value == 0x7F ? " " : scalar)
        }
        return result
    }

    func log(_ message: Logger.Message, _ delivery: InboundDelivery, reason: String) {
        logger.warning(
            message,
            metadata: [
                "event_id": "\(delivery.properties.messageID ?? "")", "routing_key": "\(delivery.routingKey)",
                "queue": "\(subscription.queue)", "attempt": "\(delivery.attempt)", "reason": "\(reason)",
            ])
    }
}
