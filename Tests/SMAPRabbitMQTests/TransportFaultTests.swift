import ConnectionThread
import Foundation
import SMAPEvents
import Synchronization
import Testing
import Waiting

@testable import SMAPRabbitMQ

/// What a broker that misbehaves does to a transport, and what it must not do.
@Suite(.serialized, .timeLimit(.minutes(1))) struct TransportFaultTests {
    struct Settings {
        let apply: (inout RabbitMQConfiguration) -> Void
        init(_ apply: @escaping (inout RabbitMQConfiguration) -> Void) { self.apply = apply }
    }

    /// Runs `body` with a transport that is connected to a fake broker.
    func withTransport(
        _ options: FakeBroker.Options = FakeBroker.Options(), _ settings: Settings = Settings { _ in },
        _ react: @escaping @Sendable (FakeBroker.Received, FakeConnection) -> Bool = { _, _ in false },
        body: (RabbitMQTransport, FakeBroker) async throws -> Void
    ) async throws {
        try await FakeBroker.withBroker(options, react) { broker in
            var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: broker.port)
            configuration.heartbeat = .zero
            configuration.reconnectDelay = .milliseconds(10)
            settings.apply(&configuration)
            let transport = try RabbitMQTransport(configuration: configuration)
            do {
                try await body(transport, broker)
            } catch {
                await transport.close(timeout: .zero)
                throw error
            }
            await transport.close(timeout: .milliseconds(200))
        }
    }

    func message(
        _ key: String = "a.b", exchange: String = "x", id: String = EventID().rawValue, size: Int = 10, header: Int = 0
    ) -> OutboundMessage {
        var properties = MessageProperties(messageID: id)
        if header > 0 { properties.headers["h"] = .string(String(repeating: "v", count: header)) }
        return OutboundMessage(
            exchange: exchange, routingKey: key, properties: properties, body: Array(repeating: 1, count: size))
    }

    func soon(_ seconds: Double = 20) -> ContinuousClock.Instant { .now + .seconds(seconds) }

    /// How a publish ended: `routed`, `returned`, or code and outcome.
    func end(_ publish: () async throws -> Bool) async -> String {
        do {
            return try await publish() ? "routed" : "returned"
        } catch let error as EventsError {
            return "\(error.code) \(error.publishOutcome)"
        } catch {
            return "cancelled"
        }
    }

    func isConfirmed(over transport: RabbitMQTransport) async -> Bool {
        await end { try await transport.publish(message(), deadline: soon()) } == "routed"
    }

    func counts(_ ends: [String]) -> [String: Int] { ends.reduce(into: [:]) { $0[$1, default: 0] += 1 } }

    /// Publishes messages at the same time; returns how each ended.
    func publish(
        _ messages: [OutboundMessage], over transport: RabbitMQTransport, deadline: Double = 20
    ) async -> [String] {
        // The same for all, however late their tasks begin.
        let limit = soon(deadline)
        return await withTaskGroup(of: (Int, String).self) { group in
            for (index, message) in messages.enumerated() {
                group.addTask {
                    (index, await end { try await transport.publish(message, deadline: limit) })
                }
            }
            return await group.reduce(into: Array(repeating: "", count: messages.count)) { $0[$1.0] = $1.1 }
        }
    }

    // MARK: Bounds

    @Test func `bytes on the wire are bounded, however many callers wait`() async throws {
        let size = 250_000
        try await withTransport { received, _ in
            received.publish != nil
        } body: { transport, broker in
            let messages = (0..<1_000).map { _ in message(size: size) }
            async let ends = publish(messages, over: transport, deadline: 60)
            // Over the limit by one message, and by those that were encoded at the same moment.
            let full = 16 * 1_048_576 / size
            try await broker.waitUntil { $0.publishes().count >= full }
            broker.connections[0].ack(channel: 2, tag: 1)
            broker.connections[0].ack(channel: 2, tag: 2)
            try await broker.waitUntil { $0.publishes().count >= full + 2 }
            #expect(broker.publishes().count <= full + 2 + 1 + PublishWindow.encodingLimit)
            broker.connections[0].ack(channel: 2, tag: 0, multiple: true)
            let acknowledging = Task {
                var done = 0
                while !Task.isCancelled {
                    try await broker.waitUntil { [done] in $0.publishes().count > done }
                    done = broker.publishes().count
                    broker.connections[0].ack(channel: 2, tag: UInt64(done), multiple: true)
                }
            }
            let result = counts(await ends)
            acknowledging.cancel()
            #expect(result == ["routed": 1_000])
        }
    }

    @Test func `callers that wait are bounded, and the next one is told so at once`() async throws {
        try await withTransport(
            FakeBroker.Options(),
            Settings { configuration in
                configuration.windowMessages = 1
                configuration.maximumWaitingPublishes = 2
            }
        ) { received, _ in
            received.publish != nil
        } body: { transport, broker in
            let ends = await publish((0..<10).map { _ in message() }, over: transport, deadline: 2)
            #expect(
                counts(ends) == ["unknownOutcome unknown": 1, "unsent unsent": 2, "overloaded unsent": 7])
        }
    }

    // MARK: One guilty, many innocent

    @Test func `a name that AMQP does not hold fails its own call, and nothing else`() async throws {
        try await withTransport { _, _ in
            false
        } body: { transport, broker in
            let long = String(repeating: "x", count: 300)
            for bad in [
                { try await transport.declare(ExchangeDeclaration(name: long, kind: .topic), deadline: soon()) },
                { try await transport.checkExchange(long, deadline: soon()) },
                { try await transport.bind("q", to: long, routingKey: "a", deadline: soon()) },
                { try await transport.bind("q", to: "x", routingKey: long, deadline: soon()) },
                {
                    let arguments = [long: MessageProperties.HeaderValue.integer(1)]
                    try await transport.declare(
                        QueueDeclaration("q", additionalArguments: arguments), deadline: soon())
                },
            ] as [() async throws -> Void] {
                let error = await #expect(throws: EventsError.self) { try await bad() }
                #expect(error?.code == .invalidName)
                #expect(await isConfirmed(over: transport))
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a header that does not fit the broker's frames fails its own message, and nothing else`() async throws {
        var options = FakeBroker.Options()
        options.frameMax = 4_096
        try await withTransport(options) { _, _ in
            false
        } body: { transport, broker in
            let ends = await publish(
                [message(size: 20_000), message(header: 5_000), message(size: 5_000)], over: transport)
            #expect(ends == ["routed", "eventTooLarge rejected", "routed"])
            #expect(broker.acceptedCount == 1)
            try await broker.waitUntil { $0.publishes().count == 2 }
            #expect(broker.publishes().allSatisfy { $0.frameSizes.allSatisfy { $0 <= 4_096 - 8 } })
            #expect(broker.publishes().map(\.body.count).sorted() == [5_000, 20_000])
        }
    }

    @Test func `a copy that AMQP does not hold is invalid, alone and among others`() async throws {
        try await withTransport { _, _ in
            false
        } body: { transport, broker in
            let headers = try #require(HeaderTable(bytes: []))
            let copy = OutboundMessage(
                copyTo: "x", routingKey: "q",
                properties: MessageProperties(contentType: String(repeating: "c", count: 258)),
                headers: headers, body: [1])
            let error = await #expect(throws: EventsError.self) {
                try await transport.publish(copy, deadline: soon())
            }
            #expect(error?.code == .eventTooLarge && error?.message.contains("content_type") == true, "\(error as Any)")
            let misaddressed = OutboundMessage(
                copyTo: "x", routingKey: String(repeating: "q", count: 258), properties: MessageProperties(),
                headers: headers, body: [1])
            let reservation = try await transport.reserve(
                3, bytes: 3_000, for: PublishDestination(exchange: "x", routingKey: "q"), deadline: soon())
            let results = await transport.publish(
                contentsOf: [message(), copy, misaddressed], using: reservation, deadline: soon())
            #expect((try? results[0].get()) == true)
            for result in results.dropFirst() {
                guard case .failure(let error) = result else {
                    Issue.record("\(result)")
                    continue
                }
                #expect(error.publishOutcome == .rejected && !error.isRetriable, "\(error)")
            }
            #expect(broker.acceptedCount == 1 && broker.publishes().count == 1)
        }
    }

    @Test func `a refused topic fails by itself, and hundreds of others are confirmed`() async throws {
        try await withTransport { received, connection in
            guard let publish = received.publish else { return false }
            if publish.routingKey == "secret.x" {
                connection.closeChannel(
                    received.channel, code: 403,
                    text:
                        "ACCESS_REFUSED - access to topic 'secret.x' in exchange 'x' in vhost '/' refused for user 'u'",
                    classID: 60, methodID: 40)
                return true
            }
            // Confirmed late, so that all are in flight together.
            if publish.tag % 100 == 0 { connection.ack(channel: received.channel, tag: publish.tag, multiple: true) }
            return true
        } body: { transport, broker in
            var messages = (0..<400).map { _ in message("a.b") }
            messages.insert(message("secret.x"), at: 350)
            async let ends = publish(messages, over: transport)
            try await broker.waitUntil { broker in
                broker.publishes().contains { $0.routingKey == "secret.x" }
            }
            try await confirmAll(broker, until: 400)
            let result = counts(await ends)
            #expect(result == ["routed": 400, "accessRefused nacked": 1])
        }
    }

    /// Confirms until so many different messages but secret ones have come.
    private func confirmAll(_ broker: FakeBroker, until count: Int) async throws {
        try await broker.waitUntil { broker in
            let publishes = broker.publishes()
            guard Set(publishes.filter { $0.routingKey != "secret.x" }.compactMap(\.messageID)).count == count else {
                return false
            }
            return publishes.last.map { $0.routingKey != "secret.x" } ?? false
        }
        broker.connections[0].ack(channel: 2, tag: 0, multiple: true)
    }

    @Test func `a message that the broker closes the channel for is found among twenty, and the others are confirmed`()
        async throws
    {
        try await withTransport { received, connection in
            guard let publish = received.publish, publish.body.count > 1_000 else { return false }
            connection.closeChannel(
                received.channel, code: 406, text: "PRECONDITION_FAILED - message size 2000 is larger than 1000",
                classID: 60, methodID: 40)
            return true
        } body: { transport, broker in
            var messages = (0..<20).map { _ in message() }
            messages[11] = message(size: 2_000)
            let ends = await publish(messages, over: transport)
            #expect(ends.enumerated().allSatisfy { $0.offset == 11 || $0.element == "routed" }, "\(ends)")
            #expect(ends[11].hasPrefix("eventRefused"))
        }
    }

    @Test func `a connection that the broker closes for a declaration fails that declaration alone`() async throws {
        try await withTransport { received, connection in
            guard case .declareQueue(let name, _) = received.kind, name == "bad" else { return false }
            connection.closeConnection(code: 540, text: "NOT_IMPLEMENTED", classID: 50, methodID: 10)
            return true
        } body: { transport, broker in
            async let bad: EventsError? = {
                do {
                    try await transport.declare(QueueDeclaration("bad"), deadline: soon())
                    return nil
                } catch { return error as? EventsError }
            }()
            async let good: Void = {
                for number in 0..<50 {
                    _ = try await transport.declare(
                        QueueDeclaration(try QueueName("good.\(number)")), deadline: soon())
                }
            }()
            try await good
            #expect(await bad?.message == "NOT_IMPLEMENTED")
            #expect(broker.acceptedCount == 2, "the guilty declaration is not repeated")
        }
    }

    @Test func `one destination that does not confirm does not hold up the others, now or later`() async throws {
        try await withTransport { received, _ in
            received.publish?.routingKey == "stuck.a"
        } body: { transport, broker in
            async let stuck = publish((0..<3_000).map { _ in message("stuck.a") }, over: transport, deadline: 4)
            try await broker.waitUntil { $0.publishes().count >= 1_000 }
            // While callers wait for the stuck ones.
            #expect(
                counts(await publish((0..<50).map { _ in message("healthy.a") }, over: transport)) == ["routed": 50])
            let ends = counts(await stuck)
            #expect(Set(ends.keys).isSubset(of: ["unknownOutcome unknown", "unsent unsent"]), "\(ends)")
            // When no caller waits for them any more.
            #expect(
                counts(await publish((0..<50).map { _ in message("healthy.a") }, over: transport)) == ["routed": 50])
            // Health names it after five seconds of silence.
            let end = soon()
            var problems: [String] = []
            while !problems.contains(where: { $0.contains("stuck.a") }), .now < end {
                problems = await transport.health().problems
                try await Task.sleep(for: .milliseconds(20))
            }
            #expect(problems.contains { $0.contains("stuck.a") })
        }
    }

    @Test func `callers that give up early do not have the others' messages written again`() async throws {
        let late = DispatchQueue(label: "late confirms")
        try await withTransport { received, connection in
            guard let publish = received.publish else { return false }
            // Healthy, and slower than those who give up.
            late.asyncAfter(deadline: .now() + 0.3) { connection.ack(channel: received.channel, tag: publish.tag) }
            return true
        } body: { transport, broker in
            async let patient = publish((0..<50).map { _ in message("a.patient") }, over: transport)
            for _ in 0..<5 {
                let ends = await publish((0..<800).map { _ in message("a.hasty") }, over: transport, deadline: 0.05)
                #expect(Set(ends).isSubset(of: ["unknownOutcome unknown", "unsent unsent", "routed"]))
            }
            #expect(counts(await patient) == ["routed": 50])
            #expect(broker.publishes().count { $0.routingKey == "a.patient" } == 50)
            #expect(broker.received.count { if case .channelOpen = $0.kind { true } else { false } } == 1)
        }
    }

    @Test func `a task that is cancelled already publishes nothing`() async throws {
        try await withTransport { _, _ in
            false
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            let ends = await Task {
                withUnsafeCurrentTask { $0?.cancel() }
                return await publish((0..<200).map { _ in message("a.cancelled") }, over: transport)
            }.value
            #expect(counts(ends) == ["cancelled": 200])
            #expect(await isConfirmed(over: transport))
            #expect(broker.publishes().allSatisfy { $0.routingKey == "a.b" })
        }
    }

    // MARK: Unclear outcomes

    @Test func `what went to an exchange before it vanished may have been taken`() async throws {
        try await withTransport { received, connection in
            guard let publish = received.publish else { return false }
            if publish.tag == 3 {
                connection.closeChannel(
                    received.channel, code: 404, text: "NOT_FOUND - no exchange 'x' in vhost '/'", classID: 60,
                    methodID: 40)
            }
            return true
        } body: { transport, broker in
            let ends = await publish((0..<3).map { _ in message() }, over: transport)
            #expect(counts(ends) == ["exchangeNotFound unknown": 3])
        }
    }

    @Test(arguments: [
        ("nack", "unknownOutcome unknown"), ("return", "unknownOutcome unknown"), ("404", "exchangeNotFound unknown"),
    ])
    func `a negative answer after a lost connection is unknown`(answer: String, expected: String) async throws {
        try await withTransport { received, connection in
            guard let publish = received.publish else { return false }
            guard received.connection > 1 else {
                connection.drop()
                return true
            }
            switch answer {
            case "nack": connection.nack(channel: received.channel, tag: publish.tag)
            case "return":
                connection.returnMessage(channel: received.channel, publish)
                connection.ack(channel: received.channel, tag: publish.tag)
            default:
                connection.closeChannel(
                    received.channel, code: 404, text: "NOT_FOUND - no exchange 'x' in vhost '/'", classID: 60,
                    methodID: 40)
            }
            return true
        } body: { transport, _ in
            #expect(await end { try await transport.publish(message(), deadline: soon()) } == expected)
        }
    }

    // MARK: Channels

    @Test func `a consumer beyond the channels that the broker allows is refused, and the others go on`() async throws {
        var options = FakeBroker.Options()
        options.channelMax = 5
        try await withTransport(options) { _, _ in
            false
        } body: { transport, broker in
            try await transport.declare(QueueDeclaration("q"), deadline: soon())
            await withTaskGroup(of: String.self) { group in
                let isOver = Latch()
                for _ in 0..<6 {
                    group.addTask {
                        do {
                            return try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) {
                                consumer in
                                await isOver.wait()
                                return "consumed"
                            }
                        } catch { return (error as? EventsError)?.code.description ?? "\(error)" }
                    }
                }
                // Channel 1 is for declarations, or 2 to 5 are all there are.
                let refused = await group.next()
                #expect(refused == "overloaded")
                isOver.open()
                var rest: [String] = []
                for await end in group { rest.append(end) }
                #expect(rest.count { $0 == "consumed" } >= 4, "\(rest)")
                #expect(Set(rest + ["overloaded"]) == ["consumed", "overloaded"])
            }
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `a publishing channel that cannot be opened is tried with growing pauses, and health says why`()
        async throws
    {
        try await withTransport { received, connection in
            guard case .confirmSelect = received.kind else { return false }
            connection.closeChannel(
                received.channel, code: 540, text: "NOT_IMPLEMENTED - no confirms here", classID: 85, methodID: 10)
            return true
        } body: { transport, broker in
            let error = await #expect(throws: EventsError.self) {
                try await transport.publish(message(), deadline: soon(3))
            }
            #expect(error?.publishOutcome == .unsent)
            #expect(error?.message.contains("no confirms here") == true, "\(error.map { "\($0)" } ?? "")")
            #expect(await transport.health().problems.contains { $0.contains("no confirms here") })
            let opened = broker.received.count { if case .channelOpen = $0.kind { true } else { false } }
            #expect((2...30).contains(opened), "\(opened) times")
        }
    }

    @Test func `a broker that takes messages again does not hide that the channel cannot be opened`() async throws {
        try await withTransport(FakeBroker.Options(), Settings { $0.reconnectDelay = .seconds(10) }) {
            received, connection in
            guard case .confirmSelect = received.kind else { return false }
            connection.closeChannel(
                received.channel, code: 540, text: "NOT_IMPLEMENTED - no confirms here", classID: 85, methodID: 10)
            return true
        } body: { transport, broker in
            let states = transport.states()
            let publishing = Task { await end { try await transport.publish(message(), deadline: soon(0.5)) } }
            try await broker.waitUntil { broker in
                broker.received.contains { if case .channelCloseOK = $0.kind { true } else { false } }
            }
            broker.connections[0].block("memory")
            broker.connections[0].unblock()
            var seen: [ConnectionState] = []
            for await change in states where seen.suffix(2) != [.blocked, .open] {
                seen.append(change.state)
                if seen.suffix(2) == [.blocked, .open] { break }
            }
            #expect(await transport.health().problems.contains { $0.contains("no confirms here") })
            let error = await #expect(throws: EventsError.self) {
                try await transport.publish(message(), deadline: soon(0.1))
            }
            #expect(error?.message.contains("no confirms here") == true, "\(error.map { "\($0)" } ?? "")")
            #expect(await publishing.value.hasSuffix("unsent"))
        }
    }

    @Test func `health says nothing of a channel that is opened again in a moment`() async throws {
        let opened = Atomic<Int>(0)
        try await withTransport { received, connection in
            switch received.kind {
            case .channelOpen: return opened.add(1, ordering: .relaxed).newValue > 1
            case .confirmSelect: return opened.load(ordering: .relaxed) > 1
            case .publish(let publish) where publish.routingKey == "bad.a":
                connection.closeChannel(
                    received.channel, code: 403, text: "ACCESS_REFUSED - access to exchange 'x' in vhost '/'",
                    classID: 60, methodID: 40)
                return true
            default: return false
            }
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            _ = await end { try await transport.publish(message("bad.a"), deadline: soon()) }
            try await broker.waitUntil { _ in opened.load(ordering: .relaxed) == 2 }
            let problems = await transport.health().problems
            #expect(problems == [])
        }
    }

    @Test func `where replies cannot be consumed, only requests fail`() async throws {
        try await withTransport { received, connection in
            guard case .consume = received.kind, received.channel == 2 else { return false }
            connection.closeChannel(
                received.channel, code: 403, text: "ACCESS_REFUSED - no replies here", classID: 60, methodID: 20)
            return true
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            let error = await #expect(throws: EventsError.self) {
                _ = try await transport.request(message(), deadline: soon())
            }
            #expect(error?.message.contains("no replies here") == true)
            #expect(await isConfirmed(over: transport))
            let consumed = broker.received.count { if case .consume = $0.kind { true } else { false } }
            #expect(consumed == 1, "replies are not asked for again before the next request")
        }
    }

    @Test func `a channel that both sides close at once is opened again`() async throws {
        // A message that nothing confirms makes us close the channel; at the same moment the broker closes it.
        try await withTransport(FakeBroker.Options(), Settings { $0.windowMessages = 2 }) { received, connection in
            switch received.kind {
            case .publish(let publish): publish.routingKey == "stuck.a"
            case .channelClose:
                {
                    connection.closeChannel(
                        received.channel, code: 404, text: "NOT_FOUND - no exchange 'other' in vhost '/'",
                        classID: 60, methodID: 40)
                    return false
                }()
            default: false
            }
        } body: { transport, broker in
            let ends = await publish((0..<2).map { _ in message("stuck.a") }, over: transport, deadline: 0.5)
            #expect(counts(ends) == ["unknownOutcome unknown": 2])
            try await broker.waitUntil { broker in
                broker.received.contains { if case .channelClose = $0.kind { true } else { false } }
            }
            #expect(await isConfirmed(over: transport))
            #expect(await isConfirmed(over: transport))
        }
    }

    @Test(arguments: ["open", "confirm.select", "close"])
    func `a broker that does not answer what opens or closes a channel is given up, with the reason`(
        silent: String
    ) async throws {
        try await withTransport(
            FakeBroker.Options(),
            Settings {
                $0.stallLimit = .milliseconds(300)
                $0.windowMessages = 2
            }
        ) { received, _ in
            guard received.connection == 1 else { return false }
            return switch received.kind {
            case .channelOpen: silent == "open"
            case .confirmSelect: silent != "close"
            case .channelClose: true
            case .publish: silent == "close"
            default: false
            }
        } body: { transport, broker in
            let states = transport.states()
            if silent == "close" { _ = await publish((0..<2).map { _ in message() }, over: transport, deadline: 0.2) }
            async let isConfirmed = isConfirmed(over: transport)
            for await change in states where change.state == .recovering {
                #expect(change.reason?.message.contains("stallLimit") == true, "\(change)")
                break
            }
            #expect(await isConfirmed)
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `the first requests of many tasks share one consumer of replies`() async throws {
        try await withTransport { received, connection in
            switch received.kind {
            case .consume where received.channel == 2 && connection.consumers(channel: 2).count > 1:
                connection.closeChannel(
                    2, code: 406, text: "PRECONDITION_FAILED - reply consumer already set", classID: 60, methodID: 20)
                return true
            case .publish(let publish):
                // The reply comes with the confirm.
                connection.ack(channel: received.channel, tag: publish.tag)
                guard let tag = connection.consumers(channel: 2).first, let id = correlationID(publish) else {
                    return true
                }
                connection.deliver(
                    channel: 2, consumerTag: tag, tag: publish.tag, key: "r",
                    properties: AMQPProperties(correlationID: id), body: Array("yes".utf8))
                return true
            default: return false
            }
        } body: { transport, broker in
            for round in 1...3 {
                await withTaskGroup(of: String.self) { group in
                    for _ in 0..<50 {
                        group.addTask {
                            do {
                                let reply = try await transport.request(message(), deadline: soon())
                                return String(decoding: reply.body, as: UTF8.self)
                            } catch { return "\(error)" }
                        }
                    }
                    var ends: [String: Int] = [:]
                    for await end in group { ends[end, default: 0] += 1 }
                    #expect(ends == ["yes": 50], "round \(round)")
                }
                // A connection that is lost is opened with the consumer.
                broker.connections.last?.drop()
                try await broker.waitUntil { $0.acceptedCount == round + 1 }
            }
            let closes = broker.received.count { if case .channelCloseOK = $0.kind { true } else { false } }
            #expect(closes == 0)
        }
    }

    @Test func `a consumer is closed although a thousand requests wait`() async throws {
        try await withTransport { received, _ in
            if case .declareQueue(let name, _) = received.kind { name.hasPrefix("mute") } else { false }
        } body: { transport, broker in
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { _ in
                for number in 0..<1_024 {
                    Task {
                        try await transport.declare(
                            QueueDeclaration(try QueueName("mute.\(number)")), deadline: soon(4))
                    }
                }
                try await broker.waitUntil { broker in
                    broker.received.count { if case .declareQueue = $0.kind { true } else { false } } >= 128
                }
            }
            try await broker.waitUntil { broker in
                broker.received.contains { if case .channelClose = $0.kind { true } else { false } }
            }
        }
    }

    @Test func `an exchange that is missing does not hold up what goes to another, however much is sent to it`()
        async throws
    {
        try await withTransport { received, connection in
            guard let publish = received.publish, publish.exchange == "gone" else { return false }
            connection.closeChannel(
                received.channel, code: 404, text: "NOT_FOUND - no exchange 'gone' in vhost '/'", classID: 60,
                methodID: 40)
            return true
        } body: { transport, broker in
            let isOver = Mutex(false)
            async let guilty: Int = {
                var count = 0
                while !isOver.withLock({ $0 }) {
                    _ = await end { try await transport.publish(message(exchange: "gone"), deadline: soon()) }
                    count += 1
                    await Task.yield()
                }
                return count
            }()
            for _ in 0..<20 { #expect(await isConfirmed(over: transport)) }
            isOver.withLock { $0 = true }
            let sent = broker.publishes().count { $0.exchange == "gone" }
            #expect(await guilty >= sent)
            #expect(sent < 30, "most were refused without closing the channel: \(sent)")
        }
    }

    @Test func `a declaration that makes the broker close the connection is not repeated on each connection`()
        async throws
    {
        let isRefusing = Mutex(false)
        try await withTransport { received, connection in
            guard case .declareQueue("bad", _) = received.kind, isRefusing.withLock({ $0 }) else { return false }
            connection.closeConnection(code: 540, text: "NOT_IMPLEMENTED", classID: 50, methodID: 10)
            return true
        } body: { transport, broker in
            for name in ["good", "bad", "fine"] as [QueueName] {
                try await transport.declare(QueueDeclaration(name), deadline: soon())
            }
            #expect(await isConfirmed(over: transport))
            isRefusing.withLock { $0 = true }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 3)
        }
    }

    @Test func `a node that refuses the login for its own reasons does not keep us from the next one`() async throws {
        try await FakeBroker.withBroker { received, connection in
            guard case .open = received.kind else { return false }
            connection.closeConnection(code: 541, text: "INTERNAL_ERROR - vhost '/' is down")
            return true
        } body: { down in
            try await FakeBroker.withBroker { up in
                var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: down.port)
                configuration.alternatives = ["127.0.0.1:\(up.port)"]
                let transport = try RabbitMQTransport(configuration: configuration)
                #expect(await isConfirmed(over: transport))
                await transport.close()
            }
        }
    }

    @Test func `a list of events that are all invalid ends, and so does an empty one`() async throws {
        try await withTransport { _, _ in
            false
        } body: { transport, _ in
            let publisher = EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "s"))
            #expect(await publisher.publish(contentsOf: [UntypedEvent]()).isEmpty)
            let bad = UntypedEvent(routingKey: "a.b", data: Array("{".utf8))
            let results = await publisher.publish(contentsOf: [bad, bad])
            #expect(results.count == 2)
            for result in results { #expect(throws: EventsError.self) { try result.get() } }
            let none = await transport.publish(contentsOf: [], using: PublishReservation(), deadline: soon())
            #expect(none.isEmpty)
        }
    }

    @Test func `a list of large events goes in parts that fit the window, although their size was not known`()
        async throws
    {
        try await withTransport(FakeBroker.Options(), Settings { $0.windowBytes = 1 << 20 }) { received, _ in
            received.publish != nil
        } body: { transport, broker in
            let publisher = EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "s"))
            let data = Array(#"{"text":"\#(String(repeating: "x", count: 100_000))"}"#.utf8)
            let events = (0..<100).map { _ in UntypedEvent(routingKey: "a.b", data: data) }
            async let results = publisher.publish(contentsOf: events, options: PublishOptions(deadline: .seconds(60)))
            var confirmed = 0
            while confirmed < 100 {
                try await broker.waitUntil { [confirmed] in $0.publishes().count > confirmed }
                let count = broker.publishes().count
                #expect(count - confirmed <= 13, "more than the window was written")
                confirmed = count
                broker.connections[0].ack(channel: 2, tag: UInt64(count), multiple: true)
            }
            for result in await results { #expect(try result.get().routed) }
        }
    }

    @Test(arguments: ["longer", "headless", "beyond the prefetch"])
    func `a delivery that no broker should send ends the connection, with the reason`(kind: String) async throws {
        try await withTransport { received, connection in
            guard case .consume(_, let tag) = received.kind, received.connection == 1 else { return false }
            connection.replyConsumeOK(channel: received.channel, tag: tag)
            switch kind {
            case "longer":
                connection.deliver(
                    channel: received.channel, consumerTag: tag, tag: 1, key: "a.b",
                    header: AMQPProperties().header(bodySize: 3), body: Array("much longer".utf8))
            case "headless":
                connection.sendRaw([3, 0, UInt8(received.channel), 0, 0, 0, 1, 0x41, 0xCE])
                connection.deliver(
                    channel: received.channel, consumerTag: tag, tag: 1, key: "a.b", header: [0, 60, 0, 0], body: [])
            default:
                for number in 1...5 as ClosedRange<UInt64> {
                    connection.deliver(
                        channel: received.channel, consumerTag: tag, tag: number, key: "a.b", body: [])
                }
            }
            return true
        } body: { transport, _ in
            let error = await #expect(throws: EventsError.self) {
                try await transport.withConsumer(on: "q", prefetch: 2, deadline: soon()) { try await $0.untilEnded() }
            }
            #expect(error?.code == .protocolViolation, "\(error.map { "\($0)" } ?? "")")
        }
    }

    // MARK: Closing

    @Test(arguments: ["idle", "publishing", "blocked", "silent after login", "connecting"])
    func `closing takes no longer than it may, in every state`(state: String) async throws {
        let isSilent = Mutex(state == "connecting")
        try await withTransport { received, connection in
            switch received.kind {
            case .startOK: isSilent.withLock { $0 }
            case .publish: state == "publishing" || state == "blocked"
            case .connectionClose: true
            case .channelOpen, .confirmSelect: state == "silent after login"
            default: false
            }
        } body: { transport, broker in
            let deadline = soon(60)
            let publishing = Task {
                await end { try await transport.publish(message(), deadline: deadline) }
            }
            let consuming = Task {
                try? await transport.withConsumer(on: "q", prefetch: 1, deadline: deadline) { try await $0.next() }
            }
            try await broker.waitUntil { broker in
                state == "idle" || state == "publishing" || state == "blocked"
                    ? !broker.publishes().isEmpty
                    : broker.received.count { if case .startOK = $0.kind { true } else { false } } == 2
            }
            if state == "idle" { _ = await publishing.value }
            if state == "blocked" {
                for connection in broker.connections { connection.block("memory") }
                let end = soon()
                while await !transport.health().problems.contains(where: { $0.contains("memory") }), .now < end {
                    try await Task.sleep(for: .milliseconds(5))
                }
            }
            let start = ContinuousClock.now
            await transport.close(timeout: .seconds(1))
            let took = ContinuousClock.now - start
            #expect(took < .seconds(1.5), "\(took)")
            let ended = await publishing.value
            #expect(state == "idle" ? ended == "routed" : ended.hasSuffix("unknown") || ended.hasSuffix("unsent"))
            _ = await consuming.value
            try await broker.waitUntil { broker in broker.connections.allSatisfy(\.isClosed) }
        }
    }

    @Test func `confirms that come after the close are ignored, and the goodbye is orderly`() async throws {
        try await withTransport { received, connection in
            if case .connectionClose = received.kind {
                connection.ack(channel: 2, tag: 1)
                connection.ack(channel: 2, tag: 2, multiple: true)
            }
            return received.publish != nil
        } body: { transport, broker in
            async let ends = publish([message(), message()], over: transport, deadline: 60)
            try await broker.waitUntil { $0.publishes().count == 2 }
            await transport.close(timeout: .seconds(2))
            #expect(counts(await ends) == ["unknownOutcome unknown": 2])
            try await broker.waitUntil { broker in
                broker.received.contains { if case .connectionClose = $0.kind { true } else { false } }
            }
        }
    }

    @Test func `a connection that is lost while requests are under way leaves nothing behind`() async throws {
        weak var lost: RabbitMQConnection?
        try await FakeBroker.withBroker(FakeBroker.Options()) { received, connection in
            // Login works; the restoration of the topology does not.
            guard case .declareQueue(_, let passive) = received.kind, !passive, received.connection > 1 else {
                return false
            }
            connection.drop()
            return true
        } body: { broker in
            var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: broker.port)
            configuration.heartbeat = .zero
            configuration.reconnectDelay = .milliseconds(1)
            configuration.maximumReconnectDelay = .milliseconds(10)
            var connection: RabbitMQConnection? = try RabbitMQConnection(
                configuration, name: "test", isForPublishing: true, logger: .silent, topology: DeclaredTopology())
            lost = connection
            for number in 0..<200 {
                _ = try await connection?.request(
                    .declareQueue(QueueDeclaration(try QueueName("q.\(number)"))), name: "declare", deadline: soon())
            }
            broker.connections[0].drop()
            try await broker.waitUntil { $0.acceptedCount > 20 }
            await connection?.close(by: soon(1))
            let end = soon()
            while connection?.driverCount.load(ordering: .relaxed) != 0, .now < end { await Task.yield() }
            #expect(connection?.driverCount.load(ordering: .relaxed) == 0)
            connection = nil
        }
        let end = soon()
        while lost != nil, .now < end { await Task.yield() }
        #expect(lost == nil)
    }

    // MARK: Liveness

    @Test func `a peer that vanishes is noticed, and what was under way is confirmed on the next connection`()
        async throws
    {
        var options = FakeBroker.Options()
        options.sendsHeartbeats = false
        try await withTransport(
            options,
            Settings { configuration in
                configuration.heartbeat = .seconds(1)
            }
        ) { received, connection in
            guard received.publish != nil, received.connection == 1 else { return false }
            // It reads no more and says no more.
            connection.stopReading()
            return true
        } body: { transport, broker in
            let start = ContinuousClock.now
            #expect(await isConfirmed(over: transport))
            #expect(.now - start < .seconds(15))
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `the default heartbeat notices a dead peer well before the default deadline of a publish`() {
        let deadline = PublisherConfiguration(service: "s").deadline
        #expect(RabbitMQConfiguration().heartbeat * 2 <= deadline * 2 / 3)
    }

    @Test func `a headers frame that is larger than agreed on is read`() async throws {
        try await withTransport { received, connection in
            guard case .consume(_, let tag) = received.kind, received.channel > 2 || tag.hasPrefix("smap.") else {
                return false
            }
            connection.replyConsumeOK(channel: received.channel, tag: tag)
            var properties = AMQPProperties()
            properties.headers = ["h": .string(String(repeating: "v", count: 140_000))]
            connection.deliver(
                channel: received.channel, consumerTag: tag, tag: 1, key: "a.b", properties: properties,
                body: Array("first".utf8))
            connection.deliver(
                channel: received.channel, consumerTag: tag, tag: 2, key: "a.b", body: Array("second".utf8))
            return true
        } body: { transport, _ in
            let bodies = try await transport.withConsumer(on: "q", prefetch: 10, deadline: soon()) { consumer in
                [try await consumer.next()?.body, try await consumer.next()?.body]
            }
            #expect(bodies == [Array("first".utf8), Array("second".utf8)])
        }
    }

    @Test func `a full socket is waited for, and what it takes late arrives whole`() async throws {
        try await withTransport { received, connection in
            guard let publish = received.publish, publish.tag == 1 else { return false }
            connection.stopReading()
            Task {
                try await Task.sleep(for: .milliseconds(300))  // long enough to fill all buffers
                connection.resumeReading()
                connection.ack(channel: 2, tag: 1)
            }
            return true
        } body: { transport, broker in
            #expect(
                counts(await publish((0..<60).map { _ in message(size: 300_000) }, over: transport)) == ["routed": 60])
            #expect(broker.publishes().allSatisfy { $0.body.count == 300_000 || $0.tag == 1 })
            #expect(broker.acceptedCount == 1)
        }
    }

    // MARK: Requests to the broker

    @Test(arguments: ["connection", "channel", "home node"])
    func `a declaration that fails while a cluster is formed is repeated until it succeeds`(_ kind: String) async throws
    {
        let refusals = Mutex(0)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) {
            received, connection in
            guard case .declareQueue("kept", false) = received.kind, refusals.withLock({ $0 }) > 0 else { return false }
            refusals.withLock { $0 -= 1 }
            switch kind {
            case "connection":
                connection.closeConnection(code: 541, text: "INTERNAL_ERROR", classID: 50, methodID: 10)
            case "channel":
                connection.closeChannel(
                    received.channel, code: 541, text: "INTERNAL_ERROR", classID: 50, methodID: 10)
            default:
                connection.closeChannel(
                    received.channel, code: 404,
                    text: "NOT_FOUND - home node 'rabbit@b' of durable queue 'kept' is down",
                    classID: 50, methodID: 10)
            }
            return true
        } body: { transport, broker in
            try await transport.declare(QueueDeclaration("kept"), deadline: soon())
            try await transport.bind("kept", to: "x", routingKey: "a.b", deadline: soon())
            #expect(await isConfirmed(over: transport))
            refusals.withLock { $0 = 2 }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            // No more connections than the broker has ended.
            let accepted = kind == "connection" ? 4 : 2
            #expect(broker.acceptedCount == accepted)
            let last = broker.received.filter { $0.connection == accepted }
            #expect(last.contains { if case .declareQueue("kept", false) = $0.kind { true } else { false } })
            #expect(last.contains { if case .bind = $0.kind { true } else { false } })
            // What goes on failing does not hold up everything for ever, and health tells.
            refusals.withLock { $0 = .max }
            broker.connections.last?.drop()
            #expect(await isConfirmed(over: transport))
            #expect(
                await transport.health().problems.contains { $0.contains("queue kept could not be declared again") })
            // Nor is it forgotten, and where the broker ends connections for it, it is left alone for minutes.
            if kind != "connection" {
                refusals.withLock { $0 = 0 }
                try await untilHealthy(transport)
            }
        }
    }

    @Test func `a reservation of another transport goes back to it`() async throws {
        try await withTransport { _, _ in
            false
        } body: { one, _ in
            try await withTransport { _, _ in
                false
            } body: { other, _ in
                let destination = PublishDestination(exchange: "x", routingKey: "a.b")
                let connection = try one.publishConnection
                #expect(await isConfirmed(over: one))
                let reservation = try await one.reserve(10, bytes: 1_000, for: destination, deadline: soon())
                #expect(connection.window.withLock { $0.count } == 10)
                let isRouted = try await other.publish(message(), using: reservation, deadline: soon())
                #expect(isRouted)
                #expect(connection.window.withLock { $0.count == 0 && $0.byteCount == 0 })
            }
        }
    }

    @Test func `declarations are repeated together after a loss, and what is only compared is not repeated`()
        async throws
    {
        let held = Mutex<[FakeBroker.Received]>([])
        try await withTransport { received, connection in
            guard case .declareQueue(let name, false) = received.kind, received.connection == 2 else { return false }
            // None is answered before a hundred have come.
            let all = held.withLock { held in
                held.append(received)
                return held.count >= 100 ? held : []
            }
            if all.count == 100 {
                for one in all {
                    if case .declareQueue(let name, _) = one.kind {
                        connection.replyDeclareOK(channel: one.channel, queue: name)
                    }
                }
            } else if all.count > 100 {
                connection.replyDeclareOK(channel: received.channel, queue: name)
            }
            return true
        } body: { transport, broker in
            for number in 0..<100 {
                try await transport.declare(QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
            }
            try await transport.compare(QueueDeclaration("compared"), deadline: soon())
            broker.connections[0].drop()
            try await broker.waitUntil { $0.acceptedCount == 2 }
            #expect(await isConfirmed(over: transport))
            let names = held.withLock { $0 }.compactMap { one -> String? in
                if case .declareQueue(let name, _) = one.kind { name } else { nil }
            }
            #expect(names == (0..<100).map { "q.\($0)" })
        }
    }

    /// Channels on which the broker answers nothing any more: it handles the methods of a channel in order.
    final class SilentChannels: Sendable {
        private let channels = Mutex<Set<[Int]>>([])

        func contains(_ received: FakeBroker.Received, beginsHere: () -> Bool) -> Bool {
            let channel = [received.connection, Int(received.channel)]
            if beginsHere() { channels.withLock { _ = $0.insert(channel) } }
            return channels.withLock { $0.contains(channel) }
        }
    }

    func untilHealthy(_ transport: RabbitMQTransport) async throws {
        let end = soon()
        while await !transport.health().problems.isEmpty, .now < end { try await Task.sleep(for: .milliseconds(10)) }
        #expect(await transport.health().problems.isEmpty)
    }

    @Test func `a declaration that the broker does not answer after a loss holds up the others once`() async throws {
        let isMute = Mutex(false)
        let silent = SilentChannels()
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) { received, _ in
            silent.contains(received) {
                if case .declareQueue("bad", _) = received.kind { isMute.withLock { $0 } } else { false }
            }
        } body: { transport, broker in
            for name in ["bad", "good"] as [QueueName] {
                try await transport.declare(QueueDeclaration(name), deadline: soon())
            }
            #expect(await isConfirmed(over: transport))
            isMute.withLock { $0 = true }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            let repeated = broker.received.contains {
                if $0.connection == 2, case .declareQueue("good", _) = $0.kind { true } else { false }
            }
            #expect(repeated)
            #expect(await transport.health().problems.contains { $0.contains("queue bad") })
            // It is asked again once the broker has got over it, and has closed that channel.
            isMute.withLock { $0 = false }
            broker.connections[1].send(classID: 20, methodID: 41, channel: 1)
            try await untilHealthy(transport)
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `many declarations that fail after a loss hold up the others no longer than one`() async throws {
        let isDown = Mutex(false)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) {
            received, connection in
            guard case .declareQueue(let name, _) = received.kind, name.hasPrefix("bad"), isDown.withLock({ $0 }) else {
                return false
            }
            connection.closeChannel(
                received.channel, code: 404, text: "NOT_FOUND - home node of queue '\(name)' is down", classID: 50,
                methodID: 10)
            return true
        } body: { transport, broker in
            for number in 0..<20 {
                try await transport.declare(QueueDeclaration(try QueueName("bad.\(number)")), deadline: soon())
            }
            #expect(await isConfirmed(over: transport))
            isDown.withLock { $0 = true }
            broker.connections[0].drop()
            let limit = soon(4)
            #expect(await end { try await transport.publish(message(), deadline: limit) } == "routed")
            #expect(broker.acceptedCount == 2)
            isDown.withLock { $0 = false }
            try await untilHealthy(transport)
        }
    }

    @Test func `a queue that can be declared again only later gets its bindings then`() async throws {
        let isRefused = Mutex(false)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) {
            received, connection in
            guard case .declareQueue("q", _) = received.kind, isRefused.withLock({ $0 }) else { return false }
            connection.closeChannel(
                received.channel, code: 406, text: "PRECONDITION_FAILED - inequivalent arg", classID: 50, methodID: 10)
            return true
        } body: { transport, broker in
            try await transport.declare(QueueDeclaration("q"), deadline: soon())
            try await transport.bind("q", to: "x", routingKey: "a.#", deadline: soon())
            #expect(await isConfirmed(over: transport))
            isRefused.withLock { $0 = true }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            #expect(await transport.health().problems.contains { $0.contains("queue q could not be declared again") })
            // The operator has deleted the queue of the old kind, and with it its bindings.
            isRefused.withLock { $0 = false }
            try await untilHealthy(transport)
            let kinds = broker.received.filter { $0.connection == 2 }.compactMap { one -> String? in
                switch one.kind {
                case .declareQueue("q", _): "queue"
                case .bind("q", _, _): "binding"
                default: nil
                }
            }
            #expect(kinds.last == "binding" && kinds.dropLast().last == "queue", "\(kinds)")
        }
    }

    @Test func `an alarm that lasts longer than the stall limit costs no connection`() async throws {
        let hasStopped = Mutex(false)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) {
            received, connection in
            let isFirst = hasStopped.withLock { hasStopped in
                defer { if received.publish != nil { hasStopped = true } }
                return received.publish != nil && !hasStopped
            }
            if isFirst { connection.stopReading() }
            return false
        } body: { transport, broker in
            async let ends = publish((0..<100).map { _ in message(size: 200_000) }, over: transport)
            try await broker.waitUntil { !$0.publishes().isEmpty }
            broker.connections[0].block("memory")
            let end = soon()
            while await !transport.health().problems.contains(where: { $0.contains("memory") }), .now < end {
                try await Task.sleep(for: .milliseconds(5))
            }
            // The alarm itself.
            try await Task.sleep(for: .seconds(2))
            broker.connections[0].unblock()
            broker.connections[0].resumeReading()
            #expect(counts(await ends) == ["routed": 100])
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a declaration that the broker does not answer does not hold up later ones`() async throws {
        let silent = SilentChannels()
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) { received, _ in
            silent.contains(received) { if case .declareQueue("bad", _) = received.kind { true } else { false } }
        } body: { transport, broker in
            async let bad: Void = {
                let error = await #expect(throws: EventsError.self) {
                    try await transport.declare(QueueDeclaration("bad"), deadline: soon())
                }
                #expect(error?.code == .deadlineExceeded)
            }()
            try await broker.waitUntil { broker in
                broker.received.contains { if case .declareQueue("bad", _) = $0.kind { true } else { false } }
            }
            for name in ["q.1", "q.2"] as [QueueName] {
                try await transport.declare(QueueDeclaration(name), deadline: soon(10))
            }
            await bad
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a consumer's channel that is not closed in time leaves the other consumers alone`() async throws {
        let channels = Mutex<[String: UInt16]>([:])
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) { received, _ in
            switch received.kind {
            case .consume(let queue, _): channels.withLock { $0[queue] = received.channel }
            case .channelClose: return channels.withLock { $0["q.bad"] == received.channel }
            default: break
            }
            return false
        } body: { transport, broker in
            try await transport.withConsumer(on: "q.other", prefetch: 1, deadline: soon()) { other in
                // Returns when the broker has had its time.
                try await transport.withConsumer(on: "q.bad", prefetch: 1, deadline: soon()) { _ in }
                let channel = try #require(channels.withLock { $0["q.other"] })
                let tag = try #require(broker.connections[0].consumers(channel: channel).first)
                broker.connections[0].deliver(channel: channel, consumerTag: tag, tag: 1, key: "a.b", body: [1])
                let delivery = try #require(try await other.next())
                try other.settle(delivery, .acknowledge)
                try await broker.waitUntil { broker in
                    broker.received.contains { if case .ack(1, _) = $0.kind { true } else { false } }
                }
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test(arguments: ["INTERNAL_ERROR", "loss"])
    func `a message that ends each connection without a reason is found, and the others are confirmed`(
        kind: String
    ) async throws {
        try await withTransport { received, connection in
            guard received.publish?.routingKey == "bad.a" else { return false }
            if kind == "loss" { connection.shut() } else { connection.closeConnection(code: 541, text: kind) }
            return true
        } body: { transport, _ in
            let messages = (0..<51).map { message($0 == 25 ? "bad.a" : "good.a") }
            let ends = await publish(messages, over: transport, deadline: 15)
            #expect(ends[25] == "unknownOutcome unknown")
            #expect(counts(ends)["routed"] == 50, "\(counts(ends))")
            #expect(await isConfirmed(over: transport))
        }
    }

    @Test func `messages are not suspected where a declaration may have ended the connections`() async throws {
        let counts = Mutex<[Int: (publishes: Int, declarations: Int)]>([:])
        try await withTransport { received, connection in
            var (isPublish, isDeclaration) = (false, false)
            switch received.kind {
            case .publish: isPublish = true
            case .declareQueue: isDeclaration = true
            default: return false
            }
            let count = counts.withLock { counts in
                var count = counts[received.connection] ?? (0, 0)
                if isPublish { count.publishes += 1 }
                if isDeclaration { count.declarations += 1 }
                counts[received.connection] = count
                return count
            }
            if received.connection <= 3 {
                if count == (2, 1) { connection.shut() }
            } else if count.publishes == 2, isPublish {
                connection.ack(channel: received.channel, tag: 2, multiple: true)
            }
            return true
        } body: { transport, broker in
            async let declared: String = end {
                try await transport.declare(QueueDeclaration("bad"), deadline: soon())
                return true
            }
            let ends = await publish([message(), message()], over: transport)
            #expect(ends == ["routed", "routed"])
            _ = await declared
            #expect(!broker.received.contains { if case .channelClose = $0.kind { true } else { false } })
            #expect(broker.acceptedCount == 4)
        }
    }

    @Test func `a broker that closes connections for its own reasons costs no message`() async throws {
        try await withTransport { received, connection in
            guard received.publish != nil, received.connection <= 5 else { return false }
            connection.closeConnection(code: 320, text: "CONNECTION_FORCED - broker forced connection closure")
            return true
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 6)
        }
    }

    @Test(arguments: [1, 20])
    func `a broker that ends each connection at the first message for a while costs no message`(
        count: Int
    ) async throws {
        try await withTransport(
            FakeBroker.Options(), Settings { $0.maximumReconnectDelay = .milliseconds(50) }
        ) { received, connection in
            guard received.publish != nil, received.connection <= 30 else { return false }
            connection.shut()
            return true
        } body: { transport, broker in
            let ends = await publish((0..<count).map { _ in message() }, over: transport)
            #expect(counts(ends) == ["routed": count])
            #expect(broker.acceptedCount == 31)
        }
    }

    @Test func `a login that takes longer than two heartbeats does not end the connection`() async throws {
        var options = FakeBroker.Options()
        options.heartbeat = 1
        try await withTransport(options, Settings { $0.heartbeat = .seconds(1) }) { received, _ in
            if case .startOK = received.kind { usleep(2_500_000) }
            return false
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a declaration that the next node's frames do not hold is dropped, and the others are repeated`()
        async throws
    {
        var options = FakeBroker.Options()
        options.laterFrameMax = 4_096
        try await withTransport(options) { received, connection in
            // What RabbitMQ does about a frame that is too large.
            guard case .declareQueue("large", false) = received.kind, received.connection > 1 else { return false }
            connection.closeConnection(code: 501, text: "FRAME_ERROR - frame too large")
            return true
        } body: { transport, broker in
            try await transport.declare(
                QueueDeclaration(
                    "large", additionalArguments: ["x-long": .string(String(repeating: "v", count: 4_096))]),
                deadline: soon())
            try await transport.declare(QueueDeclaration("small"), deadline: soon())
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            let repeated = broker.received.compactMap { one -> String? in
                if one.connection > 1, case .declareQueue(let name, _) = one.kind { name } else { nil }
            }
            #expect(repeated == ["small"])
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `an error among declarations that are under way together concerns the right one`() async throws {
        try await withTransport { received, connection in
            guard case .declareQueue(let name, _) = received.kind, name == "q.7" else { return false }
            connection.closeChannel(
                received.channel, code: 406, text: "PRECONDITION_FAILED - inequivalent arg", classID: 50, methodID: 10)
            return true
        } body: { transport, _ in
            let failed = await withTaskGroup(of: String?.self) { group in
                for number in 0..<40 {
                    group.addTask {
                        do {
                            try await transport.declare(
                                QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
                            return nil
                        } catch { return "q.\(number) \((error as? EventsError)?.code.description ?? "")" }
                    }
                }
                var failed: [String] = []
                for await name in group { if let name { failed.append(name) } }
                return failed
            }
            #expect(failed == ["q.7 topologyConflict"])
        }
    }

    @Test(arguments: ["connection", "channel"])
    func `a close for a method that does not exist ends no process, and no round without a pause`(
        what: String
    )
        async throws
    {
        let closes = Atomic<Int>(0)
        try await withTransport { received, connection in
            guard received.publish?.routingKey == "bad.a" else { return false }
            closes.add(1, ordering: .relaxed)
            if what == "connection" {
                connection.closeConnection(code: 541, text: "INTERNAL_ERROR", classID: 0xFFFF, methodID: 0xFFFF)
            } else {
                connection.closeChannel(
                    received.channel, code: 540, text: "NOT_IMPLEMENTED", classID: 60, methodID: 80)
            }
            return true
        } body: { transport, _ in
            let limit = soon(1)
            let bad = await end { try await transport.publish(message("bad.a"), deadline: limit) }
            #expect(bad.hasSuffix("unknown") || bad.hasSuffix("nacked"), "\(bad)")
            #expect(closes.load(ordering: .relaxed) < 30)
            #expect(await isConfirmed(over: transport))
        }
    }

    @Test func `a broker that reads nothing and sends heartbeats is given up`() async throws {
        var options = FakeBroker.Options()
        options.heartbeat = 1
        try await withTransport(
            options,
            Settings {
                $0.heartbeat = .seconds(1)
                $0.stallLimit = .seconds(1)
            }
        ) { received, connection in
            if received.connection == 1, received.publish != nil { connection.stopReading() }
            return received.connection == 1 && received.publish != nil
        } body: { transport, broker in
            let ends = await publish((0..<100).map { _ in message(size: 200_000) }, over: transport)
            #expect(counts(ends) == ["routed": 100])
            #expect(broker.acceptedCount == 2)
        }
    }

    @Test func `requests whose callers were cancelled leave room for others`() async throws {
        try await withTransport { received, _ in
            if case .declareQueue(let name, _) = received.kind { name.hasPrefix("mute") } else { false }
        } body: { transport, _ in
            try await transport.declare(QueueDeclaration("first"), deadline: soon())
            for round in 0..<3 {
                let tasks = (0..<1_000).map { number in
                    Task {
                        try await transport.declare(
                            QueueDeclaration(try QueueName("mute.\(round).\(number)")), deadline: soon(3_600))
                    }
                }
                for task in tasks { task.cancel() }
                for task in tasks { _ = await task.result }
            }
            let error = await #expect(throws: EventsError.self) {
                try await transport.status(of: "mute.q", deadline: soon(0.5))
            }
            #expect(error?.code == .deadlineExceeded, "not overloaded")
        }
    }

    @Test func `deadlines of any length are taken`() async throws {
        try await withTransport { _, _ in
            false
        } body: { transport, _ in
            let far = ContinuousClock.now + .seconds(Int64.max / 4)
            #expect(await end { try await transport.publish(message(), deadline: far) } == "routed")
            try await transport.declare(QueueDeclaration("q"), deadline: .now + .seconds(1e15))
            let publisher = EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "s"))
            try await publisher.publish(
                UntypedEvent(routingKey: "a.b", data: Array("{}".utf8)),
                options: PublishOptions(deadline: .seconds(Int64.max / 4)))
        }
    }

    @Test(arguments: [-1, 1 << 40]) func `a body size that cannot be meant is refused`(size: Int) {
        var configuration = RabbitMQConfiguration()
        configuration.maximumBodySize = size
        #expect(throws: EventsError.self) { try RabbitMQTransport(configuration: configuration) }
    }

    // MARK: Logging in

    @Test func `a server that does not offer PLAIN is named as such, and no password is sent`() async throws {
        let configuration = RabbitMQConfiguration(host: "127.0.0.1")
        var external = configuration
        external.authentication = .external
        #expect(throws: EventsError.self, "it needs a certificate") { try RabbitMQTransport(configuration: external) }
        var options = FakeBroker.Options()
        options.mechanisms = "EXTERNAL"
        try await withTransport(options) { _, _ in
            false
        } body: { transport, broker in
            let error = await #expect(throws: EventsError.self) {
                try await transport.publish(message(), deadline: soon())
            }
            #expect(error?.code == .accessRefused)
            #expect(error?.message.contains("PLAIN") == true)
            #expect(!broker.received.contains { if case .startOK = $0.kind { true } else { false } })
        }
    }

    @Test func `a server that let us in before and refuses us now is waited for`() async throws {
        let isRefusing = Mutex(false)
        try await withTransport(
            FakeBroker.Options(),
            Settings { configuration in
                configuration.maximumReconnectDelay = .milliseconds(200)
            }
        ) { received, connection in
            guard case .startOK = received.kind, isRefusing.withLock({ $0 }) else { return false }
            connection.closeConnection(code: 403, text: "ACCESS_REFUSED - the backend is away")
            return true
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            isRefusing.withLock { $0 = true }
            broker.connections[0].drop()
            try await broker.waitUntil { $0.acceptedCount >= 3 }
            async let published = transport.publish(message(), deadline: soon())
            try await broker.waitUntil { $0.acceptedCount >= 5 }
            isRefusing.withLock { $0 = false }
            #expect(try await published)
        }
    }

    @Test func `a limit of connections is waited out`() async throws {
        try await withTransport(
            FakeBroker.Options(),
            Settings { configuration in
                configuration.maximumReconnectDelay = .milliseconds(200)
            }
        ) { received, connection in
            guard case .open = received.kind, received.connection < 4 else { return false }
            connection.closeConnection(
                code: 530,
                text: "NOT_ALLOWED - access to vhost '/' refused for user 'u': connection limit (1) is reached")
            return true
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 4)
        }
    }

    @Test(arguments: [
        Array("AMQP".utf8) + [0, 0, 9, 0], Array("HTTP/1.1 400 Bad Request\r\n\r\n".utf8),
        [1, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0], [1, 0, 0, 0, 0, 0, 0, 0xCE], [2, 0, 0, 0, 0, 0, 2, 0, 60, 0xCE],
        [1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 10, 0],
    ])
    func `bytes that are no AMQP end the attempt with a reason`(bytes: [UInt8]) async throws {
        try await withTransport { received, connection in
            guard case .startOK = received.kind else { return false }
            connection.sendRaw(bytes)
            return true
        } body: { transport, _ in
            let error = await #expect(throws: EventsError.self) {
                try await transport.declare(QueueDeclaration("q"), deadline: soon(1))
            }
            #expect(
                ["AMQP", "frame", "decoding"].contains { error?.message.contains($0) == true },
                "\(error.map { "\($0)" } ?? "")")
        }
    }
}

/// The correlation id in a header frame of ours: it stands behind content type, headers and delivery mode.
private func correlationID(_ publish: FakeBroker.Publish) -> String? {
    let text = String(decoding: publish.header, as: UTF8.self)
    guard let start = text.range(of: "evt_") else { return nil }
    return String(text[start.lowerBound...].prefix(40))
}
