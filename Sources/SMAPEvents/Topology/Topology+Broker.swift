extension Topology {
    /// How a broker differs from a topology.
    public struct Difference: Sendable, Hashable, CustomStringConvertible {
        /// What is meant: `exchange smap.events`, `queue notification.email`.
        public let subject: String
        /// Whether it is missing. Otherwise it is there, with other arguments.
        public let isMissing: Bool
        /// What the broker said.
        public let reason: String

        /// `queue notification.email is missing`, or how it differs.
        public var description: String {
            isMissing ? "\(subject) is missing" : "\(subject) differs: \(reason)"
        }
    }

    /// Declares everything, exchanges first. What is there already stays as it is; nothing is ever deleted.
    ///
    /// - Parameter deadline: How long all of it may take, 30 s by default.
    /// - Throws: ``EventsError/Code/dangerousTopology`` before anything is declared, and
    ///   ``EventsError/Code/topologyConflict`` when something exists with other arguments.
    public func apply(to transport: any EventTransport, deadline: Duration = .seconds(30)) async throws {
        try validate()
        let end = ContinuousClock.now + deadline
        for exchange in exchanges { try await transport.declare(exchange, deadline: end) }
        for queue in queues { try await transport.declare(queue, deadline: end) }
        for binding in bindings {
            try await transport.bind(
                binding.queue, to: binding.exchange, routingKey: binding.routingKey, deadline: end)
        }
    }

    /// How the broker differs from this topology. Changes nothing.
    ///
    /// Exchanges and queues are compared with all their arguments. Bindings cannot be read over AMQP 0-9-1 and are not
    /// compared: ``apply(to:deadline:)`` makes sure of them.
    public func differences(
        from transport: any EventTransport, deadline: Duration = .seconds(30)
    ) async throws
        -> [Difference]
    {
        let end = ContinuousClock.now + deadline
        var differences: [Difference] = []
        func compare(
            _ subject: String, exists: () async throws -> Void, matches: () async throws -> Void
        ) async throws {
            do {
                // Passively first: a declaration compares arguments, but would create what is missing.
                try await exists()
                try await matches()
            } catch let error as EventsError where error.code == .notFound || error.code == .topologyConflict {
                differences.append(
                    Difference(subject: subject, isMissing: error.code == .notFound, reason: error.message))
            }
        }
        for exchange in exchanges {
            try await compare("exchange \(exchange.name)") {
                try await transport.checkExchange(exchange.name, deadline: end)
            } matches: {
                try await transport.compare(exchange, deadline: end)
            }
        }
        for queue in queues {
            try await compare("queue \(queue.name)") {
                _ = try await transport.status(of: queue.name, deadline: end)
            } matches: {
                try await transport.compare(queue, deadline: end)
            }
        }
        return differences
    }

    /// Throws ``EventsError/Code/topologyConflict`` or ``EventsError/Code/notFound`` with the first difference, if there
    /// is one. Changes nothing.
    public func check(against transport: any EventTransport, deadline: Duration = .seconds(30)) async throws {
        guard let first = try await differences(from: transport, deadline: deadline).first else { return }
        throw EventsError(
            first.isMissing ? .notFound : .topologyConflict, first.description, operation: "check topology")
    }
}
