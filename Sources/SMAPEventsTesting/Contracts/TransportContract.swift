public import SMAPEvents
internal import Synchronization

/// What every ``SMAPEvents/EventTransport`` must do. Each check can be run against any of them, and uses exchanges and
/// queues of its own.
///
/// ```swift
/// @Test(arguments: TransportContract.checks) func `the transport keeps its contract`(check: TransportContract.Check) async throws {
///     try await check.run(transport)
/// }
/// ```
public enum TransportContract {
    /// One promise.
    public struct Check: Sendable, CustomStringConvertible {
        /// The promise, as a sentence.
        public let description: String
        private let body: @Sendable (Bench) async throws -> Void

        init(_ description: String, _ body: @escaping @Sendable (Bench) async throws -> Void) {
            self.description = description
            self.body = body
        }

        /// Runs the check. Throws ``ContractViolation`` when the promise is not kept.
        public func run(_ transport: any EventTransport) async throws {
            try await body(Bench(transport: transport))
        }
    }

    /// A transport, and names that no other check uses.
    struct Bench: Sendable {
        let transport: any EventTransport
        let unique = EventID().rawValue.suffix(12)

        var deadline: ContinuousClock.Instant { .now + .seconds(60) }

        func queue(_ name: String = "q") throws -> QueueName { try QueueName("contract.\(unique).\(name)") }

        func exchange(_ kind: ExchangeDeclaration.Kind, _ name: String = "x") -> ExchangeDeclaration {
            ExchangeDeclaration(name: "contract.\(unique).\(name)", kind: kind)
        }

        /// Declares an exchange and a queue bound to it.
        func bound(
            _ kind: ExchangeDeclaration.Kind = .topic, key: String = "#", deadLetters: Bool = false
        ) async throws
            -> (exchange: String, queue: QueueName)
        {
            let exchange = exchange(kind)
            let queue = try queue()
            try await transport.declare(exchange, deadline: deadline)
            try await transport.declare(QueueDeclaration(queue, deadLetters: deadLetters), deadline: deadline)
            try await transport.bind(queue, to: exchange.name, routingKey: key, deadline: deadline)
            return (exchange.name, queue)
        }

        func message(_ exchange: String, _ key: String = "a.b", _ body: String = "{}") -> OutboundMessage {
            OutboundMessage(
                exchange: exchange, routingKey: key, properties: MessageProperties(messageID: EventID().rawValue),
                body: Array(body.utf8))
        }

        @discardableResult
        func publish(_ exchange: String, _ key: String = "a.b", _ body: String = "{}") async throws -> Bool {
            let message = message(exchange, key, body)
            return try await transport.publish(message, deadline: deadline)
        }

        /// Takes `count` deliveries, acknowledged.
        func take(_ count: Int, from queue: QueueName) async throws -> [InboundDelivery] {
            try await transport.withConsumer(on: queue, prefetch: 100, deadline: deadline) { consumer in
                var taken: [InboundDelivery] = []
                while taken.count < count, let delivery = try await consumer.next() {
                    try consumer.settle(delivery, .acknowledge)
                    taken.append(delivery)
                }
                return taken
            }
        }

        /// How many messages wait in a queue.
        func count(_ queue: QueueName, deadLetters: Bool = false) async throws -> Int {
            try await transport.declare(QueueDeclaration(queue, deadLetters: deadLetters), deadline: deadline).messages
        }

        /// Waits until a queue holds so many messages: brokers count with a delay.
        func await(_ count: Int, in queue: QueueName, deadLetters: Bool = false) async throws {
            let end = deadline
            var last = -1
            while ContinuousClock.now < end {
                last = try await self.count(queue, deadLetters: deadLetters)
                if last == count { return }
                await Task.yield()
            }
            throw ContractViolation(description: "\(queue) holds \(last) messages, not \(count)")
        }
    }

    /// All promises.
    public static let checks: [Check] = carrying + deliveryChecks

