internal import ConnectionThread
internal import Logging
internal import Metrics
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// Opening, losing and opening again. Called on the connection thread, but for ``ready(deadline:)``.
extension RabbitMQConnection {
    /// Returns once the connection is open, blocked or not. Throws when it will not be: the server refuses us, the owner
    /// has closed, or the deadline has passed, then with what the last attempt came to.
    func ready(deadline: ContinuousClock.Instant) async throws {
        try Task.checkCancellation()
        let waiter = Waiter<Void>()
        let limit = MonotonicTime(deadline)
        let isOpen = try shared.withLock { shared in
            if shared.state == .open || shared.state == .blocked { return true }
            if shared.isPermanent, let reason = shared.reason { throw reason }
            // Cancelled ones leave when the next one comes.
            shared.openings.removeAll(where: \.waiter.isResolved)
            guard shared.openings.count < Self.requestLimit else {
                throw EventsError(
                    .overloaded, "\(Self.requestLimit) callers are waiting for the connection already",
                    operation: "connect to \(configuration)", underlying: shared.reason)
            }
            shared.openings.append(Opening(waiter: waiter, deadline: limit))
            return false
        }
        if isOpen { return }
        Watchdog.shared.schedule(at: limit)
        try await waiter.value()
    }

    /// The server has accepted the login.
    func opened() {
        let isRecovery = shared.withLock { shared in
            defer { shared.hasOpened = true }
            // Its owner may have closed it a moment ago.
            if shared.state != .closed { shared.isPermanent = false }
            shared.openedAt = .now
            return shared.hasOpened
        }
        // Messages wait for the channel; also where the server refused us before.
        set(
            .openingChannel,
            EventsError(.connectionFailed, "the channel for publishing is being opened", operation: "connect"))
        if isRecovery { recoveries.increment() }
        logger.log(
            level: isRecovery ? .notice : .info, "connected",
            metadata: ["connection": "\(name)", "server": "\(configuration)"])
        change(to: .open)
        // Only now: a caller that has found it not yet open is among them, and one that comes later finds it open.
        let openings = shared.withLock { shared in
            defer { shared.openings = [] }
            return shared.openings
        }
        for opening in openings { opening.waiter.resolve(.success(())) }
    }

    /// The broker takes no messages, or takes them again.
    func blocked(_ reason: String?) {
        guard let reason else {
            window.withLock { $0.unblocked(now: .now) }
            set(.blockedByBroker, nil)
            logger.notice("the broker takes messages again", metadata: ["connection": "\(name)"])
            return change(to: .open)
        }
        let error = EventsError(.overloaded, "the broker blocks publishing: \(reason)", operation: "connection")
        set(.blockedByBroker, error)
        logger.warning(
            "the broker blocks publishing", metadata: ["connection": "\(name)", "reason": "\(reason)"])
        change(to: .blocked, error)
    }

    /// Whether the watchdog has shut down the socket of the connection that is open now, or was a moment ago.
    var hasStalled: Bool { shared.withLock { $0.hasStalled } }

    /// A connection that was open has ended by itself. The thread then asks for ``retryDelay(after:)``.
    ///
    /// - Parameters:
    ///   - sentBytes: How much of its stream may have left.
    ///   - blamed: The request that the broker has closed the connection for.
    ///   - cause: Whether a message may have ended it.
    func ended(_ failure: any Error, sentBytes: UInt64, blamed: BrokerRequest?, cause: AMQPFailure.Cause) {
        let error = AMQPFailure.error(from: failure, server: "\(configuration)", connecting: false)
        let (consumers, requests) = shared.withLock { shared in
            defer { shared.consumers = [:] }
            // What is in the mailbox is among the requests, and must not be taken twice.
            _ = mailbox.takeAll()
            return (Array(shared.consumers.values), Array(shared.requests.values))
        }
        change(to: .recovering, error)
        for consumer in consumers {
            // To be asked for again, whatever the reason was: the connection is opened again too.
            consumer.fail(
                error.isRetriable ? error : EventsError(.connectionLost, error.message, operation: error.operation))
        }
        repliesLost(error)
        resume(window.withLock { $0.connectionLost(error, sentBytes: sentBytes, cause: cause) })
        for request in requests.sorted(by: { $0.number < $1.number }) {
            switch request.operation {
            case .stopConsumer, .closeConsumer:
                // The broker has done so by itself.
                forget(request)
                request.succeed(.done)
            case _ where request === blamed:
                forget(request)
                request.fail(error.code, error.message)
            case .consume, .flushSettlements:
                forget(request)
                request.fail(error.isRetriable ? error.code : .connectionLost, error.message)
            default:
                // Declarations can be repeated. There is room: the requests are as bounded as the mailbox.
                if mailbox.post(request) == .closed { request.fail(.closed, "the transport was closed") }
            }
        }
    }

