import Foundation
import Logging
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import ServiceLifecycle
import Synchronization
import Testing

/// What networks, operators and orchestrators do to a service.
@Suite(.serialized, .timeLimit(.minutes(10))) struct FaultTests {
    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "fault.numbered"
        var number: Int
        var text = ""
    }

    private func publisher(_ transport: any EventTransport) -> EventPublisher {
        EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "test"))
    }

    // MARK: Networks

    @Test func `over a line that passes one byte at a time, frames are put together all the same`() async throws {
        try await FaultProxy.withProxy(to: try await SharedStack.current.rabbitMQPort) { proxy in
            proxy.fault = .trickle
            try await RabbitMQTransport.withTransport(
                configuration: RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
            ) { transport in
                let queue: QueueName = "fault.trickle"
                try await EventSubscription(queue: queue, bindings: ["fault.trickle"]).topology.apply(to: transport)
                let event = UntypedEvent(routingKey: "fault.trickle", data: Array(#"{"n":1}"#.utf8))
                #expect(try await publisher(transport).publish(event).routed)
                let body = try await transport.withConsumer(on: queue, prefetch: 1, deadline: .now + .seconds(20)) {
                    let delivery = try await $0.next()
                    if let delivery { try $0.settle(delivery, .acknowledge) }
                    return delivery?.body
                }
                #expect(body.map { String(decoding: $0, as: UTF8.self) }?.contains(#""data":{"n":1}"#) == true)
            }
            #expect(proxy.acceptedCount == 2)
        }
    }

    @Test func `cut, half-closed and stalled connections come back, and what was under way is confirmed`() async throws
    {
        try await FaultProxy.withProxy(to: try await SharedStack.current.rabbitMQPort) { proxy in
            var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
            configuration.heartbeat = .seconds(2)
            try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
                let publisher = publisher(transport)
                try await EventSubscription(queue: "fault.cut", bindings: [TopicPattern(Numbered.routingKey)]).topology
                    .apply(to: transport)
                let faults: [(String, @Sendable () -> Void)] = [
                    ("cut", { proxy.cut() }), ("half-close", { proxy.halfClose(toward: .server) }),
                    ("stall", { proxy.fault = .stall }),
                ]
                for (name, fault) in faults {
                    let before = proxy.acceptedCount
                    let states = transport.states()
                    // While nothing passes, nothing can be confirmed: so this one is under way when the fault comes.
                    if name != "stall" { proxy.fault = .stall }
                    async let pending = publisher.publish(
                        Numbered(number: 1), options: PublishOptions(deadline: .seconds(60)))
                    fault()
                    for await change in states where change.state == .recovering { break }
                    proxy.fault = .none
                    _ = try await pending
                    #expect(proxy.acceptedCount > before, "\(name): there was another connection")
                }
            }
        }
    }

    @Test func `what is published is written although nothing before it is confirmed`() async throws {
        try await FaultProxy.withProxy(to: try await SharedStack.current.rabbitMQPort) { proxy in
            let straight = try await SharedStack.transport()
            let queue: QueueName = "fault.unconfirmed"
            try await EventSubscription(queue: queue, bindings: ["fault.unconfirmed"]).topology.apply(to: straight)
            func arrived(_ count: Int) async throws {
                try await eventually("\(count) have arrived") {
                    try await straight.status(of: queue, deadline: .now + .seconds(20)).messages == count
                }
            }
            var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
            // Nothing else brings the connection round.
            configuration.heartbeat = .zero
            try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
                let publisher = publisher(transport)
                try await publisher.declareExchanges()
                let event = UntypedEvent(routingKey: "fault.unconfirmed", data: Array("{}".utf8))
                try await publisher.publish(event)
                proxy.fault = .stall(toward: .client)
                try await withThrowingTaskGroup { group in
                    // One by one, as long as it takes for each to arrive: so that none goes along with another.
                    for count in 2...40 {
                        group.addTask {
                            try await publisher.publish(event, options: PublishOptions(deadline: .seconds(120)))
                        }
                        try await arrived(count)
                    }
                    proxy.fault = .none
                    for try await receipt in group { #expect(receipt.routed) }
                }
            }
            await straight.close()
        }
    }

    @Test func `a connection on which the broker answers nothing of what was declared before is given up`() async throws
    {
        try await FaultProxy.withProxy(to: try await SharedStack.current.rabbitMQPort) { proxy in
            let connections = Locked(0)
            let logger = Logger(label: "test") { _ in
                HookLogHandler { event in
                    // The second time, before its first declaration is answered: from here on none is.
                    guard "\(event.message)" == "connected",
                        connections.withLock({
                            $0 += 1; return $0
                        }) == 2
                    else { return }
                    proxy.fault = .stall(toward: .client)
                }
            }
            var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
            // Nothing else would notice.
            configuration.heartbeat = .zero
            configuration.stallLimit = .seconds(2)
            try await RabbitMQTransport.withTransport(configuration: configuration, logger: logger) { transport in
                for number in 0..<10 {
                    let queue = QueueDeclaration(try QueueName("fault.restored.\(number)"), kind: .classic)
                    try await transport.declare(queue, deadline: .now + .seconds(20))
                }
                let states = transport.states()
                proxy.cut()
                var reasons: [EventsError?] = []
                for await change in states where change.state == .recovering {
                    reasons.append(change.reason)
                    if reasons.count == 2 { break }
                }
                proxy.fault = .none
                // First its channel for declarations, then the connection.
                #expect(reasons.last??.message.contains("did not open or close channel") == true, "\(reasons)")
                try await publisher(transport).declareExchanges()
                let event = UntypedEvent(routingKey: "fault.restored", data: Array("{}".utf8))
                try await publisher(transport).publish(event)
            }
        }
    }

    @Test func `a transport that is closed in a cancelled task waits for what others have published all the same`()
        async throws
    {
        try await FaultProxy.withProxy(to: try await SharedStack.current.rabbitMQPort) { proxy in
            let straight = try await SharedStack.transport()
            let queue: QueueName = "fault.closing"
            try await EventSubscription(queue: queue, bindings: ["fault.closing"]).topology.apply(to: straight)
            let transport = try RabbitMQTransport(
                configuration: RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port))
            let publisher = publisher(transport)
            let event = UntypedEvent(routingKey: "fault.closing", data: Array("{}".utf8))
            try await publisher.publish(event)
            proxy.fault = .stall(toward: .client)
            async let pending = publisher.publish(event)
            try await eventually("it has arrived") {
                try await straight.status(of: queue, deadline: .now + .seconds(20)).messages == 2
            }
            let closing = Task {
                withUnsafeCurrentTask { $0?.cancel() }
                await transport.close(timeout: .seconds(30))
            }
            try await eventually("it takes no more") {
                do {
                    try await publisher.publish(event, options: PublishOptions(deadline: .milliseconds(100)))
                    return false
                } catch let error as EventsError {
                    return error.code == .closed
                }
            }
            proxy.fault = .none
            #expect(try await pending.routed)
            await closing.value
            await straight.close()
        }
    }

    @Test func `of several nodes the one that answers is taken`() async throws {
        let port = try await SharedStack.current.rabbitMQPort
        var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: 1)
        configuration.alternatives = ["127.0.0.1:2", "127.0.0.1:\(port)"]
        try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
            try await publisher(transport).declareExchanges()
        }
    }

    // MARK: Commands

    /// Publishes `count` events with the command, kills the broker in the middle and restarts it five seconds later.
    private func publishThroughCrash(
        _ count: Int, deadline: Int, _ check: ([PublishOutcome: Set<String>], Set<String>, Int32) throws -> Void
    ) async throws {
        var options = LocalStack.Options()
        options.redis = false
        try await LocalStack.withStack(options) { stack in
            let queue: QueueName = "recovery.numbered"
            let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: stack.rabbitMQURL))
            try await EventSubscription(queue: queue, bindings: ["fault.#"]).topology.apply(to: transport)
            try await RecoveryTests.untilDurable(stack)
            let file = "\(stack.folder)/events.ndjson"
            try (0..<count).map { #"{"routing_key":"fault.numbered","data":{"number":\#($0)}}"# + "\n" }.joined()
                .write(toFile: file, atomically: true, encoding: .utf8)
            let output = "\(stack.folder)/reports.ndjson"
            async let run = Program.run(
                "sh",
                [
                    "-c", #""$0" publish --stdin --json --deadline "$1" <"$2" >"$3""#, try Program.command,
                    String(deadline), file, output,
                ], environment: stack.environment)
            func reports() -> [Substring] {
                ((try? String(contentsOfFile: output, encoding: .utf8)) ?? "").split(separator: "\n")
            }
            try await eventually("some are reported") { reports().count > count / 10 }
            try await stack.kill(.rabbitMQ)
            #expect(reports().count < count, "it was killed in the middle")
            // How long it is away is what is tested.
            try await Task.sleep(for: .seconds(5))
            try await stack.restart(.rabbitMQ)
            let result = try await run
            var outcomes: [PublishOutcome: Set<String>] = [:]
            for line in reports() {
                let report = try #require(
                    try JSONSerialization.jsonObject(with: Data(line.utf8)) as? [String: Any])
                let outcome = try #require((report["outcome"] as? String).flatMap(PublishOutcome.init(rawValue:)))
                outcomes[outcome, default: []].insert(try #require(report["event_id"] as? String))
            }
            #expect(reports().count == count, "each is reported once")
            #expect(outcomes.values.map(\.count).reduce(0, +) == count)
            // Until all that was confirmed has come; some of what is unknown is in the queue too.
            let confirmed = outcomes[.confirmed] ?? []
            let received = try await transport.withConsumer(on: queue, prefetch: 500, deadline: .now + .seconds(30)) {
                consumer in
                var ids: Set<String> = []
                var missing = confirmed
                while !missing.isEmpty, let delivery = try await consumer.next() {
                    let id = delivery.properties.messageID ?? ""
                    ids.insert(id)
                    missing.remove(id)
                    try consumer.settle(delivery, .acknowledge)
                }
                return ids
            }
            await transport.close()
            try check(outcomes, received, result.status)
        }
    }

    @Test func `publish with a long deadline has every event confirmed, although the broker is killed`() async throws {
        try await publishThroughCrash(20_000, deadline: 240) { outcomes, received, status in
            #expect(Set(outcomes.keys) == [.confirmed])
            #expect(outcomes[.confirmed]?.isSubset(of: received) == true)
            #expect(status == 0)
        }
    }

    @Test func `publish with a short deadline tells what is unsent or unknown, and no confirmed event is missing`()
        async throws
    {
        try await publishThroughCrash(20_000, deadline: 2) { outcomes, received, status in
            #expect(Set(outcomes.keys).isSubset(of: [.confirmed, .unsent, .unknown]), "\(outcomes.keys)")
            #expect((outcomes[.unsent]?.count ?? 0) + (outcomes[.unknown]?.count ?? 0) > 0)
            #expect((outcomes[.confirmed] ?? []).subtracting(received).isEmpty)
            #expect(status == 1)
        }
    }

    @Test func `listen misses nothing when its connections are closed again and again, and marks what it repeats`()
        async throws
    {
        var options = LocalStack.Options()
        options.redis = false
        try await LocalStack.withStack(options) { stack in
            let count = 3_000
            let environment = stack.environment
            let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: stack.rabbitMQURL))
            let publisher = publisher(transport)
            try await EventSubscription(queue: "fault.listen", bindings: ["fault.#"]).topology.apply(to: transport)
            let processFile = "\(stack.folder)/listen.pid"
            async let listening = Program.events(
                ["listen", "--queue", "fault.listen", "--bind", "fault.#", "--json"],
                environment: environment, processFile: processFile)
            try await eventually("it listens") {
                try await transport.status(of: "fault.listen", deadline: .now + .seconds(30)).consumers == 1
            }
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask {
                    for number in 0..<count {
                        try await publisher.publish(Numbered(number: number))
                        // Spread over the faults.
                        if number % 10 == 0 { try await Task.sleep(for: .milliseconds(50)) }
                    }
                }
                group.addTask {
                    // Those of the listener alone: a publisher that is cut off publishes again. In the broker, since
                    // starting rabbitmqctl takes seconds.
                    try await stack.rabbitMQControl(
                        "eval",
                        """
                        Mine = fun() -> [P || [{pid, P}, {client_properties, C}, {channels, N}]
                          <- rabbit_networking:connection_info_all([pid, client_properties, channels]), N > 0,
                          lists:any(fun({_, _, V}) -> V =:= <<"smap-events.consume">>; (_) -> false end, C)] end,
                        Close = fun Close(Closed) when length(Closed) >= 10 -> ok;
                          Close(Closed) -> timer:sleep(200), New = Mine() -- Closed,
                            [rabbit_networking:close_connection(P, "for a test") || P <- New],
                            Close(New ++ Closed) end,
                        Close([]).
                        """)
                }
                try await group.waitForAll()
            }
            try await eventually("all is printed and acknowledged") {
                try await stack.rabbitMQControl("list_queues", "--silent", "name", "messages")
                    .contains("fault.listen\t0\n")
            }
            try Program.signal(SIGTERM, processFile: processFile)
            let result = try await listening
            await transport.close()
            #expect(result.status == 0, "\(result.error)")
            var seen: Set<Int> = []
            for line in result.lines {
                let data = try #require(line["data"] as? [String: Any])
                let number = try #require(data["number"] as? Int)
                let isRepeated = !seen.insert(number).inserted
                #expect(!isRepeated || line["redelivered"] as? Bool == true, "\(number) came twice, unmarked")
            }
            #expect(seen == Set(0..<count))
            let interruptions = result.error.split(separator: "\n").count { $0.contains("interrupted") }
            // One that is closed before it consumes is not worth a line.
            #expect(interruptions >= 5, "the connections were closed: \(result.error)")
        }
    }

    // MARK: Shutdown

    @Test func `at shutdown a hundred deliveries in hand are drained up to the deadline, and the rest is given back`()
        async throws
    {
        let transport = try await SharedStack.transport()
        var subscription = EventSubscription(queue: "fault.shutdown", bindings: ["fault.shutdown"])
        subscription.prefetch = 150
        subscription.concurrency = 100
        subscription.drainTimeout = .seconds(8)
        try await subscription.topology.apply(to: transport)
        let entered = Locked(0)
        let finished = Locked(0)
        let (released, release) = AsyncStream.makeStream(of: Void.self)
        var router = EventRouter()
        router.on(matching: "#") { _ in
            let number = entered.withLock { count in
                count += 1
                return count
            }
            if number <= 60 {
                // These come to their end during the shutdown.
                for await _ in released { break }
            } else {
                try await Task.sleep(for: .seconds(600))
            }
            finished.withLock { $0 += 1 }
            return .acknowledge
        }
        let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
        let publisher = publisher(transport)
        for _ in 0..<140 {
            try await publisher.publish(UntypedEvent(routingKey: "fault.shutdown", data: Array("{}".utf8)))
        }
        let group = ServiceGroup(
            services: [subscriber], logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let end = try await withThrowingTaskGroup(of: Void.self) { tasks in
            tasks.addTask { try await group.run() }
            try await eventually("all are in hand") { entered.withLock { $0 } == 100 }
            // What the group does on SIGTERM.
            await group.triggerGracefulShutdown()
            for _ in 0..<60 { release.yield() }
            let start = ContinuousClock.now
            release.finish()
            try await tasks.waitForAll()
            return ContinuousClock.now - start
        }
        #expect(end < .seconds(10), "it took \(end)")
        #expect(finished.withLock { $0 } == 60)
        try await eventually("the rest is back in the queue") {
            try await transport.status(of: "fault.shutdown", deadline: .now + .seconds(30)).messages == 80
        }
        #expect(await subscriber.health().description.contains("ended"))
        await transport.close()
    }

    // MARK: Security

    @Test func `a topic that a user may not write to fails alone, and four hundred others are confirmed`() async throws
    {
        let stack = try await SharedStack.current
        try await stack.rabbitMQControl("add_user", "topical", "pw")
        try await stack.rabbitMQControl("set_permissions", "topical", ".*", ".*", ".*")
        let admin = try await SharedStack.transport()
        try await EventSubscription(queue: "topical.q", bindings: ["topical.#"]).topology.apply(to: admin)
        try await stack.rabbitMQControl(
            "set_topic_permissions", "topical", ExchangeName.events, #"^topical\.open$"#, ".*")
        var configuration = try RabbitMQConfiguration(url: stack.rabbitMQURL)
        configuration.username = "topical"
        configuration.password = "pw"
        try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
            let publisher = publisher(transport)
            let ends = await withTaskGroup(of: String.self) { group in
                for number in 0...400 {
                    group.addTask {
                        let key: RoutingKey = number == 200 ? "topical.secret" : "topical.open"
                        do {
                            let event = UntypedEvent(routingKey: key, data: Array("{}".utf8))
                            return try await publisher.publish(event).routed ? "routed" : "returned"
                        } catch { return (error as? EventsError)?.code.description ?? "\(error)" }
                    }
                }
                return await group.reduce(into: [String: Int]()) { $0[$1, default: 0] += 1 }
            }
            #expect(ends == ["routed": 400, "accessRefused": 1])
        }
        let held = try await admin.status(of: "topical.q", deadline: .now + .seconds(20)).messages
        #expect(held >= 400)
        await admin.close()
    }

    @Test
    func `a user with just the documented permissions can do its job, and with one fewer gets a typed error, once`()
        async throws
    {
        let stack = try await SharedStack.current
        let (user, password) = ("limited", "s3cret-w0rd")
        try await stack.rabbitMQControl("add_user", user, password)
        func permit(_ configure: String, _ write: String, _ read: String) async throws {
            try await stack.rabbitMQControl("set_permissions", user, configure, write, read)
        }
        let logs = Locked<[String]>([])
        let logger = Logger(label: "test") { _ in
            HookLogHandler(logLevel: .trace) { event in
                let line = "\(event.message) \(event.metadata ?? [:])"
                logs.withLock { $0.append(line) }
            }
        }
        var configuration = try RabbitMQConfiguration(url: stack.rabbitMQURL)
        configuration.username = user
        configuration.password = password
        let subscription = EventSubscription(queue: "limited.jobs", bindings: ["limited.#"])
        let event = UntypedEvent(routingKey: "limited.event", data: Array("{}".utf8))

        func work() async throws {
            try await RabbitMQTransport.withTransport(configuration: configuration, logger: logger) { transport in
                try await subscription.topology.apply(to: transport)
                #expect(try await publisher(transport).publish(event).routed)
                _ = try await transport.withConsumer(
                    on: subscription.queue, prefetch: 1, deadline: .now + .seconds(30)
                ) { consumer in
                    if let delivery = try await consumer.next() { try consumer.settle(delivery, .acknowledge) }
                }
            }
        }
        // As the README says them.
        let own = #"limited\..*"#
        let documented = #"^(smap\.(events|dlx|requeue|retry\..*)|\#(own))$"#
        let (configure, write, read) = (documented, documented, documented)
        try await permit(configure, write, read)
        try await work()

        for (configure, write, read) in [
            (#"^limited\..*$"#, write, #"^smap\..*$"#), (configure, #"^limited\..*$"#, read), (configure, write, ""),
        ] {
            try await permit(configure, write, read)
            let error = await #expect(throws: EventsError.self) { try await work() }
            #expect(error?.code == .accessRefused, "\(error as Any)")
            #expect(error?.isRetriable == false)
        }

        // A wrong password: told at once, to everybody, and the server is not asked again and again.
        try await FaultProxy.withProxy(to: stack.rabbitMQPort) { proxy in
            configuration.port = proxy.port
            configuration.password = "wr0ng-" + password
            try await RabbitMQTransport.withTransport(configuration: configuration, logger: logger) { transport in
                let publisher = publisher(transport)
                for _ in 0..<200 {
                    let error = await #expect(throws: EventsError.self) { try await publisher.publish(event) }
                    #expect(error?.code == .accessRefused)
                    #expect(error?.description.contains(password) == false)
                }
                #expect(await publisher.health().description.contains(password) == false)
            }
            #expect(proxy.acceptedCount == 1)
        }
        let lines = logs.withLock { $0 }
        #expect(!lines.isEmpty)
        #expect(!lines.contains { $0.contains(password) })
    }
}
