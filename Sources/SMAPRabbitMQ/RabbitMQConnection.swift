internal import ConnectionThread
internal import Logging
internal import Metrics
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// What callers and the connection thread of one connection share. Callers leave work here and suspend; the thread, the
/// watchdog, or the end of the connection answers them.
///
/// It outlives the TCP connections that it is made of: when one is lost the thread opens another, after a delay that
/// grows. Publishes and declarations that are under way go on there, as long as their deadlines allow; consumers end with
/// an error, since their deliveries have gone back to the queue, and are started again by those who run them.
final class RabbitMQConnection: Sendable, PublishReservationOwner {
    /// A caller that waits for the connection to open.
    struct Opening {
        let waiter: Waiter<Void>
        let deadline: MonotonicTime
    }

    /// What can keep messages from being written. Where several do, the first of them is told.
    enum PublishObstacle: CaseIterable {
        case blockedByBroker
        case restoringTopology
        /// It could not be opened, and is tried again.
        case failingChannel
        /// It will be open in a moment: nothing that `health` tells.
        case openingChannel
    }

    struct Shared {
        var state = ConnectionState.connecting
        /// Why it is not open.
        var reason: EventsError?
        /// Whether waiting is in vain: the server refuses the credentials, or the owner has closed.
        var isPermanent = false
        /// When the connection that is open now, or was lost a moment ago, was opened.
        var openedAt: MonotonicTime?
        var hasOpened = false
        /// Whether the watchdog has shut down the socket of the connection that is open now.
        var hasStalled = false
        /// Failures in a row.
        var failures = 0
        /// When what was declared began to be declared again, while everything waits for it.
        var restorationBegan: MonotonicTime?
        var openings: [Opening] = []
        var requests: [ObjectIdentifier: BrokerRequest] = [:]
        var consumers: [ObjectIdentifier: Consumer] = [:]
        /// What keeps messages from being written although the connection is open.
        var obstacles: [PublishObstacle: EventsError] = [:]
        /// Why the channel of declarations cannot be opened; nil when it can.
        var topologyProblem: EventsError?
        /// Why replies cannot be consumed, and until when that is not tried again.
        var repliesProblem: (error: EventsError, until: ContinuousClock.Instant)?
    }

    /// So many requests, and callers that wait for the connection to make one, at a time.
    static let requestLimit = 1024

    let configuration: RabbitMQConfiguration
    let name: String
    /// Whether it publishes. The other one only consumes, and has no channel for publishing.
    let isForPublishing: Bool
    let logger: Logger
    let topology: DeclaredTopology
    /// The callers that wait for replies on this connection.
    let replies = ReplyRegistry()
    /// As bounded as the requests, and the consumers that are closed.
    let mailbox = Mailbox<BrokerRequest>(capacity: .max)
    let window: Mutex<PublishWindow>
    let shared = Mutex(Shared())
    /// How many drivers there are, for the test that looks for retain cycles.
    let driverCount = Atomic<Int>(0)
    private let repliesWanted = Atomic<Bool>(false)
    private let repliesReady = Atomic<Bool>(false)
    private let closeLimit = Atomic<UInt64>(UInt64.max)
    private let threadEnd = Latch()
    /// Held while a change of state is told, so that changes are told in their order. Never taken under `shared`.
    private let changes = Mutex(())
    private let observe: @Sendable (ConnectionChange) -> Void
    let recoveries: Counter
    private let openGauge: Gauge
    private let blockedGauge: Gauge
    // Sound: set once, in init, before any other thread knows of this object.
    private nonisolated(unsafe) var thread: ConnectionThread?

