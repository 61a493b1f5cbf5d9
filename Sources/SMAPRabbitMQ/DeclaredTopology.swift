internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// What was declared through a transport, to be declared again after a loss: a broker may have come back empty. Nothing of it
/// is forgotten; what cannot be declared again is kept with the reason.
final class DeclaredTopology: Sendable {
    /// A service that makes up names must not make memory grow; what is beyond is not restored.
    let limit: Int
    /// So many declarations that have failed are tried again at a time: each may close its channel.
    private static let repeatLimit = 32
    /// A declaration for which the broker has closed the connection is left out for so many stall limits.
    private static let exclusion = 8
    /// So many connections may end without a reason while the same declaration is the oldest under way: then that is to blame.
    static let lossLimit = 3

    /// Why a declaration is not there.
    private struct Failure {
        let operation: BrokerRequest.Operation
        let since: MonotonicTime
        var error: EventsError
        var triedAt: MonotonicTime
        /// Until when it is not sent at all.
        var excludedUntil = MonotonicTime(nanoseconds: 0)

        /// Whether the broker did not answer: then what comes behind it on its channel waits too.
        var isSilent: Bool { error.code == .deadlineExceeded }
    }

    private struct State {
        /// Each with the position at which it was declared first.
        var exchanges: [String: (position: Int, declaration: ExchangeDeclaration)] = [:]
        var queues: [QueueName: (position: Int, declaration: QueueDeclaration)] = [:]
        var bindings: [QueueBinding: Int] = [:]
        /// By the description of the declaration.
        var failures: [String: Failure] = [:]
        /// By the description, then by connection: how often that has ended, naming nothing, while this was the oldest under way.
        /// An outage of the broker ends all connections, and must not count for each.
        var losses: [String: [String: Int]] = [:]
        var count: Int { exchanges.count + queues.count + bindings.count }
        var lastPosition = 0
        /// Whether something was beyond the limit.
        var isOverLimit = false

        /// What is sent behind all others: it would hold them up, or end the connection before they are answered.
        func isLast(_ failure: Failure) -> Bool {
            failure.isSilent
                || losses["\(failure.operation)", default: [:]].values.contains { $0 >= DeclaredTopology.lossLimit }
        }

        /// All declarations, in the order in which they can be repeated.
        var operations: [BrokerRequest.Operation] {
            exchanges.values.sorted { $0.position < $1.position }.map { .declareExchange($0.declaration) }
                + queues.values.sorted { $0.position < $1.position }.map { .declareQueue($0.declaration) }
                + bindings.sorted { $0.value < $1.value }.map { .bind($0.key) }
        }
    }

    private let state = Mutex(State())

    init(limit: Int = 10_000) { self.limit = limit }

    /// What is to be declared again on a new connection, in order, and what everything else waits for: not for what has been
    /// failing for longer than `limit`.
    func operations(
        now: MonotonicTime, limit: Duration
    ) -> [(operation: BrokerRequest.Operation, isAwaited: Bool)] {
        state.withLock { state in
            guard !state.failures.isEmpty else { return state.operations.map { ($0, true) } }
            var lastQueues: Set<QueueName> = []
            for failure in state.failures.values where state.isLast(failure) {
                if case .declareQueue(let queue) = failure.operation { lastQueues.insert(queue.name) }
            }
            var current: [(BrokerRequest.Operation, Bool)] = []
            var last: [(BrokerRequest.Operation, Bool)] = []
            for operation in state.operations {
                let failure = state.failures["\(operation)"]
                guard failure.map({ $0.excludedUntil <= now }) ?? true else { continue }
                let isAwaited = failure.map { $0.since.advanced(by: limit) > now } ?? true
                // A queue takes its bindings along.
                let queue: QueueName? =
                    switch operation {
                    case .declareQueue(let queue): queue.name
                    case .bind(let binding): binding.queue
                    default: nil
                    }
                if failure.map(state.isLast) == true || queue.map(lastQueues.contains) == true {
                    last.append((operation, false))
                } else {
                    current.append((operation, isAwaited))
                }
            }
            return current + last
        }
    }

    /// Some of what has failed and can be tried again, in order; not what the broker did not answer, unless `includingSilent`.
    func failed(now: MonotonicTime, includingSilent: Bool) -> [BrokerRequest.Operation] {
        state.withLock { state in
            guard !state.failures.isEmpty else { return [] }
            let due = state.failures.filter {
                $0.value.excludedUntil <= now && (includingSilent || !$0.value.isSilent)
            }
            let chosen = Set(due.sorted { $0.value.triedAt < $1.value.triedAt }.prefix(Self.repeatLimit).map(\.key))
            return state.operations.filter { chosen.contains("\($0)") }
        }
    }

    /// When something that has failed can be tried again, at `time` at the earliest; nil if nothing can.
    func repeatTime(notBefore time: MonotonicTime, includingSilent: Bool) -> MonotonicTime? {
        state.withLock { state in
            state.failures.values.lazy.filter { includingSilent || !$0.isSilent }
                .map { max(time, $0.excludedUntil) }.min()
        }
    }

