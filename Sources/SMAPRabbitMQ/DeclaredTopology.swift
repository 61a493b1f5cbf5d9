internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// What was declared through a transport, to be declared again after a loss: a broker may have come back empty.
final class DeclaredTopology: Sendable {
    /// A service that makes up names must not make memory grow; what is beyond is not restored.
    private static let limit = 10_000

    private struct State {
        /// Each with the position at which it was declared first.
        var exchanges: [String: (position: Int, declaration: ExchangeDeclaration)] = [:]
        var queues: [QueueName: (position: Int, declaration: QueueDeclaration)] = [:]
        var bindings: [QueueBinding: Int] = [:]
        /// What could not be declared again, by its description: since when, and why.
        var failures: [String: (operation: BrokerRequest.Operation, since: MonotonicTime, error: EventsError)] = [:]
        var count: Int { exchanges.count + queues.count + bindings.count }
        var lastPosition = 0
    }

    private let state = Mutex(State())

    /// All declarations, in the order in which they can be repeated; apart those that have failed for a while.
    func operations(
        failingFor limit: Duration, now: MonotonicTime
    ) -> (current: [BrokerRequest.Operation], overdue: [BrokerRequest.Operation]) {
        let failures = state.withLock { $0.failures }
        guard !failures.isEmpty else { return (operations, []) }
        let isOverdue = { (operation: BrokerRequest.Operation) in
            failures["\(operation)"].map { $0.since.advanced(by: limit) <= now } ?? false
        }
        let all = operations
        return (all.filter { !isOverdue($0) }, all.filter(isOverdue))
    }

    private var operations: [BrokerRequest.Operation] {
        state.withLock { state in
            state.exchanges.values.sorted { $0.position < $1.position }.map { .declareExchange($0.declaration) }
                + state.queues.values.sorted { $0.position < $1.position }.map { .declareQueue($0.declaration) }
                + state.bindings.sorted { $0.value < $1.value }.map { .bind($0.key) }
        }
    }

    /// A declaration could not be repeated. Returns since when that has been so.
    func failed(_ operation: BrokerRequest.Operation, _ error: EventsError, now: MonotonicTime) -> MonotonicTime {
        state.withLock { state in
            let since = state.failures["\(operation)"]?.since ?? now
            state.failures["\(operation)"] = (operation, since, error)
            return since
        }
    }

    /// A declaration was made again.
    func repeated(_ operation: BrokerRequest.Operation) {
        state.withLock { state in
            if !state.failures.isEmpty { state.failures["\(operation)"] = nil }
        }
    }

    /// The declarations that could not be repeated, and can be tried again, in the order of ``operations``.
    var failed: [BrokerRequest.Operation] {
        let failures = state.withLock { $0.failures }
        return failures.isEmpty ? [] : operations.filter { failures["\($0)"] != nil }
    }

    /// What could not be declared again, a sentence each; of many the first three.
    var problems: [String] {
        let failures = state.withLock { $0.failures }
        let texts = failures.sorted { $0.key < $1.key }
            .map { "topology: \($0.key) could not be declared again: \($0.value.error.message)" }
        return texts.count > 3 ? texts.prefix(3) + ["topology: \(texts.count - 3) more declarations"] : texts
    }

    /// Forgets a declaration.
    func remove(_ operation: BrokerRequest.Operation) {
        state.withLock { state in
            switch operation {
            case .declareExchange(let exchange): state.exchanges[exchange.name] = nil
            case .declareQueue(let queue): state.queues[queue.name] = nil
            case .bind(let binding): state.bindings[binding] = nil
            default: break
            }
        }
    }

    /// Remembers what was declared, once the broker has it.
    func insert(_ operation: BrokerRequest.Operation) {
        repeated(operation)
        state.withLock { state in
            state.lastPosition += 1
            let isFull = state.count >= Self.limit
            switch operation {
            case .declareExchange(let exchange):
                guard let known = state.exchanges[exchange.name] else {
                    if !isFull { state.exchanges[exchange.name] = (state.lastPosition, exchange) }
                    return
                }
                state.exchanges[exchange.name] = (known.position, exchange)
            case .declareQueue(let queue):
                guard let known = state.queues[queue.name] else {
                    if !isFull { state.queues[queue.name] = (state.lastPosition, queue) }
                    return
                }
                state.queues[queue.name] = (known.position, queue)
            case .bind(let binding):
                if state.bindings[binding] == nil, !isFull { state.bindings[binding] = state.lastPosition }
            default: break
            }
        }
    }
}
