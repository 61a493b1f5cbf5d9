import ArgumentParser
import Configuration
import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis

/// A service that counts items and kills itself at named points, for tests: `smap-events-bench counter`.
///
/// Each death is noted before it happens, by a byte appended to the file `<budget>/<point>`; when that has as many as were
/// asked for, the point is passed alive. So the files prove which points were hit, and how often.
struct CounterCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "counter", abstract: "Count items, and die at named points.", shouldDisplay: false)

    struct Item: SMAPEvent {
        static let routingKey: RoutingKey = "counter.item"
        var project: String
        var number: Int
    }

    @Option(help: "The queue.")
    var queue: String

    @Option(help: "The folder with a file for each point.")
    var budget: String

    @Option(help: "How often to die at each point.")
    var deaths = 20

    func run() async throws {
        let reader = ConfigReader(provider: EnvironmentVariablesProvider())
        let rabbitMQ = try RabbitMQTransport(configuration: RabbitMQConfiguration(reader: reader))
        let fate = Fate(folder: budget, deaths: deaths)
        let store = InterceptedStore(try RedisProgressStore(configuration: RedisConfiguration(reader: reader))) {
            switch $0 {
            case .advance: fate.die(at: .beforeScript, chance: 0.01)
            case .clear: fate.die(at: .confirmed)
            }
        } after: { update in
            if update.didFinish { fate.die(at: .decided) } else { fate.die(at: .afterScript, chance: 0.01) }
        }
        let publisher = MortalPublisher(
            publisher: EventPublisher(
                transport: rabbitMQ, configuration: PublisherConfiguration(service: "counter")), fate: fate)
        let finishLine = FinishLine(
            store: store, publisher: publisher, configuration: FinishLine.Configuration(interval: .milliseconds(200)))
        let tracker = ProgressTracker(store: store, finishLine: finishLine)
        var router = EventRouter()
        router.on(Item.self) { delivery in
            try await tracker.advance(
                ProjectID(delivery.event.project), item: .index(delivery.event.number),
                outcome: delivery.event.number % 50 == 0 ? .failure : .success)
            return .acknowledge
        }
        var subscription = EventSubscription(queue: try QueueName(queue), bindings: [TopicPattern(Item.routingKey)])
        // Its process is killed while it handles, again and again, and no event is to blame for that.
        subscription.maximumRedeliveries = 1_000
        let subscriber = EventSubscriber(transport: rabbitMQ, subscription: subscription, router: router)
        try await withThrowingTaskGroup { group in
            group.addTask { await finishLine.run() }
            group.addTask { try await subscriber.run() }
            try await group.waitForAll()
        }
    }

    /// Where a process may die.
    enum Point: String {
        case beforeScript = "before-script"
        /// The script has run, and nobody has learned what it decided.
        case afterScript = "after-script"
        /// It has decided the finish, and nobody has been told.
        case decided
        /// The finish is about to be published.
        case unpublished
        /// The event is in its queue, and nobody has learned of the confirm.
        case published
        /// Confirmed, and not cleared.
        case confirmed
    }

    struct Fate: Sendable {
        let folder: String
        let deaths: Int

        func die(at point: Point, chance: Double = 1) {
            guard Double.random(in: 0..<1) < chance else { return }
            let file = open("\(folder)/\(point.rawValue)", O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
            guard file >= 0, lseek(file, 0, SEEK_END) < deaths else {
                close(file)
                return
            }
            _ = write(file, ".", 1)
            kill(getpid(), SIGKILL)
        }
    }

    struct MortalPublisher: EventPublishing {
        let publisher: EventPublisher
        let fate: Fate

        func declareExchanges() async throws { try await publisher.declareExchanges() }

        func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
            try await publisher.publish(event, options: options)
        }

        func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
            fate.die(at: .unpublished)
            let receipt = try await publisher.publish(event, options: options)
            fate.die(at: .published)
            return receipt
        }
    }
}
