internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// A request to the broker that is answered by one reply: declare, bind, consume, cancel, close.
///
/// It is answered once, by whoever comes first: the broker, its deadline, its caller's cancellation, or the end of the
/// connection.
final class RemoteCall: Sendable {
    enum Request: Sendable {
        case declareExchange(ExchangeDeclaration)
        case declareQueue(QueueDeclaration)
        case bind(QueueBinding)
        case checkExchange(String)
        case checkQueue(QueueName)
        case consume(Consumer)
        case stopConsumer(Consumer)
        case closeConsumer(Consumer)
    }

    enum Reply: Sendable {
        case done
        case queue(QueueStatus)
    }

    private enum State {
        case new
        case waiting(CheckedContinuation<Reply, any Error>)
        case answered(Result<Reply, any Error>)
    }

    let request: Request
    let operation: String
    let deadline: MonotonicTime
    /// Later calls have higher numbers: after a loss they are repeated in this order.
    let number = RemoteCall.numbers.add(1, ordering: .relaxed).newValue
    private static let numbers = Atomic<UInt64>(0)
    private let state = Mutex(State.new)

    init(_ request: Request, operation: String, deadline: ContinuousClock.Instant) {
        self.request = request
        self.operation = operation
        self.deadline = MonotonicTime(deadline)
    }

    var isAnswered: Bool {
        state.withLock { if case .answered = $0 { true } else { false } }
    }

    func answer(_ result: Result<Reply, any Error>) {
        let continuation = state.withLock { state -> CheckedContinuation<Reply, any Error>? in
            switch state {
            case .new:
                state = .answered(result)
                return nil
            case .waiting(let continuation):
                state = .answered(result)
                return continuation
            case .answered: return nil
            }
        }
        continuation?.resume(with: result)
    }

    func fail(_ code: EventsError.Code, _ message: String) {
        answer(.failure(EventsError(code, message, operation: operation)))
    }

    /// Waits for the answer. With `isCancellable` off it outlasts the cancellation of its task, up to its deadline: for
    /// what must be done on the way out.
    func wait(isCancellable: Bool = true) async throws -> Reply {
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let result = state.withLock { state -> Result<Reply, any Error>? in
                    if case .answered(let result) = state { return result }
                    state = .waiting(continuation)
                    return nil
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            if isCancellable { answer(.failure(CancellationError())) }
        }
    }
}
