internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents

/// What is being published on a connection: who waits for room, what waits to be written, and what waits for a confirm.
///
/// A value behind a lock. It never calls out: what must be answered is returned, and is answered outside the lock.
///
/// Invariants (P1, P2, P8): each caller is answered once; an entry whose bytes may have been written ends as confirmed,
/// nacked or *unknown*, never as unsent; room is given back only when the broker has answered or the connection is gone,
/// so a silent broker holds back callers, not memory.
struct PublishWindow {
    typealias Continuation = CheckedContinuation<Bool, any Error>

    /// Answers to give, outside the lock.
    struct Answers {
        var publishes: [(Continuation, Result<Bool, any Error>)] = []
        var admissions: [(CheckedContinuation<Void, any Error>, Result<Void, any Error>)] = []
        var drained: [CheckedContinuation<Void, Never>] = []

        func give() {
            for (continuation, result) in publishes { continuation.resume(with: result) }
            for (continuation, result) in admissions { continuation.resume(with: result) }
            for continuation in drained { continuation.resume() }
        }
    }

    private struct Waiting {
        let id: UInt64
        let deadline: MonotonicTime
        let continuation: CheckedContinuation<Void, any Error>
    }

    private struct Entry {
        let id: UInt64
        let deadline: MonotonicTime
        let message: PackedMessage
        var continuation: Continuation?
        var isReturned = false
        /// Answered by the broker while an earlier one is not.
        var isSettled = false
    }

    private let messageLimit: Int
    private let byteLimit: Int
    private var messages = 0
    private var bytes = 0
    private var lastID: UInt64 = 0
    private var waiting: Deque<Waiting> = []
    private var unsent: Deque<Entry> = []
    private var sent: Deque<Entry> = []
    /// The delivery tag of the first entry in `sent`; tags count from 1 on each channel.
    private var firstTag: UInt64 = 1
    private var drained: [CheckedContinuation<Void, Never>] = []
    private var failure: EventsError?
    /// No deadline is earlier than this; it may be too early.
    private(set) var earliestDeadline = MonotonicTime.distantFuture

    init(messageLimit: Int, byteLimit: Int) {
        self.messageLimit = messageLimit
        self.byteLimit = byteLimit
    }

    var hasUnsent: Bool { !unsent.isEmpty }
    var isIdle: Bool { unsent.isEmpty && sent.isEmpty }
    private var hasRoom: Bool { messages < messageLimit && bytes < byteLimit }

    /// An id for a caller, to cancel it by.
    mutating func nextID() -> UInt64 {
        lastID += 1
        return lastID
    }

    // MARK: Callers

    /// Takes room for one message, if there is some and nobody has waited longer; returns an id to submit it under.
    mutating func tryAdmit() throws -> UInt64? {
        if let failure { throw failure }
        guard waiting.isEmpty, hasRoom else { return nil }
        messages += 1
        return nextID()
    }

    /// Waits for room. Answers at once when there is some after all.
    mutating func admit(
        _ id: UInt64, deadline: MonotonicTime, _ continuation: CheckedContinuation<Void, any Error>
    ) -> Answers {
        var answers = Answers()
        if let failure {
            answers.admissions.append((continuation, .failure(failure)))
        } else {
            waiting.append(Waiting(id: id, deadline: deadline, continuation: continuation))
            earliestDeadline = min(earliestDeadline, deadline)
            admitWaiting(&answers)
        }
        return answers
    }

    /// Gives room back that was taken and not used.
    mutating func release() -> Answers {
        messages -= 1
        var answers = Answers()
        admitWaiting(&answers)
        return answers
    }

    /// Whether the thread must be told of what was just submitted. While some messages are in flight their confirms bring
    /// it round soon enough, and it then finds a batch instead of one message; that is Nagle's rule (RFC 896), and saves
    /// a dozen system calls a message.
    var needsWake: Bool { sent.count < 32 || unsent.count % 32 == 0 }

    /// Whether so much is in flight that two milliseconds more make no difference to anyone.
    var isBusy: Bool { sent.count >= 256 }

