internal import SMAPEvents
internal import Synchronization

/// What was declared through a transport, to be declared again after a loss: a broker may have come back empty.
final class DeclaredTopology: Sendable {
    /// A service that makes up names must not make memory grow; what is beyond is not restored.
    private static let limit = 10_000

    private let state = Mutex(Topology())

    var current: Topology { state.withLock { $0 } }

    /// Remembers what was declared, once the broker has it.
    func insert(_ request: RemoteCall.Request) {
        state.withLock { topology in
            guard topology.exchanges.count + topology.queues.count + topology.bindings.count < Self.limit else {
                return
            }
            switch request {
            case .declareExchange(let exchange): topology.insert(exchange)
            case .declareQueue(let queue): topology.insert(queue)
            case .bind(let binding): topology.insert(binding)
            default: break
            }
        }
    }
}
