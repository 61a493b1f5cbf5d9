import ArgumentParser
import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis

struct DemoCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "demo",
        abstract: "Run the whole choreography on private servers, and check that nothing is lost or doubled.",
        discussion: """
            An identity service publishes mails to both exchanges. A project runs from project.created over \
            data.collected and analysis.finished to job.completed; 2 % of its items fail, and 5 % of the messages are \
            published twice, on purpose. Consumers beside the workers count what arrives. Exits with 1 if an invariant \
            does not hold.
            """)

    @Option(help: "How many items the project has.")
    var items = 2_000

    @Option(help: "How many analytics workers there are.")
    var workers = 8

    @Flag(help: "Use the servers that the environment names, instead of starting private ones.")
    var external = false

    @Flag(help: "Print the summary as one JSON object.")
    var json = false

    func validate() throws {
        guard (0...1_000_000).contains(items) else { throw ValidationError("--items is 0 to 1000000.") }
        guard (1...1_000).contains(workers) else { throw ValidationError("--workers is 1 to 1000.") }
    }

    func run() async throws {
        var broken: [String] = []
        try await Console.reporting {
            let summary: Choreography.Summary
            if external {
                summary = try await play(try Settings.rabbitMQ(), try Settings.redis())
            } else {
                if !json { Console.error("starting RabbitMQ and Redis…") }
                summary = try await LocalStack.withStack { stack in
                    try await play(
                        RabbitMQConfiguration(url: stack.rabbitMQURL),
                        RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
                }
            }
            Console.line(json ? try Console.json(summary) : summary.table)
            broken = summary.brokenInvariants
        }
        for invariant in broken { Console.error("does not hold: \(invariant)") }
        if !broken.isEmpty { throw ExitCode(1) }
    }

    private func play(
        _ rabbitMQ: RabbitMQConfiguration, _ redis: RedisConfiguration
    ) async throws
        -> Choreography.Summary
    {
        try await RabbitMQTransport.withTransport(configuration: rabbitMQ) { services in
            // The observers have connections of their own: they are not part of what they observe.
            try await RabbitMQTransport.withTransport(configuration: rabbitMQ) { observers in
                try await RedisProgressStore.withStore(configuration: redis) { store in
                    try await Choreography(
                        services: services, observers: observers, store: store, items: items, workers: workers
                    ).run()
                }
            }
        }
    }
}
