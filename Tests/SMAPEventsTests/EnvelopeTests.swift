import Foundation
import SMAPEvents
import Testing

func fixture(_ name: String) throws -> [UInt8] {
    let url = try #require(Bundle.module.url(forResource: "Fixtures/\(name)", withExtension: "json"))
    return Array(try Data(contentsOf: url))
}

@Suite struct EnvelopeTests {
    private func envelope(
        _ data: String, project: String? = nil, key: RoutingKey = "order.shipped"
    ) throws -> EventEnvelope {
        EventEnvelope(
            eventID: try EventID("evt_1"), timestamp: Date(timeIntervalSince1970: 1_764_930_645.123), routingKey: key,
            projectID: try project.map { try ProjectID($0) }, service: "shop", data: Array(data.utf8))
    }

    private func text(_ bytes: [UInt8]) -> String { String(decoding: bytes, as: UTF8.self) }

    @Test func `an envelope is written as the contract says, without what is absent`() throws {
        #expect(
            text(try envelope("{}").serialized())
                == #"{"event_id":"evt_1","timestamp":"2025-12-05T10:30:45.123Z","payload":{"service":"shop","#
                + #""action":"shipped","routing_key":"order.shipped","data":{}}}"#)
        var full = try envelope(#"{"a":1}"#, project: "proj_abc")
        full.idempotencyKey = "k\"1"
        full.schemaVersion = 2
        #expect(
            text(try full.serialized())
                == #"{"event_id":"evt_1","timestamp":"2025-12-05T10:30:45.123Z","payload":{"project_id":"proj_abc","#
                + #""service":"shop","action":"shipped","routing_key":"order.shipped","idempotency_key":"k\"1","#
                + #""schema_version":2,"data":{"a":1}}}"#)
    }

    @Test func `what is written is read back as it was, numbers and unknown fields included`() throws {
        let data = #"{"n":12345678901234567890.50,"e":1E+400,"deep":{"x":[1,null,"\u00e9\ud83d\ude00"]}}"#
        let written = try envelope(data, project: "p").serialized()
        let read = try EventEnvelope(parsing: written)
        #expect(text(read.data) == data)
        #expect(read.projectID?.rawValue == "p")
        #expect(read.timestamp == Date(timeIntervalSince1970: 1_764_930_645.123))
        #expect(read.routingKey == "order.shipped")
    }

    @Test func `flat fields stand beside the envelope's, whose names win`() throws {
        let data =
            #"{"brand_name":"VinFast","service":"evil","project_id":"evil","data":1,"\u0061ction":"evil","k":[1,2]}"#
        let both = text(try envelope(data, project: "p").serialized(shape: .both))
        #expect(both.hasSuffix(#""data":\#(data),"brand_name":"VinFast","k":[1,2]}}"#))
        let flat = text(try envelope(data, project: "p").serialized(shape: .flat))
        #expect(flat.hasSuffix(#""routing_key":"order.shipped","brand_name":"VinFast","k":[1,2]}}"#))
    }

    @Test func `project created can be read by a consumer that expects it flat`() throws {
        let event = ProjectCreated(projectID: try ProjectID("p"), brandName: "VinFast")
        let body = try EventEnvelope(
            routingKey: ProjectCreated.routingKey, projectID: event.projectID, service: "project",
            data: Array(JSONEncoder().encode(event))
        ).serialized(shape: ProjectCreated.shape)
        let json = try #require(try JSONSerialization.jsonObject(with: Data(body)) as? [String: Any])
        let payload = try #require(json["payload"] as? [String: Any])
        #expect(payload["brand_name"] as? String == "VinFast")
        #expect((payload["data"] as? [String: Any])?["brand_name"] as? String == "VinFast")
        #expect(payload["project_id"] as? String == "p")
    }

    @Test func `more than 256 KiB are refused, and just that much is not`() throws {
        let empty = try envelope(#"{"t":""}"#).serialized().count
        let room = EventEnvelope.sizeLimit - empty
        #expect(
            try envelope(#"{"t":"\#(String(repeating: "x", count: room))"}"#).serialized().count
                == EventEnvelope.sizeLimit)
        let error = #expect(throws: EventsError.self) {
            try envelope(#"{"t":"\#(String(repeating: "x", count: room + 1))"}"#).serialized()
        }
        #expect(error?.code == .eventTooLarge)
    }

    @Test(arguments: [
        ("2025-12-05T10:30:45Z", 1_764_930_645.0), ("2025-12-05T10:30:45", 1_764_930_645),
        ("2025-12-05T10:30:45.1Z", 1_764_930_645.1), ("2025-12-05T10:30:45.123456789Z", 1_764_930_645.123456789),
        ("2025-12-05T17:30:45+07:00", 1_764_930_645), ("2025-12-05T05:00:45-05:30", 1_764_930_645),
        ("2024-02-29T00:00:00Z", 1_709_164_800), ("1969-12-31T23:59:59.500Z", -0.5),
        ("2000-03-01T00:00:00z", 951_868_800), ("2025-12-05T17:30:45+07", 1_764_930_645),
        ("2025-12-05T17:30:45+0700", 1_764_930_645), ("2025-12-05T10:30:45.12345678901Z", 1_764_930_645.123456789),
    ])
    func `timestamps are read in every form that siblings write`(written: String, seconds: Double) throws {
        let body = #"{"event_id":"e","timestamp":"\#(written)","payload":{}}"#
        let read = try EventEnvelope(parsing: Array(body.utf8)).timestamp.timeIntervalSince1970
        #expect(abs(read - seconds) < 1e-6)
    }

    @Test(arguments: [
        "yesterday", "2025-13-01T00:00:00Z", "2025-02-29T00:00:00Z", "2025-01-01", "2025-01-01T25:00:00Z",
        "2025-01-01T00:00:00.Z", "2025-01-01T00:00:00Zx", "2025-01-01T00:00:00+7", "2025-01-01T00:00:00+07:",
        "2025-01-01T00:00:00+070",
    ])
    func `timestamps that are none are refused`(written: String) {
        let body = #"{"event_id":"e","timestamp":"\#(written)","payload":{}}"#
        let error = #expect(throws: EventsError.self) { try EventEnvelope(parsing: Array(body.utf8)) }
        #expect(error?.code == .undecodable)
    }

    @Test(arguments: [Double.nan, .infinity, -.infinity, 1e300, -1e300])
    func `dates that no clock shows are written without harm`(seconds: Double) throws {
        var envelope = try envelope("{}")
        envelope.timestamp = Date(timeIntervalSince1970: seconds)
        #expect(try EventEnvelope(parsing: envelope.serialized()).eventID == envelope.eventID)
    }

    @Test func `a missing timestamp is taken from the message, and null counts as absent`() throws {
        let fallback = Date(timeIntervalSince1970: 7)
        for body in [
            #"{"event_id":"e","payload":{}}"#,
            #"{"event_id":"e","timestamp":null,"payload":{"project_id":null,"data":null,"service":null,"x":1}}"#,
        ] {
            let read = try EventEnvelope(parsing: Array(body.utf8), routingKey: "a.b", timestamp: fallback)
            #expect(read.timestamp == fallback)
            #expect(read.projectID == nil)
            #expect(read.routingKey == "a.b")
        }
    }

    @Test func `what other languages write for nothing, for numbers and before UTF-8 is understood`() throws {
        let fallback = Date(timeIntervalSince1970: 7)
        func read(_ body: String, key: String? = "a.b") throws -> EventEnvelope {
            try EventEnvelope(parsing: Array(body.utf8), routingKey: key, timestamp: fallback)
        }
        #expect(
            try read("\u{FEFF}" + #"{"event_id":"e","payload":{"data":{"n":1.50}}}"#).data == Array(#"{"n":1.50}"#.utf8)
        )
        let empty = try read(#"{"event_id":"e","timestamp":"","payload":{"project_id":"","idempotency_key":""}}"#)
        #expect(empty.projectID == nil && empty.idempotencyKey == nil && empty.timestamp == fallback)
        #expect(try read(#"{"event_id":"e","timestamp":"0001-01-01T00:00:00Z","payload":{}}"#).timestamp == fallback)
        for (number, seconds) in [("1764930645", 1_764_930_645.0), ("1764930645123", 1_764_930_645.123), ("1.5", 1.5)] {
            let time = try read(#"{"event_id":"e","timestamp":\#(number),"payload":{}}"#).timestamp
            #expect(abs(time.timeIntervalSince1970 - seconds) < 1e-6)
        }
        let numbers = try read(#"{"event_id":7,"payload":{"project_id":42}}"#)
        #expect(numbers.eventID.rawValue == "7" && numbers.projectID?.rawValue == "42")
        // A key that is none does not hide the one that the message came with.
        #expect(try read(#"{"event_id":"e","payload":{"routing_key":"No Key"}}"#).routingKey == "a.b")
        #expect(throws: EventsError.self) { try read(#"{"event_id":"e","timestamp":1e300,"payload":{}}"#) }
        #expect(throws: EventsError.self) { try read("\u{FEFF}\u{FEFF}" + #"{"event_id":"e","payload":{}}"#) }
    }

    @Test func `the siblings' events decode`() throws {
        let created = try EventEnvelope(parsing: fixture("project.created.sibling"), routingKey: "project.created")
        #expect(created.eventID.rawValue == "evt_001")
        let project: ProjectCreated = try created.decode()
        #expect(project.projectID?.rawValue == "proj_abc")
        #expect(project.keywords == ["VinFast", "VF3"])
        #expect(project.targets == [.init(platform: "tiktok", url: "https://example.com/@vinfast")])

        let collected = try EventEnvelope(parsing: fixture("data.collected.sibling"), routingKey: "data.collected")
        let batch: DataCollected = try collected.decode()
        #expect(batch.platform == "TIKTOK")
        #expect(batch.contentCount == 50)
        #expect(batch.totalBatches == 20)

        let requested = try EventEnvelope(parsing: fixture("email.verification.requested"))
        #expect(requested.routingKey == "email.verification.requested")
        #expect(requested.schemaVersion == 1)
        let mail: EmailVerificationRequested = try requested.decode()
        #expect(mail.recipient == "user@example.com")
    }

    @Test(arguments: [
        ("not json", "not a JSON object"), ("", "not a JSON object"), ("[1]", "not a JSON object"),
        (#"{"event_id":"e"}"#, "payload"), (#"{"event_id":"e","payload":[]}"#, "payload"),
        (#"{"payload":{}}"#, "event_id"), (#"{"event_id":true,"payload":{}}"#, "event_id"),
        (#"{"event_id":"","payload":{}}"#, "event id"), (#"{"event_id":"e","payload":{}} x"#, "text after"),
        (#"{"event_id":"e","payload":{"project_id":"a:b"}}"#, "project id"),
        (#"{"event_id":"e","payload":{"a":01}}"#, "not a JSON"), (#"{"event_id":"e","payload":{"a":"\x"}}"#, "escape"),
        (#"{"event_id":"e","payload":{"a":tru}}"#, "not a JSON value"), (#"{"event_id":"e","payload":{"#, "expected"),
        (#"{"event_id":"\ud800","payload":{}}"#, "surrogate"), (#"{"event_id":"e","payload":{"a":1.}}"#, "number"),
    ])
    func `what is no event is undecodable, and the error says why`(body: String, reason: String) {
        let error = #expect(throws: EventsError.self) { try EventEnvelope(parsing: Array(body.utf8)) }
        #expect(error?.code == .undecodable)
        #expect(error?.message.contains(reason) == true, "\(error?.message ?? "")")
    }

    @Test func `invalid UTF-8, 10,000 levels and 5 MiB of junk are refused without harm`() {
        var invalid = Array(#"{"event_id":"e","payload":{"data":{"a":"?"}}}"#.utf8)
        invalid[invalid.firstIndex(of: UInt8(ascii: "?")) ?? 0] = 0xFF
        for level in [("[", "]"), (#"{"a":"#, "}")] {
            let deep = String(repeating: level.0, count: 10_000) + "1" + String(repeating: level.1, count: 10_000)
            #expect(throws: EventsError.self) {
                try EventEnvelope(parsing: Array(#"{"event_id":"e","payload":{"data":{"a":\#(deep)}}}"#.utf8))
            }
        }
        #expect(throws: EventsError.self) { try EventEnvelope(parsing: invalid) }
        #expect(throws: EventsError.self) {
            try EventEnvelope(parsing: Array(repeating: UInt8(ascii: "{"), count: 5 << 20))
        }
    }

    @Test func `no prefix of an event is an event, and none crashes the reader`() throws {
        var whole = try fixture("data.collected.sibling")
        while whole.last == 0x0A { whole.removeLast() }
        for length in 0..<whole.count {
            #expect(throws: EventsError.self) { try EventEnvelope(parsing: Array(whole.prefix(length))) }
        }
    }

    @Test func `a decoding error names the field and never quotes the value`() throws {
        let body = #"{"event_id":"e","payload":{"data":{"recipient":{"secret":"s3cret"},"subject":"s","body":"b"}}}"#
        let envelope = try EventEnvelope(parsing: Array(body.utf8))
        let error = #expect(throws: EventsError.self) { try envelope.decode(EmailVerificationRequested.self) }
        #expect(error?.description.contains("recipient") == true)
        #expect(error?.description.contains("s3cret") == false)
    }
}
