import Foundation
import SMAPEvents
import SMAPRabbitMQ
import Synchronization

/// An event of any size.
struct BenchEvent: SMAPEvent {
    static let routingKey: RoutingKey = "bench.published"
    var text: String

    /// An event whose envelope has `size` bytes.
    static func sized(_ size: Int) throws -> BenchEvent {
        let empty = try envelope(BenchEvent(text: "")).count
        return BenchEvent(text: String(repeating: "x", count: max(0, size - empty)))
    }

    static func envelope(_ event: BenchEvent) throws -> [UInt8] {
        try EventEnvelope(
            routingKey: routingKey, service: "bench", schemaVersion: 1, data: Array("{\"text\":\"\(event.text)\"}".utf8)
        ).serialized()
    }
}

final class RabbitMQBench: Sendable {
    private let configuration: RabbitMQConfiguration
    private let options: BenchCommand.Options
    private let transport: RabbitMQTransport
    private let event: BenchEvent
    private let body: [UInt8]
    private let publisher: EventPublisher
    private let inbox: (any Inbox)?
    private let runs = Atomic<Int>(0)

    init(
        _ configuration: RabbitMQConfiguration, _ options: BenchCommand.Options, _ inbox: (any Inbox)? = nil
    ) async throws {
        self.inbox = inbox
        var configuration = configuration
        configuration.windowMessages = options.window
        self.configuration = configuration
        self.options = options
        transport = try RabbitMQTransport(configuration: configuration)
        event = try BenchEvent.sized(options.size)
        body = try BenchEvent.envelope(event)
        publisher = EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "bench"))
    }

    func close() async { await transport.close() }

    /// Declares a queue of its own for what is published.
    @discardableResult
    func prepare(_ name: String) async throws -> QueueName {
        let number = runs.add(1, ordering: .relaxed).newValue
        let queue = try QueueName("bench.\(name).\(getpid()).\(number)")
        let deadline = ContinuousClock.now + .seconds(30)
        try await publisher.declareExchanges()
        try await transport.declare(QueueDeclaration(queue, deadLetters: true), deadline: deadline)
        try await transport.bind(
            queue, to: ExchangeName.events, routingKey: BenchEvent.routingKey.rawValue, deadline: deadline)
        return queue
    }

    func publishTyped() async throws -> Measurement {
        try await Measurement.of(options.messages) {
            try await withThrowingTaskGroup(of: [UInt64].self) { group in
                for task in 0..<options.tasks {
                    let share = options.messages / options.tasks + (task < options.messages % options.tasks ? 1 : 0)
                    group.addTask { [publisher, event] in
                        var latencies: [UInt64] = []
                        latencies.reserveCapacity(share)
                        for _ in 0..<share {
                            let start = ContinuousClock.now
                            try await publisher.publish(event)
                            latencies.append(nanoseconds(since: start))
                        }
                        return latencies
                    }
                }
                return try await group.reduce(into: []) { $0 += $1 }
            }
        }
    }

    func publishRaw() async throws -> Measurement {
        let (configuration, options, body) = (configuration, options, body)
        let raw = try await blocking { try RawRabbitMQ(configuration) }
        return try await Measurement.of(options.messages) {
            try await blocking {
                try raw.publish(
                    exchange: ExchangeName.events, key: BenchEvent.routingKey.rawValue, body: body,
                    count: options.messages, window: options.window)
                return []
            }
        }
    }

    /// Fills a new queue, unmeasured.
    private func fill() async throws -> QueueName {
        let queue = try await prepare("consume")
        guard inbox == nil else {
            // Each with an id of its own.
            _ = try await publishTyped()
            return queue
        }
        let raw = try await blocking { [configuration] in try RawRabbitMQ(configuration) }
        let (options, body) = (options, body)
        try await blocking {
            // Straight to this queue: those of earlier runs are bound to the exchange too.
            try raw.publish(
                exchange: "", key: queue.rawValue, body: body, count: options.messages, window: options.window)
        }
        return queue
    }

    func consumeTyped() async throws -> Measurement {
        let queue = try await fill()
        var router = EventRouter()
        let (done, finish) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        let counter = Counter()
        router.on(BenchEvent.self, matching: "#") { [messages = options.messages] _ in
            if counter.handled.add(1, ordering: .relaxed).newValue == messages { finish.yield() }
            return .acknowledge
        }
        let subscriber = EventSubscriber(
            transport: transport,
            subscription: EventSubscription(
                queue: queue, bindings: [], prefetch: options.window, concurrency: min(options.tasks, options.window)),
            router: router, inbox: inbox)
        return try await Measurement.of(options.messages) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                group.addTask { for await _ in done { break } }
                defer { group.cancelAll() }
                // Whichever ends first: all are handled, or the subscriber has failed.
                try await group.next()
            }
            return []
        }
    }

    func consumeRaw() async throws -> Measurement {
        let queue = try await fill()
        let raw = try await blocking { [configuration] in try RawRabbitMQ(configuration) }
        let options = options
        return try await Measurement.of(options.messages) {
            try await blocking {
                try raw.consume(queue: queue.rawValue, count: options.messages, prefetch: options.window)
                return []
            }
        }
    }

    private final class Counter: Sendable {
        let handled = Atomic<Int>(0)
    }
}

func nanoseconds(since start: ContinuousClock.Instant) -> UInt64 {
    let (seconds, attoseconds) = (ContinuousClock.now - start).components
    return UInt64(max(0, seconds)) * 1_000_000_000 + UInt64(max(0, attoseconds) / 1_000_000_000)
}
