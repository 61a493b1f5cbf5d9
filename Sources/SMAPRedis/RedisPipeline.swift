internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents

/// The commands of one connection: those to be written, and those whose replies are to come, in order.
///
/// A value behind a lock; answers are given outside it. Invariant: replies are matched by position, so a command that
/// nobody waits for any more keeps its place until its reply has come.
struct RedisPipeline {
    typealias Continuation = CheckedContinuation<RedisReply, any Error>

    struct Answers {
        var calls: [(Continuation, Result<RedisReply, any Error>)] = []

        func give() {
            for (continuation, result) in calls { continuation.resume(with: result) }
        }
    }

    private struct Entry {
        let id: UInt64
        let deadline: MonotonicTime
        var continuation: Continuation?
    }

    private let limit: Int
    private var lastID: UInt64 = 0
    private var unsent: [(entry: Entry, bytes: [UInt8])] = []
    private var awaiting: Deque<Entry> = []
    private var failure: EventsError?
    /// No deadline is earlier than this; it may be too early.
    private(set) var earliestDeadline = MonotonicTime.distantFuture

    init(limit: Int) {
        self.limit = limit
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
        } else if unsent.count + awaiting.count >= limit {
            let error = EventsError(
                .overloaded, "\(limit) commands are under way already", operation: "redis")
            answers.calls.append((continuation, .failure(error)))
        } else {
            unsent.append((Entry(id: id, deadline: deadline, continuation: continuation), command.bytes))
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
        } else if let index = awaiting.firstIndex(where: { $0.id == id }),
            let continuation = awaiting[index].continuation
        {
            awaiting[index].continuation = nil
            answers.calls.append((continuation, .failure(CancellationError())))
        }
        return answers
    }

    /// Appends what is to be written to `buffer`. From here on replies are expected.
    mutating func takeUnsent(into buffer: inout [UInt8]) {
        for (entry, bytes) in unsent {
            buffer.append(contentsOf: bytes)
            awaiting.append(entry)
        }
        unsent.removeAll(keepingCapacity: true)
    }

    /// Matches replies with their commands. False if one came that nobody asked for.
    mutating func replied(_ replies: [RedisReply], _ answers: inout Answers) -> Bool {
        for reply in replies {
            guard let entry = awaiting.popFirst() else { return false }
            if let continuation = entry.continuation { answers.calls.append((continuation, .success(reply))) }
        }
        return true
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
            guard let continuation = awaiting[index].continuation else { continue }
            guard awaiting[index].deadline <= now else {
                next = min(next, awaiting[index].deadline)
                continue
            }
            awaiting[index].continuation = nil
            answers.calls.append((continuation, .failure(Self.late("not answered"))))
        }
        earliestDeadline = next
        return answers
    }

    mutating func fail(_ error: EventsError) -> Answers {
        guard failure == nil else { return Answers() }
        failure = error
        var answers = Answers()
        for entry in awaiting + unsent.map(\.entry) {
            if let continuation = entry.continuation { answers.calls.append((continuation, .failure(error))) }
        }
        unsent = []
        awaiting = []
        return answers
    }

    private static func late(_ what: String) -> EventsError {
        EventsError(.deadlineExceeded, "\(what) by the deadline", operation: "redis")
    }
}
