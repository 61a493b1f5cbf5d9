internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// What callers and the connection thread of one Redis connection share.
final class RedisConnection: Sendable {
    let configuration: RedisConfiguration
    private let pipeline: Mutex<RedisPipeline>
    private let closed = Atomic<Bool>(false)
    private let threadEnd = Latch()
    // Set once, in init, before any other thread knows of this object.
    private nonisolated(unsafe) var thread: ConnectionThread?
    /// Told of the channel of each message that comes by subscription.
    private let onMessage: (@Sendable (String) -> Void)?

    /// Starts connecting. Commands wait until that is done, or fail with it.
    init(_ configuration: RedisConfiguration, onMessage: (@Sendable (String) -> Void)? = nil) throws {
        self.onMessage = onMessage
        self.configuration = configuration
        self.pipeline = Mutex(RedisPipeline(configuration))
        let deadline = MonotonicTime.now.advanced(by: configuration.connectTimeout)
        do {
            // Nothing blocks on this thread after the handshake: the stall limit is for what nobody has thought of.
            let thread = try ConnectionThread(stallLimit: .seconds(15)) { [weak self] now in
                self?.check(now: now)
            } onStall: { [weak self] in
                self?.end(EventsError(.connectionLost, "the connection hung", operation: "redis"))
            }
            self.thread = thread
            try thread.start(name: "smap-redis", openLimit: configuration.connectTimeout + .seconds(1)) {
                try RedisDriver(connection: self, thread: $0, deadline: deadline)
            } failed: { error in
                let operation = "connect to \(configuration)"
                switch error {
                case let error as SocketError:
                    self.end(EventsError(.connectionFailed, error.description, operation: operation))
                case let error as TLSError: self.end(RedisFailure.error(error, operation: operation))
                case let error as EventsError: self.end(error)
                default: self.end(EventsError(.connectionFailed, "\(type(of: error))", operation: operation))
                }
            } ended: { [threadEnd] in
                threadEnd.open()
            }
        } catch let error as SocketError {
            throw EventsError(.connectionFailed, error.description, operation: "connect to \(configuration)")
        }
    }

    var isClosed: Bool { closed.load(ordering: .acquiring) }

    /// Sends a command and returns its reply, errors of the server included.
    func send(_ command: RedisCommand, deadline: MonotonicTime) async throws -> RedisPipeline.Answer {
        let id = pipeline.withLock { $0.nextID() }
        return try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                pipeline.withLock { pipeline in
                    if Task.isCancelled {
                        return RedisPipeline.Answers(calls: [(continuation, .failure(CancellationError()))])
                    }
                    return pipeline.submit(id, command, deadline: deadline, continuation)
                }.give()
                Watchdog.shared.schedule(at: deadline)
                thread?.wake()
            }
        } onCancel: {
            pipeline.withLock { $0.cancel(id) }.give()
        }
    }

    /// Ends the connection; whatever is under way fails.
    func close() async {
        drop(EventsError(.closed, "the store was closed", operation: "redis"))
        await threadEnd.wait()
    }

    /// Ends the connection without waiting for that; whatever is under way fails with `error`.
    func drop(_ error: EventsError) {
        end(error)
        thread?.stop()
    }

    /// Answers everyone who waits, and refuses all who come later. Any thread; the first error stands.
    func end(_ error: EventsError) {
        closed.store(true, ordering: .releasing)
        pipeline.withLock { $0.fail(error) }.give()
    }

    // MARK: The connection thread

    func takeUnsent(into buffer: inout [UInt8], now: MonotonicTime) {
        let next = pipeline.withLock { pipeline in
            pipeline.takeUnsent(into: &buffer, now: now)
            return pipeline.nextLook
        }
        Watchdog.shared.schedule(at: next)
    }

    func replied(_ all: [RedisReply], now: MonotonicTime) -> Bool {
        var replies = all
        if let onMessage {
            replies = all.filter { reply in
                guard case .array(let parts) = reply, parts.count == 3, parts[0].text == "message",
                    let channel = parts[1].text
                else { return true }
                onMessage(channel)
                return false
            }
        }
        let (answers, isExpected) = pipeline.withLock { pipeline in
            var answers = RedisPipeline.Answers()
            let isExpected = pipeline.replied(replies, now: now, &answers)
            return (answers, isExpected)
        }
        answers.give()
        return isExpected
    }

    private func check(now: MonotonicTime) -> MonotonicTime? {
        let (answers, isSilent, next) = pipeline.withLock { pipeline in
            (pipeline.expire(now: now), pipeline.isSilent(now: now), pipeline.nextLook)
        }
        answers.give()
        // It may have moved, or be the master no longer, and the kernel would not tell for a quarter of an hour.
        if isSilent {
            drop(
                EventsError(.connectionLost, "the server has been silent for too long", operation: "redis"))
            return nil
        }
        return next == .distantFuture ? nil : next
    }
}
