import ArgumentParser
import SMAPEvents
import SMAPRabbitMQ

struct TopologyCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "topology",
        abstract: "Declare, check or show the exchanges, queues and bindings.",
        discussion: """
            The platform's own: smap.events, smap.dlx, the mail queue smtp_send_email_v2 with its dead letters, and the \
            legacy exchange as long as the migration's phase publishes to it. With --queue and --bind, those of a \
            subscription too. Nothing is ever deleted.
            """,
        subcommands: [Apply.self, Check.self, Show.self])

    struct Selection: ParsableArguments {
        @Option(help: "The migration's phase, 1 to 4; SMAP_MIGRATION_PHASE by default.")
        var phase: Int?

        @Option(help: "A subscription's queue.")
        var queue: String?

        @Option(help: "A pattern that the queue is bound with. May be given several times.")
        var bind: [String] = []

        @Option(help: "How many seconds it may take.")
        var deadline: Double = 30

        @Flag(help: "Print JSON, on a terminal too.")
        var json = false

        func validate() throws {
            guard queue != nil || bind.isEmpty else { throw ValidationError("--bind needs a --queue.") }
            guard phase.map({ (1...4).contains($0) }) ?? true else { throw ValidationError("A phase is 1 to 4.") }
            guard deadline > 0, deadline <= 3600 else { throw ValidationError("A deadline is above 0, up to 3600 s.") }
        }

        func topology() throws -> Topology {
            let phase = try phase.flatMap(MigrationPhase.init) ?? MigrationPhase(reader: Settings.reader)
            var topology = Topology.platform(in: phase)
            if let queue {
                topology.insert(
                    EventSubscription(
                        queue: try QueueName(queue), bindings: try bind.map { try TopicPattern($0) }))
            }
            return topology
        }

        func withTransport<Result: Sendable>(_ body: (RabbitMQTransport) async throws -> Result) async throws -> Result
        {
            try await RabbitMQTransport.withTransport(configuration: Settings.rabbitMQ(), logger: Console.logger) {
                try await body($0)
            }
        }

        func show(_ report: some Encodable, _ text: String) throws {
            Console.line(json || !Console.isOutputTerminal ? try Console.json(report) : text)
        }
    }

    struct Apply: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Declare what is missing. What exists stays; what exists otherwise is an error.")
        @OptionGroup var selection: Selection

        private struct Report: Encodable {
            var exchanges: Int
            var queues: Int
            var bindings: Int
        }

        func run() async throws {
            try await Console.reporting {
                let topology = try selection.topology()
                try await selection.withTransport {
                    try await topology.apply(to: $0, deadline: seconds(selection.deadline))
                }
                let report = Report(
                    exchanges: topology.exchanges.count, queues: topology.queues.count,
                    bindings: topology.bindings.count)
                try selection.show(
                    report,
                    "\(report.exchanges) exchanges, \(report.queues) queues and \(report.bindings) bindings are in place"
                )
            }
        }
    }

    struct Check: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Compare with the broker, and change nothing. Exit code 1 if something is missing or differs.",
            discussion: "Bindings cannot be read over AMQP 0-9-1 and are not compared.")
        @OptionGroup var selection: Selection

        private struct Report: Encodable {
            struct Difference: Encodable {
                var subject: String
                var missing: Bool
                var reason: String
            }

            var matches: Bool
            var differences: [Difference]
        }

        func run() async throws {
            var matches = false
            try await Console.reporting {
                let topology = try selection.topology()
                try topology.validate()
                let differences = try await selection.withTransport {
                    try await topology.differences(from: $0, deadline: seconds(selection.deadline))
                }
                matches = differences.isEmpty
                try selection.show(
                    Report(
                        matches: matches,
                        differences: differences.map {
                            .init(subject: $0.subject, missing: $0.isMissing, reason: $0.reason)
                        }),
                    matches
                        ? "exchanges and queues are as they should be"
                        : differences.map(\.description).joined(separator: "\n"))
            }
            if !matches { throw ExitCode(1) }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Print it, without asking a broker.")
        @OptionGroup var selection: Selection

        private struct Report: Encodable {
            struct Exchange: Encodable {
                var name: String
                var kind: String
            }

            struct Queue: Encodable {
                var name: String
                var arguments: [String: String]
            }

            struct Binding: Encodable {
                var queue: String
                var exchange: String
                var routing_key: String
            }

            var exchanges: [Exchange]
            var queues: [Queue]
            var bindings: [Binding]
        }

        func run() async throws {
            try await Console.reporting {
                let topology = try selection.topology()
                let report = Report(
                    exchanges: topology.exchanges.map { .init(name: $0.name, kind: $0.kind.rawValue) },
                    queues: topology.queues.map { queue in
                        .init(name: queue.name.rawValue, arguments: queue.arguments.mapValues(\.description))
                    },
                    bindings: topology.bindings.map {
                        .init(queue: $0.queue.rawValue, exchange: $0.exchange, routing_key: $0.routingKey)
                    })
                let lines =
                    report.exchanges.map { "exchange  \($0.name)  \($0.kind)" }
                    + report.queues.map { queue in
                        "queue     \(queue.name)  "
                            + queue.arguments.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }
                            .joined(separator: " ")
                    } + report.bindings.map { "binding   \($0.exchange) --\($0.routing_key)--> \($0.queue)" }
                try selection.show(report, lines.joined(separator: "\n"))
            }
        }
    }
}
