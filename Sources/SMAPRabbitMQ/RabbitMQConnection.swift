internal import ConnectionThread
internal import Logging
internal import Metrics
internal import SMAPEvents
internal import Synchronization

/// What callers and the connection thread of one connection share. Callers leave work here and suspend; the thread, the
/// watchdog, or the end of the connection answers them.
///
/// It outlives the TCP connections that it is made of: when one is lost the thread opens another, after a delay that
/// grows. Publishes and declarations that are under way go on there, as long as their deadlines allow; consumers end with
/// an error, since their deliveries have gone back to the queue, and are started again by whoever runs them.
final class RabbitMQConnection: Sendable {
    private struct Waiting {
        let deadline: MonotonicTime
        let continuation: CheckedContinuation<Void, any Error>
    }

    private struct Shared {
        var state = ConnectionState.connecting
        /// Why it is not open.
        var reason: EventsError?
        /// Whether waiting is in vain: the server refuses the credentials, or the owner has closed.
        var isHopeless = false
        /// When the connection that is open now, or was lost a moment ago, was opened.
        var openedAt: MonotonicTime?
        var hasOpened = false
        /// Failures in a row.
        var failures = 0
        var waiting: [UInt64: Waiting] = [:]
        var lastID: UInt64 = 0
        var calls: [ObjectIdentifier: RemoteCall] = [:]
        var consumers: [ObjectIdentifier: Consumer] = [:]
    }

    private static let callLimit = 1024

    let configuration: RabbitMQConfiguration
    let name: String
    let logger: Logger
    let topology: DeclaredTopology
    /// Who waits for replies on this connection.
    let replies = ReplyRegistry()
    private let mailbox = Mailbox<RemoteCall>(capacity: callLimit)
    private let window: Mutex<PublishWindow>
    private let shared = Mutex(Shared())
    /// Held while a change of state is told, so that changes are told in their order. Never taken under `shared`.
    private let changes = Mutex(())
    private let observe: @Sendable (ConnectionChange) -> Void
    private let recoveries: Counter
    private let openGauge: Gauge
    // Set once, in init, before any other thread knows of this object.
    private nonisolated(unsafe) var thread: ConnectionThread?

    /// Starts connecting, and goes on trying until it is closed.
    ///
    /// - Parameter observe: Told of each change of state, in their order, on whichever thread brings it about; neither it
    ///   nor the backend of metrics may block.
    init(
        _ configuration: RabbitMQConfiguration, name: String, logger: Logger, topology: DeclaredTopology,
        observe: @escaping @Sendable (ConnectionChange) -> Void = { _ in }
    ) throws {
        self.configuration = configuration
        self.name = name
        self.logger = logger
        self.topology = topology
        self.observe = observe
        self.recoveries = Counter(label: "events_connection_recoveries_total", dimensions: [("connection", name)])
        self.openGauge = Gauge(label: "events_connection_open", dimensions: [("connection", name)])
        self.window = Mutex(
            PublishWindow(messageLimit: configuration.windowMessages, byteLimit: configuration.windowBytes))
        do {
            let thread = try ConnectionThread(stallLimit: configuration.stallLimit) { [weak self] now in
                self?.check(now: now)
            } onStall: { [weak self] in
                // The thread finds its socket shut down, and opens another. Callers have deadlines of their own.
                self?.change(
                    to: .recovering, EventsError(.connectionLost, "the connection hung", operation: "connection"))
            }
            self.thread = thread
            observe(ConnectionChange(connection: name, state: .connecting))
            try thread.start(name: "smap-rabbit-\(name.prefix(3))", openLimit: configuration.connectTimeout * 2) {
                // The thread owns the connection object until it has ended.
                try AMQPDriver(connection: self, thread: $0, name: name)
            } failed: { _ in
            } retryDelay: { failure in
                self.retryDelay(after: failure)
            }
        } catch let error as SocketError {
            throw EventsError(.connectionFailed, error.description, operation: "connect to \(configuration)")
        }
    }

    /// How it stands, and why.
    var status: (state: ConnectionState, reason: EventsError?) {
        shared.withLock { ($0.state, $0.reason) }
    }

    func wake() { thread?.wake() }

