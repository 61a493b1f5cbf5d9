import ArgumentParser
import Foundation
import SMAPEvents
import SMAPRabbitMQ
import Synchronization

struct DeadLetterCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "dlq",
        abstract: "Look at the dead letters of a queue, bring them back, or throw them away.",
        discussion: """
            QUEUE is the queue whose messages could not be handled; its dead letters are in QUEUE.dlq. Looking at them \
            fetches them and gives them back, so two who look at the same time see a part each.
            """,
        subcommands: [List.self, Show.self, Replay.self, Purge.self])

    struct Selection: ParsableArguments {
        @Argument(help: "The queue that the messages come from.")
        var queue: String

        @Option(
            name: .customLong("where"),
            help: """
                Only those with key=value: event_id, routing_key, exchange, error_type, reason, attempts, replays, or a \
                header. May be given several times; all must hold.
                """)
        var conditions: [String] = []

        @Option(help: "How many at most.")
        var limit: Int?

        @Flag(help: "Print JSON lines, on a terminal too.")
        var json = false

        func validate() throws {
            for condition in conditions where !condition.contains("=") || condition.hasPrefix("=") {
                throw ValidationError("--where takes key=value, not '\(condition)'.")
            }
            guard limit.map({ $0 > 0 }) ?? true else { throw ValidationError("--limit is 1 or more.") }
        }

        /// Whether a dead letter is meant; nil for all.
        var choice: (@Sendable (DeadLetter) -> Bool)? {
            guard !conditions.isEmpty else { return nil }
            let pairs = conditions.map { condition in
                let parts = condition.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                return (key: String(parts[0]), value: String(parts[1]))
            }
            return { letter in pairs.allSatisfy { letter[$0.key] == $0.value } }
        }

        @discardableResult
        func withQueue<Result: Sendable>(_ body: (DeadLetterQueue) async throws -> Result) async throws -> Result {
            let name = try QueueName(queue)
            return try await RabbitMQTransport.withTransport(configuration: Settings.rabbitMQ(), logger: Console.logger)
            {
                try await body(DeadLetterQueue(of: name, transport: $0))
            }
        }

        func show(_ report: some Encodable, _ text: String) throws {
            Console.line(json || !Console.isOutputTerminal ? try Console.json(report) : text)
        }

        /// Reports what was done. False if something could not be done.
        func show(_ report: DeadLetterQueue.Report, _ verb: String, isDryRun: Bool) throws -> Bool {
            struct Line: Encodable {
                var examined: Int
                var done: Int
                var failed: Int
                var dry_run: Bool
            }
            let would = isDryRun ? "would be " : ""
            try show(
                Line(examined: report.examined, done: report.done, failed: report.failed, dry_run: isDryRun),
                "\(report.done) \(would)\(verb), \(report.failed) failed, of \(report.examined) examined")
            if let failure = report.failure { Console.error("\(failure)") }
            return report.failed == 0
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Count dead letters by error type and routing key.")
        @OptionGroup var selection: Selection

        private struct Group: Encodable {
            var error_type: String?
            var routing_key: String
            var count = 0
            var oldest: String?
            var newest: String?
        }

        func run() async throws {
            try await Console.reporting {
                let groups = Mutex<[[String?]: Group]>([:])
                let choice = selection.choice
                let limit = selection.limit ?? .max
                let count = Atomic(0)
                try await selection.withQueue { queue in
                    try await queue.read { letter in
                        guard choice?(letter) ?? true, count.add(1, ordering: .relaxed).newValue <= limit else {
                            return
                        }
                        groups.withLock { groups in
                            let key = [letter.errorType, letter.routingKey]
                            var group =
                                groups[key] ?? Group(error_type: letter.errorType, routing_key: letter.routingKey)
                            group.count += 1
                            let time = (letter.lastFailure ?? letter.properties.timestamp).map(Self.text)
                            group.oldest = [group.oldest, time].compactMap(\.self).min()
                            group.newest = [group.newest, time].compactMap(\.self).max()
                            groups[key] = group
                        }
                    }
                }
                let sorted = groups.withLock {
                    $0.values.sorted { ($1.count, $0.routing_key) < ($0.count, $1.routing_key) }
                }
                if sorted.isEmpty, !selection.json, Console.isOutputTerminal { Console.line("no dead letters") }
                for group in sorted {
                    try selection.show(
                        group,
                        "\(group.count)\t\(group.error_type ?? "?")\t\(group.routing_key)\t"
                            + "\(group.oldest ?? "?") to \(group.newest ?? "?")")
                }
            }
        }

        static func text(_ date: Date) -> String {
            date.formatted(Date.ISO8601FormatStyle(includingFractionalSeconds: true))
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Print dead letters with their headers; the body, which may hold personal data, only with --body."
        )
        @OptionGroup var selection: Selection

        @Flag(help: "Print the message too.")
        var body = false

        private struct Line: Encodable {
            var event_id: String?
            var routing_key: String
            var exchange: String
            var reason: String?
            var error_type: String?
            var attempts: Int?
            var first_failure: String?
            var last_failure: String?
            var replays: Int
            var headers: [String: String]
            var bytes: Int?
            var body: String?
        }

        func run() async throws {
            try await Console.reporting {
                let choice = selection.choice
                let limit = selection.limit ?? .max
                let count = Atomic(0)
                try await selection.withQueue { queue in
                    try await queue.read { [selection, body] letter in
                        guard choice?(letter) ?? true, count.add(1, ordering: .relaxed).newValue <= limit else {
                            return
                        }
                        let line = Line(
                            event_id: letter.eventID, routing_key: letter.routingKey, exchange: letter.exchange,
                            reason: letter.reason, error_type: letter.errorType, attempts: letter.attempts,
                            first_failure: letter.firstFailure.map(List.text),
                            last_failure: letter.lastFailure.map(List.text), replays: letter.replays,
                            headers: letter.properties.headers.mapValues(\.description),
                            bytes: letter.isTruncated ? nil : letter.body.count,
                            body: body ? String(decoding: letter.body, as: UTF8.self) : nil)
                        let headers = line.headers.sorted { $0.key < $1.key }.map { "\n    \($0.key): \($0.value)" }
                        try selection.show(
                            line,
                            "\(line.event_id ?? "?")  \(line.routing_key)  \(line.bytes.map { "\($0) bytes" } ?? "too large")"
                                + headers.joined() + (line.body.map { "\n    \($0)" } ?? ""))
                    }
                }
            }
        }
    }

    struct Replay: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Bring dead letters back to their queue, as new.",
            discussion: """
                Each is taken off only when its copy is confirmed to be in the queue. Interrupted at any moment, none is \
                lost; a few may then be there twice, under one event id, which an inbox recognises.
                """)
        @OptionGroup var selection: Selection

        @Option(help: "How many a second at most.")
        var rate: Double?

        @Flag(help: "Only count.")
        var dryRun = false

        func validate() throws {
            guard rate.map({ $0 > 0 }) ?? true else { throw ValidationError("--rate is above 0.") }
        }

        func run() async throws {
            try await Console.reporting {
                let report = try await selection.withQueue {
                    try await $0.replay(
                        where: selection.choice, limit: selection.limit ?? .max, rate: rate, isDryRun: dryRun)
                }
                guard try selection.show(report, "replayed", isDryRun: dryRun) else { throw ExitCode(1) }
            }
        }
    }

    struct Purge: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Throw dead letters away, for good.")
        @OptionGroup var selection: Selection

        @Flag(help: "Only count.")
        var dryRun = false

        @Flag(help: "Throw all of them away: needed where neither --where nor --limit says which.")
        var all = false

        func validate() throws {
            guard all || dryRun || !selection.conditions.isEmpty || selection.limit != nil else {
                throw ValidationError("Say which with --where or --limit, or --all.")
            }
        }

        func run() async throws {
            try await Console.reporting {
                let report = try await selection.withQueue {
                    try await $0.purge(where: selection.choice, limit: selection.limit ?? .max, isDryRun: dryRun)
                }
                guard try selection.show(report, "purged", isDryRun: dryRun) else { throw ExitCode(1) }
            }
        }
    }
}
