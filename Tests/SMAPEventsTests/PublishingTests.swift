import Configuration
import Foundation
import SMAPEvents
import SMAPEventsTesting
import Synchronization
import Testing

private let mail = EmailVerificationRequested(recipient: "a@b.c", subject: "s", body: "b")

private struct Surroundings {
    let broker = InMemoryBroker()
    let topicQueue: QueueName = "t.topic"
    let legacyQueue: QueueName = "t.legacy"

    init() async throws {
        let deadline = ContinuousClock.now + .seconds(5)
        try await broker.declare(.events, deadline: deadline)
        try await broker.declare(.legacyEmail, deadline: deadline)
        try await broker.declare(QueueDeclaration(topicQueue), deadline: deadline)
        try await broker.declare(QueueDeclaration(legacyQueue, kind: .classic), deadline: deadline)
        try await broker.bind(topicQueue, to: ExchangeName.events, routingKey: "#", deadline: deadline)
        try await broker.bind(legacyQueue, to: ExchangeName.legacyEmail, routingKey: "", deadline: deadline)
    }

    var publisher: EventPublisher {
        EventPublisher(transport: broker, configuration: PublisherConfiguration(service: "identity"))
    }

    func dual(_ phase: MigrationPhase) -> DualPublisher {
        DualPublisher(transport: broker, configuration: PublisherConfiguration(service: "identity"), phase: phase)
    }

    var topic: [OutboundMessage] { broker.messages(in: topicQueue) }
    var legacy: [OutboundMessage] { broker.messages(in: legacyQueue) }
}

@Suite struct EventPublisherTests {
    @Test func `an event carries the properties of the contract`() async throws {
        let here = try await Surroundings()
        let options = PublishOptions(correlationID: "c", tenantID: "t", userID: "u")
        let receipt = try await here.publisher.publish(mail, options: options)
        let message = try #require(here.topic.first)
        #expect(receipt.routed)
        #expect(message.exchange == "smap.events")
        #expect(message.routingKey == "email.verification.requested")
        let properties = message.properties
        #expect(properties.contentType == "application/json")
        #expect(properties.messageID == receipt.eventID.rawValue)
        #expect(properties.type == "email.verification.requested")
        #expect(properties.appID == "identity")
        #expect(properties.correlationID == "c")
        #expect(properties.timestamp != nil)
        #expect(
            properties.headers == [
                "tenant_id": .string("t"), "user_id": .string("u"), "x-smap-schema-version": .integer(1),
            ])
        #expect(try EventEnvelope(parsing: message.body).eventID == receipt.eventID)
    }

    @Test func `an event that fails its checks is rejected, naming the field, and nothing is sent`() async throws {
        let here = try await Surroundings()
        for publisher in [here.publisher as any EventPublishing, here.dual(.dual)] {
            let bad = EmailVerificationRequested(recipient: "nobody", subject: "s", body: "b")
            let error = await #expect(throws: EventsError.self) { try await publisher.publish(bad) }
            #expect(error?.publishOutcome == .rejected)
            #expect(error?.message.contains("recipient") == true)
            #expect(error?.eventID != nil)
        }
        #expect(here.topic.isEmpty && here.legacy.isEmpty)
    }

    @Test func `plain JSON of the catalogue is checked, and other keys carry any object`() async throws {
        let here = try await Surroundings()
        let error = await #expect(throws: EventsError.self) {
            try await here.publisher.publish(UntypedEvent(routingKey: "user.registered", data: Array("{}".utf8)))
        }
        #expect(error?.publishOutcome == .rejected)
        #expect(error?.message.contains("user_id") == true)
        for bad in ["[]", "7", "", "{", "{\"a\":\"\u{1}\"}"] {
            let error = await #expect(throws: EventsError.self) {
                try await here.publisher.publish(UntypedEvent(routingKey: "own.event", data: Array(bad.utf8)))
            }
            #expect(error?.publishOutcome == .rejected)
        }
        #expect(here.topic.isEmpty)
        try await here.publisher.publish(UntypedEvent(routingKey: "own.event", data: Array(#"{"x":1.0}"#.utf8)))
        #expect(String(decoding: here.topic[0].body, as: UTF8.self).contains(#""data":{"x":1.0}"#))
    }

    @Test func `an event that reaches no queue is reported, or an error where a route is required`() async throws {
        let broker = InMemoryBroker()
        try await broker.declare(.events, deadline: .now + .seconds(5))
        let publisher = EventPublisher(transport: broker, configuration: PublisherConfiguration(service: "s"))
        let receipt = try await publisher.publish(mail)
        #expect(!receipt.routed)
        let error = await #expect(throws: EventsError.self) {
            try await publisher.publish(mail, options: PublishOptions(requireRoute: true))
        }
        #expect(error?.publishOutcome == .returned)
    }

    @Test func `an event too large for an envelope is rejected`() async throws {
        let here = try await Surroundings()
        let large = EmailVerificationRequested(
            recipient: "a@b.c", subject: "s", body: String(repeating: "x", count: EventEnvelope.sizeLimit))
        let error = await #expect(throws: EventsError.self) { try await here.publisher.publish(large) }
        #expect(error?.code == .eventTooLarge)
        #expect(error?.publishOutcome == .rejected)
    }

    @Test func `dates in events are RFC 3339`() async throws {
        let here = try await Surroundings()
        let start = Date(timeIntervalSince1970: 1_764_930_645.5)
        try await here.publisher.publish(
            SubscriptionCreated(
                subscriptionID: "550e8400-e29b-41d4-a716-446655440001", userID: "u", startsAt: start))
        let text = String(decoding: here.topic[0].body, as: UTF8.self)
        #expect(text.contains(#""starts_at":"2025-12-05T10:30:45.500Z""#))
        #expect(text.contains(#""idempotency_key":"550e8400-e29b-41d4-a716-446655440001""#))
        let back: SubscriptionCreated = try EventEnvelope(parsing: here.topic[0].body).decode()
        #expect(back.startsAt == start)
    }
}

