#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

extension EventEnvelope {
    /// Reads an envelope as this service or its siblings write it.
    ///
    /// - A byte order mark before it is ignored.
    /// - `event_id` may be any text of up to 255 bytes, or a number.
    /// - `timestamp` may have fractional digits, an offset (`+07:00`, `+0700`, `+07`) or no zone (then UTC), be a number of
    ///   seconds (of milliseconds from 10¹¹ on), or be missing. Go's zero time counts as absent.
    /// - `project_id` may be a number; empty, it counts as absent, and so does an empty `idempotency_key`.
    /// - `payload` may be flat; then the payload itself is the data.
    /// - `null` counts as absent, and unknown fields are ignored. Where a name stands twice, the last one counts.
    ///
    /// - Parameters:
    ///   - body: UTF-8 JSON, nested at most 256 levels deep.
    ///   - routingKey: The key that the message was delivered with, used when the payload names none.
    ///   - timestamp: Used when the envelope has none: the AMQP timestamp, or the time of receipt.
    /// - Throws: ``EventsError/Code/undecodable``, naming what is wrong and where, never quoting the message.
    public init(parsing body: [UInt8], routingKey: String? = nil, timestamp: @autoclosure () -> Date = Date()) throws {
        do {
            self = try Self.read(body.span, routingKey, timestamp)
        } catch let failure as JSONText.Failure {
            throw EventsError(.undecodable, "\(failure.reason) (byte \(failure.offset))", operation: "decode")
        } catch let error as EventsError where error.code == .invalidName {
            throw EventsError(.undecodable, error.message, operation: "decode")
        }
    }

    private static func read(_ span: Span<UInt8>, _ key: String?, _ fallback: () -> Date) throws -> EventEnvelope {
        var eventID: String?
        var timestamp: Date?
        var payload: Range<Int>?
        try JSONText.readObject(span) { member in
            if JSONText.token(member.name, in: span, is: "event_id") {
                eventID = try JSONText.optionalID(member.value, in: span, field: "event_id")
            } else if JSONText.token(member.name, in: span, is: "timestamp") {
                timestamp = try time(member.value, in: span)
            } else if JSONText.token(member.name, in: span, is: "payload") {
                payload = member.value
            }
        }
        guard let eventID else { throw JSONText.Failure(reason: "event_id is missing", offset: 0) }
        guard let payload, span[payload.lowerBound] == UInt8(ascii: "{") else {
            throw JSONText.Failure(reason: "payload is missing or not an object", offset: payload?.lowerBound ?? 0)
        }

        var envelope = EventEnvelope(
            eventID: try EventID(eventID), timestamp: timestamp ?? fallback(), routingKey: nil, service: nil, data: [])
        var namedKey: String?
        var nested: Range<Int>?
        var index = payload.lowerBound
        try JSONText.members(span, at: &index, depth: 2) { member in
            func text(_ field: String) throws -> String? {
                try JSONText.optionalString(member.value, in: span, field: "payload.\(field)")
            }
            if JSONText.token(member.name, in: span, is: "data") {
                // A flat payload may have a field of this name that is something else.
                nested = span[member.value.lowerBound] == UInt8(ascii: "{") ? member.value : nil
            } else if JSONText.token(member.name, in: span, is: "project_id") {
                let id = try JSONText.optionalID(member.value, in: span, field: "payload.project_id")
                envelope.projectID = try id.flatMap { $0.isEmpty ? nil : try ProjectID($0) }
            } else if JSONText.token(member.name, in: span, is: "service") {
                envelope.service = try text("service")
            } else if JSONText.token(member.name, in: span, is: "routing_key") {
                namedKey = try text("routing_key")
            } else if JSONText.token(member.name, in: span, is: "idempotency_key") {
                envelope.idempotencyKey = try text("idempotency_key").flatMap { $0.isEmpty ? nil : $0 }
            } else if JSONText.token(member.name, in: span, is: "schema_version") {
                envelope.schemaVersion = Int(JSONText.copy(member.value, of: span))
            }
        }
        envelope.routingKey = namedKey.flatMap { try? RoutingKey($0) } ?? key.flatMap { try? RoutingKey($0) }
        envelope.data = JSONText.copyBytes(nested ?? payload, of: span)
        return envelope
    }

    /// A timestamp in one of its forms; nil where it counts as absent.
    private static func time(_ value: Range<Int>, in span: Span<UInt8>) throws -> Date? {
        let failure = JSONText.Failure(reason: "timestamp is not an RFC 3339 time", offset: value.lowerBound)
        if JSONText.isNumber(value, in: span) {
            guard let number = Double(JSONText.copy(value, of: span)), abs(number) < 1e15 else { throw failure }
            return Date(timeIntervalSince1970: abs(number) >= 1e11 ? number / 1_000 : number)
        }
        guard let text = try JSONText.optionalString(value, in: span, field: "timestamp"), !text.isEmpty else {
            return nil
        }
        guard let date = RFC3339.date(from: text) else { throw failure }
        return text.hasPrefix("0001-01-01T00:00:00") ? nil : date
    }
}
