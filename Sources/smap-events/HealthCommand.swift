import ArgumentParser
import SMAPEvents
import SMAPRabbitMQ
import SMAPRedis

struct HealthCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "health",
        abstract: "Ask whether the servers can do their job: for probes.",
        discussion: """
            RabbitMQ is healthy when one can log in, it takes messages (one that no queue is bound for is published), and \
            smap.events is there; with --queue, when that queue has a consumer too. Redis is healthy when it answers; a server that may lose what it holds (appendonly off, an evicting \
            maxmemory-policy) is warned of. The exit code is 0 only if all is well, warnings aside.
            """)

    @Option(help: "A queue that must have an active consumer. May be given several times.")
    var queue: [String] = []

    @Flag(inversion: .prefixedNo, help: "Whether to ask Redis.")
    var redis = true

    @Option(help: "How many seconds it may take.")
    var deadline: Double = 5

    @Flag(help: "Print JSON, on a terminal too.")
    var json = false

    func validate() throws {
        guard deadline > 0, deadline <= 3600 else { throw ValidationError("A deadline is above 0, up to 3600 s.") }
    }

    private struct Report: Encodable {
        var healthy: Bool
        var rabbitmq: [String]
        var redis: [String]?
        var warnings: [String]
    }

    func run() async throws {
        var isHealthy = false
        try await Console.reporting {
            let queues = try queue.map { try QueueName($0) }
            let end = ContinuousClock.now + seconds(deadline)
            let (rabbitMQ, redis) = (try Settings.rabbitMQ(), redis ? try Settings.redis() : nil)
            // Beside each other: one that does not answer must not use up the time of the other.
            async let asked: Health? = Self.health(of: redis, end)
            let broker = try await RabbitMQTransport.withTransport(configuration: rabbitMQ) {
                await Self.health(of: $0, queues, end)
            }
            let store = try await asked
            let health = broker + (store ?? Health())
            isHealthy = health.isHealthy
            if json || !Console.isOutputTerminal {
                Console.line(
                    try Console.json(
                        Report(
                            healthy: isHealthy, rabbitmq: broker.problems, redis: store?.problems,
                            warnings: health.warnings)))
            } else {
                Console.line(isHealthy ? "healthy" : "unhealthy")
                for problem in health.problems { Console.line("  \(problem)") }
                for warning in health.warnings { Console.line("  warning: \(warning)") }
            }
        }
        if !isHealthy { throw ExitCode(1) }
    }

    private static func health(of redis: RedisConfiguration?, _ end: ContinuousClock.Instant) async throws -> Health? {
        guard let redis else { return nil }
        return try await RedisProgressStore.withStore(configuration: redis) { await $0.health(deadline: end) }
    }

    private static func health(
        of transport: RabbitMQTransport, _ queues: [QueueName], _ end: ContinuousClock.Instant
    ) async -> Health {
        var health = Health()
        do {
            try await transport.checkExchange(ExchangeName.events, deadline: end)
            for queue in queues {
                let status = try await transport.status(of: queue, deadline: end)
                if status.consumers == 0 { health.problems.append("queue \(queue) has no active consumer") }
            }
            try await probe(transport, end)
            health = health + (await transport.health())
        } catch {
            health.problems.append((error as? EventsError)?.description ?? "\(type(of: error))")
        }
        return health
    }

    /// Publishes a message to no queue, and waits for its confirm. RabbitMQ tells a connection of an alarm only after it has
    /// published, so nothing less shows that messages are taken.
    private static func probe(_ transport: RabbitMQTransport, _ end: ContinuousClock.Instant) async throws {
        do {
            // The default exchange routes by a queue's name, and no queue has this one.
            try await transport.publish(
                OutboundMessage(
                    exchange: "", routingKey: "smap.health.\(EventID())",
                    properties: MessageProperties(messageID: EventID().rawValue), body: []), deadline: end)
        } catch let error as EventsError where error.code == .accessRefused {
            // The user may not publish there. That the broker says so shows that it takes messages.
        }
    }
}