    /// There is no connection: one was lost, or could not be opened. Returns how long to wait until the next attempt, nil
    /// when there is to be none.
    func retryDelay(after failure: any Error) -> Duration? {
        let (wasOpen, hasOpened) = shared.withLock { ($0.openedAt != nil, $0.hasOpened) }
        let error = AMQPFailure.error(from: failure, server: "\(configuration)", connecting: !wasOpen)
        // A server that has accepted the login before may refuse it for a moment: its backend for users is away, or certificates are
        // being exchanged. Then callers wait, as long as their deadlines allow.
        let isRefused = !wasOpen && [.accessRefused, .invalidConfiguration, .tlsFailed].contains(error.code)
        let isPermanent = isRefused && !hasOpened
        let (failures, isClosed, openings) = shared.withLock { shared -> (Int, Bool, [Opening]) in
            if shared.state == .closed { return (0, true, []) }
            shared.hasStalled = false
            // A connection that lasted a second begins the back-off again; one that is closed at once does not.
            if let openedAt = shared.openedAt, openedAt.advanced(by: .seconds(1)) < .now { shared.failures = 0 }
            shared.openedAt = nil
            shared.obstacles = [:]
            shared.topologyProblem = nil
            // The time in which there is no connection does not count.
            if !wasOpen { shared.restorationBegan = nil }
            shared.failures += 1
            shared.reason = error
            shared.isPermanent = isPermanent
            guard isPermanent else { return (shared.failures, false, []) }
            defer { shared.openings = [] }
            return (shared.failures, false, shared.openings)
        }
        if isClosed { return nil }
        change(to: .recovering, error)
        if isPermanent {
            resume(window.withLock { $0.refuse(error) })
            for opening in openings { opening.waiter.resolve(.failure(error)) }
            for request in shared.withLock({ Array($0.requests.values) }) {
                forget(request)
                request.fail(error.code, error.message)
            }
        } else {
            window.withLock { $0.blocked(error) }
        }
        // No attempt that comes sooner changes the mind of a server that refuses us.
        let delay =
            isRefused
            ? configuration.maximumReconnectDelay * Double.random(in: 0.5...1)
            // While the search for a message that ends connections makes progress, the others wait.
            : configuration.backoff.delay(after: wasOpen && window.withLock { $0.retriesSoon } ? 1 : failures)
        // The first failure, and each after a pause that a person would notice.
        logger.log(
            level: failures == 1 || delay >= .seconds(1) ? .warning : .info, "no connection",
            metadata: ["connection": "\(name)", "reason": "\(error)", "next_attempt_in": "\(Self.text(delay))"])
        return delay
    }

    /// Notes or clears what keeps messages from being written. Those that wait are told the first reason that is left.
    func set(_ obstacle: PublishObstacle, _ reason: EventsError?) {
        let first = shared.withLock { shared in
            shared.obstacles[obstacle] = reason
            return PublishObstacle.allCases.compactMap { shared.obstacles[$0] }.first
        }
        window.withLock { window in
            if let first { window.blocked(first) } else { window.connected() }
        }
    }

    // MARK: The topology

    /// The broker has a declaration.
    func declared(_ operation: BrokerRequest.Operation) {
        guard topology.insert(operation) else { return }
        logger.warning(
            "too many declarations: from this one on they are not declared again after a reconnect",
            metadata: ["limit": "\(topology.limit)", "declaration": "\(operation)"])
    }

    /// What was declared before a loss is being declared again, before anything is published. Returns until when everything
    /// waits for it, on whichever connection it ends.
    func restoring(_ count: Int) -> MonotonicTime {
        set(
            .restoringTopology,
            EventsError(
                .connectionLost, "the topology is being declared again (\(count) declarations)",
                operation: "connection"))
        return shared.withLock { shared in
            let began = shared.restorationBegan ?? .now
            shared.restorationBegan = began
            return began.advanced(by: configuration.stallLimit)
        }
    }

    /// All of it has been answered, or has had its time.
    func restored() {
        set(.restoringTopology, nil)
        noteUse()
    }

    /// After the next loss everything waits for the topology again, as long as the first time; not while each connection ends before it is of use.
    func noteUse() {
        shared.withLock { shared in
            let isWaiting = shared.obstacles[.restoringTopology] != nil
            let isOpening = isForPublishing && shared.obstacles[.openingChannel] != nil
            if !isWaiting, !isOpening { shared.restorationBegan = nil }
        }
    }

    /// The broker has not declared something again.
    ///
    /// - Parameter endedConnection: Whether it has closed the connection for it.
    func restorationFailed(
        _ operation: BrokerRequest.Operation, _ error: any Error, endedConnection: Bool = false
    ) {
        let error = AMQPFailure.error(from: error, server: "", connecting: false)
        let isNews = topology.failed(
            operation, error, now: .now, limit: configuration.stallLimit, endedConnection: endedConnection)
        if isNews { logFailure(of: operation, error) }
    }

    /// A connection has ended, naming nothing, while a declaration was the oldest one under way.
    func restorationLost(_ operation: BrokerRequest.Operation, _ error: any Error) {
        let error = AMQPFailure.error(from: error, server: "", connecting: false)
        let isNews = topology.lost(operation, error, on: name, now: .now, limit: configuration.stallLimit)
        if isNews { logFailure(of: operation, error) }
    }

    private func logFailure(of operation: BrokerRequest.Operation, _ error: EventsError) {
        logger.warning(
            "a declaration failed after a reconnect, and is tried again",
            metadata: ["declaration": "\(operation)", "reason": "\(error.message)"])
    }

    /// The channel for declarations can be used.
    func topologyOpened() { shared.withLock { $0.topologyProblem = nil } }

    /// A channel cannot be opened, and is tried again.
    func channelBlocked(isForPublishing: Bool, _ error: EventsError, retryIn delay: Duration) {
        let what = isForPublishing ? "publishing" : "declarations"
        if isForPublishing {
            set(
                .failingChannel,
                EventsError(
                    .connectionLost, "the channel for publishing cannot be opened: \(error.message)",
                    operation: "publish"))
        } else {
            shared.withLock { $0.topologyProblem = error }
        }
        logger.warning(
            "a channel cannot be opened",
            metadata: ["channel": "\(what)", "reason": "\(error.message)", "next_attempt_in": "\(Self.text(delay))"])
    }

    private static func text(_ delay: Duration) -> String {
        "\(Duration.milliseconds(Int64(delay / .milliseconds(1))))"
    }
}