    /// The bindings that need a queue or exchange.
    func bindings(of operation: BrokerRequest.Operation) -> [BrokerRequest.Operation] {
        state.withLock { state in
            let names = { (binding: QueueBinding) in
                switch operation {
                case .declareQueue(let queue): binding.queue == queue.name
                case .declareExchange(let exchange): binding.exchange == exchange.name
                default: false
                }
            }
            return state.bindings.filter { names($0.key) }.sorted { $0.value < $1.value }.map { .bind($0.key) }
        }
    }

    /// A declaration could not be repeated. True if the reason is a new one.
    ///
    /// - Parameter endedConnection: Whether the broker has closed the connection for it: that must not happen on each.
    func failed(
        _ operation: BrokerRequest.Operation, _ error: EventsError, now: MonotonicTime, limit: Duration,
        endedConnection: Bool
    ) -> Bool {
        state.withLock { state in
            let known = state.failures["\(operation)"]
            var failure = Failure(operation: operation, since: known?.since ?? now, error: error, triedAt: now)
            if endedConnection {
                if error.code == .protocolViolation {
                    failure.excludedUntil = .distantFuture
                } else if failure.since.advanced(by: limit) <= now {
                    failure.excludedUntil = now.advanced(by: limit * Self.exclusion)
                }
            }
            // The broker has answered it.
            if !endedConnection, !failure.isSilent { state.losses["\(operation)"] = nil }
            state.failures["\(operation)"] = failure
            return known?.error.message != error.message
        }
    }

    /// A connection has ended, naming nothing, while a declaration was the oldest under way. True if that is to blame from now
    /// on: it is sent as the last one then, and left out for a while when it ends one more.
    func lost(
        _ operation: BrokerRequest.Operation, _ error: EventsError, on connection: String, now: MonotonicTime,
        limit: Duration
    ) -> Bool {
        state.withLock { state in
            let losses = state.losses["\(operation)", default: [:]][connection, default: 0] + 1
            state.losses["\(operation)", default: [:]][connection] = losses
            guard losses >= Self.lossLimit else { return false }
            let known = state.failures["\(operation)"]
            var failure = Failure(operation: operation, since: known?.since ?? now, error: error, triedAt: now)
            if losses > Self.lossLimit { failure.excludedUntil = now.advanced(by: limit * Self.exclusion) }
            state.failures["\(operation)"] = failure
            return losses == Self.lossLimit
        }
    }

    /// Whether it is being found out which declaration ends connections: one at a time is sent meanwhile. Not for one that the
    /// broker only leaves unanswered: that may be so for ever.
    var isTesting: Bool {
        state.withLock { state in
            state.losses.contains { key, losses in
                state.failures[key]?.isSilent != true && losses.values.contains { $0 <= Self.lossLimit }
            }
        }
    }

    var hasFailures: Bool { state.withLock { !$0.failures.isEmpty } }

    /// Whether a declaration is missing.
    func isMissing(_ operation: BrokerRequest.Operation) -> Bool {
        state.withLock { !$0.failures.isEmpty && $0.failures["\(operation)"] != nil }
    }

    /// What could not be declared again, a sentence each; of many the first three.
    var problems: [String] {
        let failures = state.withLock { $0.failures }
        let texts = failures.sorted { $0.key < $1.key }
            .map { "topology: \($0.key) could not be declared again: \($0.value.error.message)" }
        return texts.count > 3 ? texts.prefix(3) + ["topology: \(texts.count - 3) more declarations"] : texts
    }

    /// Remembers what was declared, once the broker has it. True for the first that is beyond the limit, and not remembered.
    func insert(_ operation: BrokerRequest.Operation) -> Bool {
        state.withLock { state in
            let isKnown =
                switch operation {
                case .declareExchange(let exchange): state.exchanges[exchange.name] != nil
                case .declareQueue(let queue): state.queues[queue.name] != nil
                case .bind(let binding): state.bindings[binding] != nil
                default: true
                }
            guard isKnown || state.count < limit else {
                defer { state.isOverLimit = true }
                return !state.isOverLimit
            }
            state.lastPosition += 1
            switch operation {
            case .declareExchange(let exchange):
                let position = state.exchanges[exchange.name]?.position ?? state.lastPosition
                state.exchanges[exchange.name] = (position, exchange)
            case .declareQueue(let queue):
                let position = state.queues[queue.name]?.position ?? state.lastPosition
                state.queues[queue.name] = (position, queue)
            case .bind(let binding):
                if !isKnown { state.bindings[binding] = state.lastPosition }
            default: return false
            }
            if !state.failures.isEmpty { state.failures["\(operation)"] = nil }
            if !state.losses.isEmpty { state.losses["\(operation)"] = nil }
            return false
        }
    }
}
