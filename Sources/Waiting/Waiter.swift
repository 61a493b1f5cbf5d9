public import Synchronization

/// One task that waits for one value: a reply, a confirm, room in a queue.
///
/// It is resolved once, by the first that comes: the side that has the value, a deadline, the end of a connection, or the
/// cancellation of the task. All later attempts are told that they came too late, so that a value that was not taken
/// can be given to another task. It may be resolved before the task waits.
///
/// The side that keeps waiters keeps them behind a lock of its own, and resolves them outside it.
///
/// A module of its own, since what is inlinable and public is specialised in the modules that use it: there is one of these
/// for each publish.
public final class Waiter<Value: Sendable>: Sendable {
    @usableFromInline
    enum State {
        case idle
        case waiting(UnsafeContinuation<Void, Never>)
        case resolved(Result<Value, any Error>)
    }

    @usableFromInline let state: Mutex<State>

    /// A waiter that has no result yet.
    @inlinable
    public init() { state = Mutex(.idle) }

    /// Whether it has a result, taken or not.
    @inlinable
    public var isResolved: Bool {
        state.withLock { if case .resolved = $0 { true } else { false } }
    }

    /// Gives the task its result. False when it has one already; then nothing has changed.
    @discardableResult
    @inlinable
    public func resolve(_ result: Result<Value, any Error>) -> Bool {
        let (isFirst, continuation) = state.withLock { state -> (Bool, UnsafeContinuation<Void, Never>?) in
            switch state {
            case .idle:
                state = .resolved(result)
                return (true, nil)
            case .waiting(let continuation):
                state = .resolved(result)
                return (true, continuation)
            case .resolved: return (false, nil)
            }
        }
        // Sound: a continuation is in the state from the moment it is made until it is taken out here, once.
        continuation?.resume()
        return isFirst
    }

    /// Waits for the result. One task may do so, once.
    ///
    /// - Parameter onCancel: Called when the task was cancelled before there was a result, which then is a
    ///   `CancellationError`.
    @inlinable
    public func value(onCancel: @Sendable () -> Void = {}) async throws -> Value {
        // What is awaited has no value, so that none is handed through the runtime's generic functions.
        await withTaskCancellationHandler {
            await suspend()
        } onCancel: {
            if resolve(.failure(CancellationError())) { onCancel() }
        }
        return try result.get()
    }

    /// Waits for the result also when the task is cancelled: for what must be awaited on the way out.
    @inlinable
    public func uncancelledResult() async -> Result<Value, any Error> {
        await suspend()
        return result
    }

    /// Returns once there is a result.
    @inlinable
    func suspend() async {
        await withUnsafeContinuation { continuation in
            let isResolved = state.withLock { state in
                switch state {
                case .resolved: return true
                case .waiting: preconditionFailure("a second task waits for the same value")
                case .idle:
                    state = .waiting(continuation)
                    return false
                }
            }
            if isResolved { continuation.resume() }
        }
    }

    /// The result that there is.
    @inlinable
    var result: Result<Value, any Error> {
        state.withLock { state in
            guard case .resolved(let result) = state else { preconditionFailure("resumed without a result") }
            return result
        }
    }
}
