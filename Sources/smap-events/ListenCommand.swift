import ArgumentParser
import Foundation
import Logging
import SMAPEvents
import SMAPRabbitMQ
import ServiceLifecycle
import Synchronization
import UnixSignals

struct ListenCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "listen",
        abstract: "Print the events that reach a queue, and acknowledge them.",
        discussion: """
            The queue is declared (durable, quorum, with a dead letter queue) and bound to smap.events for each pattern: \
            '*' stands for one word, '#' for any number. Each event is acknowledged after it has been printed. Messages \
            that are no events go to the dead letter queue and are reported on standard error.
            """)

    @Option(help: "The queue, <service>.<purpose>.")
    var queue: String

    @Option(help: "A pattern to bind, such as 'email.#'. May be given several times.")
    var bind: [String]

    @Option(help: "Stop after so many events.")
    var count: Int?

    @Option(help: "Stop after so many seconds; with --count, exit with 1 if there were fewer.")
    var timeout: Double?

    @Flag(help: "Print JSON lines, on a terminal too.")
    var json = false

    func validate() throws {
        guard count.map({ $0 > 0 }) ?? true else { throw ValidationError("--count is 1 or more.") }
        guard timeout.map({ $0 > 0 && $0 <= 31_536_000 }) ?? true else {
            throw ValidationError("--timeout is above 0, up to a year.")
        }
    }

    func run() async throws {
        try await Console.reporting {
            let queue = try QueueName(queue)
            var subscription = EventSubscription(queue: queue, bindings: try bind.map { try TopicPattern($0) })
            // In order, and with a small count one at a time: what is fetched ahead and not printed would come again,
            // marked as redelivered, to whoever listens next.
            subscription.concurrency = 1
            // What it gives back, again and again, is not for it to judge.
            subscription.isolatesSuspects = false
            subscription.prefetch = (count ?? .max) <= 1_000 ? 1 : 100
            let configuration = try Settings.rabbitMQ()
            let printed = try await RabbitMQTransport.withTransport(
                configuration: configuration, logger: Console.logger
            ) {
                try await printAll(of: subscription, $0)
            }
            if let count, printed < count {
                Console.error("\(printed) of \(count) events came")
                throw ExitCode(1)
            }
        }
    }

    /// Prints until there have been enough events, the time is up, or a signal comes. Returns how many there were.
    private func printAll(of subscription: EventSubscription, _ transport: RabbitMQTransport) async throws -> Int {
        let printed = Progress()
        let (done, finish) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        var router = EventRouter()
        router.on(matching: "#") { [count, json] delivery in
            // Beyond the count it belongs to whoever listens next.
            if printed.count.load(ordering: .relaxed) >= count ?? .max { return .giveBack }
            try Self.show(delivery, json: json)
            if printed.count.add(1, ordering: .relaxed).newValue == count {
                // Acknowledged only when the consumer is being stopped, so that the queue sends no other one.
                finish.yield()
                try? await gracefulShutdown()
            }
            return .acknowledge
        }
        let subscriber = EventSubscriber(
            transport: transport, subscription: subscription, router: router, logger: Console.logger)
        let group = ServiceGroup(
            configuration: ServiceGroupConfiguration(
                services: [.init(service: subscriber)], gracefulShutdownSignals: [.sigint, .sigterm],
                logger: .silent))
        try await withThrowingDiscardingTaskGroup { tasks in
            tasks.addTask {
                for await _ in done { break }
                await group.triggerGracefulShutdown()
            }
            if let timeout {
                tasks.addTask {
                    guard (try? await Task.sleep(for: seconds(timeout))) != nil else { return }
                    // Where there was nothing to listen to, no events is no answer.
                    var found = await subscriber.health().problems
                    if !found.isEmpty { found += await transport.health().problems }
                    printed.problems.withLock { [found] in $0 = found }
                    await group.triggerGracefulShutdown()
                }
            }
            defer { tasks.cancelAll() }
            // It is never cancelled: what was printed would not be acknowledged, and be printed again by the next one.
            try await group.run()
        }
        let problems = printed.problems.withLock { $0 }
        guard problems.isEmpty || printed.count.load(ordering: .relaxed) >= count ?? .max else {
            throw EventsError(.connectionFailed, problems.joined(separator: "; "), operation: "listen")
        }
        return printed.count.load(ordering: .relaxed)
    }

    private final class Progress: Sendable {
        let count = Atomic(0)
        /// What kept it from listening when the time was up.
        let problems = Mutex<[String]>([])
    }

    private static func show(_ delivery: EventDelivery<EventEnvelope>, json: Bool) throws {
        let envelope = delivery.envelope
        let time = envelope.timestamp.formatted(Date.ISO8601FormatStyle(includingFractionalSeconds: true))
        // A JSON text has no raw line breaks inside strings, so those between its parts can be spaces.
        let data = String(
            decoding: envelope.data.map { $0 == 0x0A || $0 == 0x0D ? 0x20 : $0 }, as: UTF8.self)
        if json || !Console.isOutputTerminal {
            let project = try envelope.projectID.map { try Console.json($0.rawValue) } ?? "null"
            Console.line(
                "{\"event_id\":\(try Console.json(envelope.eventID.rawValue)),"
                    + "\"routing_key\":\(try Console.json(delivery.routingKey)),\"timestamp\":\"\(time)\","
                    + "\"project_id\":\(project),\"data\":\(data),\"redelivered\":\(delivery.isRedelivered),"
                    + "\"attempt\":\(delivery.attempt)}")
        } else {
            let again = delivery.isRedelivered ? "  (redelivered, attempt \(delivery.attempt))" : ""
            Console.line("\(time)  \(delivery.routingKey)  \(envelope.eventID)\(again)\n    \(data)")
        }
    }
}