    /// Queues a message for which there is room.
    mutating func submit(
        _ id: UInt64, _ message: PackedMessage, deadline: MonotonicTime, _ continuation: Continuation
    ) -> Answers {
        var answers = Answers()
        if let failure {
            messages -= 1
            answers.publishes.append((continuation, .failure(failure)))
        } else {
            bytes += message.bytes.count
            unsent.append(Entry(id: id, deadline: deadline, message: message, continuation: continuation))
            earliestDeadline = min(earliestDeadline, deadline)
        }
        return answers
    }

    /// Answers one caller whose task was cancelled. What is written already stays until the broker answers.
    mutating func cancel(_ id: UInt64) -> Answers {
        var answers = Answers()
        if let index = waiting.firstIndex(where: { $0.id == id }) {
            answers.admissions.append((waiting.remove(at: index).continuation, .failure(CancellationError())))
        } else if let index = Self.index(of: id, in: unsent) {
            let entry = unsent.remove(at: index)
            if let continuation = entry.continuation {
                answers.publishes.append((continuation, .failure(CancellationError())))
            }
            free(entry)
        } else if let index = Self.index(of: id, in: sent), let continuation = sent[index].continuation {
            sent[index].continuation = nil
            answers.publishes.append((continuation, .failure(CancellationError())))
        }
        admitWaiting(&answers)
        return answers
    }

    // MARK: The connection thread

    /// The next messages to write, in order, no more bytes than `budget` but one at least. From here on they count as
    /// sent.
    mutating func takeBatch(budget: Int) -> [PackedMessage] {
        var batch: [PackedMessage] = []
        var size = 0
        while let entry = unsent.first {
            size += entry.message.bytes.count
            if !batch.isEmpty, size > budget { break }
            batch.append(entry.message)
            sent.append(unsent.removeFirst())
        }
        return batch
    }

    /// The size of the next message to write; nil if there is none.
    var nextSize: Int? { unsent.first?.message.bytes.count }

    /// Takes note of a returned message; its confirm follows.
    mutating func returned(exchange: String, routingKey: String, messageID: String?) {
        let index = sent.firstIndex {
            !$0.isReturned && $0.message.matches(exchange: exchange, routingKey: routingKey, messageID: messageID)
        }
        if let index { sent[index].isReturned = true }
    }

    /// Answers for `basic.ack` and `basic.nack`. Nil for a tag that was never given or is settled already.
    mutating func confirmed(tag: UInt64, multiple: Bool, isNack: Bool) -> Answers? {
        let end = firstTag + UInt64(sent.count)
        // Tag 0 with `multiple` means all so far (AMQP 0-9-1, basic.ack).
        let last = tag == 0 && multiple ? end - 1 : tag
        guard last < end else { return nil }
        var answers = Answers()
        guard last >= firstTag else { return answers }
        let index = Int(last - firstTag)
        for position in (multiple ? 0 : index)...index where !sent[position].isSettled {
            settle(position, isNack: isNack, &answers)
        }
        // Settled entries leave from the front, so that tags stay positions.
        let settled = sent.firstIndex { !$0.isSettled } ?? sent.endIndex
        sent.removeFirst(settled)
        firstTag += UInt64(settled)
        admitWaiting(&answers)
        noteDrained(&answers)
        return answers
    }

    private mutating func settle(_ position: Int, isNack: Bool, _ answers: inout Answers) {
        sent[position].isSettled = true
        messages -= 1
        bytes -= sent[position].message.bytes.count
        guard let continuation = sent[position].continuation.take() else { return }
        if isNack {
            let error = EventsError(.nacked, "the broker refused the message", operation: "publish")
            answers.publishes.append((continuation, .failure(error)))
        } else {
            answers.publishes.append((continuation, .success(!sent[position].isReturned)))
        }
    }

    /// The channel was closed by the broker and will be opened again. What was sent is answered: as refused if it went to
    /// the exchange that the broker names, else as unknown. What was not sent stays, for the new channel.
    mutating func channelClosed(_ reason: String, refused: (exchange: String, code: EventsError.Code)?) -> Answers {
        var answers = Answers()
        failSent(&answers) { entry in
            if let refused, entry.message.exchangeName == refused.exchange {
                let code = refused.code == .notFound ? .exchangeNotFound : refused.code
                return EventsError(code, reason, operation: "publish")
            }
            return EventsError(.unknownOutcome, "the channel was closed: \(reason)", operation: "publish")
        }
        admitWaiting(&answers)
        noteDrained(&answers)
        return answers
    }

