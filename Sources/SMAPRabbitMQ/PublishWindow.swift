internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents

/// What is being published: who waits for room, what waits to be written, and what waits for a confirm. It outlives
/// connections: what a lost one leaves unconfirmed is written again on the next.
///
/// A value behind a lock. It never calls out: what must be answered is returned, and is answered outside the lock.
///
/// Invariants (P1, P2, P8): each caller is answered once; an entry whose bytes may have been written ends as confirmed,
/// nacked or *unknown*, never as unsent; room is given back only when the broker has answered, or when the caller has
/// been answered and no connection holds the message any more. So a silent broker holds back callers, not memory.
struct PublishWindow {
    typealias Continuation = CheckedContinuation<Bool, any Error>

    /// Answers to give, outside the lock.
    struct Answers {
        var publishes: [(Continuation, Result<Bool, any Error>)] = []
        var admissions: [(CheckedContinuation<Void, any Error>, Result<Void, any Error>)] = []
        var drained: [CheckedContinuation<Void, Never>] = []
        /// The correlation ids of requests that are in a queue now.
        var requests: [String] = []

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
        /// Whether some of its bytes may have gone out on a connection that was lost.
        var isInDoubt = false
    }

    private let messageLimit: Int
    private let byteLimit: Int
    private var messages = 0
    private var bytes = 0
    private var lastID: UInt64 = 0
    private var waiting: Deque<Waiting> = []
    /// In order of publishing. The first ``sentCount`` are on the wire, the others still to be written.
    private var entries: Deque<Entry> = []
    private var sentCount = 0
    /// The delivery tag of the first entry; tags count from 1 on each channel.
    private var firstTag: UInt64 = 1
    private var drained: [CheckedContinuation<Void, Never>] = []
    /// Why callers are refused: for good, or until a connection opens.
    private var refusal: EventsError?
    private var isClosed = false
    /// Why nothing is being written now, for those whose deadline passes meanwhile.
    var obstacle: EventsError?
    /// No deadline is earlier than this; it may be too early.
    private(set) var earliestDeadline = MonotonicTime.distantFuture

    init(messageLimit: Int, byteLimit: Int) {
        self.messageLimit = messageLimit
        self.byteLimit = byteLimit
    }

    var hasUnsent: Bool { entries.count > sentCount }
    /// How many messages are in the window, those being made included.
    var count: Int { messages }
    private var hasRoom: Bool { messages < messageLimit && bytes < byteLimit }

    /// An id for a caller, to cancel it by.
    mutating func nextID() -> UInt64 {
        lastID += 1
        return lastID
    }

    // MARK: Callers

    /// Takes room for one message, if there is some and nobody has waited longer; returns an id to submit it under.
    mutating func tryAdmit() throws -> UInt64? {
        if let refusal { throw refusal }
        guard waiting.isEmpty, hasRoom else { return nil }
        messages += 1
        return nextID()
    }

