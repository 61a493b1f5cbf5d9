import ArgumentParser
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

/// An event that says how many were due before it.
struct TimedEvent: SMAPEvent {
    static let routingKey: RoutingKey = "bench.published"
    var number: Int
    var text: String
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
    private let queues = Mutex<[QueueName]>([])

    /// Runs `body` with a bench, and deletes the queues that it has declared: else each later publish to a broker that stays
    /// would fill them.
    static func with(
        _ configuration: RabbitMQConfiguration, _ options: BenchCommand.Options, _ inbox: (any Inbox)? = nil,
        _ body: (RabbitMQBench) async throws -> Void
    ) async throws {
        let bench = try await RabbitMQBench(configuration, options, inbox)
        do {
            try await body(bench)
        } catch {
            try? await bench.close()
            throw error
        }
        try await bench.close()
    }

    private init(
        _ configuration: RabbitMQConfiguration, _ options: BenchCommand.Options, _ inbox: (any Inbox)? = nil
    ) async throws {
        guard configuration.tls == nil else {
            throw ValidationError("The bare loops, which also delete the queues, speak no TLS: use an amqp:// URL.")
        }
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

    private func close() async throws {
        await transport.close()
        let names = queues.withLock { $0 }.map(\.rawValue)
        let raw = try await blocking { [configuration] in try RawRabbitMQ(configuration) }
        try await blocking {
            for name in names { for queue in [name, name + ".dlq"] { raw.delete(queue: queue) } }
        }
    }

    /// Declares a queue of its own for what is published.
    @discardableResult
    func prepare(_ name: String) async throws -> QueueName {
        let number = runs.add(1, ordering: .relaxed).newValue
        let queue = try QueueName("bench.\(name).\(getpid()).\(number)")
        let deadline = ContinuousClock.now + .seconds(30)
        try await publisher.declareExchanges()
        try await transport.declare(QueueDeclaration(queue, deadLetters: true), deadline: deadline)
        queues.withLock { $0.append(queue) }
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

    func publishLists(of count: Int) async throws -> Measurement {
        try await Measurement.of(options.messages) {
            var left = options.messages
            while left > 0 {
                let events = Array(repeating: event, count: min(count, left))
                for result in await publisher.publish(contentsOf: events) { _ = try result.get() }
                left -= events.count
            }
            return []
        }
    }

    /// Publishes at a fixed rate while a subscriber handles; the latencies are from due to handled.
    func endToEnd(rate: Int) async throws -> Measurement {
        let queue = try await prepare("e2e")
        var router = EventRouter()
        let latencies = Latencies()
        let (done, finish) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        let start = ContinuousClock.now + .milliseconds(200)
        let interval = Duration.seconds(1) / Double(rate)
        router.on(TimedEvent.self, matching: "#") { [messages = options.messages] delivery in
            let latency = nanoseconds(since: start + interval * delivery.event.number)
            if latencies.add(latency) == messages { finish.yield() }
            return .acknowledge
        }
        let subscriber = EventSubscriber(
            transport: transport,
            subscription: EventSubscription(
                queue: queue, bindings: [], prefetch: options.window, concurrency: min(options.tasks, options.window)),
            router: router)
        return try await Measurement.of(options.messages) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                group.addTask { for await _ in done { break } }
                group.addTask { [publisher, options, event] in
                    try await withThrowingDiscardingTaskGroup { publishing in
                        var number = 0
                        while number < options.messages {
                            // A timer for each would cost more than the event does: what is due goes out each millisecond.
                            try await Task.sleep(until: max(start, .now + .milliseconds(1)), tolerance: .zero)
                            while number < options.messages, start + interval * number <= .now {
                                publishing.addTask { [number] in
                                    try await publisher.publish(TimedEvent(number: number, text: event.text))
                                }
                                number += 1
                            }
                        }
                    }
                    // The handler ends the measurement.
                    for await _ in AsyncStream<Void>.makeStream().stream {}
                }
                defer { group.cancelAll() }
                try await group.next()
            }
            return latencies.all
        }
    }

    private final class Latencies: Sendable {
        private let values = Mutex<[UInt64]>([])

        func add(_ value: UInt64) -> Int {
            values.withLock { values in
                values.append(value)
                return values.count
            }
        }

        var all: [UInt64] { values.withLock { $0 } }
    }

    func publishOwnSocket() async throws -> Measurement {
        let (configuration, options, body) = (configuration, options, body)
        let loop = try await blocking { try OwnSocketLoop(configuration) }
        return try await Measurement.of(options.messages) {
            try await blocking {
                try loop.publish(
                    exchange: ExchangeName.events, key: BenchEvent.routingKey.rawValue, body: body,
                    count: options.messages, window: options.window)
                return []
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