    private static let carrying: [Check] = [
        Check("a message reaches every queue whose pattern matches, once each, with its properties") { bench in
            let exchange = bench.exchange(.topic)
            try await bench.transport.declare(exchange, deadline: bench.deadline)
            let queues = try [bench.queue("one"), bench.queue("two"), bench.queue("none")]
            for (queue, patterns) in zip(queues, [["email.#", "*.verification.*"], ["#.requested"], ["sms.#"]]) {
                try await bench.transport.declare(QueueDeclaration(queue), deadline: bench.deadline)
                for pattern in patterns {
                    try await bench.transport.bind(
                        queue, to: exchange.name, routingKey: pattern, deadline: bench.deadline)
                }
            }
            let message = OutboundMessage(
                exchange: exchange.name, routingKey: "email.verification.requested",
                properties: MessageProperties(
                    contentType: "application/json", messageID: "evt_1", type: "email.verification.requested",
                    appID: "identity", correlationID: "c-1",
                    headers: ["tenant_id": .string("t"), "n": .integer(7), "flag": .boolean(true)]),
                body: Array("{\"ü\":1}".utf8))
            let routed = try await bench.transport.publish(message, deadline: bench.deadline)
            try ContractViolation.require(routed, "it was routed")
            for queue in queues[..<2] {
                let delivery = try await bench.take(1, from: queue)[0]
                try ContractViolation.equal(delivery.body, message.body, "body")
                try ContractViolation.equal(delivery.exchange, exchange.name, "exchange")
                try ContractViolation.equal(delivery.routingKey, message.routingKey, "key")
                try ContractViolation.equal(delivery.properties, message.properties, "properties")
                try ContractViolation.equal(delivery.isRedelivered, false, "redelivered")
                try ContractViolation.equal(delivery.attempt, 1, "attempt")
                try await bench.await(0, in: queue)
            }
            try await bench.await(0, in: queues[2])
        },
        Check("a fanout exchange ignores keys, and a direct one compares them") { bench in
            let fanout = bench.exchange(.fanout, "f")
            let direct = bench.exchange(.direct, "d")
            let queue = try bench.queue()
            try await bench.transport.declare(QueueDeclaration(queue), deadline: bench.deadline)
            for exchange in [fanout, direct] {
                try await bench.transport.declare(exchange, deadline: bench.deadline)
                try await bench.transport.bind(
                    queue, to: exchange.name, routingKey: "just.this", deadline: bench.deadline)
            }
            try ContractViolation.equal(try await bench.publish(fanout.name, ""), true, "fanout")
            try ContractViolation.equal(try await bench.publish(direct.name, "just.this"), true, "direct")
            try ContractViolation.equal(try await bench.publish(direct.name, "just.that"), false, "another key")
            try await bench.await(2, in: queue)
        },
        Check("a message for which no queue is bound is reported as such") { bench in
            let exchange = bench.exchange(.topic)
            try await bench.transport.declare(exchange, deadline: bench.deadline)
            try ContractViolation.equal(try await bench.publish(exchange.name), false, "routed")
        },
        Check("routed and returned messages in flight together are told apart") { bench in
            let (exchange, _) = try await bench.bound(key: "to.somebody")
            try await withThrowingTaskGroup(of: (Bool, Bool).self) { group in
                for index in 0..<200 {
                    group.addTask {
                        let expected = index % 3 != 0
                        return (try await bench.publish(exchange, expected ? "to.somebody" : "to.nobody"), expected)
                    }
                }
                for try await (routed, expected) in group {
                    try ContractViolation.equal(routed, expected, "routed")
                }
            }
        },
        Check("a missing exchange fails only the publish that names it, and publishing goes on") { bench in
            let (exchange, queue) = try await bench.bound()
            try await ContractViolation.error(.exchangeNotFound) {
                try await bench.publish("contract.\(bench.unique).missing")
            }
            try ContractViolation.equal(try await bench.publish(exchange), true, "routed afterwards")
            try await bench.await(1, in: queue)
        },
        Check("declaring again is nothing, and declaring otherwise is an error that names the difference") { bench in
            let exchange = bench.exchange(.topic)
            let queue = try bench.queue()
            for _ in 0..<2 {
                try await bench.transport.declare(exchange, deadline: bench.deadline)
                try await bench.transport.declare(QueueDeclaration(queue), deadline: bench.deadline)
                try await bench.transport.bind(queue, to: exchange.name, routingKey: "a.*", deadline: bench.deadline)
            }
            var error = try await ContractViolation.error(.topologyConflict) {
                try await bench.transport.declare(QueueDeclaration(queue, kind: .classic), deadline: bench.deadline)
            }
            try ContractViolation.require(error.description.contains("x-queue-type"), "\(error) names the argument")
            error = try await ContractViolation.error(.topologyConflict) {
                try await bench.transport.declare(
                    ExchangeDeclaration(name: exchange.name, kind: .fanout), deadline: bench.deadline)
            }
            try ContractViolation.require(error.description.contains("'type'"), "\(error) names the argument")
            // The transport has survived both.
            try ContractViolation.equal(try await bench.publish(exchange.name), true, "routed afterwards")
        },
        Check("binding what is not there, and consuming from it, is notFound") { bench in
            let (exchange, _) = try await bench.bound()
            let missing = try bench.queue("missing")
            try await ContractViolation.error(.notFound) {
                try await bench.transport.bind(missing, to: exchange, routingKey: "#", deadline: bench.deadline)
            }
            try await ContractViolation.error(.notFound) {
                try await bench.transport.withConsumer(on: missing, prefetch: 1, deadline: bench.deadline) { _ in }
            }
        },
        Check("what the wire cannot carry is rejected before it is sent, and publishing goes on") { bench in
            let (exchange, queue) = try await bench.bound()
            let bad: [(EventsError.Code, @Sendable (inout OutboundMessage) -> Void)] = [
                (.eventTooLarge, { $0.routingKey = String(repeating: "k", count: 256) }),
                (.eventTooLarge, { $0.properties.correlationID = String(repeating: "c", count: 256) }),
                (.eventTooLarge, { $0.properties.headers["h"] = .string(String(repeating: "v", count: 70_000)) }),
                (.invalidEvent, { $0.properties.headers["tenant_id"] = .string("a\r\nb") }),
                (.invalidEvent, { $0.properties.headers["BCC"] = .string("other.queue") }),
            ]
            for (code, spoil) in bad {
                var message = bench.message(exchange)
                spoil(&message)
                try await ContractViolation.error(code) { [message] in
                    try await bench.transport.publish(message, deadline: bench.deadline)
                }
            }
            try await bench.publish(exchange)
            try await bench.await(1, in: queue)
        },
        Check("room that is reserved and not used is given back") { bench in
            let (exchange, _) = try await bench.bound()
            for _ in 0..<1_500 {
                _ = try await bench.transport.reserve(
                    1, bytes: 1_000, for: PublishDestination(exchange: exchange, routingKey: "a.b"),
                    deadline: bench.deadline)
            }
            try await bench.publish(exchange)
        },
        Check("of many messages in one call each has its own result, in order") { bench in
            let (exchange, queue) = try await bench.bound(key: "to.somebody")
            var messages = (0..<20).map { bench.message(exchange, "to.somebody", "\($0)") }
            messages[3].routingKey = "to.nobody"
            messages[5].properties.headers["BCC"] = .string("other.queue")
            let reservation = try await bench.transport.reserve(
                messages.count, bytes: 2_000, for: PublishDestination(exchange: exchange, routingKey: "to.somebody"),
                deadline: bench.deadline)
            try ContractViolation.equal(reservation.count, messages.count, "messages that there is room for")
            let results = await bench.transport.publish(
                contentsOf: messages, using: reservation, deadline: bench.deadline)
            try ContractViolation.equal(results.count, messages.count, "results")
            for (index, result) in results.enumerated() {
                switch result {
                case .success(let routed): try ContractViolation.equal(routed, index != 3, "message \(index) routed")
                case .failure(let error):
                    try ContractViolation.equal(index, 5, "the index of what failed")
                    try ContractViolation.equal(error.code, .invalidEvent, "why")
                }
            }
            let bodies = try await bench.take(18, from: queue).map { String(decoding: $0.body, as: UTF8.self) }
            let expected = (0..<20).filter { $0 != 3 && $0 != 5 }.map(String.init)
            try ContractViolation.equal(bodies, expected, "what arrived")
        },
        Check("no messages in one call are no results") { bench in
            let (exchange, _) = try await bench.bound()
            let reservation = try await bench.transport.reserve(
                1, bytes: 1, for: PublishDestination(exchange: exchange, routingKey: "a.b"), deadline: bench.deadline)
            let none = await bench.transport.publish(contentsOf: [], using: reservation, deadline: bench.deadline)
            try ContractViolation.equal(none.count, 0, "results")
            var invalid = bench.message(exchange)
            invalid.properties.headers["CC"] = .string("other.queue")
            let results = await bench.transport.publish(
                contentsOf: [invalid, invalid], using: PublishReservation(count: 2), deadline: bench.deadline)
            try ContractViolation.equal(results.count { (try? $0.get()) == nil }, 2, "failures")
        },
        Check("bodies of every awkward size arrive whole and in order") { bench in
            let (exchange, queue) = try await bench.bound()
            let frame = 131_072 - 8
            let sizes = [0, 1, frame - 1, frame, frame + 1, 2 * frame, 2 * frame + 1, 1_000_000]
            for size in sizes {
                let clock = ContinuousClock.now
                try await bench.publish(exchange, "a.b", String(repeating: "x", count: size))
                // A frame's last bytes held back by the kernel would take 200 ms.
                try ContractViolation.require(.now - clock < .seconds(5), "\(size) bytes went out at once")
            }
            let bodies = try await bench.take(sizes.count, from: queue).map(\.body.count)
            try ContractViolation.equal(bodies, sizes, "sizes")
        },
        Check("no more than the prefetch is delivered unsettled, and settling lets more in") { bench in
            let (exchange, queue) = try await bench.bound()
            for index in 0..<10 { try await bench.publish(exchange, "a.b", "\(index)") }
            try await bench.transport.withConsumer(on: queue, prefetch: 3, deadline: bench.deadline) { consumer in
                var held: [InboundDelivery] = []
                for _ in 0..<3 {
                    if let delivery = try await consumer.next() { held.append(delivery) }
                }
                try await bench.await(7, in: queue)
                for delivery in held { try consumer.settle(delivery, .acknowledge) }
                for expected in 3..<10 {
                    let delivery = try await consumer.next()
                    try ContractViolation.equal(delivery?.body, Array("\(expected)".utf8), "order")
                    if let delivery { try consumer.settle(delivery, .acknowledge) }
                }
            }
            try await bench.await(0, in: queue)
        },
        Check("a consumer that is widened has more at a time, and settles what it had before") { bench in
            let (exchange, queue) = try await bench.bound()
            for body in ["1", "2", "3"] { _ = try await bench.publish(exchange, "a.b", body) }
            try await bench.transport.withConsumer(on: queue, prefetch: 1, deadline: bench.deadline) { consumer in
                let first = try await consumer.next()
                consumer.widen(to: 3)
                let others = [try await consumer.next(), try await consumer.next()]
                try ContractViolation.equal(
                    ([first] + others).map { $0?.body }, ["1", "2", "3"].map { Array($0.utf8) }, "each once, in order")
                for delivery in [first] + others {
                    if let delivery { try consumer.settle(delivery, .acknowledge) }
                }
            }
            try await bench.await(0, in: queue)
        },
        Check("what is not settled comes again, marked as redelivered and counted") { bench in
            let (exchange, queue) = try await bench.bound()
            try await bench.publish(exchange)
            for attempt in 1...2 {
                try await bench.transport.withConsumer(on: queue, prefetch: 1, deadline: bench.deadline) { consumer in
                    let delivery = try await consumer.next()
                    try ContractViolation.equal(delivery?.isRedelivered, attempt > 1, "redelivered")
                    try ContractViolation.equal(delivery?.attempt, attempt, "attempt")
                    guard attempt == 2, let delivery else { return }
                    try consumer.settle(delivery, .requeue)
                    let again = try await consumer.next()
                    try ContractViolation.equal(again?.attempt, 3, "attempt after a requeue")
                    try ContractViolation.equal(again?.body, delivery.body, "body after a requeue")
                }
            }
            try await bench.await(1, in: queue)
        },
        Check("a delivery is settled once, and not after its consumer has ended") { bench in
            let (exchange, queue) = try await bench.bound()
            try await bench.publish(exchange, "a.b", "1")
            try await bench.publish(exchange, "a.b", "2")
            let (old, late) = try await bench.transport.withConsumer(on: queue, prefetch: 2, deadline: bench.deadline) {
                consumer in
                guard let first = try await consumer.next(), let second = try await consumer.next() else {
                    throw ContractViolation(description: "nothing was delivered")
                }
                try consumer.settle(first, .acknowledge)
                try await ContractViolation.error(.deliveryExpired) { try consumer.settle(first, .acknowledge) }
                return (consumer, second)
            }
            try await ContractViolation.error(.deliveryExpired) { try old.settle(late, .acknowledge) }
            try await bench.await(1, in: queue)
        },
        Check("a rejected message goes to the queue's dead letters") { bench in
            let (exchange, queue) = try await bench.bound(deadLetters: true)
            try await bench.transport.declare(.deadLetters, deadline: bench.deadline)
            try await bench.transport.declare(QueueDeclaration(queue.deadLetterQueue), deadline: bench.deadline)
            try await bench.transport.bind(
                queue.deadLetterQueue, to: ExchangeName.deadLetters, routingKey: queue.rawValue,
                deadline: bench.deadline)
            try await bench.publish(exchange, "a.b", "poison")
            try await bench.transport.withConsumer(on: queue, prefetch: 1, deadline: bench.deadline) { consumer in
                if let delivery = try await consumer.next() { try consumer.settle(delivery, .reject) }
            }
            let dead = try await bench.take(1, from: queue.deadLetterQueue)
            try ContractViolation.equal(dead.first?.body, Array("poison".utf8), "body")
            try await bench.await(0, in: queue, deadLetters: true)
        },
        Check("settling out of order loses and doubles nothing") { bench in
            // A classic queue on purpose. A channel of RabbitMQ keeps no more than 32 commands to a quorum queue in
            // flight, holds back the others, and forgets them when it is closed: acknowledgements of the last moment
            // are then lost, and their messages come again. That is at least once, but not what is tested here.
            let exchange = bench.exchange(.fanout)
            let queue = QueueDeclaration(try bench.queue(), kind: .classic)
            try await bench.transport.declare(exchange, deadline: bench.deadline)
            try await bench.transport.declare(queue, deadline: bench.deadline)
            try await bench.transport.bind(queue.name, to: exchange.name, routingKey: "", deadline: bench.deadline)
            let count = 300
            for index in 0..<count { try await bench.publish(exchange.name, "a.b", "\(index)") }
            let kept = try await bench.transport.withConsumer(
                on: queue.name, prefetch: count, deadline: bench.deadline
            ) { consumer in
                var held: [InboundDelivery] = []
                while held.count < count, let delivery = try await consumer.next() { held.append(delivery) }
                var kept: Set<[UInt8]> = []
                for (index, delivery) in held.shuffled().enumerated() {
                    if index % 10 == 0 {
                        kept.insert(delivery.body)
                    } else {
                        try consumer.settle(delivery, .acknowledge)
                    }
                }
                return kept
            }
            let again = try await bench.take(count / 10, from: queue.name)
            try ContractViolation.equal(Set(again.map(\.body)), kept, "what came again")
            let left = try await bench.transport.declare(queue, deadline: bench.deadline).messages
            try ContractViolation.equal(left, 0, "messages left")
        },
        Check("many tasks share a consumer, and each delivery goes to one of them") { bench in
            let (exchange, queue) = try await bench.bound()
            let count = 500
            try await withThrowingTaskGroup { group in
                for index in 0..<count { group.addTask { _ = try await bench.publish(exchange, "a.b", "\(index)") } }
                try await group.waitForAll()
            }
            let seen = SeenBodies()
            try await bench.transport.withConsumer(on: queue, prefetch: 50, deadline: bench.deadline) { consumer in
                try await withThrowingTaskGroup { group in
                    for _ in 0..<8 {
                        group.addTask {
                            while let delivery = try await consumer.next() {
                                try consumer.settle(delivery, .acknowledge)
                                if seen.add(delivery.body) == count { await consumer.stop() }
                            }
                        }
                    }
                    try await group.waitForAll()
                }
            }
            try ContractViolation.equal(seen.distinct, count, "distinct messages")
            try await bench.await(0, in: queue)
        },
        Check("a task that waits for a delivery ends when it is cancelled, and takes none with it") { bench in
            let (exchange, queue) = try await bench.bound()
            try await bench.transport.withConsumer(on: queue, prefetch: 1, deadline: bench.deadline) { consumer in
                let waiting = Task { try await consumer.next() }
                await Task.yield()
                waiting.cancel()
                let result = await waiting.result
                guard case .failure(let error) = result, error is CancellationError else {
                    throw ContractViolation(description: "expected a cancellation, got \(result)")
                }
                try await bench.publish(exchange)
                try ContractViolation.require(try await consumer.next() != nil, "the next task gets it")
            }
        },
        Check("of a thousand publishes at once, one in ten cancelled, each ends and the counts add up") { bench in
            let (exchange, queue) = try await bench.bound()
            var counts: [Ending: Int] = [:]
            await withTaskGroup(of: Ending.self) { group in
                for index in 0..<1_000 {
                    group.addTask {
                        let task = Task { try await bench.publish(exchange) }
                        if index % 10 == 0 { task.cancel() }
                        switch await task.result {
                        case .success: return .confirmed
                        case .failure(let error): return error is CancellationError ? .cancelled : .failed
                        }
                    }
                }
                for await ending in group { counts[ending, default: 0] += 1 }
            }
            try ContractViolation.equal(counts[.failed] ?? 0, 0, "failures")
            try ContractViolation.require((counts[.confirmed] ?? 0) >= 900, "\(counts): the others were confirmed")
            // A cancelled one may have been written already: it is in the queue, or it is not.
            try await bench.publish(exchange)
            let held = try await bench.count(queue)
            try ContractViolation.require(held >= 901 && held <= 1_001, "\(held) messages are in the queue")
        },
    ]

    private enum Ending: Hashable { case confirmed, cancelled, failed }

    private final class SeenBodies: Sendable {
        private let state = Mutex<(bodies: Set<[UInt8]>, count: Int)>(([], 0))

        func add(_ body: [UInt8]) -> Int {
            state.withLock { state in
                state.bodies.insert(body)
                state.count += 1
                return state.count
            }
        }

        var distinct: Int { state.withLock { $0.bodies.count } }
    }
}
