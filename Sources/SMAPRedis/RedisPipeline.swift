internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents

/// The commands of one connection: those to be written, and those whose replies are to come, in order.
///
/// A value behind a lock; answers are given outside it. Invariants: replies are matched by position, so a command that
/// nobody waits for any more keeps its place until its reply has come. What is to be on replicas is answered after the
/// `WAIT` that was written behind it; one is under way at a time, and what comes meanwhile shares the next, since Redis
/// works on nothing else of this connection until it has ended.
struct RedisPipeline {
    /// What a command came to.
    struct Answer: Sendable, Equatable {
        let reply: RedisReply
        /// How many replicas have it; nil where it did not ask.
        var replicas: Int?
    }

    typealias Continuation = CheckedContinuation<Answer, any Error>

    struct Answers {
        var calls: [(Continuation, Result<Answer, any Error>)] = []

        func give() {
            for (continuation, result) in calls { continuation.resume(with: result) }
        }
    }

    private struct Entry {
        let id: UInt64
        let deadline: MonotonicTime
        let awaitsReplicas: Bool
        var continuation: Continuation?
    }

    private let limit: Int
    private let silenceLimit: Duration
    private let wait: [UInt8]
    private var lastID: UInt64 = 0
    private var unsent: [(entry: Entry, bytes: [UInt8])] = []
    /// Nil stands for `WAIT`.
    private var awaiting: Deque<Entry?> = []
    private var isWaiting = false
    /// Answered by the master, until `WAIT` is.
    private var held: [(entry: Entry, reply: RedisReply)] = []
    private var failure: EventsError?
    /// No deadline is earlier than this; it may be too early.
    private var earliestDeadline = MonotonicTime.distantFuture
    /// Since when the server owes a reply and has sent none.
    private var silentSince = MonotonicTime.distantFuture

    init(_ configuration: RedisConfiguration) {
        limit = configuration.maximumInFlight
        silenceLimit = configuration.silenceLimit
        let milliseconds = configuration.replicaTimeout / .milliseconds(1)
        wait = RedisCommand(["WAIT", String(configuration.replicas), String(max(1, Int(milliseconds)))]).bytes
    }

    mutating func nextID() -> UInt64 {
        lastID += 1
        return lastID
    }

    mutating func submit(
        _ id: UInt64, _ command: RedisCommand, deadline: MonotonicTime, _ continuation: Continuation
    ) -> Answers {
        var answers = Answers()
        if let failure {
            answers.calls.append((continuation, .failure(failure)))
        } else if unsent.count + awaiting.count + held.count >= limit {
            let error = EventsError(
                .overloaded, "\(limit) commands are under way already", operation: "redis")
            answers.calls.append((continuation, .failure(error)))
        } else {
            let entry = Entry(
                id: id, deadline: deadline, awaitsReplicas: command.awaitsReplicas, continuation: continuation)
            unsent.append((entry, command.bytes))
            earliestDeadline = min(earliestDeadline, deadline)
        }
        return answers
    }

    mutating func cancel(_ id: UInt64) -> Answers {
        var answers = Answers()
        if let index = unsent.firstIndex(where: { $0.entry.id == id }) {
            if let continuation = unsent.remove(at: index).entry.continuation {
                answers.calls.append((continuation, .failure(CancellationError())))
            }
        } else if let index = awaiting.firstIndex(where: { $0?.id == id }),
            let continuation = awaiting[index]?.continuation
        {
            awaiting[index]?.continuation = nil
            answers.calls.append((continuation, .failure(CancellationError())))
        } else if let index = held.firstIndex(where: { $0.entry.id == id }),
            let continuation = held.remove(at: index).entry.continuation
        {
            answers.calls.append((continuation, .failure(CancellationError())))
        }
        return answers
    }