    private func change(to state: ConnectionState, _ reason: EventsError? = nil) {
        changes.withLock { _ in
            let hasChanged = shared.withLock { shared in
                guard shared.state != .closed, shared.state != state else { return false }
                shared.state = state
                shared.reason = reason
                return true
            }
            guard hasChanged else { return }
            openGauge.record(state == .open ? 1 : 0)
            observe(ConnectionChange(connection: name, state: state, reason: reason))
        }
    }

    // MARK: Opening and closing

    /// Returns once the connection is open, blocked or not. Throws when it will not be: the server refuses us, the owner
    /// has closed, or the deadline has passed, then with what the last attempt came to.
    func ready(deadline: ContinuousClock.Instant) async throws {
        let id = shared.withLock { shared in
            shared.lastID += 1
            return shared.lastID
        }
        let limit = MonotonicTime(deadline)
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
                let result = shared.withLock { shared -> Result<Void, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if shared.state == .open || shared.state == .blocked { return .success(()) }
                    if shared.isHopeless, let reason = shared.reason { return .failure(reason) }
                    shared.waiting[id] = Waiting(deadline: limit, continuation: continuation)
                    return nil
                }
                if let result { continuation.resume(with: result) } else { Watchdog.shared.look(by: limit) }
            }
        } onCancel: {
            let cancelled = shared.withLock { $0.waiting.removeValue(forKey: id) }
            cancelled?.continuation.resume(throwing: CancellationError())
        }
    }

    /// Called on the thread once the server has accepted the login.
    func opened() {
        let isRecovery = shared.withLock { shared in
            defer { shared.hasOpened = true }
            // Its owner may have closed it a moment ago.
            if shared.state != .closed { shared.isHopeless = false }
            shared.openedAt = .now
            return shared.hasOpened
        }
        window.withLock { $0.connected() }
        if isRecovery { recoveries.increment() }
        logger.info("connected", metadata: ["connection": "\(name)", "server": "\(configuration)"])
        change(to: .open)
        // Only now: who has found it not yet open is among them, and who comes later finds it open.
        let waiting = shared.withLock { shared in
            defer { shared.waiting = [:] }
            return Array(shared.waiting.values)
        }
        for entry in waiting { entry.continuation.resume() }
    }

    /// The broker takes no messages, or takes them again.
    func blocked(_ reason: String?) {
        guard let reason else {
            window.withLock { $0.connected() }
            logger.info("the broker takes messages again")
            return change(to: .open)
        }
        let error = EventsError(.overloaded, "the broker blocks publishing: \(reason)", operation: "connection")
        window.withLock { $0.obstacle = error }
        logger.warning("the broker blocks publishing", metadata: ["reason": "\(reason)"])
        change(to: .blocked, error)
    }

    /// A connection that was open has ended by itself. Called on the thread, which then asks for ``retryDelay(after:)``.
    ///
    /// - Parameter unwritten: How many of the messages taken last have not been written at all.
    func ended(_ failure: any Error, unwritten: Int) {
        let error = AMQPFailure.error(from: failure, server: "\(configuration)", connecting: false)
        // A broker that closes the connection for what it was sent would do so again.
        let isPoisoned = if case AMQPFailure.closedByBroker = failure { error.code != .connectionLost } else { false }
        let (consumers, calls) = shared.withLock { shared in
            defer { shared.consumers = [:] }
            // What is in the mailbox is among the calls, and must not be taken twice.
            _ = mailbox.takeAll()
            return (Array(shared.consumers.values), Array(shared.calls.values))
        }
        change(to: .recovering, error)
        for consumer in consumers { consumer.fail(error) }
        replies.connectionLost(error)
        answer { $0.connectionLost(error, unwritten: unwritten, isPoisoned: isPoisoned) }
        for call in calls.sorted(by: { $0.number < $1.number }) {
            switch call.request {
            case .stopConsumer, .closeConsumer:
                // The broker has done so by itself.
                forget(call)
                call.answer(.success(.done))
            case .consume:
                forget(call)
                call.fail(error.code, error.message)
            default:
                // Declarations can be repeated. There is room: the calls are as bounded as the mailbox.
                if mailbox.post(call) == .closed { call.fail(.closed, "the transport was closed") }
            }
        }
    }

    /// There is no connection: one was lost, or could not be opened. Called on the thread; returns how long to wait until
    /// the next attempt, nil when there is to be none.
    private func retryDelay(after failure: any Error) -> Duration? {
        let wasOpen = shared.withLock { $0.openedAt != nil }
        let error = AMQPFailure.error(from: failure, server: "\(configuration)", connecting: !wasOpen)
        let isHopeless = [.accessRefused, .invalidConfiguration, .tlsFailed].contains(error.code)
        let (failures, isClosed, waiting) = shared.withLock { shared -> (Int, Bool, [Waiting]) in
            if shared.state == .closed { return (0, true, []) }
            // One that worked for a while was lost by accident; one that is thrown out at once must wait longer.
            if let openedAt = shared.openedAt, openedAt.advanced(by: .seconds(1)) < .now { shared.failures = 0 }
            shared.openedAt = nil
            shared.failures += 1
            shared.reason = error
            shared.isHopeless = isHopeless
            guard isHopeless else { return (shared.failures, false, []) }
            defer { shared.waiting = [:] }
            return (shared.failures, false, Array(shared.waiting.values))
        }
        if isClosed { return nil }
        change(to: .recovering, error)
        if isHopeless {
            answer { $0.refuse(error) }
            for entry in waiting { entry.continuation.resume(throwing: error) }
            for call in shared.withLock({ Array($0.calls.values) }) {
                forget(call)
                call.fail(error.code, error.message)
            }
        } else {
            window.withLock { $0.obstacle = error }
        }
        // Nothing that is tried sooner changes the mind of a server that refuses us.
        let delay = isHopeless ? configuration.maximumReconnectDelay : configuration.backoff.delay(after: failures)
        logger.warning(
            "no connection", metadata: ["connection": "\(name)", "reason": "\(error)", "next_attempt_in": "\(delay)"])
        return delay
    }

    /// Waits until nobody waits for a confirm any more or the deadline has passed, then closes the connection.
    func close(deadline: ContinuousClock.Instant) async {
        // Not in this task, which may be cancelled: others may wait for what is unconfirmed.
        await Task {
            await withTaskGroup { group in
                group.addTask { await self.drain() }
                group.addTask { try? await Task.sleep(until: deadline) }
                await group.next()
                // Ends the drain, where it is not over.
                end(EventsError(.closed, "the transport was closed", operation: "connection"))
                group.cancelAll()
            }
        }.value
        thread?.stop()
        await thread?.join()
    }

    private func drain() async {
        await withCheckedContinuation { continuation in
            window.withLock { $0.whenDrained(continuation) }.give()
        }
    }

    /// Closes the connection without waiting for anything: for when nobody is left to wait.
    func abandon() {
        end(EventsError(.closed, "the transport is gone", operation: "connection"))
        thread?.stop()
    }

    /// Answers everyone who waits, and refuses all who come later. Any thread; the first error stands.
    func end(_ error: EventsError, unwritten: Int = 0) {
        let isOpen = shared.withLock { $0.state == .open || $0.state == .blocked }
        change(to: .closed, error)
        let (waiting, calls, consumers) = shared.withLock { shared in
            shared.isHopeless = true
            // What is in the mailbox is among the calls.
            _ = mailbox.close()
            defer {
                shared.waiting = [:]
                shared.calls = [:]
                shared.consumers = [:]
            }
            return (Array(shared.waiting.values), Array(shared.calls.values), Array(shared.consumers.values))
        }
        for entry in waiting { entry.continuation.resume(throwing: error) }
        answer { $0.close(error, unwritten: unwritten) }
        replies.connectionLost(error, isFinal: true)
        for call in calls { call.fail(error.code, error.message) }
        for consumer in consumers { consumer.fail(error) }
        // Nobody waits for a connection that is still being made.
        if !isOpen { thread?.severSocket() }
    }

    // MARK: Calls

    func call(
        _ request: RemoteCall.Request, _ operation: String, deadline: ContinuousClock.Instant
    ) async throws
        -> RemoteCall.Reply
    {
        try await ready(deadline: deadline)
        return try await post(RemoteCall(request, operation: operation, deadline: deadline)).wait()
    }

    /// A call on the way out: it is not cancelled with its task, and how it ends does not matter.
    func finish(_ request: RemoteCall.Request, _ operation: String) async {
        let call = RemoteCall(request, operation: operation, deadline: .now + .seconds(5))
        _ = try? await post(call).wait(isCancellable: false)
    }

    private func post(_ call: RemoteCall) -> RemoteCall {
        // In one step: when a connection ends, a call is in both or in neither.
        let posting = shared.withLock { shared -> Mailbox<RemoteCall>.Posting in
            guard shared.calls.count < Self.callLimit else { return .full }
            let posting = mailbox.post(call)
            if case .accepted = posting { shared.calls[ObjectIdentifier(call)] = call }
            return posting
        }
        switch posting {
        case .accepted:
            Watchdog.shared.look(by: call.deadline)
            wake()
        case .full: call.fail(.overloaded, "too many calls are waiting for the connection")
        case .closed: call.fail(.closed, "the transport was closed")
        }
        return call
    }

    func forget(_ call: RemoteCall) {
        shared.withLock { state in _ = state.calls.removeValue(forKey: ObjectIdentifier(call)) }
    }

    func takeCalls() -> [RemoteCall] { mailbox.takeAll() }

    func add(_ consumer: Consumer) {
        shared.withLock { $0.consumers[ObjectIdentifier(consumer)] = consumer }
    }

    func remove(_ consumer: Consumer) {
        shared.withLock { state in _ = state.consumers.removeValue(forKey: ObjectIdentifier(consumer)) }
    }

    // MARK: Publishing

    func publish(deadline: ContinuousClock.Instant, _ message: () throws -> OutboundMessage) async throws -> Bool {
        let limit = MonotonicTime(deadline)
        // Mostly there is room: then this costs no suspension. Whether there is a connection does not matter yet.
        let admission = try window.withLock { try $0.tryAdmit() }
        if admission == nil { try await waitForRoom(limit) }
        let packed: PackedMessage
        do {
            packed = try PackedMessage(message())
        } catch {
            window.withLock { $0.release() }.give()
            throw error
        }
        let id = admission ?? window.withLock { $0.nextID() }
        return try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let (answers, needsWake) = window.withLock { window in
                    if Task.isCancelled {
                        var answers = window.release()
                        answers.publishes.append((continuation, .failure(CancellationError())))
                        return (answers, false)
                    }
                    let answers = window.submit(id, packed, deadline: limit, continuation)
                    return (answers, window.needsWake)
                }
                answers.give()
                Watchdog.shared.look(by: limit)
                if needsWake { wake() }
            }
        } onCancel: {
            window.withLock { $0.cancel(id) }.give()
        }
    }

    private func waitForRoom(_ limit: MonotonicTime) async throws {
        let id = window.withLock { $0.nextID() }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                window.withLock { window in
                    if Task.isCancelled {
                        var answers = PublishWindow.Answers()
                        answers.admissions.append((continuation, .failure(CancellationError())))
                        return answers
                    }
                    return window.admit(id, deadline: limit, continuation)
                }.give()
                Watchdog.shared.look(by: limit)
            }
        } onCancel: {
            window.withLock { $0.cancel(id) }.give()
        }
    }

    /// For the thread: one short step on the window, whose answers are given outside the lock.
    func withWindow<R: Sendable>(_ step: (inout PublishWindow) -> R) -> R {
        window.withLock { step(&$0) }
    }

    func answer(_ step: (inout PublishWindow) -> PublishWindow.Answers) {
        window.withLock { step(&$0) }.give()
    }

    // MARK: The watchdog

    private func check(now: MonotonicTime) -> MonotonicTime? {
        let (answers, nextPublish) = window.withLock { window in
            let answers = window.expire(now: now)
            return (answers, window.earliestDeadline)
        }
        answers.give()
        var next = nextPublish
        let (waiting, overdue, reason) = shared.withLock { shared in
            let late = shared.waiting.filter { $0.value.deadline <= now }
            for id in late.keys { shared.waiting[id] = nil }
            for entry in shared.waiting.values { next = min(next, entry.deadline) }
            let overdue = shared.calls.values.filter { $0.deadline <= now }
            for call in overdue { shared.calls[ObjectIdentifier(call)] = nil }
            for call in shared.calls.values { next = min(next, call.deadline) }
            return (Array(late.values), Array(overdue), shared.reason)
        }
        let noConnection =
            reason
            ?? EventsError(
                .connectionFailed, "\(configuration) did not answer by the deadline",
                operation: "connect to \(configuration)")
        for entry in waiting { entry.continuation.resume(throwing: noConnection) }
        for call in overdue { call.fail(.deadlineExceeded, "no answer by the deadline") }
        return next == .distantFuture ? nil : next
    }
}
