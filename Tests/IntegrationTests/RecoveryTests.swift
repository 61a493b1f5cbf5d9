import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import Synchronization
import Testing

/// SCENARIOS, part A: what connections live through. Each test has a broker of its own, since it is killed, stopped or
/// filled up.
@Suite(.serialized, .timeLimit(.minutes(10))) struct RecoveryTests {
    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "recovery.numbered"
        var number: Int
        var text: String = ""
    }

    private static let queue: QueueName = "recovery.numbered"

    /// Runs `body` with a broker that has the queue above.
    private func withBroker(
        _ change: (inout RabbitMQConfiguration) -> Void = { _ in },
        _ body: (LocalStack, RabbitMQTransport, EventPublisher) async throws -> Void
    ) async throws {
        var options = LocalStack.Options()
        options.redis = false
        try await LocalStack.withStack(options) { stack in
            var configuration = try RabbitMQConfiguration(url: stack.rabbitMQURL)
            change(&configuration)
            try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
                try await Self.subscription.topology.apply(to: transport)
                try await Self.untilDurable(stack)
                try await body(stack, transport, Self.publisher(transport))
                await transport.close(timeout: .seconds(2))
            }
        }
    }

    private static let subscription = EventSubscription(queue: queue, bindings: ["recovery.#"])

    /// RabbitMQ 3.10 notes a new quorum queue's server in a table that is saved every half second: a node that is killed
    /// before that comes back with a queue that takes nothing, ever.
    static func untilDurable(_ stack: LocalStack) async throws {
        let folder = "\(stack.folder)/rabbitmq/mnesia"
        try await eventually("the queue is in the table") {
            let paths = FileManager.default.enumerator(atPath: folder)?.compactMap { $0 as? String } ?? []
            return paths.filter { $0.hasSuffix("names.dets") }.contains { path in
                let table = try? Data(contentsOf: URL(filePath: "\(folder)/\(path)"))
                // The name, then the tag of the binary that follows it (Erlang's external term format): not the name of
                // its dead letter queue, which begins alike.
                return table?.range(of: Data("_\(queue)m".utf8)) != nil
            }
        }
    }

    private static func publisher(_ transport: any EventTransport) -> EventPublisher {
        EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "test"))
    }

    /// Handles events until `count` different ones have been seen, and returns how often each was.
    private func collect(_ count: Int, _ transport: RabbitMQTransport) async throws -> [Int: Int] {
        try await collect(transport) { $0.count >= count }
    }

    /// Handles events until those that have been seen are enough, and returns how often each was.
    private func collect(
        _ transport: RabbitMQTransport, until areEnough: (Dictionary<Int, Int>.Keys) -> Bool
    ) async throws -> [Int: Int] {
        let seen = Seen()
        var router = EventRouter()
        router.on(Numbered.self, matching: "#") { delivery in
            seen.insert(delivery.event.number)
            return .acknowledge
        }
        let subscriber = EventSubscriber(transport: transport, subscription: Self.subscription, router: router)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            defer { group.cancelAll() }
            try await eventually("all events arrive") { areEnough(seen.numbers.keys) }
        }
        return seen.numbers
    }

    final class Seen: Sendable {
        private let state = Mutex<[Int: Int]>([:])
        var numbers: [Int: Int] { state.withLock { $0 } }
        func insert(_ number: Int) { state.withLock { $0[number, default: 0] += 1 } }
    }

    @Test func `while the broker is absent a call ends by its deadline with the connect error, and later ones succeed`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            try await stack.kill(.rabbitMQ)
            let fresh = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: stack.rabbitMQURL))
            let freshPublisher = Self.publisher(fresh)
            #expect(await freshPublisher.health().isHealthy == false)
            let start = ContinuousClock.now
            let overrun = await overrun(.seconds(2)) {
                let error = await #expect(throws: EventsError.self) {
                    try await freshPublisher.publish(
                        Numbered(number: 1), options: PublishOptions(deadline: .seconds(2)))
                }
                #expect(error?.publishOutcome == .unsent)
                #expect((error?.underlying as? EventsError)?.code == .connectionFailed, "\(String(describing: error))")
            }
            #expect(overrun < .seconds(1))
            #expect(.now - start > .seconds(1.9))
            async let late = freshPublisher.publish(
                Numbered(number: 2), options: PublishOptions(deadline: .seconds(240)))
            try await stack.restart(.rabbitMQ)
            let lateReceipt = try await late
            #expect(lateReceipt.routed)
            #expect(await freshPublisher.health().isHealthy)
            await fresh.close()
        }
    }

    @Test func `a broker that is killed and comes back has every confirmed event, and all end as confirmed`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            let count = 5_000
            let confirmed = Seen()
            let states = transport.states()
            let (killed, kill) = AsyncStream.makeStream(of: Void.self)
            try await withThrowingTaskGroup(of: Void.self) { group in
                for number in 0..<count {
                    group.addTask {
                        // One half before and while it is killed, the other afterwards.
                        if number >= count / 2 { for await _ in killed {} }
                        try await publisher.publish(
                            Numbered(number: number), options: PublishOptions(deadline: .seconds(240)))
                        confirmed.insert(number)
                    }
                }
                group.addTask {
                    try await eventually("some are confirmed") { confirmed.numbers.count > 200 }
                    try await stack.kill(.rabbitMQ)
                    kill.finish()
                    try await eventually("health tells of it") { await publisher.health().isHealthy == false }
                    try await stack.restart(.rabbitMQ)
                }
                try await group.waitForAll()
            }
            #expect(confirmed.numbers.count == count)
            var seen: [ConnectionState] = []
            for await change in states {
                seen.append(change.state)
                if change.state == .open { break }
            }
            #expect(seen.contains(.recovering), "\(seen)")
            let received = try await collect(count, transport)
            #expect(Set(received.keys) == Set(0..<count))
        }
    }

    @Test
    func `with a short deadline a killed broker leaves events unsent or unknown, and no confirmed one is missing`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            let lastNumber = Locked(0)
            let isOver = Locked(false)
            let outcomes = Locked<[PublishOutcome: Set<Int>]>([:])
            try await withThrowingTaskGroup(of: Void.self) { group in
                for _ in 0..<200 {
                    group.addTask {
                        while !isOver.withLock({ $0 }) {
                            let number = lastNumber.withLock { number in
                                number += 1
                                return number
                            }
                            var outcome = PublishOutcome.confirmed
                            let late = try await overrun(.seconds(1)) {
                                do {
                                    try await publisher.publish(
                                        Numbered(number: number), options: PublishOptions(deadline: .seconds(1)))
                                } catch let error as EventsError {
                                    outcome = error.publishOutcome
                                }
                            }
                            #expect(late < .seconds(1))
                            outcomes.withLock { _ = $0[outcome, default: []].insert(number) }
                        }
                    }
                }
                group.addTask {
                    try await eventually("some are confirmed") {
                        outcomes.withLock { ($0[.confirmed]?.count ?? 0) > 100 }
                    }
                    try await stack.kill(.rabbitMQ)
                    try await eventually("some are not confirmed") { outcomes.withLock { $0.count } > 1 }
                    isOver.withLock { $0 = true }
                }
                try await group.waitForAll()
            }
            let ends = outcomes.withLock { $0 }
            #expect(ends.values.map(\.count).reduce(0, +) == lastNumber.withLock { $0 })
            #expect(Set(ends.keys).isSubset(of: [.confirmed, .unsent, .unknown]), "\(ends.keys)")
            let confirmed = ends[.confirmed] ?? []
            try await stack.restart(.rabbitMQ)
            let received = try await collect(transport) { confirmed.isSubset(of: $0) }
            #expect(confirmed.isSubset(of: received.keys))
            #expect((ends[.unsent] ?? []).isDisjoint(with: received.keys), "unsent means that not a byte was written")
        }
    }

    @Test func `a broker stopped for longer than the heartbeat ends calls in time, and work goes on afterwards`()
        async throws
    {
        try await withBroker({ $0.heartbeat = .seconds(2) }) { stack, transport, publisher in
            stack.suspend(.rabbitMQ)
            let late = Locked(0)
            await withTaskGroup(of: Void.self) { group in
                for size in [100, 65_536] {
                    for number in 0..<50 {
                        group.addTask {
                            let event = Numbered(number: number, text: String(repeating: "x", count: size))
                            let overrun = await overrun(.seconds(6)) {
                                _ = try? await publisher.publish(event, options: PublishOptions(deadline: .seconds(6)))
                            }
                            if overrun > .seconds(1) { late.withLock { $0 += 1 } }
                        }
                    }
                }
            }
            #expect(late.withLock { $0 } == 0)
            #expect(await publisher.health().isHealthy == false)
            stack.resume(.rabbitMQ)
            let receipt = try await publisher.publish(Numbered(number: 1))
            #expect(receipt.routed)
        }
    }

    @Test func `connections closed by an operator come back, and the subscription is healthy only while it consumes`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            let seen = Seen()
            var router = EventRouter()
            router.on(Numbered.self, matching: "#") { delivery in
                seen.insert(delivery.event.number)
                return .acknowledge
            }
            let subscriber = EventSubscriber(transport: transport, subscription: Self.subscription, router: router)
            #expect(await subscriber.health().isHealthy == false)
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                try await eventually("it consumes") { await subscriber.health().isHealthy }
                for round in 0..<3 {
                    let states = transport.states()
                    try await stack.rabbitMQControl("close_all_connections", "for a test")
                    var lost: Set<String> = []
                    var back: Set<String> = []
                    for await change in states {
                        if change.state == .recovering { lost.insert(change.connection) }
                        if change.state == .open { back.insert(change.connection) }
                        if back.count == 2 { break }
                    }
                    #expect(lost == ["publish", "consume"])
                    try await publisher.publish(Numbered(number: round))
                    try await eventually("event \(round) arrives") { seen.numbers[round] != nil }
                    #expect(await subscriber.health().isHealthy)
                    // Health is about the broker's view too.
                    let status = try await transport.status(of: Self.queue, deadline: .now + .seconds(30))
                    #expect(status.consumers == 1)
                }
            }
            #expect(await subscriber.health().isHealthy == false)
        }
    }

    @Test func `a memory alarm holds publishers back and is reported, consumers go on, and nothing is lost`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            for number in 0..<50 { try await publisher.publish(Numbered(number: number)) }
            let states = transport.states()
            try await stack.rabbitMQControl("set_vm_memory_high_watermark", "absolute", "1")
            // The broker tells of the alarm once something is published.
            async let doubtful = publisher.publish(
                Numbered(number: 50), options: PublishOptions(deadline: .seconds(60)))
            for await change in states where change.state == .blocked { break }
            #expect(await publisher.health().description.contains("blocked"))
            let late = await overrun(.seconds(1)) {
                let error = await #expect(throws: EventsError.self) {
                    try await publisher.publish(Numbered(number: 51), options: PublishOptions(deadline: .seconds(1)))
                }
                #expect(error?.publishOutcome == .unsent)
                #expect(error?.message.contains("blocks") == true)
            }
            #expect(late < .seconds(1))
            // A declaration on the blocked connection ends by its deadline, one way or the other.
            let declaredLate = await overrun(.seconds(1)) {
                _ = try? await transport.declare(QueueDeclaration("recovery.alarm"), deadline: .now + .seconds(1))
            }
            #expect(declaredLate < .seconds(1))
            let received = try await collect(50, transport)
            #expect(received.count >= 50)
            try await stack.rabbitMQControl("set_vm_memory_high_watermark", "0.6")
            let doubtfulReceipt = try await doubtful
            #expect(doubtfulReceipt.routed)
            try await publisher.publish(Numbered(number: 52))
            #expect(await publisher.health().isHealthy)
            let rest = try await collect(1, transport)
            #expect(rest[51] == nil, "reported as unsent, so not one byte was written")
        }
    }

    @Test func `two alarms, one of which clears, still block`() async throws {
        try await withBroker { stack, transport, publisher in
            let states = transport.states()
            try await stack.rabbitMQControl("set_vm_memory_high_watermark", "absolute", "1")
            try await stack.rabbitMQControl("set_disk_free_limit", "100000GB")
            async let held = publisher.publish(Numbered(number: 1), options: PublishOptions(deadline: .seconds(60)))
            for await change in states where change.state == .blocked { break }
            try await stack.rabbitMQControl("set_vm_memory_high_watermark", "0.6")
            let error = await #expect(throws: EventsError.self) {
                try await publisher.publish(Numbered(number: 2), options: PublishOptions(deadline: .seconds(1)))
            }
            #expect(error?.publishOutcome == .unsent)
            #expect(await publisher.health().isHealthy == false)
            try await stack.rabbitMQControl("set_disk_free_limit", "50MB")
            let heldReceipt = try await held
            #expect(heldReceipt.routed)
        }
    }

    @Test
    func `a queue deleted under its consumer is declared and consumed again, or ends the subscription, by policy`()
        async throws
    {
        try await withBroker { stack, transport, publisher in
            let seen = Seen()
            var router = EventRouter()
            router.on(Numbered.self, matching: "#") { delivery in
                seen.insert(delivery.event.number)
                return .acknowledge
            }
            for resumes in [true, false] {
                var subscription = Self.subscription
                subscription.resumesWhenCancelled = resumes
                let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await subscriber.run() }
                    defer { group.cancelAll() }
                    try await eventually("it consumes") { await subscriber.health().isHealthy }
                    try await stack.rabbitMQControl("delete_queue", Self.queue.rawValue)
                    if resumes {
                        try await eventually("it is noticed, and mended, and an event arrives") {
                            // Until the queue is bound again, there is nowhere for an event to go.
                            try await publisher.publish(Numbered(number: 7))
                            return seen.numbers[7] != nil
                        }
                    } else {
                        do {
                            try await group.next()
                            Issue.record("the subscription went on")
                        } catch let error as EventsError {
                            #expect(error.code == .subscriptionCancelled)
                        }
                    }
                }
            }
        }
    }

    @Test func `a handler that sleeps for three heartbeats keeps its connection, and its acknowledgement counts`()
        async throws
    {
        try await withBroker({ $0.heartbeat = .seconds(1) }) { stack, transport, publisher in
            let handled = Seen()
            var router = EventRouter()
            router.on(Numbered.self, matching: "#") { delivery in
                // The duration is what is tested.
                try await Task.sleep(for: .seconds(3))
                handled.insert(delivery.event.number)
                return .acknowledge
            }
            let states = transport.states()
            let subscriber = EventSubscriber(transport: transport, subscription: Self.subscription, router: router)
            try await publisher.publish(Numbered(number: 1))
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                try await eventually("it is handled") { handled.numbers[1] != nil }
                try await eventually("it is acknowledged") {
                    try await transport.status(of: Self.queue, deadline: .now + .seconds(30)).messages == 0
                }
            }
            await transport.close()
            var seen: [ConnectionState] = []
            for await change in states { seen.append(change.state) }
            #expect(!seen.contains(.recovering), "\(seen)")
            #expect(handled.numbers == [1: 1])
        }
    }

    @Test func `an acknowledgement for a connection that is gone is not sent on the next one`() async throws {
        try await withBroker { stack, transport, publisher in
            for number in 1...3 { try await publisher.publish(Numbered(number: number)) }
            let (entered, enter) = AsyncStream.makeStream(of: Void.self)
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            let seen = Seen()
            let isFirst = Locked(true)
            var router = EventRouter()
            router.on(Numbered.self, matching: "#") { delivery in
                seen.insert(delivery.event.number)
                if isFirst.withLock({ first in
                    defer { first = false }
                    return first
                }) {
                    enter.yield()
                    for await _ in released { break }
                }
                return .acknowledge
            }
            // One at a time: tag 1 of the old channel would be tag 1 of the new one.
            var subscription = Self.subscription
            subscription.prefetch = 2
            subscription.concurrency = 2
            let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                for await _ in entered { break }
                try await stack.rabbitMQControl("close_all_connections", "for a test")
                try await eventually("what was in hand came again") {
                    seen.numbers.count == 3 && seen.numbers.values.contains { $0 > 1 }
                }
                release.yield()
                try await eventually("the queue is empty") {
                    try await transport.status(of: Self.queue, deadline: .now + .seconds(30)).messages == 0
                }
                #expect(await subscriber.health().isHealthy, "an acknowledgement of an unknown tag closes the channel")
            }
        }
    }
}

/// A value that several tasks share.
final class Locked<Value: Sendable>: Sendable {
    private let value: Mutex<Value>
    init(_ value: Value) { self.value = Mutex(value) }
    func withLock<Result: Sendable>(_ body: (inout Value) -> Result) -> Result { value.withLock { body(&$0) } }
}

struct NeverHappened: Error, CustomStringConvertible {
    let description: String
}

/// Waits until something is so: for what no event tells of.
func eventually(
    _ what: String, within limit: Duration = .seconds(60), _ condition: () async throws -> Bool
) async throws {
    let end = ContinuousClock.now + limit
    while ContinuousClock.now < end {
        if try await condition() { return }
        try await Task.sleep(for: .milliseconds(5))
    }
    throw NeverHappened(description: "in \(limit) it never happened that \(what)")
}