    /// Appends what is to be written to `buffer`. From here on replies are expected.
    mutating func takeUnsent(into buffer: inout [UInt8], now: MonotonicTime) {
        guard !isWaiting, !unsent.isEmpty else { return }
        if awaiting.isEmpty { silentSince = now }
        for (entry, bytes) in unsent {
            buffer.append(contentsOf: bytes)
            awaiting.append(entry)
            isWaiting = isWaiting || entry.awaitsReplicas
        }
        if isWaiting {
            buffer.append(contentsOf: wait)
            awaiting.append(nil)
        }
        unsent.removeAll(keepingCapacity: true)
    }

    /// Matches replies with their commands. False if one came that nobody asked for. To be told of what is not complete yet
    /// too, as no replies: the server is not silent.
    mutating func replied(_ replies: [RedisReply], now: MonotonicTime, _ answers: inout Answers) -> Bool {
        for reply in replies {
            guard let place = awaiting.popFirst() else { return false }
            guard let entry = place else {
                isWaiting = false
                // An error of `WAIT` is none of the updates: of replicas nothing is known.
                release(replicas: reply.number ?? 0, &answers)
                continue
            }
            if case .error = reply {
            } else if entry.awaitsReplicas {
                held.append((entry, reply))
                continue
            }
            if let continuation = entry.continuation {
                answers.calls.append((continuation, .success(Answer(reply: reply))))
            }
        }
        silentSince = awaiting.isEmpty ? .distantFuture : now
        return true
    }

    private mutating func release(replicas: Int, _ answers: inout Answers) {
        for (entry, reply) in held {
            if let continuation = entry.continuation {
                answers.calls.append((continuation, .success(Answer(reply: reply, replicas: replicas))))
            }
        }
        held = []
    }

    /// When to look at deadlines and silence again; it may be too early.
    var nextLook: MonotonicTime { min(earliestDeadline, silenceEnds) }

    /// Whether the server owes a reply and has sent nothing for too long: it may have gone without a word.
    func isSilent(now: MonotonicTime) -> Bool { silenceEnds <= now }

    private var silenceEnds: MonotonicTime {
        silentSince == .distantFuture ? .distantFuture : silentSince.advanced(by: silenceLimit)
    }

    /// Answers every caller whose deadline has passed. Whether the command was carried out is then unknown; every
    /// command of the tracker can be repeated.
    mutating func expire(now: MonotonicTime) -> Answers {
        var answers = Answers()
        guard earliestDeadline <= now else { return answers }
        var next = MonotonicTime.distantFuture
        unsent.removeAll { item in
            guard item.entry.deadline <= now else {
                next = min(next, item.entry.deadline)
                return false
            }
            if let continuation = item.entry.continuation {
                answers.calls.append((continuation, .failure(Self.late("not written"))))
            }
            return true
        }
        for index in awaiting.indices {
            guard let entry = awaiting[index], let continuation = entry.continuation else { continue }
            guard entry.deadline <= now else {
                next = min(next, entry.deadline)
                continue
            }
            awaiting[index]?.continuation = nil
            answers.calls.append((continuation, .failure(Self.late("not answered"))))
        }
        held.removeAll { entry, reply in
            guard entry.deadline <= now else {
                next = min(next, entry.deadline)
                return false
            }
            // It is done; of replicas nothing is known.
            if let continuation = entry.continuation {
                answers.calls.append((continuation, .success(Answer(reply: reply, replicas: 0))))
            }
            return true
        }
        earliestDeadline = next
        return answers
    }

    mutating func fail(_ error: EventsError) -> Answers {
        guard failure == nil else { return Answers() }
        failure = error
        var answers = Answers()
        for entry in awaiting + unsent.map(\.entry) {
            if let continuation = entry?.continuation { answers.calls.append((continuation, .failure(error))) }
        }
        release(replicas: 0, &answers)
        (unsent, awaiting, silentSince) = ([], [], .distantFuture)
        return answers
    }

    private static func late(_ what: String) -> EventsError {
        EventsError(.deadlineExceeded, "\(what) by the deadline", operation: "redis")
    }
}
