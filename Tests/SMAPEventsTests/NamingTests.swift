import SMAPEvents
import Testing

@Suite struct NamingTests {
    @Test(arguments: [
        "project.created", "email.verification.requested", "user.logged_in", "a.b", "a-1.b_2",
    ])
    func `keys of two words or more are routing keys`(key: String) throws {
        #expect(try RoutingKey(key).rawValue == key)
    }

    @Test(arguments: [
        "", "project", "Project.created", "project.", ".created", "a..b", "a.*", "a.#", "a. b", "a.b\n", "a.\u{E9}",
        "a." + String(repeating: "b", count: 254),
    ])
    func `anything else is refused as a routing key`(key: String) {
        let error = #expect(throws: EventsError.self) { try RoutingKey(key) }
        #expect(error?.code == .invalidName)
    }

    @Test func `a key's domain and action are its first word and the rest`() {
        let key: RoutingKey = ("email.verification.requested")
        #expect(key.domain == "email")
        #expect(key.action == "verification.requested")
    }

    // The tables of the AMQP 0-9-1 specification and RabbitMQ's own topic tests.
    @Test(arguments: [
        ("email.#", "email.verification.requested", true), ("email.#", "email", true), ("email.#", "emails.x", false),
        ("*.created", "project.created", true), ("*.created", "a.b.created", false), ("*.created", "created", false),
        ("#", "", true), ("#", "a", true), ("#", "a.b.c", true), ("*", "a", true), ("*", "a.b", false),
        ("*", "", false), ("#.created", "created", true), ("#.created", "a.b.created", true),
        ("a.#.z", "a.z", true), ("a.#.z", "a.b.c.z", true), ("a.#.z", "a.b.c", false),
        ("#.b.#", "a.b.c", true), ("#.b.#", "b", true), ("#.b.#", "a.c", false), ("*.#", "a", true), ("*.#", "", false),
        ("#.*", "a", true), ("#.*", "", false), ("#.#", "", true), ("#.*.#", "a", true), ("#.*.#", "", false),
        ("#.a.*.b.#", "x.a.y.a.z.b", true), ("a.*.c", "a..c", true), ("a.b", "a.b", true), ("a.b", "a.b.c", false),
        ("*.*.#", "a.b", true), ("*.*.#", "a", false), ("#.a.#.a.#", "a.b.a", true), ("#.a.#.a.#", "a", false),
    ])
    func `patterns match as a topic exchange does`(pattern: String, key: String, matches: Bool) throws {
        #expect(try TopicPattern(pattern).matches(key) == matches)
    }

    @Test(arguments: ["", "a b", "a*.b", "##", "a\u{0}", String(repeating: "a", count: 256)])
    func `malformed patterns are refused`(pattern: String) {
        #expect(throws: EventsError.self) { try TopicPattern(pattern) }
    }

    @Test(arguments: ["proj_abc", "550e8400-e29b-41d4-a716-446655440001", "\"quoted\\\""])
    func `project ids are taken verbatim`(id: String) throws {
        #expect(try ProjectID(id).rawValue == id)
    }

    @Test(arguments: ["", "a:b", "{a}", "a b", "a\tb", "a\u{7F}", "a\u{A0}b", String(repeating: "a", count: 201)])
    func `what would break a Redis key is no project id`(id: String) {
        #expect(throws: EventsError.self) { try ProjectID(id) }
    }

    @Test func `new event ids are version 4 UUIDs in lower case, and never the same`() throws {
        let ids = Set((0..<10_000).map { _ in EventID().rawValue })
        #expect(ids.count == 10_000)
        let form = /evt_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}/
        for id in ids { #expect(id.wholeMatch(of: form) != nil, "\(id)") }
    }

    @Test func `event ids of siblings are taken as they are, up to 255 bytes`() throws {
        #expect(try EventID("evt_001").rawValue == "evt_001")
        #expect(try EventID(String(repeating: "x", count: 255)).rawValue.count == 255)
        for bad in ["", String(repeating: "x", count: 256), "a\nb"] {
            #expect(throws: EventsError.self) { try EventID(bad) }
        }
    }

    @Test func `queue names leave room for what is derived from them`() throws {
        #expect(QueueName("notification.email").deadLetterQueue.rawValue == "notification.email.dlq")
        for bad in ["", "amq.q", "a b", "a\n", String(repeating: "q", count: 246)] {
            #expect(throws: EventsError.self) { try QueueName(bad) }
        }
    }
}
