#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

extension EventEnvelope {
    /// The envelope as UTF-8 JSON.
    ///
    /// It is assembled from bytes, since encoding the whole with `JSONEncoder` costs three times what publishing does.
    /// Throws ``EventsError/Code/eventTooLarge`` over 256 KiB (``sizeLimit``), and ``EventsError/Code/invalidEvent``
    /// when the data is not a JSON object or a routing key is missing.
    public func serialized(shape: EventShape = .nested) throws -> [UInt8] {
        try serialized(shape: shape, identity: nil)
    }

    /// The fields of the payload that say who has published what.
    static func identity(service: String?, routingKey: RoutingKey) -> [UInt8] {
        var bytes: [UInt8] = []
        if let service {
            bytes.append(literal: "\"service\":")
            bytes.append(json: service)
            bytes.append(literal: ",")
        }
        // A routing key has no characters that JSON escapes.
        bytes.append(literal: "\"action\":\"")
        bytes.append(contentsOf: routingKey.action.utf8)
        bytes.append(literal: "\",\"routing_key\":\"")
        bytes.append(contentsOf: routingKey.rawValue.utf8)
        bytes.append(literal: "\"")
        return bytes
    }

    /// - Parameter identity: ``identity(service:routingKey:)`` of this envelope, where it is known.
    func serialized(shape: EventShape, identity: [UInt8]?) throws -> [UInt8] {
        try serialized(identity: identity, dataCount: data.count * (shape == .both ? 2 : 1)) { bytes in
            if shape != .flat {
                bytes.append(literal: ",\"data\":")
                bytes.append(contentsOf: data)
            }
            if shape != .nested { try appendFields(to: &bytes) }
        }
    }

    /// The envelope with data that was encoded just now, which is copied only once.
    func serialized(nesting data: Data, identity: [UInt8]) throws -> [UInt8] {
        try serialized(identity: identity, dataCount: data.count) { bytes in
            bytes.append(literal: ",\"data\":")
            data.withUnsafeBytes { bytes.append(contentsOf: $0) }
        }
    }

    private func serialized(
        identity: [UInt8]?, dataCount: Int, appendData: (inout [UInt8]) throws -> Void
    ) throws -> [UInt8] {
        guard let routingKey else {
            throw EventsError(
                .invalidEvent, "an envelope is written with a routing key", operation: "publish", eventID: eventID)
        }
        var bytes: [UInt8] = []
        bytes.reserveCapacity(320 + dataCount)
        bytes.append(literal: "{\"event_id\":")
        bytes.append(json: eventID.rawValue)
        bytes.append(literal: ",\"timestamp\":\"")
        RFC3339.append(timestamp, to: &bytes)
        bytes.append(literal: "\",\"payload\":{")
        if let projectID {
            bytes.append(literal: "\"project_id\":")
            bytes.append(json: projectID.rawValue)
            bytes.append(literal: ",")
        }
        bytes.append(contentsOf: identity ?? Self.identity(service: service, routingKey: routingKey))
        if let idempotencyKey {
            bytes.append(literal: ",\"idempotency_key\":")
            bytes.append(json: idempotencyKey)
        }
        if let schemaVersion {
            bytes.append(literal: ",\"schema_version\":")
            bytes.append(contentsOf: String(schemaVersion).utf8)
        }
        try appendData(&bytes)
        bytes.append(literal: "}}")
        guard bytes.count <= Self.sizeLimit else {
            throw EventsError(
                .eventTooLarge, "\(routingKey) has \(bytes.count) bytes, more than the \(Self.sizeLimit) allowed",
                operation: "publish", eventID: eventID)
        }
        return bytes
    }

    /// The data's own fields beside the envelope's, whose names win.
    private func appendFields(to bytes: inout [UInt8]) throws {
        let own: [StaticString] = [
            "project_id", "service", "action", "routing_key", "idempotency_key", "schema_version", "data",
        ]
        let span = data.span
        do {
            try JSONText.readObject(span) { member in
                guard !own.contains(where: { JSONText.token(member.name, in: span, is: $0) }) else { return }
                bytes.append(literal: ",")
                // The quotes stand just outside the token.
                let quoted = member.name.range.lowerBound - 1..<member.name.range.upperBound + 1
                bytes.append(contentsOf: data[quoted])
                bytes.append(literal: ":")
                bytes.append(contentsOf: data[member.value])
            }
        } catch let failure as JSONText.Failure {
            throw EventsError(
                .invalidEvent, "the data is \(failure.reason) at byte \(failure.offset)", operation: "publish",
                eventID: eventID)
        }
    }

    /// Checks that `data` is one JSON object in valid UTF-8. Throws ``EventsError/Code/invalidEvent``.
    static func checkData(_ data: [UInt8], operation: String) throws {
        do {
            try JSONText.readObject(data.span) { _ in }
        } catch let failure as JSONText.Failure {
            throw EventsError(
                .invalidEvent, "the data is not valid: \(failure.reason) at byte \(failure.offset)",
                operation: operation)
        }
    }
}
