import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis
import Testing

/// SCENARIOS, part B: what deliveries live through, with processes that are killed.
@Suite(.serialized, .timeLimit(.minutes(10))) struct DeliveryTests {
    private func publisher(_ transport: any EventTransport) -> EventPublisher {
        EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "test"))
    }

    /// Publishes `count` events with `key`, many at a time, and returns their ids.
    private func publish(_ count: Int, _ key: RoutingKey, _ publisher: EventPublisher) async throws -> Set<String> {
        try await withThrowingTaskGroup(of: String.self) { group in
            for number in 0..<count {
                group.addTask {
                    let event = UntypedEvent(routingKey: key, data: Array(#"{"number":\#(number)}"#.utf8))
                    return try await publisher.publish(event).eventID.rawValue
                }
            }
            return try await group.reduce(into: []) { $0.insert($1) }
        }
    }

    /// Reads a file that others append lines to, as far as it goes.
    private func lines(_ path: String) -> [[Substring]] {
        ((try? String(contentsOfFile: path, encoding: .utf8)) ?? "").split(separator: "\n").map {
            $0.split(separator: " ")
        }
    }

    private func withFolder(_ body: (String) async throws -> Void) async throws {
        let folder = FileManager.default.temporaryDirectory.appending(path: "smap-deliveries-\(EventID())").path
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(atPath: folder) }
        try await body(folder)
    }

    @Test func `an event that kills its process is dead-lettered alone, and the others are handled`() async throws {
        let (queue, key): (QueueName, RoutingKey) = ("worker.poisoned", "worker.work")
        let environment = try await SharedStack.current.environment
        let transport = try await SharedStack.transport()
        var subscription = EventSubscription(
            queue: queue, bindings: [TopicPattern(key)],
            retry: RetryPolicy(rungs: [.milliseconds(50), .milliseconds(250)]))
        subscription.deadline = .seconds(20)
        try await subscription.topology.apply(to: transport)
        let fatal = Int.random(in: 1_000_000...2_000_000)
        let publisher = publisher(transport)
        func publish(_ number: Int) async throws -> String {
            let event = UntypedEvent(routingKey: key, data: Array("{\"number\":\(number)}".utf8))
            return try await publisher.publish(event).eventID.rawValue
        }
        let poison = try await publish(fatal)
        var others: Set<String> = []
        for number in 1...199 { others.insert(try await publish(number)) }
        try await withFolder { [others] folder in
            let (ledger, processFile) = ("\(folder)/ledger", "\(folder)/pid")
            func worker() async throws -> Program.Output {
                try await Program.run(
                    Program.built("smap-events-bench"),
                    [
                        "worker", "--queue", queue.rawValue, "--ledger", ledger, "--fail-share", "0", "--fatal",
                        "\(fatal)",
                    ], environment: environment, processFile: processFile)
            }
            // As a supervisor restarts it.
            async let last: Void = {
                var deaths = 0
                while try await worker().status == 128 + SIGKILL { deaths += 1 }
                // Once with others in hand, twice before them, three times in a queue of its own; once more if it did not come first.
                #expect((6...7).contains(deaths), "\(deaths)")
            }()
            var failure: (any Error)?
            do {
                try await eventually("the others are handled", within: .seconds(120)) {
                    let done = Set(lines(ledger).filter { $0.first == "e" }.compactMap(\.last).map(String.init))
                    let dead = try await transport.status(of: queue.deadLetterQueue, deadline: .now + .seconds(20))
                    return done.isSuperset(of: others) && dead.messages > 0
                }
            } catch {
                failure = error
            }
            // The supervisor ends whether or not that is so.
            try Program.signal(SIGTERM, processFile: processFile)
            try await last
            if let failure { throw failure }
        }
        let letters = Locked<[String]>([])
        try await DeadLetterQueue(of: queue, transport: transport).read { letter in
            letters.withLock { $0.append("\(letter.eventID ?? "") \(letter.errorType ?? "")") }
        }
        #expect(letters.withLock { $0 } == ["\(poison) poison"])
        await transport.close()
    }

    @Test
    func `a worker that fails at random and is killed ten times handles every event, or gives up after its attempts`()
        async throws
    {
        let (count, kills, attempts) = (10_000, 10, 5)
        let queue: QueueName = "worker.killed"
        let environment = try await SharedStack.current.environment
        let transport = try await SharedStack.transport()
        // As the worker declares it.
        var subscription = EventSubscription(
            queue: queue, bindings: ["worker.work"],
            retry: RetryPolicy(rungs: [.milliseconds(50), .milliseconds(250)]))
        subscription.deadline = .seconds(20)
        try await subscription.topology.apply(to: transport)
        let ids = try await publish(count, "worker.work", publisher(transport))
        #expect(ids.count == count)
        try await withFolder { folder in
            let (ledger, processFile) = ("\(folder)/ledger", "\(folder)/pid")
            func worker() async throws -> Program.Output {
                try await Program.run(
                    Program.built("smap-events-bench"),
                    ["worker", "--queue", queue.rawValue, "--ledger", ledger, "--attempts", "\(attempts)"],
                    environment: environment, processFile: processFile)
            }
            func isQuiet() async throws -> Bool {
                for queue: QueueName in [queue, "smap.retry.50ms", "smap.retry.250ms"] {
                    let status = try await transport.status(of: queue, deadline: .now + .seconds(20))
                    guard status.messages == 0 else { return false }
                }
                return true
            }
            for kill in 1...kills {
                async let run = worker()
                // Killed in the midst of its work, at another place each time.
                let mark = lines(ledger).count + 300 + 50 * kill
                try await eventually("the worker works") { lines(ledger).count >= mark }
                try Program.signal(SIGKILL, processFile: processFile)
                let status = try await run.status
                #expect(status == 128 + SIGKILL)
            }
            async let last = worker()
            var dead: [String: Int] = [:]
            try await eventually("all events are handled or dead-lettered", within: .seconds(120)) {
                // An effect whose process was killed before it could be noted as done has no `c`.
                let handled = Set(lines(ledger).filter { $0.first == "e" }.compactMap(\.last).map(String.init))
                guard try await isQuiet() else { return false }
                let letters = Locked<[String: Int]>([:])
                try await DeadLetterQueue(of: queue, transport: transport).read { letter in
                    letters.withLock { $0[letter.eventID ?? "", default: 0] = letter.attempts ?? 0 }
                }
                dead = letters.withLock { $0 }
                return handled.union(dead.keys).isSuperset(of: ids)
            }
            try Program.signal(SIGTERM, processFile: processFile)
            _ = try await last

            #expect(!dead.isEmpty, "0.3 to the fifth power of 10,000 are about 24")
            #expect(dead.values.allSatisfy { $0 == attempts }, "\(dead)")
            // What each process had in hand when it was killed: begun, and neither failed nor remembered as done.
            var inside: Set<String> = []
            var effects: [String: Int] = [:]
            var open: [Substring: Set<String>] = [:]
            for line in lines(ledger) where line.count == 3 {
                let id = String(line[2])
                switch line[0] {
                case "i": open[line[1], default: []].insert(id)
                case "e": effects[id, default: 0] += 1
                default: open[line[1]]?.remove(id)
                }
            }
            for ids in open.values { inside.formUnion(ids) }
            #expect(!inside.isEmpty, "some were killed inside their handlers")
            let repeated = effects.filter { $0.value > 1 }.keys
            #expect(inside.isSuperset(of: repeated), "\(repeated.count) were repeated, \(inside.count) were inside")
        }
        await transport.close()
    }

    @Test func `a replay of dead letters that is killed twice loses none`() async throws {
        let count = 10_000
        let queue: QueueName = "fault.replayed"
        let environment = try await SharedStack.current.environment
        let transport = try await SharedStack.transport()
        let subscription = EventSubscription(queue: queue, bindings: [])
        try await subscription.topology.apply(to: transport)
        // As a subscriber would have put them there.
        let ids: Set<String> = try await withThrowingTaskGroup(of: String.self) { group in
            for number in 0..<count {
                group.addTask {
                    let id = EventID().rawValue
                    let message = OutboundMessage(
                        exchange: ExchangeName.deadLetters, routingKey: queue.rawValue,
                        properties: MessageProperties(
                            messageID: id,
                            headers: [
                                "x-smap-original-key": .string("a.b"),
                                "x-smap-original-exchange": .string("smap.events"),
                                "x-smap-attempts": .integer(5),
                                "x-smap-error-type": .string(number % 2 == 0 ? "Even" : "Odd"),
                            ]), body: Array(#"{"n":\#(number)}"#.utf8))
                    guard try await transport.publish(message, deadline: .now + .seconds(60)) else { return "" }
                    return id
                }
            }
            return try await group.reduce(into: []) { $0.insert($1) }
        }
        #expect(ids.count == count)
        func replayed() async throws -> Int {
            try await transport.status(of: queue, deadline: .now + .seconds(20)).messages
        }

        // Looked at, nothing changes.
        let list = try await Program.events(["dlq", "list", queue.rawValue], environment: environment)
        #expect(list.status == 0, "\(list.error)")
        #expect(list.lines.compactMap { $0["count"] as? Int } == [count / 2, count / 2], "\(list.output)")
        #expect(Set(list.lines.compactMap { $0["error_type"] as? String }) == ["Even", "Odd"])
        let show = try await Program.events(
            ["dlq", "show", queue.rawValue, "--where", "error_type=Odd", "--limit", "2"], environment: environment)
        #expect(show.lines.count == 2)
        #expect(!show.output.contains("\"body\""), "the message only when asked")
        #expect(show.lines.first?["attempts"] as? Int == 5)

        try await withFolder { folder in
            let processFile = "\(folder)/pid"
            for kill in 1...2 {
                let ended = Locked<String?>(nil)
                async let run = {
                    let output = try await Program.events(
                        ["dlq", "replay", queue.rawValue], environment: environment, processFile: processFile)
                    ended.withLock { $0 = "\(output.status): \(output.output) \(output.error)" }
                    return output
                }()
                let mark = kill * count / 4
                try await eventually("some are replayed") {
                    let output = ended.withLock { $0 }
                    if let output { Issue.record("it ended by itself, with \(output)") }
                    let count = try await replayed()
                    return output != nil || count >= mark
                }
                try Program.signal(SIGKILL, processFile: processFile)
                let status = try await run.status
                #expect(status == 128 + SIGKILL, "it was killed in the middle")
            }
        }
        let rest = try await Program.events(["dlq", "replay", queue.rawValue], environment: environment)
        #expect(rest.status == 0, "\(rest.error)")
        #expect(rest.lines.first?["failed"] as? Int == 0)
        #expect((rest.lines.first?["done"] as? Int ?? 0) > 0)
        try await eventually("the dead letters are gone") {
            try await transport.status(of: queue.deadLetterQueue, deadline: .now + .seconds(20)).messages == 0
        }
        // All that there is, and not until none is missing: that would wait for ever if one were.
        let waiting = try await replayed()
        let (missing, doubled) = try await transport.withConsumer(
            on: queue, prefetch: 500, deadline: .now + .seconds(20)
        ) {
            consumer in
            var missing = ids
            var doubled = 0
            for _ in 0..<waiting {
                guard let delivery = try await consumer.next() else { break }
                if missing.remove(delivery.properties.messageID ?? "") == nil { doubled += 1 }
                #expect(delivery.properties.headers["x-smap-attempts"] == nil, "attempts begin anew")
                #expect(delivery.properties.headers["x-smap-replays"] == .integer(1))
                try consumer.settle(delivery, .acknowledge)
            }
            return (missing, doubled)
        }
        #expect(missing.isEmpty)
        // An acknowledgement may be on its way when the process dies, and lost with it.
        #expect(doubled <= 400, "no more than the broker thought under way at the kills, 200 each: \(doubled)")
        await transport.close()
    }

    @Test func `a message too large to be taken is put aside by the broker, and looking at it does not lose it`()
        async throws
    {
        let queue: QueueName = "fault.large"
        let transport = try await SharedStack.transport { $0.maximumBodySize = 100_000 }
        let seen = Locked(0)
        var router = EventRouter()
        router.on(matching: "#") { _ in
            seen.withLock { $0 += 1 }
            return .acknowledge
        }
        let subscription = EventSubscription(queue: queue, bindings: ["fault.large"])
        let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
        try await subscriber.declare()
        let dead = DeadLetterQueue(of: queue, transport: transport)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            defer { group.cancelAll() }
            for size in [150_000, 10] {
                let event = UntypedEvent(
                    routingKey: "fault.large", data: Array(#"{"text":"\#(String(repeating: "x", count: size))"}"#.utf8))
                try await publisher(transport).publish(event)
            }
            try await eventually("the small one is handled, the large one put aside") {
                try await transport.status(of: queue.deadLetterQueue, deadline: .now + .seconds(20)).messages == 1
                    && seen.withLock { $0 } == 1
            }
        }
        let letters = Locked<[Bool]>([])
        for _ in 1...2 {
            try await dead.read { letter in letters.withLock { $0.append(letter.isTruncated) } }
            let report = try await dead.replay()
            #expect(report.done == 0 && report.failed == 1)
            #expect(report.failure?.code == .eventTooLarge)
        }
        #expect(letters.withLock { $0 } == [true, true], "it is still there")
        await transport.close()
    }
}
