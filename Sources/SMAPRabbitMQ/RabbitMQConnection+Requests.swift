internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// Requests that the broker answers: declarations and consumers.
extension RabbitMQConnection {
    /// Sends a request once the connection is open, and waits for its reply.
    func request(
        _ operation: BrokerRequest.Operation, name: String, deadline: ContinuousClock.Instant
    ) async throws -> BrokerRequest.Reply {
        try await ready(deadline: deadline)
        let request = post(BrokerRequest(operation, name: name, deadline: MonotonicTime(deadline)))
        return try await request.waiter.value { forget(request) }
    }

    /// A request on the way out: it is not cancelled with its task, and how it ends does not matter.
    func finish(_ operation: BrokerRequest.Operation, name: String) async {
        let limit = MonotonicTime(.now + .seconds(5))
        _ = await post(BrokerRequest(operation, name: name, deadline: limit)).waiter.uncancelledResult()
    }

    private func post(_ request: BrokerRequest) -> BrokerRequest {
        // In one step: when a connection ends, a request is in both or in neither.
        let posting = shared.withLock { shared -> Mailbox<BrokerRequest>.Posting in
            guard request.isClose || shared.requests.count < Self.requestLimit else { return .full }
            let posting = mailbox.post(request)
            if case .accepted = posting { shared.requests[ObjectIdentifier(request)] = request }
            return posting
        }
        switch posting {
        case .accepted:
            Watchdog.shared.schedule(at: request.deadline)
            wake()
        case .full:
            request.fail(.overloaded, "\(Self.requestLimit) requests are waiting for the broker already")
        case .closed: request.fail(.closed, "the transport was closed")
        }
        return request
    }

    func forget(_ request: BrokerRequest) {
        shared.withLock { state in _ = state.requests.removeValue(forKey: ObjectIdentifier(request)) }
    }

    // MARK: The connection thread

    func takeRequests() -> [BrokerRequest] { mailbox.takeAll() }

    func add(_ consumer: Consumer) {
        shared.withLock { $0.consumers[ObjectIdentifier(consumer)] = consumer }
    }

    func remove(_ consumer: Consumer) {
        shared.withLock { state in _ = state.consumers.removeValue(forKey: ObjectIdentifier(consumer)) }
    }
}
