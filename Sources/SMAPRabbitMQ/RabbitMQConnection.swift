internal import ConnectionThread
internal import Logging
internal import SMAPEvents
internal import Synchronization

/// What callers and the connection thread of one connection share. Callers leave work here and suspend; the thread, the
/// watchdog, or the end of the connection answers them.
final class RabbitMQConnection: Sendable {
    private struct Waiting {
        let deadline: MonotonicTime
        let continuation: CheckedContinuation<Void, any Error>
    }

    private enum Status {
        case connecting(waiting: [UInt64: Waiting])
        case open
        case closed(EventsError)
    }

    private struct Shared {
        var status: Status
        var lastID: UInt64 = 0
        var calls: [ObjectIdentifier: RemoteCall] = [:]
        var consumers: [ObjectIdentifier: Consumer] = [:]
    }

    let configuration: RabbitMQConfiguration
    let logger: Logger
    private let mailbox = Mailbox<RemoteCall>(capacity: 1024)
    private let window: Mutex<PublishWindow>
    private let shared: Mutex<Shared>
    /// Whether the login is done. Stays true when the connection has ended: then the window refuses.
    private let isOpen = Atomic<Bool>(false)
    private let hasEnded = Atomic<Bool>(false)
    // Set once, in init, before any other thread knows of this object.
    private nonisolated(unsafe) var thread: ConnectionThread?

    /// Starts connecting; ``ready(deadline:)`` waits for it.
    init(_ configuration: RabbitMQConfiguration, name: String, logger: Logger) throws {
        self.configuration = configuration
        self.logger = logger
        self.window = Mutex(
            PublishWindow(messageLimit: configuration.windowMessages, byteLimit: configuration.windowBytes))
        let deadline = MonotonicTime.now.advanced(by: configuration.connectTimeout)
        self.shared = Mutex(Shared(status: .connecting(waiting: [:])))
        do {
            let thread = try ConnectionThread(stallLimit: configuration.stallLimit) { [weak self] now in
                self?.check(now: now)
            } onStall: { [weak self] in
                self?.end(EventsError(.connectionLost, "the connection hung", operation: "connection"))
            }
            self.thread = thread
            try thread.start(name: "smap-rabbit-\(name.prefix(3))", openLimit: configuration.connectTimeout) {
                // The thread owns the connection object until it has ended.
                try AMQPDriver(connection: self, thread: $0, name: name, deadline: deadline)
            } failed: { error in
                self.end(AMQPFailure.error(from: error, server: "\(configuration)", connecting: true))
            }
        } catch let error as SocketError {
            throw EventsError(.connectionFailed, error.description, operation: "connect to \(configuration)")
        }
    }

    var isClosed: Bool { hasEnded.load(ordering: .acquiring) }

    func wake() { thread?.wake() }

    // MARK: Opening and closing

    /// Returns once the connection is open; throws why it is not.
    func ready(deadline: ContinuousClock.Instant) async throws {
        let id = shared.withLock { state in
            state.lastID += 1
            return state.lastID
        }
        let limit = MonotonicTime(deadline)
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
                let result = shared.withLock { state -> Result<Void, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    switch state.status {
                    case .open: return .success(())
                    case .closed(let error): return .failure(error)
                    case .connecting(var waiting):
                        waiting[id] = Waiting(deadline: limit, continuation: continuation)
                        state.status = .connecting(waiting: waiting)
                        return nil
                    }
                }
                if let result { continuation.resume(with: result) } else { Watchdog.shared.look(by: limit) }
            }
        } onCancel: {
            let cancelled = shared.withLock { state -> Waiting? in
                guard case .connecting(var waiting) = state.status else { return nil }
                defer { state.status = .connecting(waiting: waiting) }
                return waiting.removeValue(forKey: id)
            }
            cancelled?.continuation.resume(throwing: CancellationError())
        }
    }

    /// Called on the thread once the server has accepted the login.
    func opened() {
        let waiting = shared.withLock { state -> [Waiting] in
            guard case .connecting(let waiting) = state.status else { return [] }
            state.status = .open
            return Array(waiting.values)
        }
        isOpen.store(true, ordering: .releasing)
        for entry in waiting { entry.continuation.resume() }
    }

    /// Waits until nothing is unconfirmed or the deadline has passed, then closes the connection.
    func close(deadline: ContinuousClock.Instant) async {
        await withTaskGroup { group in
            group.addTask { await self.drain() }
            group.addTask { try? await Task.sleep(until: deadline) }
            await group.next()
            // Ends the drain, where it is not over.
            end(EventsError(.closed, "the transport was closed", operation: "connection"))
            group.cancelAll()
        }
        // Nobody waits for a connection that is still being made.
        if !isOpen.load(ordering: .acquiring) { thread?.severSocket() }
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
        hasEnded.store(true, ordering: .releasing)
        let (waiting, calls, consumers) = shared.withLock { state in
            var waiting: [Waiting] = []
            switch state.status {
            case .connecting(let all):
                waiting = Array(all.values)
                state.status = .closed(error)
            case .open: state.status = .closed(error)
            case .closed: break
            }
            defer {
                state.calls = [:]
                state.consumers = [:]
            }
            return (waiting, Array(state.calls.values), Array(state.consumers.values))
        }
        for entry in waiting { entry.continuation.resume(throwing: error) }
        window.withLock { $0.fail(error, unwritten: unwritten) }.give()
        for call in calls { call.fail(error.code, error.message) }
        for consumer in consumers { consumer.fail(error) }
        for call in mailbox.close() { call.fail(error.code, error.message) }
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
        shared.withLock { $0.calls[ObjectIdentifier(call)] = call }
        switch mailbox.post(call) {
        case .accepted:
            Watchdog.shared.look(by: call.deadline)
            wake()
        case .full:
            forget(call)
            call.fail(.overloaded, "too many calls are waiting for the connection")
        case .closed:
            forget(call)
            let error = shared.withLock { state -> EventsError? in
                if case .closed(let error) = state.status { error } else { nil }
            }
            call.fail(error?.code ?? .connectionLost, error?.message ?? "the connection is closed")
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
        // Mostly the connection is open and there is room: neither costs a suspension then.
        if !isOpen.load(ordering: .acquiring) { try await ready(deadline: deadline) }
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
        Watchdog.shared.look(by: limit)
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
        let (waiting, overdue) = shared.withLock { state in
            var late: [Waiting] = []
            if case .connecting(let all) = state.status {
                late = all.values.filter { $0.deadline <= now }
                let rest = all.filter { $0.value.deadline > now }
                for entry in rest.values { next = min(next, entry.deadline) }
                state.status = .connecting(waiting: rest)
            }
            let overdue = state.calls.values.filter { $0.deadline <= now }
            for call in overdue { state.calls[ObjectIdentifier(call)] = nil }
            for call in state.calls.values { next = min(next, call.deadline) }
            return (late, Array(overdue))
        }
        for entry in waiting {
            let error = EventsError(
                .connectionFailed, "\(configuration) did not answer by the deadline", operation: "connect")
            entry.continuation.resume(throwing: error)
        }
        for call in overdue { call.fail(.deadlineExceeded, "no answer by the deadline") }
        return next == .distantFuture ? nil : next
    }
}
