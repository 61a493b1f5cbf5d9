import ArgumentParser
import Foundation
import SMAPEvents
import SMAPRabbitMQ

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
            let subscription = EventSubscription(queue: queue, bindings: try bind.map { try TopicPattern($0) })
            let configuration = try Settings.rabbitMQ()
            let printed = try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
                try await EventSubscriber(
                    transport: transport, subscription: subscription, router: EventRouter()
                ).declare()
                // With a small count, one at a time: what is fetched ahead and not printed would come again, marked as
                // redelivered, to whoever listens next.
                let prefetch = (count ?? .max) <= 1_000 ? 1 : 100
                return try await transport.withConsumer(on: queue, prefetch: prefetch, deadline: .now + .seconds(30)) {
                    try await printAll(from: $0)
                }
            }
            if let count, printed < count { throw ExitCode(1) }
        }
    }

    private func printAll(from consumer: any TransportConsumer) async throws -> Int {
        try await withThrowingTaskGroup(of: Int?.self) { group in
            group.addTask {
                var printed = 0
                while printed < count ?? .max, let delivery = try await consumer.next() {
                    guard try show(delivery) else {
                        try consumer.settle(delivery, .reject)
                        continue
                    }
                    printed += 1
                    if printed == count { await consumer.stop() }
                    try consumer.settle(delivery, .acknowledge)
                }
                return printed
            }
            if let timeout {
                group.addTask {
                    try? await Task.sleep(for: seconds(timeout))
                    await consumer.stop()
                    return nil
                }
            }
            defer { group.cancelAll() }
            while let result = try await group.next() {
                if let result { return result }
            }
            return 0
        }
    }

    /// Prints an event. False if it is none.
    private func show(_ delivery: InboundDelivery) throws -> Bool {
        let envelope: EventEnvelope
        do {
            envelope = try EventEnvelope(
                parsing: delivery.body, routingKey: delivery.routingKey,
                timestamp: delivery.properties.timestamp ?? delivery.receivedAt)
        } catch let error as EventsError {
            Console.error("dead-lettered: \(error.message)")
            return false
        }
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
        return true
    }
}
