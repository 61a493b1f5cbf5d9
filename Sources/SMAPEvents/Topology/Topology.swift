/// The exchanges, queues and bindings that a service relies on, as a value: to be declared, compared with what a broker
/// has, and printed.
///
/// ```swift
/// var topology = Topology(exchanges: [.events])
/// topology.insert(EventSubscription(queue: "notification.email", bindings: ["email.#"]))
/// try await topology.apply(to: transport)
/// ```
public struct Topology: Sendable, Hashable {
    /// The exchanges, no name twice.
    public private(set) var exchanges: [ExchangeDeclaration] = []
    /// The queues, no name twice.
    public private(set) var queues: [QueueDeclaration] = []
    /// The bindings, none twice.
    public private(set) var bindings: [QueueBinding] = []
    /// Exchanges that others declare, and that queues may be bound to here: binding to one that is missing is an error.
    public var foreignExchanges: Set<String> = []

    /// Describes a topology. Of two declarations of one name the last counts.
    public init(
        exchanges: [ExchangeDeclaration] = [], queues: [QueueDeclaration] = [], bindings: [QueueBinding] = []
    ) {
        for exchange in exchanges { insert(exchange) }
        for queue in queues { insert(queue) }
        for binding in bindings { insert(binding) }
    }

    /// Adds an exchange, in place of one of the same name.
    public mutating func insert(_ exchange: ExchangeDeclaration) {
        if let index = exchanges.firstIndex(where: { $0.name == exchange.name }) {
            exchanges[index] = exchange
        } else {
            exchanges.append(exchange)
        }
    }

    /// Adds a queue, in place of one of the same name.
    public mutating func insert(_ queue: QueueDeclaration) {
        if let index = queues.firstIndex(where: { $0.name == queue.name }) {
            queues[index] = queue
        } else {
            queues.append(queue)
        }
    }

    /// Adds a binding.
    public mutating func insert(_ binding: QueueBinding) {
        if !bindings.contains(binding) { bindings.append(binding) }
    }

    /// Adds all that another topology has.
    public mutating func insert(_ other: Topology) {
        for exchange in other.exchanges { insert(exchange) }
        for queue in other.queues { insert(queue) }
        for binding in other.bindings { insert(binding) }
        foreignExchanges.formUnion(other.foreignExchanges)
    }

    /// Adds what a subscription needs: its queue, its bindings, and where its dead letters go.
    public mutating func insert(_ subscription: EventSubscription) {
        insert(subscription.topology)
    }

    // MARK: Checks that need no broker

    /// What would lose messages silently if it were declared so, a sentence each.
    public var dangers: [String] {
        var dangers: [String] = []
        let known = Set(exchanges.map(\.name))
        for queue in queues {
            let arguments = queue.arguments
            let isQuorum = arguments["x-queue-type"] == .string("quorum")
            if case .string(let target) = arguments["x-dead-letter-exchange"], !target.isEmpty, !known.contains(target)
            {
                // RabbitMQ guide, "Dead Letter Exchanges": a missing exchange drops silently.
                dangers.append(
                    "\(queue.name) sends its dead letters to the exchange \(target), which is not declared: "
                        + "they would be lost")
            }
            if arguments["x-dead-letter-strategy"] == .string("at-least-once") {
                // RabbitMQ guide, "Quorum Queues: Dead Lettering": otherwise the broker falls back silently.
                if !isQuorum {
                    dangers.append("\(queue.name) is to dead-letter at least once, which only quorum queues do")
                } else if arguments["x-overflow"] != .string("reject-publish") {
                    dangers.append(
                        "\(queue.name) is to dead-letter at least once, which needs x-overflow=reject-publish")
                }
            }
            if arguments["x-max-priority"] != nil, isQuorum {
                // RabbitMQ guide, "Quorum Queues": no message priorities in 3.10.
                dangers.append("\(queue.name) is to have priorities, which quorum queues do not have")
            }
        }
        let names = Set(queues.map(\.name))
        for binding in bindings {
            if !known.contains(binding.exchange), !foreignExchanges.contains(binding.exchange) {
                dangers.append("\(binding.queue) is bound to the exchange \(binding.exchange), which is not declared")
            }
            if !names.contains(binding.queue) {
                dangers.append("\(binding.queue) is bound to \(binding.exchange), but not declared")
            }
        }
        return dangers
    }

    /// Throws ``EventsError/Code/dangerousTopology`` with the first of the ``dangers``, if there are any.
    public func validate() throws {
        if let danger = dangers.first { throw EventsError(.dangerousTopology, danger, operation: "topology") }
    }
}
