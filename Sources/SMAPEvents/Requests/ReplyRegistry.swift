internal import Synchronization

/// Who waits for which reply. For the transports of this package.
package final class ReplyRegistry: Sendable {
    private struct Waiting {
        var continuation: CheckedContinuation<InboundDelivery, any Error>?
        var reply: Result<InboundDelivery, any Error>?
        /// Whether the broker has the request: then its reply is lost with the connection.
        var isSent = false
    }

    private struct State {
        var waiting: [String: Waiting] = [:]
        /// Why there will be no connection any more.
        var end: EventsError?
    }

    private let state = Mutex(State())

    package init() {}

    /// Sends a request, and waits for the reply with its correlation id.
    ///
    /// - Parameter publish: Publishes the request; returns whether it reached a queue.
    package func request(
        _ correlationID: String, deadline: ContinuousClock.Instant, publish: @escaping @Sendable () async throws -> Bool
    ) async throws -> InboundDelivery {
        let isNew = state.withLock { state in
            guard state.waiting[correlationID] == nil else { return false }
            state.waiting[correlationID] = Waiting()
            return true
        }
        guard isNew else {
            throw EventsError(
                .invalidEvent, "a request with this correlation id is under way", operation: "request")
        }
        defer { state.withLock { $0.waiting[correlationID] = nil } }
        return try await withThrowingTaskGroup(of: InboundDelivery?.self) { group in
            group.addTask { [self] in
                guard try await publish() else {
                    throw EventsError(.unroutable, "no queue is bound for the request", operation: "request")
                }
                sent(correlationID)
                return nil
            }
            group.addTask { try await self.reply(to: correlationID) }
            group.addTask {
                try await Task.sleep(until: deadline)
                throw EventsError(.deadlineExceeded, "no reply by the deadline", operation: "request")
            }
            defer { group.cancelAll() }
            while let reply = try await group.next() {
                if let reply { return reply }
            }
            throw CancellationError()
        }
    }

    private func reply(to correlationID: String) async throws -> InboundDelivery {
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let result = state.withLock { state -> Result<InboundDelivery, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if let reply = state.waiting[correlationID]?.reply { return reply }
                    state.waiting[correlationID]?.continuation = continuation
                    return nil
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            answer(correlationID, .failure(CancellationError()))
        }
    }

    /// Hands a reply to whoever waits for it; one that comes too late is dropped.
    package func deliver(_ reply: InboundDelivery) {
        guard let id = reply.properties.correlationID else { return }
        answer(id, .success(reply))
    }

    /// The broker has a request. Told by whoever reads its confirm, before a loss that comes after it.
    package func sent(_ correlationID: String) {
        let end = state.withLock { state in
            state.waiting[correlationID]?.isSent = true
            return state.end
        }
        if let end { answer(correlationID, .failure(end)) }
    }

    /// The connection, or its channel, is gone, and with it the replies to what had been sent. What had not ends, or is sent
    /// again, as any other message is.
    ///
    /// - Parameter isFinal: Whether there will be no other connection.
    package func connectionLost(_ error: EventsError, isFinal: Bool = false) {
        let lost = state.withLock { state in
            if isFinal { state.end = state.end ?? error }
            return state.waiting.filter { $0.value.isSent }.map(\.key)
        }
        for id in lost { answer(id, .failure(error)) }
    }

    private func answer(_ id: String, _ result: Result<InboundDelivery, any Error>) {
        let continuation = state.withLock { state -> CheckedContinuation<InboundDelivery, any Error>? in
            guard state.waiting[id]?.reply == nil else { return nil }
            state.waiting[id]?.reply = result
            defer { state.waiting[id]?.continuation = nil }
            return state.waiting[id]?.continuation
        }
        continuation?.resume(with: result)
    }
}
