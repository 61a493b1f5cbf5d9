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
        var count: Int { exchanges.count + queues.count + bindings.count }
        var lastPosition = 0
    }

    private let state = Mutex(State())

    /// All declarations, in the order in which they can be repeated.
    var operations: [BrokerRequest.Operation] {
        state.withLock { state in
            state.exchanges.values.sorted { $0.position < $1.position }.map { .declareExchange($0.declaration) }
                + state.queues.values.sorted { $0.position < $1.position }.map { .declareQueue($0.declaration) }
                + state.bindings.sorted { $0.value < $1.value }.map { .bind($0.key) }
        }
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
