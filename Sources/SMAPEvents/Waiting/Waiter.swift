package import Synchronization

/// One task that waits for one value: a reply, a confirm, room in a queue.
///
/// It is resolved once, by the first that comes: the side that has the value, a deadline, the end of a connection, or the
/// cancellation of the task. All later attempts are told that they came too late, so that a value that was not taken
/// can be given to another task. It may be resolved before the task waits.
///
/// Whoever keeps waiters keeps them behind a lock of its own, and resolves them outside it.
package final class Waiter<Value: Sendable>: Sendable {
    @usableFromInline
    enum State {
        case idle
        case waiting(UnsafeContinuation<Result<Value, any Error>, Never>)
        case resolved(Result<Value, any Error>)
    }

    @usableFromInline let state: Mutex<State>

    @inlinable
    package init() { state = Mutex(.idle) }

    /// Whether it has a result, taken or not.
    @inlinable
    package var isResolved: Bool {
        state.withLock { if case .resolved = $0 { true } else { false } }
    }

    /// Gives the task its result. False when it has one already; then nothing has changed.
    @discardableResult
    @inlinable
    package func resolve(_ result: Result<Value, any Error>) -> Bool {
        let (isFirst, continuation) = state.withLock {
            state -> (Bool, UnsafeContinuation<Result<Value, any Error>, Never>?) in
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
        continuation?.resume(returning: result)
        return isFirst
    }

    /// Waits for the result. One task may do so, once.
    ///
    /// - Parameter onCancel: Called when the task was cancelled before there was a result, which then is a
    ///   `CancellationError`.
    @inlinable
    package func value(onCancel: @Sendable () -> Void = {}) async throws -> Value {
        try await withTaskCancellationHandler {
            try await uncancelledResult().get()
        } onCancel: {
            if resolve(.failure(CancellationError())) { onCancel() }
        }
    }

    /// Waits for the result also when the task is cancelled: for what must be awaited on the way out.
    @inlinable
    package func uncancelledResult() async -> Result<Value, any Error> {
        await withUnsafeContinuation { continuation in
            let result = state.withLock { state -> Result<Value, any Error>? in
                if case .resolved(let result) = state { return result }
                if case .waiting = state { preconditionFailure("a second task waits for the same value") }
                state = .waiting(continuation)
                return nil
            }
            if let result { continuation.resume(returning: result) }
        }
    }
}
