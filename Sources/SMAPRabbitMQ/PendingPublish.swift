internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// One message from the moment at which its caller has handed it over until the broker has answered.
///
/// Sound as `Sendable`: all its variables belong to the ``PublishWindow`` that it is in, and are read and written under the
/// lock of that window only. The exception is `message`, which the connection thread reads while it writes: only that
/// thread takes it away.
final class PendingPublish: @unchecked Sendable {
    /// Who receives the result.
    enum Caller {
        case task(Waiter<Bool>)
        case batch(PublishBatch, Int)
    }

    /// Nil once the broker has answered: behind one that it does not answer, no message is kept.
    private(set) var message: EncodedMessage?
    /// What it counts for in the window.
    let size: Int
    let destination: UInt64
    let deadline: MonotonicTime
    let caller: Caller
    /// Whether the caller has its result: from the broker, by its deadline, or by its cancellation.
    var isAnswered = false
    /// Whether the broker has it in front of a message that it has not answered yet.
    private(set) var isSettled = false
    var isReturned = false
    /// Whether the broker may have taken it on a channel or connection that is gone. Then no later answer but a
    /// confirm tells what became of it.
    var isInDoubt = false
    /// Whether it has been handed to a connection that is still there.
    var isOnWire = false
    /// Its delivery tag on the channel that it was written to.
    var tag: UInt64 = 0
    /// Where its first byte stands in the stream of that connection.
    var position: UInt64 = 0
    /// When it was written there.
    var writtenAt = MonotonicTime(nanoseconds: 0)
    /// How many connections have ended while it was under way, as far as a message may have ended them.
    var lossCount = 0
    /// How many of them have ended while it was the only message under way.
    var loneLossCount = 0
    /// How many answers the broker had given before the first of those.
    var answersBefore = 0
    /// How many channels were closed while it was under way, for another message that the broker has named.
    var interruptionCount = 0
    /// Whether the broker may have closed a channel because of it.
    var isSuspect = false
    /// As a suspect it is written with so many others at most, itself included.
    var groupLimit = Int.max

    /// Whether it is a suspect and goes where nothing was confirmed in time: it is not written together with others.
    var isPutBack = false
    /// Whether the channel was reset while it was a suspect on the wire. The next time it may stay there.
    var wasSilent = false
    /// Whether it is a suspect on the wire that the others do not wait for any more.
    var isLeft = false

    init(_ message: EncodedMessage, deadline: MonotonicTime, caller: Caller) {
        self.message = message
        size = message.size
        destination = message.destination.hash
        self.deadline = deadline
        self.caller = caller
    }

    /// The broker has answered.
    func settle() {
        isSettled = true
        isSuspect = false
        message = nil
    }

    /// Tells the caller. To be called outside the window's lock.
    func resume(_ result: Result<Bool, EventsError>) {
        switch caller {
        case .task(let waiter): waiter.resolve(result.mapError { $0 })
        case .batch(let batch, let index): batch.resolve(index, result)
        }
    }
}

/// Many messages that one caller waits for together.
final class PublishBatch: Sendable {
    private struct State {
        var results: [Result<Bool, EventsError>]
        var isAnswered: [Bool]
        var missing: Int
    }

    private let state: Mutex<State>
    private let waiter = Waiter<Void>()

    init(count: Int) {
        let none = Result<Bool, EventsError>.failure(EventsError(.unsent, "not published", operation: "publish"))
        state = Mutex(
            State(
                results: Array(repeating: none, count: count), isAnswered: Array(repeating: false, count: count),
                missing: count))
        if count == 0 { waiter.resolve(.success(())) }
    }

    /// The first result of a message stands.
    func resolve(_ index: Int, _ result: Result<Bool, EventsError>) {
        let isComplete = state.withLock { state in
            guard !state.isAnswered[index] else { return false }
            state.isAnswered[index] = true
            state.results[index] = result
            state.missing -= 1
            return state.missing == 0
        }
        if isComplete { waiter.resolve(.success(())) }
    }

    /// Returns when every message has its result: the broker's, or by its deadline.
    func results() async -> [Result<Bool, EventsError>] {
        _ = await waiter.uncancelledResult()
        return state.withLock { $0.results }
    }
}