@Suite struct DualPublisherTests {
    @Test(arguments: [
        (MigrationPhase.prepare, 0, 1), (.dual, 1, 1), (.consumers, 1, 1), (.cleanup, 1, 0),
    ])
    func `each phase publishes just to its exchanges`(phase: MigrationPhase, topic: Int, legacy: Int) async throws {
        let here = try await Surroundings()
        let receipt = try await here.dual(phase).publish(mail)
        #expect(here.topic.count == topic)
        #expect(here.legacy.count == legacy)
        #expect(receipt.legs.count == topic + legacy)
    }

    @Test func `both legs carry one id, and the legacy one the legacy message`() async throws {
        let here = try await Surroundings()
        let receipt = try await here.dual(.dual).publish(mail)
        let legacy = try #require(here.legacy.first)
        #expect(here.topic.first?.properties.messageID == receipt.eventID.rawValue)
        #expect(legacy.properties.messageID == receipt.eventID.rawValue)
        #expect(legacy.properties.headers["x-smap-event-id"] == .string(receipt.eventID.rawValue))
        #expect(legacy.properties.contentType == "text/plain")
        #expect(legacy.routingKey == "")
        #expect(try LegacyEmailMessage(parsing: legacy.body) == LegacyEmailMessage(mail))
    }

    @Test func `plain JSON is published to both as a typed event is`() async throws {
        let here = try await Surroundings()
        let data = #"{"recipient":"a@b.c","subject":"s","body":"b","extra":1.50}"#
        try await here.dual(.dual).publish(
            UntypedEvent(routingKey: "email.verification.requested", data: Array(data.utf8)))
        #expect(String(decoding: here.topic[0].body, as: UTF8.self).contains(data))
        #expect(try LegacyEmailMessage(parsing: here.legacy[0].body).recipient == "a@b.c")
    }

