internal import Synchronization
internal import Waiting

/// The callers that wait for replies, by correlation id. For the transports of this package.
package final class ReplyRegistry: Sendable {
    private struct Waiting {
        let waiter: Waiter<InboundDelivery>
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
        let waiter = Waiter<InboundDelivery>()
        let isNew = state.withLock { state in
            guard state.waiting[correlationID] == nil else { return false }
            state.waiting[correlationID] = Waiting(waiter: waiter)
            return true
        }
        guard isNew else {
            throw EventsError(
                .invalidEvent, "a request with this correlation id is under way", operation: "request")
        }
        defer { state.withLock { $0.waiting[correlationID] = nil } }
        // Both are cancelled when this call ends. A reply may overtake the confirm of its request.
        async let _ = send(correlationID, waiter, publish)
        async let _ = expire(waiter, deadline)
        return try await waiter.value()
    }

    private func send(
        _ correlationID: String, _ waiter: Waiter<InboundDelivery>, _ publish: @Sendable () async throws -> Bool
    ) async {
        do {
            guard try await publish() else {
                throw EventsError(.unroutable, "no queue is bound for the request", operation: "request")
            }
            sent(correlationID)
        } catch {
            waiter.resolve(.failure(error))
        }
    }

    private func expire(_ waiter: Waiter<InboundDelivery>, _ deadline: ContinuousClock.Instant) async {
        do {
            try await Task.sleep(until: deadline)
            waiter.resolve(
                .failure(EventsError(.deadlineExceeded, "no reply by the deadline", operation: "request")))
        } catch {
            // The call has ended.
        }
    }

    /// Hands a reply to the caller that waits for it; one that comes too late is dropped.
    package func deliver(_ reply: InboundDelivery) {
        guard let id = reply.properties.correlationID else { return }
        state.withLock { $0.waiting[id] }?.waiter.resolve(.success(reply))
    }

    /// The broker has a request. To be called by the side that reads its confirm, before a loss that comes after it.
    package func sent(_ correlationID: String) {
        let (waiting, end) = state.withLock { state in
            state.waiting[correlationID]?.isSent = true
            return (state.waiting[correlationID], state.end)
        }
        if let end { waiting?.waiter.resolve(.failure(end)) }
    }

    /// The connection, or its channel, is gone, and with it the replies to what had been sent. What had not ends, or is sent
    /// again, as any other message is.
    ///
    /// - Parameter isFinal: Whether there will be no other connection.
    package func connectionLost(_ error: EventsError, isFinal: Bool = false) {
        let lost = state.withLock { state in
            if isFinal { state.end = state.end ?? error }
            return state.waiting.values.filter(\.isSent)
        }
        for waiting in lost { waiting.waiter.resolve(.failure(error)) }
    }
}
