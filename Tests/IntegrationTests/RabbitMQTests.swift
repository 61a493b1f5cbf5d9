import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import Testing

@Suite struct RabbitMQTests {
    private let mail = EmailVerificationRequested(recipient: "a@b.c", subject: "s", body: "b")

    private func publisher(_ transport: any EventTransport) -> EventPublisher {
        EventPublisher(transport: transport, configuration: PublisherConfiguration(service: "test"))
    }

    @Test func `an event that reaches no queue is confirmed and not routed, and an error where a route is required`()
        async throws
    {
        struct Unheard: SMAPEvent { static let routingKey: RoutingKey = "never.bound" }
        let transport = try await SharedStack.transport()
        try await publisher(transport).declareExchanges()
        #expect(try await publisher(transport).publish(Unheard()).routed == false)
        let error = await #expect(throws: EventsError.self) {
            try await publisher(transport).publish(Unheard(), options: PublishOptions(requireRoute: true))
        }
        #expect(error?.publishOutcome == .returned)
        await transport.close()
    }

    @Test func `a rejected event leaves the connection alive, and nothing was sent`() async throws {
        let transport = try await SharedStack.transport()
        let publisher = publisher(transport)
        try await publisher.declareExchanges()
        let queue: QueueName = "test.rejected"
        try await transport.declare(QueueDeclaration(queue), deadline: .now + .seconds(10))
        try await transport.bind(
            queue, to: ExchangeName.events, routingKey: "email.rejected.#", deadline: .now + .seconds(10))
        let bad = UntypedEvent(routingKey: "email.verification.requested", data: Array("{}".utf8))
        let long = PublishOptions(correlationID: String(repeating: "c", count: 300))
        for attempt in [
            { _ = try await publisher.publish(bad) },
            {
                _ = try await publisher.publish(
                    UntypedEvent(routingKey: "email.rejected.long", data: Array("{}".utf8)), options: long)
            },
        ] {
            let error = await #expect(throws: EventsError.self) { try await attempt() }
            #expect(error?.publishOutcome == .rejected)
        }
        let fine = UntypedEvent(routingKey: "email.rejected.not", data: Array("{}".utf8))
        #expect(try await publisher.publish(fine).routed)
        #expect(try await transport.declare(QueueDeclaration(queue), deadline: .now + .seconds(10)).messages <= 1)
        await transport.close()
    }

    @Test func `a server that is not there, and a wrong password, are told apart, in time and without the password`()
        async throws
    {
        let wrong = try await SharedStack.transport { $0.password = "s3cret" }
        let start = ContinuousClock.now
        let absent = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: "amqp://u:s3cret@127.0.0.1:1"))
        let short = PublishOptions(deadline: .seconds(2))
        var error = await #expect(throws: EventsError.self) {
            try await publisher(absent).publish(mail, options: short)
        }
        #expect(error?.publishOutcome == .unsent)
        #expect((error?.underlying as? EventsError)?.code == .connectionFailed)
        #expect(error?.description.contains("127.0.0.1:1") == true)
        #expect(error?.description.contains("s3cret") == false)
        error = await #expect(throws: EventsError.self) { try await publisher(wrong).publish(mail) }
        #expect(error?.code == .accessRefused)
        #expect(error?.description.contains("s3cret") == false)
        #expect(.now - start < .seconds(10))
    }

    @Test func `a host that swallows packets ends the call by its own deadline`() async throws {
        // A listener that accepts and never speaks.
        try await SilentServer.withServer { port in
            let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(host: "127.0.0.1", port: port))
            let late = await overrun(.seconds(1)) {
                let error = await #expect(throws: EventsError.self) {
                    try await publisher(transport).publish(mail, options: PublishOptions(deadline: .seconds(1)))
                }
                #expect(error?.publishOutcome == .unsent)
            }
            #expect(late < .seconds(1))
            await transport.close(timeout: .zero)
        }
    }

    @Test(.timeLimit(.minutes(10)))
    func `while the broker is stopped every publish ends by its deadline, large and small`() async throws {
        var options = LocalStack.Options()
        options.redis = false
        try await LocalStack.withStack(options) { stack in
            var configuration = try RabbitMQConfiguration(url: stack.rabbitMQURL)
            // A publish once the receive heartbeat is overdue is what librabbitmq 0.11 never returns from.
            configuration.heartbeat = .seconds(2)
            let transport = try RabbitMQTransport(configuration: configuration)
            let publisher = publisher(transport)
            try await publisher.declareExchanges()
            try await publisher.publish(mail)

            stack.suspend(.rabbitMQ)
            defer { stack.resume(.rabbitMQ) }
            let end = ContinuousClock.now + .seconds(8)
            var endings: [PublishOutcome: Int] = [:]
            await withTaskGroup(of: (PublishOutcome, Duration).self) { group in
                for size in [100, 64_000] {
                    for _ in 0..<20 {
                        group.addTask {
                            var last = PublishOutcome.confirmed
                            var longest = Duration.zero
                            let event = UntypedEvent(
                                routingKey: "own.event",
                                data: Array(#"{"t":"\#(String(repeating: "x", count: size))"}"#.utf8))
                            while ContinuousClock.now < end {
                                let late = await overrun(.seconds(1)) {
                                    do {
                                        try await publisher.publish(
                                            event, options: PublishOptions(deadline: .seconds(1)))
                                    } catch let error as EventsError {
                                        last = error.publishOutcome
                                    } catch {
                                        Issue.record(error)
                                    }
                                }
                                longest = max(longest, late)
                            }
                            return (last, longest)
                        }
                    }
                }
                for await (last, longest) in group {
                    endings[last, default: 0] += 1
                    #expect(longest < .seconds(1), "a call overran its deadline by \(longest)")
                }
            }
            #expect(endings[.confirmed] == nil, "\(endings): the broker was stopped")
            stack.resume(.rabbitMQ)
            await transport.close(timeout: .seconds(1))
        }
    }

    @Test(.timeLimit(.minutes(10)))
    func `when the broker is killed every publish ends once, and nothing confirmed is lost to the caller`() async throws
    {
        var options = LocalStack.Options()
        options.redis = false
        try await LocalStack.withStack(options) { stack in
            let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(url: stack.rabbitMQURL))
            let publisher = publisher(transport)
            try await publisher.declareExchanges()

            var endings: [PublishOutcome: Int] = [:]
            await withTaskGroup(of: PublishOutcome.self) { group in
                for index in 0..<2_000 {
                    group.addTask {
                        if index == 1_000 { try? await stack.kill(.rabbitMQ) }
                        do {
                            try await publisher.publish(mail, options: PublishOptions(deadline: .seconds(5)))
                            return .confirmed
                        } catch {
                            return (error as? EventsError)?.publishOutcome ?? .rejected
                        }
                    }
                }
                for await ending in group { endings[ending, default: 0] += 1 }
            }
            #expect(endings.values.reduce(0, +) == 2_000)
            #expect((endings[.unsent] ?? 0) + (endings[.unknown] ?? 0) > 0, "\(endings): the broker was killed")
            #expect(endings[.rejected] == nil && endings[.nacked] == nil, "\(endings)")
            await transport.close(timeout: .zero)
        }
    }

    @Test(.timeLimit(.minutes(10)))
    func `a request whose reply can no longer come ends, long before its deadline`() async throws {
        let queue: QueueName = "test.unanswered"
        let observer = try await SharedStack.transport()
        try await EventSubscription(queue: queue, bindings: ["test.unanswered"]).topology.apply(to: observer)

        func request(
            _ number: Int, endsWith code: EventsError.Code, after lose: (RabbitMQTransport) async throws -> Void
        )
            async throws
        {
            let transport = try await SharedStack.transport()
            let hasEnded = Locked(false)
            let question = OutboundMessage(
                exchange: ExchangeName.events, routingKey: "test.unanswered", properties: MessageProperties(), body: [])
            async let error: EventsError? = {
                defer { hasEnded.withLock { $0 = true } }
                do {
                    _ = try await transport.request(question, deadline: .now + .seconds(3600))
                    return nil
                } catch { return error as? EventsError }
            }()
            try await eventually("it was sent") {
                try await observer.status(of: queue, deadline: .now + .seconds(20)).messages == number
            }
            // More than once: the confirm may still be on its way.
            try await eventually("it has ended") {
                try await lose(transport)
                return hasEnded.withLock { $0 }
            }
            #expect(await error?.code == code)
            await transport.close()
        }
        try await request(1, endsWith: .closed) { await $0.close() }
        // The broker closes the channel, and replies come to channels.
        try await request(2, endsWith: .connectionLost) { transport in
            let error = await #expect(throws: EventsError.self) {
                try await transport.publish(
                    OutboundMessage(
                        exchange: "test.missing", routingKey: "x", properties: MessageProperties(), body: []),
                    deadline: .now + .seconds(20))
            }
            #expect(error?.code == .exchangeNotFound)
        }
        await observer.close()
    }

    @Test func `a closed transport refuses what comes later`() async throws {
        let transport = try await SharedStack.transport()
        let publisher = publisher(transport)
        try await publisher.declareExchanges()
        try await publisher.publish(mail)
        await transport.close()
        let error = await #expect(throws: EventsError.self) { try await publisher.publish(mail) }
        #expect(error?.code == .closed)
    }
}