    @Test func `events without a legacy form go to the topic exchange alone`() async throws {
        let here = try await Surroundings()
        try await here.dual(.dual).publish(UserRegistered(userID: "u"))
        #expect(here.topic.count == 1)
        #expect(here.legacy.isEmpty)
        let error = await #expect(throws: EventsError.self) {
            try await here.dual(.prepare).publish(UserRegistered(userID: "u"))
        }
        #expect(error?.publishOutcome == .rejected)
    }

    @Test func `what cannot be expressed in both forms reaches neither`() async throws {
        let here = try await Surroundings()
        var byKey = mail
        byKey.attachments = [EmailAttachment(filename: "f", contentType: "t", storageKey: "k")]
        var large = mail
        large.body = String(repeating: "x", count: EventEnvelope.sizeLimit)
        for bad in [byKey, large] {
            let error = await #expect(throws: EventsError.self) { try await here.dual(.dual).publish(bad) }
            #expect(error?.publishOutcome == .rejected)
        }
        #expect(here.topic.isEmpty && here.legacy.isEmpty)
    }

    @Test func `a missing leg is named, and a repeat under the same id completes it`() async throws {
        let broker = InMemoryBroker()
        let deadline = ContinuousClock.now + .seconds(5)
        try await broker.declare(.events, deadline: deadline)
        let publisher = DualPublisher(
            transport: broker, configuration: PublisherConfiguration(service: "s"), phase: .dual)
        let error = await #expect(throws: EventsError.self) {
            try await publisher.publish(mail, options: PublishOptions(deadline: .milliseconds(200)))
        }
        #expect(error?.missingLegs == [ExchangeName.legacyEmail])
        #expect(error?.publishOutcome == .unknown)
        let id = try #require(error?.eventID)
        try await broker.declare(.legacyEmail, deadline: deadline)
        let receipt = try await publisher.publish(mail, options: PublishOptions(eventID: id))
        #expect(receipt.eventID == id)
        #expect(receipt.legs.map(\.exchange) == [ExchangeName.events, ExchangeName.legacyEmail])
    }

    @Test func `a leg that is nacked for a while is completed by the same call`() async throws {
        let broker = InMemoryBroker()
        let deadline = ContinuousClock.now + .seconds(20)
        try await broker.declare(.events, deadline: deadline)
        try await broker.declare(.legacyEmail, deadline: deadline)
        try await broker.declare(QueueDeclaration("t.topic"), deadline: deadline)
        try await broker.bind("t.topic", to: ExchangeName.events, routingKey: "#", deadline: deadline)
        let refusals = Mutex(2)
        var transport = InterceptedTransport(broker: broker)
        transport.publishing = { message in
            guard message.exchange == ExchangeName.legacyEmail else { return }
            let isRefused = refusals.withLock { left in
                left -= 1
                return left >= 0
            }
            if isRefused { throw EventsError(.nacked, "full", operation: "publish") }
        }
        let publisher = DualPublisher(
            transport: transport, configuration: PublisherConfiguration(service: "s"), phase: .dual)
        let receipt = try await publisher.publish(mail, options: PublishOptions(deadline: .seconds(20)))
        #expect(receipt.legs.map(\.exchange) == [ExchangeName.events, ExchangeName.legacyEmail])
        #expect(broker.messages(in: "t.topic").count == 1, "the leg that was there is not sent again")
        #expect(refusals.withLock { $0 } < 0)
    }

    @Test func `a leg that no repetition completes ends the call at once, not to be repeated`() async throws {
        let broker = InMemoryBroker()
        try await broker.declare(.events, deadline: .now + .seconds(5))
        let publisher = DualPublisher(
            transport: broker, configuration: PublisherConfiguration(service: "s"), phase: .dual)
        let start = ContinuousClock.now
        let error = await #expect(throws: EventsError.self) {
            try await publisher.publish(mail, options: PublishOptions(deadline: .seconds(600)))
        }
        #expect(error?.code == .exchangeNotFound && error?.isRetriable == false)
        #expect(error?.publishOutcome == .unknown, "the other leg is out")
        #expect(error?.missingLegs == [ExchangeName.legacyEmail])
        #expect(.now - start < .seconds(300))
    }

    @Test func `what one leg cannot carry reaches neither`() async throws {
        let here = try await Surroundings()
        for options in [
            PublishOptions(tenantID: "a\nb"), PublishOptions(userID: String(repeating: "u", count: 70_000)),
        ] {
            let error = await #expect(throws: EventsError.self) {
                try await here.dual(.dual).publish(mail, options: options)
            }
            #expect(error?.publishOutcome == .rejected)
            #expect(error?.isRetriable == false)
        }
        #expect(here.topic.isEmpty && here.legacy.isEmpty)
    }

    @Test func `a list of mails and other events goes out whole, each with its own receipt`() async throws {
        let here = try await Surroundings()
        let data = Array(#"{"recipient":"a@b.c","subject":"s","body":"b"}"#.utf8)
        let ids = (0..<4).map { _ in EventID() }
        let events = [
            UntypedEvent(routingKey: "email.verification.requested", data: data, eventID: ids[0]),
            UntypedEvent(routingKey: "thing.made", data: Array("{}".utf8), eventID: ids[1]),
            UntypedEvent(routingKey: "thing.made", data: Array("{".utf8), eventID: ids[2]),
            UntypedEvent(routingKey: "email.verification.requested", data: data, eventID: ids[3]),
        ]
        let results = await here.dual(.dual).publish(contentsOf: events)
        #expect(results.count == 4)
        #expect(try results[0].get().legs.count == 2)
        #expect(try results[1].get().legs.count == 1)
        #expect(throws: EventsError.self) { try results[2].get() }
        #expect(try [0, 1, 3].map { try results[$0].get().eventID } == [0, 1, 3].map { ids[$0] })
        #expect(here.topic.count == 3)
        #expect(here.legacy.count == 2)
        let mails = await here.dual(.dual).publish(
            contentsOf: [mail, mail], ids: [ids[0], ids[1]], options: PublishOptions())
        #expect(try mails.map { try $0.get().eventID } == [ids[0], ids[1]])
        let wrong = await here.dual(.dual).publish(contentsOf: [mail], ids: [], options: PublishOptions())
        #expect(throws: EventsError.self) { try wrong[0].get() }
    }

    @Test(arguments: [
        ([:], MigrationPhase.dual), (["ENABLE_DUAL_PUBLISH": "true"], .dual),
        (["ENABLE_DUAL_PUBLISH": "false"], .cleanup), (["SMAP_MIGRATION_PHASE": "1"], .prepare),
        (["SMAP_MIGRATION_PHASE": "3", "ENABLE_DUAL_PUBLISH": "false"], .consumers),
    ])
    func `the phase comes from the environment`(variables: [String: String], phase: MigrationPhase) throws {
        let reader = ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: variables))
        #expect(try MigrationPhase(reader: reader) == phase)
    }

    @Test(arguments: [["ENABLE_DUAL_PUBLISH": "maybe"], ["SMAP_MIGRATION_PHASE": "5"], ["SMAP_MIGRATION_PHASE": "x"]])
    func `a phase that is none is refused, naming the variable`(variables: [String: String]) {
        let reader = ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: variables))
        let error = #expect(throws: EventsError.self) { try MigrationPhase(reader: reader) }
        #expect(error?.message.contains(variables.keys.first ?? "?") == true)
    }
}
