internal import SMAPEvents
internal import Synchronization

/// Those who want to know of a transport's connections.
final class ConnectionObservers: Sendable {
    private struct State {
        var isFinished = false
        var lastID = 0
        var observers: [Int: AsyncStream<ConnectionChange>.Continuation] = [:]
    }

    private let state = Mutex(State())

    func stream() -> AsyncStream<ConnectionChange> {
        let (stream, continuation) = AsyncStream.makeStream(
            of: ConnectionChange.self, bufferingPolicy: .bufferingNewest(64))
        let id = state.withLock { state -> Int? in
            guard !state.isFinished else { return nil }
            state.lastID += 1
            state.observers[state.lastID] = continuation
            return state.lastID
        }
        guard let id else {
            continuation.finish()
            return stream
        }
        continuation.onTermination = { [weak self] _ in
            self?.state.withLock { state in _ = state.observers.removeValue(forKey: id) }
        }
        return stream
    }

    func tell(_ change: ConnectionChange) {
        for observer in state.withLock({ Array($0.observers.values) }) { observer.yield(change) }
    }

    func finish() {
        let observers = state.withLock { state in
            state.isFinished = true
            defer { state.observers = [:] }
            return Array(state.observers.values)
        }
        for observer in observers { observer.finish() }
    }
}