    /// Waits for room. Answers at once when there is some after all.
    mutating func admit(
        _ id: UInt64, deadline: MonotonicTime, _ continuation: CheckedContinuation<Void, any Error>
    ) -> Answers {
        var answers = Answers()
        if let refusal {
            answers.admissions.append((continuation, .failure(refusal)))
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

    /// From so many in flight on callers do not wake the thread one by one.
    private static let busyCount = 32

    /// Whether the thread must be told of what was just submitted. While some messages are in flight their confirms bring
    /// it round soon enough, and it then finds a batch instead of one message; that is Nagle's rule (RFC 896), and saves
    /// a dozen system calls a message. Where they do not, ``patience`` does.
    var needsWake: Bool { sentCount < Self.busyCount || (entries.count - sentCount) % Self.busyCount == 0 }

    /// How long the thread may stay away when it has written what it could; nil for as long as it likes. A queue that
    /// cannot confirm (a quorum queue without a majority) must not hold up what goes to others.
    var patience: Duration? {
        hasUnsent ? .milliseconds(2) : sentCount < Self.busyCount ? nil : .milliseconds(10)
    }

    /// Whether so much is in flight that two milliseconds more make no difference to anyone.
    var isBusy: Bool { sentCount >= 256 }

    /// Queues a message for which there is room.
    mutating func submit(
        _ id: UInt64, _ message: PackedMessage, deadline: MonotonicTime, _ continuation: Continuation
    ) -> Answers {
        var answers = Answers()
        if let refusal {
            messages -= 1
            answers.publishes.append((continuation, .failure(refusal)))
        } else {
            bytes += message.bytes.count
            entries.append(Entry(id: id, deadline: deadline, message: message, continuation: continuation))
            earliestDeadline = min(earliestDeadline, deadline)
        }
        return answers
    }

    /// Answers one caller whose task was cancelled. What is written already stays until the broker answers.
    mutating func cancel(_ id: UInt64) -> Answers {
        var answers = Answers()
        if let index = waiting.firstIndex(where: { $0.id == id }) {
            answers.admissions.append((waiting.remove(at: index).continuation, .failure(CancellationError())))
        } else if let index = entries.firstIndex(where: { $0.id == id }),
            let continuation = entries[index].continuation.take()
        {
            answers.publishes.append((continuation, .failure(CancellationError())))
            if index >= sentCount { free(entries.remove(at: index)) }
        }
        admitWaiting(&answers)
        noteDrained(&answers)
        return answers
    }

    // MARK: The connection thread

    /// The next messages to write, in order, no more bytes than `budget` but one at least. From here on they count as
    /// sent.
    mutating func takeBatch(budget: Int) -> [PackedMessage] {
        var batch: [PackedMessage] = []
        var size = 0
        while sentCount < entries.count {
            let message = entries[sentCount].message
            size += message.bytes.count
            if !batch.isEmpty, size > budget { break }
            batch.append(message)
            sentCount += 1
        }
        return batch
    }

    /// The size of the next message to write; nil if there is none.
    var nextSize: Int? { hasUnsent ? entries[sentCount].message.bytes.count : nil }

    /// Takes note of a returned message; its confirm follows.
    mutating func returned(exchange: String, routingKey: String, messageID: String?) {
        let index = entries[..<sentCount].firstIndex {
            !$0.isReturned && $0.message.matches(exchange: exchange, routingKey: routingKey, messageID: messageID)
        }
        if let index { entries[index].isReturned = true }
    }

    /// Answers for `basic.ack` and `basic.nack`. Nil for a tag that was never given or is settled already.
    mutating func confirmed(tag: UInt64, multiple: Bool, isNack: Bool) -> Answers? {
        let end = firstTag + UInt64(sentCount)
        // Tag 0 with `multiple` means all so far (AMQP 0-9-1, basic.ack).
        let last = tag == 0 && multiple ? end - 1 : tag
        guard last < end else { return nil }
        var answers = Answers()
        guard last >= firstTag else { return answers }
        let index = Int(last - firstTag)
        for position in (multiple ? 0 : index)...index where !entries[position].isSettled {
            settle(position, isNack: isNack, &answers)
        }
        // Settled entries leave from the front, so that tags stay positions.
        let settled = entries[..<sentCount].firstIndex { !$0.isSettled } ?? sentCount
        entries.removeFirst(settled)
        sentCount -= settled
        firstTag += UInt64(settled)
        admitWaiting(&answers)
        noteDrained(&answers)
        return answers
    }

    private mutating func settle(_ position: Int, isNack: Bool, _ answers: inout Answers) {
        entries[position].isSettled = true
        messages -= 1
        bytes -= entries[position].message.bytes.count
        guard let continuation = entries[position].continuation.take() else { return }
        if isNack {
            let error = EventsError(.nacked, "the broker refused the message", operation: "publish")
            answers.publishes.append((continuation, .failure(error)))
        } else {
            answers.publishes.append((continuation, .success(!entries[position].isReturned)))
            if !entries[position].isReturned, let id = entries[position].message.requestID {
                answers.requests.append(id)
            }
        }
    }

    /// The channel was closed by the broker and will be opened again.
    ///
    /// What went to the exchange that the broker names is refused; the rest of what was sent is innocent, and is written
    /// again. Where the broker names no exchange that a message went to, the guilty one cannot be told, and writing it
    /// again would close the next channel too: then all that was sent ends as unknown.
    mutating func channelClosed(_ reason: String, refused: (exchange: String, code: EventsError.Code)?) -> Answers {
        var answers = Answers()
        let isNamed = entries[..<sentCount].contains { !$0.isSettled && $0.message.exchangeName == refused?.exchange }
        takeBackSent(&answers, written: sentCount) { entry in
            if let refused, isNamed {
                guard entry.message.exchangeName == refused.exchange else { return nil }
                let code = refused.code == .notFound ? .exchangeNotFound : refused.code
                return EventsError(code, reason, operation: "publish")
            }
            return EventsError(.unknownOutcome, "the channel was closed: \(reason)", operation: "publish")
        }
        return answers
    }

    /// The connection is gone, and there will be another: what was sent and not confirmed is written again on it, in
    /// order and under the same ids, as long as its caller waits.
    ///
    /// - Parameters:
    ///   - unwritten: How many of those taken last have not been written at all.
    ///   - isPoisoned: Whether something that was sent may be the reason. Then nothing is written again.
    mutating func connectionLost(_ error: EventsError, unwritten: Int, isPoisoned: Bool) -> Answers {
        var answers = Answers()
        obstacle = error
        takeBackSent(&answers, written: sentCount - unwritten) { _ in
            isPoisoned ? EventsError(.unknownOutcome, error.message, operation: "publish", underlying: error) : nil
        }
        return answers
    }

    /// Refuses all who wait or come, until ``connected()``: the server will not have us, and waiting does not help.
    mutating func refuse(_ error: EventsError) -> Answers {
        guard !isClosed else { return Answers() }
        var answers = Answers()
        refusal = error
        obstacle = error
        takeBackSent(&answers, written: sentCount) { _ in nil }
        failAll(unsent: error, &answers)
        return answers
    }

    /// A connection is open, and nothing stands in the way.
    mutating func connected() {
        guard !isClosed else { return }
        refusal = nil
        obstacle = nil
    }

    /// The end: answers everyone, and refuses all who come later.
    ///
    /// - Parameter unwritten: How many of those taken last have not been written at all.
    mutating func close(_ error: EventsError, unwritten: Int = 0) -> Answers {
        guard !isClosed else { return Answers() }
        isClosed = true
        var answers = Answers()
        let never = EventsError(.unsent, error.message, operation: "publish", underlying: error)
        refusal = never
        takeBackSent(&answers, written: sentCount - unwritten) { _ in nil }
        failAll(unsent: never, &answers)
        return answers
    }

    // MARK: The watchdog

    /// Answers every caller whose deadline has passed.
    mutating func expire(now: MonotonicTime) -> Answers {
        var answers = Answers()
        guard earliestDeadline <= now else { return answers }
        var next = MonotonicTime.distantFuture
        let reason = obstacle.map { ": \($0.description)" } ?? ""
        waiting.removeAll { entry in
            guard entry.deadline <= now else {
                next = min(next, entry.deadline)
                return false
            }
            let error = EventsError(
                .unsent, "no room among the \(messageLimit) messages awaiting confirms by the deadline\(reason)",
                operation: "publish", underlying: obstacle)
            answers.admissions.append((entry.continuation, .failure(error)))
            return true
        }
        var hasOverdue = false
        for index in entries.indices {
            guard entries[index].continuation != nil else { continue }
            guard entries[index].deadline <= now else {
                next = min(next, entries[index].deadline)
                continue
            }
            guard let continuation = entries[index].continuation.take() else { continue }
            let isSent = index < sentCount
            hasOverdue = hasOverdue || !isSent
            let error =
                isSent || entries[index].isInDoubt
                ? EventsError(
                    .unknownOutcome, "not confirmed by the deadline\(reason)", operation: "publish",
                    underlying: obstacle)
                : EventsError(
                    .unsent, "not written by the deadline\(reason)", operation: "publish", underlying: obstacle)
            answers.publishes.append((continuation, .failure(error)))
        }
        if hasOverdue { dropUnsentWithoutCaller() }
        earliestDeadline = next
        admitWaiting(&answers)
        noteDrained(&answers)
        return answers
    }

    /// Calls back once nobody waits any more for what is under way.
    mutating func whenDrained(_ continuation: CheckedContinuation<Void, Never>) -> Answers {
        var answers = Answers()
        drained.append(continuation)
        noteDrained(&answers)
        return answers
    }

    // MARK: Parts

    /// Makes everything that was sent unsent again, in its place; what is settled, or has nobody waiting any more, goes.
    ///
    /// - Parameter failing: The error with which an entry ends instead.
    private mutating func takeBackSent(
        _ answers: inout Answers, written: Int, failing: (Entry) -> EventsError?
    ) {
        for index in 0..<sentCount where !entries[index].isSettled {
            if index < written { entries[index].isInDoubt = true }
            entries[index].isReturned = false
            guard let error = failing(entries[index]) else { continue }
            if let continuation = entries[index].continuation.take() {
                answers.publishes.append((continuation, .failure(error)))
            }
        }
        // Of the settled ones the room has been given back already.
        entries.removeAll(where: \.isSettled)
        sentCount = 0
        firstTag = 1
        dropUnsentWithoutCaller()
        admitWaiting(&answers)
        noteDrained(&answers)
    }

    private mutating func dropUnsentWithoutCaller() {
        for index in sentCount..<entries.count where entries[index].continuation == nil { free(entries[index]) }
        let sent = sentCount
        var index = 0
        entries.removeAll { entry in
            defer { index += 1 }
            return index >= sent && entry.continuation == nil
        }
    }

    /// Answers everyone. Nothing is on the wire any more.
    private mutating func failAll(unsent error: EventsError, _ answers: inout Answers) {
        for entry in entries {
            guard let continuation = entry.continuation else { continue }
            let outcome =
                entry.isInDoubt
                ? EventsError(.unknownOutcome, error.message, operation: "publish", underlying: error) : error
            answers.publishes.append((continuation, .failure(outcome)))
            free(entry)
        }
        entries = []
        for entry in waiting { answers.admissions.append((entry.continuation, .failure(error))) }
        waiting = []
        noteDrained(&answers)
    }

    private mutating func free(_ entry: Entry) {
        messages -= 1
        bytes -= entry.message.bytes.count
    }

    private mutating func admitWaiting(_ answers: inout Answers) {
        while refusal == nil, hasRoom, let first = waiting.popFirst() {
            messages += 1
            answers.admissions.append((first.continuation, .success(())))
        }
    }

    private mutating func noteDrained(_ answers: inout Answers) {
        if !drained.isEmpty, !entries.contains(where: { $0.continuation != nil }) {
            answers.drained += drained
            drained = []
        }
    }
}
