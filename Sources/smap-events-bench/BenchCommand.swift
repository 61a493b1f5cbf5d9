import ArgumentParser
import Configuration
import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis

@main
struct BenchCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "smap-events-bench",
        abstract: "Measure the SDK; with --raw, compare it with bare loops.",
        discussion: """
            Absolute figures move with the machine; the ratio to a bare loop in the same run does not, nor does the \
            CPU time per message. Build it with -c release. It starts private servers, unless RABBITMQ_URL \
            (REDIS_URL or REDIS_HOST for 'track') names others. Its own queues are deleted at the end; the shared \
            exchanges and the queues for retries stay.
            """,
        subcommands: [
            Publish.self, Consume.self, EndToEnd.self, Track.self, SoakCommand.self, WorkerCommand.self,
            CounterCommand.self,
        ])

    struct Options: ParsableArguments {
        @Option(help: "Messages (or items) per run.")
        var messages = 100_000

        @Option(help: "Bytes of a serialised event.")
        var size = 300

        @Option(help: "How many may be unconfirmed, unsettled or unanswered at a time.")
        var window = 1_000

        @Option(help: "How many tasks publish, handle or report.")
        var tasks = defaultTasks

        static let defaultTasks = 100

        @Flag(
            help: "Measure bare loops too: before and after each typed run, five times, and the median ratio to each.")
        var raw = false

        @Flag(help: "Print JSON lines.")
        var json = false

        /// Prints a result.
        func emit<Value: Encodable>(_ value: Value, _ text: String) throws {
            let encoder = JSONEncoder()
            encoder.outputFormatting = .sortedKeys
            let line = json ? String(decoding: try encoder.encode(value), as: UTF8.self) : text
            FileHandle.standardOutput.write(Data((line + "\n").utf8))
        }

        func validate() throws {
            guard messages > 0 else { throw ValidationError("--messages is 1 or more, not \(messages).") }
            guard tasks > 0 else { throw ValidationError("--tasks is 1 or more, not \(tasks).") }
            guard (1...65_535).contains(window) else {
                throw ValidationError("--window is 1 to 65535, not \(window).")
            }
            guard (250...200_000).contains(size) else {
                throw ValidationError("--size is 250 to 200000 bytes, not \(size).")
            }
        }
    }

    struct Publish: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Publish with confirms to a quorum queue.")
        @OptionGroup var options: Options

        @Option(help: "Publish lists of so many events, one call each, from one task.")
        var contentsOf: Int?

        func validate() throws {
            guard (1...100_000).contains(contentsOf ?? 1) else {
                throw ValidationError("--contents-of is 1 to 100000.")
            }
            guard contentsOf == nil || options.tasks == Options.defaultTasks else {
                throw ValidationError("With --contents-of one task publishes: leave --tasks out.")
            }
        }

        func run() async throws {
            try await BenchCommand.withRabbitMQ { configuration in
                try await RabbitMQBench.with(configuration, options) { bench in
                    try await bench.prepare("publish")
                    let typed: () async throws -> Measurement =
                        if let contentsOf {
                            { try await bench.publishLists(of: contentsOf) }
                        } else {
                            bench.publishTyped
                        }
                    try await compare(
                        options, "publish", typed: typed,
                        raw: [("own socket", bench.publishOwnSocket), ("librabbitmq", bench.publishRaw)])
                }
            }
        }
    }

    struct EndToEnd: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            commandName: "e2e",
            abstract: "Publish at a fixed rate, and measure the time until the handler has the event.",
            discussion: """
                The time counts from the moment at which the event was due, so that a publisher that falls behind does not \
                hide it (coordinated omission).
                """)
        @OptionGroup var options: Options

        @Option(help: "Events per second.")
        var rate = 2_000

        func validate() throws {
            guard (1...1_000_000).contains(rate) else {
                throw ValidationError("--rate is 1 to 1000000 a second, not \(rate).")
            }
            guard !options.raw else { throw ValidationError("There is no bare loop to compare e2e with.") }
        }

        func run() async throws {
            try await BenchCommand.withRabbitMQ { configuration in
                try await RabbitMQBench.with(configuration, options) { bench in
                    let measurement = try await bench.endToEnd(rate: rate)
                    let report = Report("e2e \(rate)/s", measurement)
                    try options.emit(report, report.text)
                }
            }
        }
    }

    struct Consume: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Decode, handle and acknowledge from a quorum queue that is full at the start.")
        @OptionGroup var options: Options

        @Flag(help: "Ask an inbox in Redis about each event, and tell it.")
        var inbox = false

        func run() async throws {
            guard inbox else { return try await BenchCommand.withRabbitMQ { try await measure($0, nil) } }
            try await LocalStack.withStack { stack in
                let redis = try RedisInbox(
                    configuration: RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
                try await measure(RabbitMQConfiguration(url: stack.rabbitMQURL), redis)
                await redis.close()
            }
        }

        private func measure(_ configuration: RabbitMQConfiguration, _ inbox: RedisInbox?) async throws {
            try await RabbitMQBench.with(configuration, options, inbox) { bench in
                try await compare(
                    options, "consume", typed: bench.consumeTyped, raw: [("librabbitmq", bench.consumeRaw)])
            }
        }
    }

    struct Track: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Report indexed items of one project.")
        @OptionGroup var options: Options

        @Flag(
            help: """
                Instead, compare projects of 1,000 items with one of a million, by index and by name, five times: the time \
                of a report, and the memory of an item. Resets the statistics of the server.
                """)
        var growth = false

        @Option(help: "Instead, let so many ask for a project's progress every 2 s, for 20 s.")
        var pollers: Int?

        func validate() throws {
            guard pollers ?? 1 > 0 else { throw ValidationError("pollers are above 0.") }
            guard [growth, pollers != nil, options.raw].count(where: { $0 }) <= 1 else {
                throw ValidationError("--growth, --pollers and --raw measure different things: give one.")
            }
        }

        func run() async throws {
            let environment = ProcessInfo.processInfo.environment
            if environment["REDIS_URL"] ?? environment["REDIS_HOST"] != nil {
                try await measure(RedisConfiguration(reader: BenchCommand.reader))
            } else {
                var servers = LocalStack.Options()
                servers.rabbitMQ = false
                try await LocalStack.withStack(servers) { stack in
                    try await measure(RedisConfiguration(host: "127.0.0.1", port: stack.redisPort))
                }
            }
        }

        private func measure(_ configuration: RedisConfiguration) async throws {
            guard
                !(growth || options.raw)
                    || (configuration.tls == nil && configuration.sentinels.isEmpty
                        && configuration.password == nil)
            else {
                throw ValidationError("--raw and --growth talk to a plain Redis without a password only.")
            }
            let bench = try RedisBench(configuration, options)
            if growth {
                try await bench.growth()
            } else if let pollers {
                try await bench.poll(pollers)
            } else {
                try await compare(options, "track", typed: bench.typed, raw: [("raw", bench.raw)])
            }
            await bench.close()
        }
    }

    static let reader = ConfigReader(provider: EnvironmentVariablesProvider())

    static func withRabbitMQ(_ body: (RabbitMQConfiguration) async throws -> Void) async throws {
        if ProcessInfo.processInfo.environment["RABBITMQ_URL"] != nil {
            try await body(RabbitMQConfiguration(reader: reader))
        } else {
            var servers = LocalStack.Options()
            servers.redis = false
            try await LocalStack.withStack(servers) { stack in
                try await body(RabbitMQConfiguration(url: stack.rabbitMQURL))
            }
        }
    }
}