    /// Starts connecting, and goes on trying until it is closed.
    ///
    /// - Parameter observe: Told of each change of state, in their order, on the thread that brings it about; neither it
    ///   nor the backend of metrics may block.
    init(
        _ configuration: RabbitMQConfiguration, name: String, isForPublishing: Bool, logger: Logger,
        topology: DeclaredTopology, observe: @escaping @Sendable (ConnectionChange) -> Void = { _ in }
    ) throws {
        self.configuration = configuration
        self.name = name
        self.isForPublishing = isForPublishing
        self.logger = logger
        self.topology = topology
        self.observe = observe
        self.recoveries = Counter(label: "events_connection_recoveries_total", dimensions: [("connection", name)])
        self.openGauge = Gauge(label: "events_connection_open", dimensions: [("connection", name)])
        self.blockedGauge = Gauge(label: "events_connection_blocked", dimensions: [("connection", name)])
        self.window = Mutex(
            PublishWindow(
                PublishWindow.Limits(
                    messages: configuration.windowMessages, bytes: configuration.windowBytes,
                    waiting: configuration.maximumWaitingPublishes)))
        do {
            let thread = try ConnectionThread(stallLimit: configuration.stallLimit) { [weak self] now in
                self?.check(now: now)
            } onStall: { [weak self] in
                // The thread finds its socket shut down, and opens another. Callers have deadlines of their own.
                logger.warning(
                    "the connection's thread was away for too long (stallLimit), and its socket is shut down",
                    metadata: ["connection": "\(name)"])
                self?.shared.withLock { $0.hasStalled = true }
                self?.change(
                    to: .recovering,
                    EventsError(.connectionLost, "the connection is unresponsive", operation: "connection"))
            }
            self.thread = thread
            observe(ConnectionChange(connection: name, state: .connecting))
            try thread.start(name: "smap-rabbit-\(name.prefix(3))", openLimit: configuration.connectTimeout * 2) {
                // The thread owns the connection object until it has ended.
                try AMQPDriver(connection: self, thread: $0, name: name)
            } failed: { _ in
            } retryDelay: { failure in
                self.retryDelay(after: failure)
            } ended: { [threadEnd] in
                threadEnd.open()
            }
        } catch let error as SocketError {
            throw EventsError(.connectionFailed, error.description, operation: "connect to \(configuration)")
        }
    }

    /// How it stands, and why.
    var status: (state: ConnectionState, reason: EventsError?) {
        shared.withLock { ($0.state, $0.reason) }
    }

    /// What keeps it from publishing now, a sentence each.
    var publishingProblems: [String] {
        let (state, reason, obstacles) = shared.withLock { ($0.state, $0.reason, $0.obstacles) }
        guard state == .open else { return ["publishing: \(state)" + (reason.map { ": \($0)" } ?? "")] }
        var problems = PublishObstacle.allCases.filter { $0 != .openingChannel }
            .compactMap { obstacles[$0].map { "publishing: \($0.message)" } }
        if let destination = window.withLock({ $0.unconfirmedDestination(now: .now) }) {
            problems.append("publishing: the broker does not confirm what goes to \(destination)")
        }
        problems += topology.problems
        return problems
    }

    func wake() { thread?.wake() }

    /// Ends whatever the connection waits for, when it is still being opened or hangs.
    func shutDownSocket() { thread?.shutDownSocket() }

    func change(to state: ConnectionState, _ reason: EventsError? = nil) {
        changes.withLock { _ in
            let hasChanged = shared.withLock { shared in
                guard shared.state != .closed, shared.state != state else { return false }
                shared.state = state
                shared.reason = reason
                return true
            }
            guard hasChanged else { return }
            openGauge.record(state == .open || state == .blocked ? 1 : 0)
            if isForPublishing { blockedGauge.record(state == .blocked ? 1 : 0) }
            observe(ConnectionChange(connection: name, state: state, reason: reason))
        }
    }

    // MARK: Closing

    /// Waits until no caller waits for a confirm any more. Some of the time is left for the goodbye.
    func drain(until deadline: ContinuousClock.Instant, of timeout: Duration) async {
        let drained = Latch()
        resume(window.withLock { $0.whenDrained { drained.open() } })
        // Not in this task, which may be cancelled: others may wait for what is unconfirmed.
        await Task { await drained.wait(until: deadline - min(AMQPDriver.goodbyeLimit, timeout / 4)) }.value
    }

    /// Closes the connection. Returns by the deadline, in every state.
    func close(by deadline: ContinuousClock.Instant) async {
        closeLimit.store(MonotonicTime(deadline).nanoseconds, ordering: .sequentiallyConsistent)
        end(EventsError(.closed, "the transport was closed", operation: "connection"))
        thread?.stop()
        await Task { await threadEnd.wait(until: deadline) }.value
    }

    /// Until when the broker's goodbye may be waited for.
    var closeDeadline: MonotonicTime {
        MonotonicTime(nanoseconds: closeLimit.load(ordering: .sequentiallyConsistent))
    }

