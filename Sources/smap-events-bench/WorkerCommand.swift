import ArgumentParser
import Configuration
import Foundation
import SMAPEvents
import SMAPRabbitMQ
import SMAPRedis

/// A service that fails at random, for tests that kill it: `smap-events-bench worker`.
///
/// It notes on disk what it does, a line each, appended by one system call: `i` before an event is handled, `f` when it is
/// to fail, `e` for its effect, `c` when the inbox knows that it is done. So what was inside its handler when the process
/// was killed has an `i` and no `f` or `c` after it.
struct WorkerCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "worker", abstract: "Handle events, fail at random, and note what was done.", shouldDisplay: false)

    struct Work: SMAPEvent {
        static let routingKey: RoutingKey = "worker.work"
        var number: Int
    }

    @Option(help: "The queue.")
    var queue: String

    @Option(help: "The file to append to.")
    var ledger: String

    @Option(help: "The share of attempts that fail.")
    var failShare = 0.3

    @Option(help: "How often an event is tried.")
    var attempts = 5

    @Option(help: "The number of the event that kills the process. Without an inbox, whose leases it would wait for.")
    var fatal: Int?

    /// What the subscription is; the test declares it too.
    static func subscription(queue: QueueName, attempts: Int) -> EventSubscription {
        var subscription = EventSubscription(
            queue: queue, bindings: [TopicPattern(Work.routingKey)],
            retry: RetryPolicy(
                maximumAttempts: attempts, firstDelay: .milliseconds(50),
                rungs: [.milliseconds(50), .milliseconds(250)]))
        subscription.handlerDeadline = .seconds(1)
        // A lease lasts as long as both together: what was killed inside its handler waits for that.
        subscription.deadline = .seconds(10)
        return subscription
    }

    func run() async throws {
        let file = open(ledger, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        guard file >= 0 else { throw ValidationError("\(ledger) cannot be written") }
        let process = getpid()
        let note: @Sendable (String, String) -> Void = { kind, id in
            let line = "\(kind) \(process) \(id)\n"
            _ = line.withCString { write(file, $0, strlen($0)) }
        }
        let reader = ConfigReader(provider: EnvironmentVariablesProvider())
        let rabbitMQ = try RabbitMQTransport(configuration: RabbitMQConfiguration(reader: reader))
        let inbox = NotingInbox(inbox: try RedisInbox(configuration: RedisConfiguration(reader: reader)), note: note)
        var router = EventRouter()
        router.on(Work.self) { [failShare, fatal] delivery in
            note("i", delivery.eventID.rawValue)
            if delivery.event.number == fatal { kill(process, SIGKILL) }
            // Long enough to be killed inside.
            try await Task.sleep(for: .microseconds(Int.random(in: 0...2_000)))
            if Double.random(in: 0..<1) < failShare {
                note("f", delivery.eventID.rawValue)
                return .retry
            }
            note("e", delivery.eventID.rawValue)
            return .acknowledge
        }
        let subscriber = EventSubscriber(
            transport: rabbitMQ, subscription: Self.subscription(queue: try QueueName(queue), attempts: attempts),
            router: router, inbox: fatal == nil ? inbox : nil)
        try await subscriber.run()
    }

    private struct NotingInbox: Inbox {
        let inbox: RedisInbox
        let note: @Sendable (String, String) -> Void

        func claim(
            _ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant
        ) async throws -> InboxClaim { try await inbox.claim(entry, lease: lease, deadline: deadline) }

        func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws {
            try await inbox.complete(entry, timeToLive: timeToLive, deadline: deadline)
            note("c", entry.id)
        }

        func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws {
            try await inbox.release(entry, token: token, deadline: deadline)
        }
    }
}
