internal import SMAPEvents
internal import Synchronization

/// What subscriptions rely on: retries through delay queues, dead letters and their replay, requests and replies.
extension TransportContract {
    private struct Tried: SMAPEvent {
        static let routingKey: RoutingKey = "contract.tried"
        var number = 0
    }

    private struct Reply: Codable, Sendable {
        var text: String
    }

    private struct Failure: Error {}

    /// What handlers have seen.
    private final class Seen: Sendable {
        private let entries = Mutex<[(text: String, time: ContinuousClock.Instant)]>([])
        func add(_ text: String) { entries.withLock { $0.append((text, .now)) } }
        var all: [String] { entries.withLock { $0.map(\.text) } }
        var times: [ContinuousClock.Instant] { entries.withLock { $0.map(\.time) } }
    }

    private static func until(
        _ bench: Bench, _ what: String, _ condition: () async throws -> Bool
    ) async throws {
        let end = bench.deadline
        while !(try await condition()) {
            guard ContinuousClock.now < end else { throw ContractViolation(description: "it never happened: \(what)") }
            try await Task.sleep(for: .milliseconds(2))
        }
    }

    private static func subscription(
        _ bench: Bench, attempts: Int = 3, _ rungs: [Duration] = [.milliseconds(100), .milliseconds(300)]
    ) throws -> EventSubscription {
        EventSubscription(
            queue: try bench.queue(), bindings: [TopicPattern("contract.#")], exchange: bench.exchange(.topic).name,
            retry: RetryPolicy(
                maximumAttempts: attempts, firstDelay: rungs.first ?? .zero, multiplier: 3, rungs: rungs,
                hasJitter: false))
    }

    private static func publisher(_ bench: Bench) -> EventPublisher {
        var configuration = PublisherConfiguration(service: "contract")
        configuration.exchange = bench.exchange(.topic).name
        return EventPublisher(transport: bench.transport, configuration: configuration)
    }

