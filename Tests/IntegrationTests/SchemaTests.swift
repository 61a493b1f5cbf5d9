import Foundation
import SMAPEvents
import SMAPEventsTesting
import Testing

@Suite struct SchemaTests {
    private struct Case: Encodable {
        var schema: String
        var valid: Bool
        var instance: JSON
    }

    /// Just enough of JSON to mutate it.
    private indirect enum JSON: Codable {
        case object([String: JSON])
        case array([JSON])
        case string(String)
        case number(Double)
        case boolean(Bool)
        case null

        init(from decoder: any Decoder) throws {
            let container = try decoder.singleValueContainer()
            if let value = try? container.decode([String: JSON].self) {
                self = .object(value)
            } else if let value = try? container.decode([JSON].self) {
                self = .array(value)
            } else if let value = try? container.decode(Bool.self) {
                self = .boolean(value)
            } else if let value = try? container.decode(Double.self) {
                self = .number(value)
            } else if let value = try? container.decode(String.self) {
                self = .string(value)
            } else {
                self = .null
            }
        }

        func encode(to encoder: any Encoder) throws {
            var container = encoder.singleValueContainer()
            switch self {
            case .object(let value): try container.encode(value)
            case .array(let value): try container.encode(value)
            case .string(let value): try container.encode(value)
            case .number(let value): try container.encode(value)
            case .boolean(let value): try container.encode(value)
            case .null: try container.encodeNil()
            }
        }

        subscript(key: String) -> JSON {
            get { if case .object(let members) = self { members[key] ?? .null } else { .null } }
            set {
                guard case .object(var members) = self else { return }
                members[key] = newValue
                self = .object(members)
            }
        }

        var keys: [String] { if case .object(let members) = self { members.keys.sorted() } else { [] } }

        func without(_ key: String) -> JSON {
            guard case .object(var members) = self else { return self }
            members[key] = nil
            return .object(members)
        }
    }

    private static let folder = Program.repository + "/Schemas"

    /// What Swift writes for an event: the envelope, and what is required of its data.
    private func cases<E: SMAPEvent>(_ event: E, required: [String]) async throws -> [Case] {
        let queue: QueueName = "t.schema"
        let broker = InMemoryBroker()
        let deadline = ContinuousClock.now + .seconds(5)
        try await broker.declare(.events, deadline: deadline)
        try await broker.declare(QueueDeclaration(queue), deadline: deadline)
        try await broker.bind(queue, to: ExchangeName.events, routingKey: "#", deadline: deadline)
        try await EventPublisher(transport: broker, configuration: PublisherConfiguration(service: "test"))
            .publish(event)
        let body = try #require(broker.messages(in: queue).first).body
        let envelope = try JSONDecoder().decode(JSON.self, from: Data(body))
        let data = envelope["payload"]["data"]

        let envelopeSchema = Self.folder + "/envelope.schema.json"
        let dataSchema = Self.folder + "/events/\(E.routingKey).schema.json"
        var cases = [
            Case(schema: envelopeSchema, valid: true, instance: envelope),
            Case(schema: dataSchema, valid: true, instance: data),
        ]
        for key in envelope.keys {
            cases.append(Case(schema: envelopeSchema, valid: false, instance: envelope.without(key)))
        }
        var mutant = envelope
        mutant["timestamp"] = .string("2025-12-05 10:30:45")
        cases.append(Case(schema: envelopeSchema, valid: false, instance: mutant))
        for (key, value) in [
            ("routing_key", JSON.string("Not.A.Key")), ("project_id", .null), ("data", .array([])),
            ("schema_version", .string("1")), ("idempotency_key", .null),
        ] {
            mutant = envelope
            mutant["payload"][key] = value
            cases.append(Case(schema: envelopeSchema, valid: false, instance: mutant))
        }
        for field in required {
            cases.append(Case(schema: dataSchema, valid: false, instance: data.without(field)))
            mutant = data
            mutant[field] = .array([])
            cases.append(Case(schema: dataSchema, valid: false, instance: mutant))
        }
        return cases
    }

    @Test func `an independent validator accepts what Swift writes, and refuses mutations of it`() async throws {
        let uuid = "550e8400-e29b-41d4-a716-446655440001"
        let project = try ProjectID("proj_abc")
        let mail = EmailVerificationRequested(
            recipient: "a@b.c", subject: "s", body: "b", replyTo: "d@e.f", ccAddresses: ["g@h.i"],
            attachments: [EmailAttachment(filename: "f", contentType: "t/t", data: Data([1]))])
        var all = try await cases(mail, required: ["recipient", "subject", "body"])
        all += try await cases(
            SubscriptionCreated(subscriptionID: uuid, userID: "u", planID: "p", startsAt: Date(), endsAt: Date()),
            required: ["subscription_id", "user_id"])
        all += try await cases(
            SubscriptionCancelled(subscriptionID: uuid, userID: "u", reason: "r", cancelledAt: Date()),
            required: ["subscription_id", "user_id"])
        all += try await cases(UserRegistered(userID: "u", role: "r", companyID: "c"), required: ["user_id"])
        all += try await cases(UserLoggedIn(userID: "u", sessionID: "s"), required: ["user_id"])
        all += try await cases(UserLoggedOut(userID: "u"), required: ["user_id"])
        all += try await cases(
            ProjectCreated(
                projectID: project, brandName: "b", keywords: ["k"], targets: [.init(platform: "p", url: "u")],
                dateRange: ["2025-01-01", "2025-02-01"]), required: [])
        all += try await cases(
            DataCollected(projectID: project, jobID: "j", platform: "p", minioPath: "m", contentCount: 1),
            required: ["job_id", "platform", "minio_path"])
        all += try await cases(
            AnalysisFinished(projectID: project, itemID: "i", status: .success), required: ["item_id"])
        all += try await cases(
            JobCompleted(projectID: project, total: 2, done: 2, errors: 1, durationSeconds: 1.5),
            required: ["total", "done", "errors"])

        let legacySchema = Self.folder + "/legacy-email.schema.json"
        let legacy = try JSONDecoder().decode(JSON.self, from: Data(LegacyEmailMessage(mail).serialized()))
        all.append(Case(schema: legacySchema, valid: true, instance: legacy))
        for key in legacy.keys {
            all.append(Case(schema: legacySchema, valid: false, instance: legacy.without(key)))
        }
        var snake = legacy.without("ReplyTo")
        snake["reply_to"] = .string("")
        all.append(Case(schema: legacySchema, valid: false, instance: snake))

        let encoder = JSONEncoder()
        let input = try all.map { String(decoding: try encoder.encode($0), as: UTF8.self) }.joined(separator: "\n")
        let result = try await Program.run(Program.python, [Program.script("validate")], input: input)
        #expect(result.status == 0, "\(result.output)\(result.error)")
        #expect(result.output.contains("\(all.count) checked"))
    }
}