    /// The connection is gone: answers everyone, and refuses all who come later.
    ///
    /// - Parameter unwritten: How many of those taken last have not been written at all.
    mutating func fail(_ error: EventsError, unwritten: Int = 0) -> Answers {
        guard failure == nil else { return Answers() }
        var answers = Answers()
        let never = EventsError(.unsent, error.message, operation: "publish", underlying: error)
        failure = never
        let written = sent.count - unwritten
        var position = 0
        failSent(&answers) { _ in
            defer { position += 1 }
            guard position < written else { return never }
            return EventsError(.unknownOutcome, error.message, operation: "publish", underlying: error)
        }
        for entry in unsent {
            if let continuation = entry.continuation { answers.publishes.append((continuation, .failure(never))) }
        }
        unsent = []
        for entry in waiting { answers.admissions.append((entry.continuation, .failure(never))) }
        waiting = []
        messages = 0
        bytes = 0
        noteDrained(&answers)
        return answers
    }

    // MARK: The watchdog

    /// Answers every caller whose deadline has passed.
    mutating func expire(now: MonotonicTime) -> Answers {
        var answers = Answers()
        guard earliestDeadline <= now else { return answers }
        var next = MonotonicTime.distantFuture
        waiting.removeAll { entry in
            guard entry.deadline <= now else {
                next = min(next, entry.deadline)
                return false
            }
            let error = EventsError(
                .unsent, "no room among the \(messageLimit) messages awaiting confirms by the deadline",
                operation: "publish")
            answers.admissions.append((entry.continuation, .failure(error)))
            return true
        }
        var overdue: [Entry] = []
        unsent.removeAll { entry in
            guard entry.deadline <= now else {
                next = min(next, entry.deadline)
                return false
            }
            overdue.append(entry)
            return true
        }
        for entry in overdue {
            free(entry)
            guard let continuation = entry.continuation else { continue }
            let error = EventsError(.unsent, "not written by the deadline", operation: "publish")
            answers.publishes.append((continuation, .failure(error)))
        }
        for index in sent.indices {
            guard let continuation = sent[index].continuation else { continue }
            guard sent[index].deadline <= now else {
                next = min(next, sent[index].deadline)
                continue
            }
            sent[index].continuation = nil
            let error = EventsError(.unknownOutcome, "not confirmed by the deadline", operation: "publish")
            answers.publishes.append((continuation, .failure(error)))
        }
        earliestDeadline = next
        admitWaiting(&answers)
        return answers
    }

    /// Calls back once nothing is under way any more.
    mutating func whenDrained(_ continuation: CheckedContinuation<Void, Never>) -> Answers {
        var answers = Answers()
        drained.append(continuation)
        noteDrained(&answers)
        return answers
    }

    // MARK: Parts

    private mutating func failSent(_ answers: inout Answers, _ error: (Entry) -> EventsError) {
        for entry in sent {
            let error = error(entry)
            if entry.isSettled { continue }
            free(entry)
            if let continuation = entry.continuation { answers.publishes.append((continuation, .failure(error))) }
        }
        sent = []
        firstTag = 1
    }

    private mutating func free(_ entry: Entry) {
        messages -= 1
        bytes -= entry.message.bytes.count
    }

    private mutating func admitWaiting(_ answers: inout Answers) {
        while failure == nil, hasRoom, let first = waiting.popFirst() {
            messages += 1
            answers.admissions.append((first.continuation, .success(())))
        }
    }

    private mutating func noteDrained(_ answers: inout Answers) {
        if isIdle {
            answers.drained += drained
            drained = []
        }
    }

    /// Ids only grow, so both queues are sorted by them.
    private static func index(of id: UInt64, in entries: Deque<Entry>) -> Int? {
        var low = 0
        var high = entries.count
        while low < high {
            let middle = (low + high) / 2
            if entries[middle].id < id { low = middle + 1 } else { high = middle }
        }
        return low < entries.count && entries[low].id == id ? low : nil
    }
}
