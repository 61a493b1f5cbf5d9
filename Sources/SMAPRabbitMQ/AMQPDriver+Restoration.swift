internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents

/// Declares again what was declared on the connections before this one.
///
/// Publishing and new requests wait until all of it is answered, at most for the stall limit, counted over all connections
/// that it takes. What fails is tried again on the same connection: soon while everything waits, later at growing intervals.
/// A passing failure (a cluster that is being formed refuses what it takes a moment later) costs no connection.
extension AMQPDriver {
    struct Restoration {
        /// The descriptions of the declarations that everything else waits for.
        var awaited: Set<String> = []
        /// When it waits no longer.
        var limit = MonotonicTime.distantFuture
        /// How many are under way, those that nothing waits for included.
        var pendingCount = 0
        /// When those that have failed are tried again.
        var repeatTime = MonotonicTime.distantFuture
        /// How often they were.
        var repeatCount = 0
        /// Whether the broker may answer now what it did not answer before: it has closed a channel that we had given up.
        var includesSilent = false

        var isAwaited: Bool { !awaited.isEmpty }
    }

    /// Between two tries while everything waits.
    private static let quickRepeat = Backoff(first: .milliseconds(100), longest: .seconds(1))
    /// With so many channels given up nothing more is tried again on this connection.
    private static let silentLimit = 8

    func restoreTopology() throws {
        for (operation, isAwaited) in connection.topology.operations(
            now: .now, limit: connection.configuration.stallLimit)
        {
            if try enqueueRestoration(of: operation), isAwaited { restoration.awaited.insert("\(operation)") }
        }
        if restoration.isAwaited { restoration.limit = connection.restoring(restoration.awaited.count) }
        if restoration.pendingCount > 0 { try open(topology) } else { planRepeat() }
    }

    /// False if the broker would end the connection for it: this node takes smaller frames than the one before.
    private func enqueueRestoration(of operation: BrokerRequest.Operation) throws -> Bool {
        let step = try step(for: operation, .restored(operation))
        guard step.frame.count <= limits.frameLimit else {
            connection.restorationFailed(operation, tooLarge(step))
            return false
        }
        restoration.pendingCount += 1
        topology.enqueue(step)
        return true
    }

    /// Takes in how the repetition of a declaration has ended.
    func restored(_ operation: BrokerRequest.Operation, _ result: Result<amqp_method_t, EventsError>) throws {
        restoration.pendingCount -= 1
        switch result {
        case .success:
            let wasMissing = connection.topology.isMissing(operation)
            connection.declared(operation)
            // Their own repetitions may have come before, and failed for its lack.
            if wasMissing {
                for binding in connection.topology.bindings(of: operation) where try enqueueRestoration(of: binding) {
                    if restoration.isAwaited { restoration.awaited.insert("\(binding)") }
                }
            }
            answered(operation, isFinal: true)
        case .failure(let error):
            connection.restorationFailed(operation, error)
            let isFinal =
                switch (error.code, operation) {
                // Time does not help, or it was waited for already.
                case (.accessRefused, _), (.topologyConflict, _), (.deadlineExceeded, _): true
                // Its queue or exchange is not there, and brings its bindings along.
                case (.notFound, .bind): true
                default: false
                }
            answered(operation, isFinal: isFinal)
        }
    }

    private func answered(_ operation: BrokerRequest.Operation, isFinal: Bool) {
        if isFinal, restoration.awaited.remove("\(operation)") != nil, !restoration.isAwaited { connection.restored() }
        planRepeat()
    }

    /// Once all are answered: sets when those that have failed are tried again.
    private func planRepeat() {
        guard restoration.pendingCount == 0, connection.topology.hasFailures else { return }
        let stallLimit = connection.configuration.stallLimit
        let pause =
            restoration.isAwaited
            ? Self.quickRepeat.delay(after: restoration.repeatCount + 1)
            : min(stallLimit * (1 << min(restoration.repeatCount, 5)), stallLimit * 20)
        // What is left out for a while is tried when that is over.
        restoration.repeatTime =
            connection.topology.repeatTime(
                notBefore: MonotonicTime.now.advanced(by: pause), includingSilent: restoration.includesSilent)
            ?? .distantFuture
    }

    /// Ends the waiting when its time is over, and tries again what has failed when its time has come.
    func continueRestoration(_ now: MonotonicTime) throws {
        if restoration.isAwaited, now >= restoration.limit {
            restoration.awaited = []
            restoration.repeatCount = 0
            connection.restored()
        }
        guard now >= restoration.repeatTime, !isBlocked, restoration.pendingCount == 0 else { return }
        restoration.repeatTime = .distantFuture
        let isAwaited = restoration.isAwaited
        guard retiredCount < Self.silentLimit else { return }
        let failed = connection.topology.failed(now: now, includingSilent: restoration.includesSilent)
        restoration.includesSilent = false
        restoration.repeatCount += 1
        for operation in failed { _ = try enqueueRestoration(of: operation) }
        if restoration.pendingCount > 0 {
            if case .closed = topology.state { try open(topology) }
        } else {
            if isAwaited {
                // The other connection has declared it meanwhile.
                restoration.awaited = []
                connection.restored()
            }
            planRepeat()
        }
    }

    /// The broker has closed a channel that was given up: what it was asked for there it may answer now.
    func silenceEnded() {
        restoration.includesSilent = true
        restoration.repeatTime = min(restoration.repeatTime, .now)
    }

    /// How many channels were given up and are not closed yet.
    var retiredCount: Int { channels.values.count { if case .retired = $0.role { true } else { false } } }

    /// Whether a step need not be sent any more because the broker leaves too much unanswered; then it is answered.
    func givesUp(_ step: AMQPChannel.Step, _ error: EventsError) throws -> Bool {
        guard case .restored = step.completion, retiredCount >= Self.silentLimit else { return false }
        try complete(step, on: topology, .failure(error))
        return true
    }
}
