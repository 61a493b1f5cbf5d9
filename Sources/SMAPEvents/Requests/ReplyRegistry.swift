internal import Synchronization

/// Who waits for which reply. For the transports of this package.
package final class ReplyRegistry: Sendable {
    private struct Waiting {
        var continuation: CheckedContinuation<InboundDelivery, any Error>?
        var reply: Result<InboundDelivery, any Error>?
        /// Whether the broker has the request: then its reply is lost with the connection.
        var isSent = false
    }

    private let waiting = Mutex<[String: Waiting]>([:])

    package init() {}

    /// Sends a request, and waits for the reply with its correlation id.
    ///
    /// - Parameter publish: Publishes the request; returns whether it reached a queue.
    package func request(
        _ correlationID: String, deadline: ContinuousClock.Instant, publish: @escaping @Sendable () async throws -> Bool
    ) async throws -> InboundDelivery {
        let isNew = waiting.withLock { waiting in
            guard waiting[correlationID] == nil else { return false }
            waiting[correlationID] = Waiting()
            return true
        }
        guard isNew else {
            throw EventsError(
                .invalidEvent, "a request with this correlation id is under way", operation: "request")
        }
        defer { waiting.withLock { $0[correlationID] = nil } }
        return try await withThrowingTaskGroup(of: InboundDelivery?.self) { group in
            group.addTask { [self] in
                guard try await publish() else {
                    throw EventsError(.unroutable, "no queue is bound for the request", operation: "request")
                }
                waiting.withLock { $0[correlationID]?.isSent = true }
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
                let result = waiting.withLock { waiting -> Result<InboundDelivery, any Error>? in
                    if Task.isCancelled { return .failure(CancellationError()) }
                    if let reply = waiting[correlationID]?.reply { return reply }
                    waiting[correlationID]?.continuation = continuation
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

    /// The connection, or its channel, is gone, and with it the replies to what had been sent. What had not is sent on the
    /// next.
    package func connectionLost(_ error: EventsError) {
        let lost = waiting.withLock { $0.filter { $0.value.isSent }.map(\.key) }
        for id in lost { answer(id, .failure(error)) }
    }

    /// There will be no connection any more.
    package func close(_ error: EventsError) {
        for id in waiting.withLock({ Array($0.keys) }) { answer(id, .failure(error)) }
    }

    private func answer(_ id: String, _ result: Result<InboundDelivery, any Error>) {
        let continuation = waiting.withLock { waiting -> CheckedContinuation<InboundDelivery, any Error>? in
            guard waiting[id]?.reply == nil else { return nil }
            waiting[id]?.reply = result
            defer { waiting[id]?.continuation = nil }
            return waiting[id]?.continuation
        }
        continuation?.resume(with: result)
    }
}