    /// Closes the connection without waiting for anything: for when no owner is left to wait.
    func abandon() {
        closeLimit.store(0, ordering: .sequentiallyConsistent)
        end(EventsError(.closed, "the transport is gone", operation: "connection"))
        thread?.stop()
    }

    /// Answers all callers that wait, and refuses all that come later. Any thread; the first error stands.
    func end(_ error: EventsError) {
        change(to: .closed, error)
        let (openings, requests, consumers) = shared.withLock { shared in
            shared.isPermanent = true
            // What is in the mailbox is among the requests.
            _ = mailbox.close()
            defer {
                shared.openings = []
                shared.requests = [:]
                shared.consumers = [:]
            }
            return (shared.openings, Array(shared.requests.values), Array(shared.consumers.values))
        }
        for opening in openings { opening.waiter.resolve(.failure(error)) }
        resume(window.withLock { $0.close(error) })
        replies.connectionLost(error, isFinal: true)
        for request in requests { request.fail(error.code, error.message) }
        for consumer in consumers { consumer.fail(error) }
    }

    // MARK: Replies to requests

    /// Whether replies are consumed on each publishing channel.
    var repliesAreWanted: Bool { repliesWanted.load(ordering: .acquiring) }
    /// Whether they are on the channel that is open now.
    var repliesAreConsumed: Bool { repliesReady.load(ordering: .acquiring) }

    /// Makes sure that replies are consumed, before a request. A refusal closes the channel that all publishes share, so it
    /// is not tried again for ten seconds.
    func consumeReplies(deadline: ContinuousClock.Instant) async throws {
        guard !repliesAreConsumed else { return }
        if let (error, until) = shared.withLock({ $0.repliesProblem }), until > .now { throw error }
        _ = try await request(.consumeReplies, name: "consume replies", deadline: deadline)
    }

    /// The broker has answered, on the thread.
    func repliesConsumed(_ error: EventsError?) {
        shared.withLock { $0.repliesProblem = error.map { ($0, .now + .seconds(10)) } }
        repliesWanted.store(error == nil, ordering: .releasing)
        repliesReady.store(error == nil, ordering: .releasing)
    }

    /// The channel on which they were consumed is gone.
    func repliesLost(_ error: EventsError) {
        repliesReady.store(false, ordering: .releasing)
        replies.connectionLost(error)
    }

    // MARK: The watchdog

    private func check(now: MonotonicTime) -> MonotonicTime? {
        let (resumptions, nextPublish, needsReset) = window.withLock { window in
            let resumptions = window.expire(now: now)
            return (resumptions, window.nextDeadline, !resumptions.isEmpty && window.resetTime < .distantFuture)
        }
        resume(resumptions)
        // Nothing else may bring the thread round, and it does not know of the time yet.
        if needsReset { wake() }
        var next = nextPublish
        let (late, overdue, reason, problem, isOpen) = shared.withLock { shared in
            let late = shared.openings.filter { $0.deadline <= now }
            if !late.isEmpty { shared.openings.removeAll { $0.deadline <= now } }
            for opening in shared.openings { next = min(next, opening.deadline) }
            let overdue = shared.requests.values.filter { $0.deadline <= now }
            for request in overdue { shared.requests[ObjectIdentifier(request)] = nil }
            for request in shared.requests.values { next = min(next, request.deadline) }
            return (late, overdue, shared.reason, shared.topologyProblem, shared.state == .open)
        }
        if !late.isEmpty {
            // A server that accepted the login before may accept it again: the deadline is what has passed.
            let noConnection = EventsError(
                reason.map { $0.isRetriable ? $0.code : .connectionFailed } ?? .connectionFailed,
                reason?.message ?? "\(configuration) did not answer by the deadline",
                operation: "connect to \(configuration)", underlying: reason)
            for opening in late { opening.waiter.resolve(.failure(noConnection)) }
        }
        let obstacle =
            isOpen ? problem.map { "the channel for declarations cannot be opened: \($0.message)" } : reason?.message
        let why = obstacle.map { ": \($0)" } ?? ""
        for request in overdue { request.fail(.deadlineExceeded, "no answer by the deadline\(why)") }
        return next == .distantFuture ? nil : next
    }
}