    /// Runs a subscriber while `body` runs.
    private static func subscribing(
        _ bench: Bench, _ subscription: EventSubscription, _ router: EventRouter,
        _ body: @escaping @Sendable () async throws -> Void
    ) async throws {
        try await bench.transport.declare(bench.exchange(.topic), deadline: bench.deadline)
        let subscriber = EventSubscriber(transport: bench.transport, subscription: subscription, router: router)
        try await subscriber.declare()
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            group.addTask {
                try await body()
                throw CancellationError()
            }
            defer { group.cancelAll() }
            do { try await group.next() } catch is CancellationError {}
        }
    }

    static let deliveryChecks: [Check] = [
        Check(
            "a handler that fails has the configured attempts after the ladder's pauses, then there is one dead letter"
        ) {
            bench in
            let seen = Seen()
            var router = EventRouter()
            router.on(Tried.self) { delivery in
                seen.add("\(delivery.attempt) \(delivery.routingKey)")
                throw Failure()
            }
            let subscription = try subscription(bench)
            try await subscribing(bench, subscription, router) {
                try await publisher(bench).publish(Tried())
                try await bench.await(1, in: subscription.queue.deadLetterQueue)
            }
            try ContractViolation.equal(
                seen.all, ["1 contract.tried", "2 contract.tried", "3 contract.tried"], "what the handler saw")
            let pauses = zip(seen.times, seen.times.dropFirst()).map { $1 - $0 }
            try ContractViolation.require(
                pauses.count == 2 && pauses[0] >= .milliseconds(100) && pauses[1] >= .milliseconds(300),
                "never too soon: \(pauses)")
            let letters = Mutex<[DeadLetter]>([])
            let count = try await DeadLetterQueue(of: subscription.queue, transport: bench.transport).read { letter in
                letters.withLock { $0.append(letter) }
            }
            try ContractViolation.equal(count, 1, "dead letters")
            let letter = letters.withLock { $0.first }
            try ContractViolation.equal(letter?.attempts, 3, "attempts")
            try ContractViolation.equal(letter?.errorType, "Failure", "error type")
            try ContractViolation.equal(letter?.routingKey, "contract.tried", "original key")
            try ContractViolation.equal(letter?.exchange, bench.exchange(.topic).name, "original exchange")
            try ContractViolation.require(
                letter?.firstFailure.flatMap { first in letter?.lastFailure.map { first < $0 } } == true,
                "the first failure came before the last")
        },
        Check("bad input is dead-lettered at once, with the reason, and the consumer goes on") { bench in
            let seen = Seen()
            var router = EventRouter()
            router.on(Tried.self) { delivery in
                seen.add("\(delivery.event.number)")
                return .acknowledge
            }
            let subscription = try subscription(bench)
            let deep = String(repeating: "[", count: 10_000) + String(repeating: "]", count: 10_000)
            let bodies: [[UInt8]] = [
                Array("not json".utf8), Array(#"{"event_id":"e","payload":\#(deep)}"#.utf8),
                Array(#"{"event_id":"e","payload":{"data":{"number":""#.utf8) + [0xFF, 0xFE] + Array(#""}}}"#.utf8),
                Array(#"{"event_id":"e"}"#.utf8),
                Array(
                    #"{"event_id":"e","payload":{"data":{"number":"\#(String(repeating: "x", count: 5 << 20))"}}}"#.utf8
                ),
            ]
            try await subscribing(bench, subscription, router) {
                for body in bodies {
                    let message = OutboundMessage(
                        exchange: bench.exchange(.topic).name, routingKey: "contract.tried",
                        properties: MessageProperties(), body: body)
                    try await bench.transport.publish(message, deadline: bench.deadline)
                }
                try await publisher(bench).publish(Tried(number: 7))
                try await bench.await(bodies.count, in: subscription.queue.deadLetterQueue)
                try await until(bench, "the good one is handled") { seen.all == ["7"] }
            }
            let letters = Mutex<[DeadLetter]>([])
            try await DeadLetterQueue(of: subscription.queue, transport: bench.transport).read { letter in
                letters.withLock { $0.append(letter) }
            }
            let dead = letters.withLock { $0 }
            try ContractViolation.equal(
                dead.map(\.errorType), Array(repeating: "undecodable", count: bodies.count), "error types")
            try ContractViolation.require(dead.allSatisfy { $0.attempts == 1 }, "after one attempt")
            try ContractViolation.equal(Set(dead.map(\.body.count)), Set(bodies.map(\.count)), "the bodies, whole")
        },
        Check("lanes keep the order within a project, and projects go side by side") { bench in
            struct Step: SMAPEvent {
                static let routingKey: RoutingKey = "contract.step"
                var projectID: ProjectID?
                var number: Int

                enum CodingKeys: String, CodingKey { case number }
                init(_ projectID: ProjectID, _ number: Int) {
                    self.projectID = projectID
                    self.number = number
                }
            }
            let seen = Seen()
            var router = EventRouter()
            router.on(Step.self) { delivery in
                // As long as work may take: the order must not depend on it.
                try await Task.sleep(for: .microseconds(Int.random(in: 0...3_000)))
                let project = delivery.projectID?.rawValue ?? ""
                if project == "p0", delivery.event.number == 3, delivery.attempt < 3 { throw Failure() }
                seen.add("\(project) \(delivery.event.number)")
                return .acknowledge
            }
            var subscription = try subscription(bench)
            subscription.orderingKey = .project
            try await subscribing(bench, subscription, router) {
                for number in 0..<20 {
                    for project in 0..<10 {
                        try await publisher(bench).publish(Step(try ProjectID("p\(project)"), number))
                    }
                }
                try await until(bench, "all are handled") { seen.all.count == 200 }
            }
            for project in 0..<10 {
                try ContractViolation.equal(
                    seen.all.filter { $0.hasPrefix("p\(project) ") }, (0..<20).map { "p\(project) \($0)" }, "order")
            }
        },
        Check("a queue with a single active consumer gives all to one, and to the next when that is gone") { bench in
            var subscription = try subscription(bench)
            subscription.isSingleActive = true
            try await bench.transport.declare(bench.exchange(.topic), deadline: bench.deadline)
            try await subscription.topology.apply(to: bench.transport)
            let (queue, transport) = (subscription.queue, bench.transport)
            let taken = try await transport.withConsumer(on: queue, prefetch: 10, deadline: bench.deadline) { first in
                try await transport.withConsumer(on: queue, prefetch: 10, deadline: bench.deadline) { second in
                    let message = bench.message(bench.exchange(.topic).name, "contract.tried")
                    for _ in 0..<4 { try await transport.publish(message, deadline: bench.deadline) }
                    var taken = 0
                    while taken < 4, let delivery = try await first.next() {
                        taken += 1
                        if taken == 4 { await first.stop() }
                        try first.settle(delivery, taken < 4 ? .acknowledge : .requeue)
                    }
                    let last = try await second.next()
                    if let last { try second.settle(last, .acknowledge) }
                    return (taken, last?.isRedelivered)
                }
            }
            try ContractViolation.equal(taken.0, 4, "the first has had all")
            try ContractViolation.equal(taken.1, true, "then the second")
        },
        Check("a consumer of both legs of a dual publish acts once") { bench in
            let seen = Seen()
            var router = EventRouter()
            router.on(EmailVerificationRequested.self, matching: "email.#") { delivery in
                // Others use these exchanges too.
                if delivery.event.recipient.contains(bench.unique) { seen.add(delivery.event.recipient) }
                return .acknowledge
            }
            try await bench.transport.declare(.events, deadline: bench.deadline)
            try await bench.transport.declare(.legacyEmail, deadline: bench.deadline)
            var new = EventSubscription(queue: try bench.queue("new"), bindings: ["email.#"])
            new.inbox.scope = "contract.\(bench.unique)"
            var old = EventSubscription(
                queue: try bench.queue("old"), bindings: ["#"], exchange: ExchangeName.legacyEmail)
            old.inbox.scope = new.inbox.scope
            // Who comes while the other leg is in hand comes again soon.
            new.retry = RetryPolicy(rungs: [.seconds(1)])
            old.retry = new.retry
            let inbox = InMemoryInbox()
            let (first, second) = (new, old)
            try await withThrowingTaskGroup(of: Void.self) { group in
                for subscription in [first, second] {
                    let subscriber = EventSubscriber(
                        transport: bench.transport, subscription: subscription, router: router, inbox: inbox)
                    try await subscriber.declare()
                    group.addTask { try await subscriber.run() }
                }
                defer { group.cancelAll() }
                let publisher = DualPublisher(
                    transport: bench.transport, configuration: PublisherConfiguration(service: "contract"), phase: .dual
                )
                for number in 0..<20 {
                    try await publisher.publish(
                        EmailVerificationRequested(
                            recipient: "u\(number)@\(bench.unique).example.org", subject: "s", body: "b"))
                }
                try await until(bench, "all are handled, and both queues are empty") {
                    guard seen.all.count >= 20 else { return false }
                    for queue in [first.queue, second.queue] {
                        guard try await bench.count(queue, deadLetters: true) == 0 else { return false }
                    }
                    return true
                }
            }
            try ContractViolation.equal(seen.all.count, 20, "each once")
        },
        Check("a slow retry does not hold up a fast one behind it") { bench in
            let seen = Seen()
            var router = EventRouter()
            router.on(Tried.self) { delivery in
                seen.add("\(delivery.event.number)")
                if delivery.attempt > 1 { return .acknowledge }
                return .retry(after: delivery.event.number == 1 ? .seconds(10) : .milliseconds(100))
            }
            let subscription = try subscription(bench, [.milliseconds(100), .seconds(10)])
            try await subscribing(bench, subscription, router) {
                try await publisher(bench).publish(Tried(number: 1))
                try await until(bench, "the first is tried") { seen.all.count == 1 }
                try await publisher(bench).publish(Tried(number: 2))
                try await until(bench, "all are handled") { seen.all.count == 4 }
            }
            try ContractViolation.equal(seen.all, ["1", "2", "2", "1"], "the order")
        },
        Check("dead letters are replayed as new, chosen by their fields; others stay, and may be purged") { bench in
            let seen = Seen()
            var router = EventRouter()
            router.on(Tried.self) { delivery in
                seen.add(
                    "\(delivery.event.number) \(delivery.attempt) \(delivery.properties.headers["x-smap-replays"]?.description ?? "-")"
                )
                let isReplayed = delivery.properties.headers["x-smap-replays"] != nil
                return isReplayed ? .acknowledge : .deadLetter(reason: "odd \(delivery.event.number % 2)")
            }
            let subscription = try subscription(bench)
            let letters = DeadLetterQueue(of: subscription.queue, transport: bench.transport)
            try await subscribing(bench, subscription, router) {
                for number in 1...10 { try await publisher(bench).publish(Tried(number: number)) }
                try await bench.await(10, in: subscription.queue.deadLetterQueue)
                let odd: @Sendable (DeadLetter) -> Bool = { $0.reason == "odd 1" }
                let trial = try await letters.replay(where: odd, isDryRun: true)
                try ContractViolation.equal([trial.examined, trial.done], [10, 5], "a dry run counts")
                let first = try await letters.replay(where: odd, limit: 3)
                try ContractViolation.equal(first.done, 3, "no more than the limit")
                let rest = try await letters.replay(where: odd)
                try ContractViolation.equal([rest.done, rest.failed], [2, 0], "the rest")
                try await until(bench, "the replayed are handled") { seen.all.count == 15 }
                try await bench.await(5, in: subscription.queue.deadLetterQueue)
                try ContractViolation.equal(
                    Set(seen.all.suffix(5)), Set([1, 3, 5, 7, 9].map { "\($0) 1 1" }), "attempts begin anew")
                let purged = try await letters.purge()
                try ContractViolation.equal(purged.done, 5, "purged")
                try await bench.await(0, in: subscription.queue.deadLetterQueue)
            }
        },
        Check("a request is answered, refused, reaches nobody, or is given up at its deadline") { bench in
            var router = EventRouter()
            router.onRequest(Tried.self) { delivery -> Reply in
                switch delivery.event.number {
                case 0: throw RequestRejection(reason: "not zero")
                case 1: try await Task.sleep(for: .seconds(600))
                default: break
                }
                return Reply(text: "number \(delivery.event.number)")
            }
            var configuration = PublisherConfiguration(service: "contract")
            configuration.exchange = bench.exchange(.topic).name
            let requester = EventRequester(transport: bench.transport, configuration: configuration)
            @Sendable func code(_ number: Int, _ deadline: Duration) async throws -> EventsError.Code? {
                do {
                    let _: Reply = try await requester.request(
                        Tried(number: number), options: PublishOptions(deadline: deadline))
                    return nil
                } catch let error as EventsError {
                    return error.code
                }
            }
            try await bench.transport.declare(bench.exchange(.topic), deadline: bench.deadline)
            try ContractViolation.equal(try await code(2, .seconds(20)), .unroutable, "nobody is there")
            try await subscribing(bench, try subscription(bench), router) {
                try await withThrowingTaskGroup(of: (Int, String).self) { group in
                    for number in 2..<22 {
                        group.addTask {
                            (number, try await requester.request(Tried(number: number), reply: Reply.self).text)
                        }
                    }
                    for try await (number, text) in group {
                        try ContractViolation.equal(text, "number \(number)", "each has its own reply")
                    }
                }
                try ContractViolation.equal(try await code(0, .seconds(20)), .requestRejected, "a refusal")
                try ContractViolation.equal(try await code(1, .seconds(2)), .deadlineExceeded, "no reply")
            }
        },
        Check("a reply goes to an address for replies only, never to a queue that the request names") { bench in
            var router = EventRouter()
            router.onRequest(Tried.self) { _ in Reply(text: "secret") }
            let victim = try bench.queue("victim")
            try await bench.transport.declare(QueueDeclaration(victim), deadline: bench.deadline)
            try await bench.transport.declare(bench.exchange(.topic), deadline: bench.deadline)
            let subscription = try subscription(bench)
            try await subscribing(bench, subscription, router) {
                var message = bench.message(bench.exchange(.topic).name, "contract.tried", "{\"number\":1}")
                message.body = try EventEnvelope(
                    routingKey: Tried.routingKey, service: "contract", data: Array("{\"number\":1}".utf8)
                ).serialized()
                message.properties.replyTo = victim.rawValue
                message.properties.correlationID = "c"
                try await bench.transport.publish(message, deadline: bench.deadline)
                try await bench.await(0, in: subscription.queue, deadLetters: true)
                // The request that comes behind it has been replied to, or would have been.
                var configuration = PublisherConfiguration(service: "contract")
                configuration.exchange = bench.exchange(.topic).name
                let requester = EventRequester(transport: bench.transport, configuration: configuration)
                let reply = try await requester.request(Tried(number: 2), reply: Reply.self)
                try ContractViolation.equal(reply.text, "secret", "a proper request")
            }
            try await bench.await(0, in: victim)
        },
    ]
}
