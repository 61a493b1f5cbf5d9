#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// How the `data` of events is written and read: dates are RFC 3339, binary data is base64, slashes are not escaped.
enum EventJSON {
    // One encoder and one decoder for all: they keep no state between calls, and setting one up for each event costs
    // more than small events do.
    private static let encoder: JSONEncoder = {
        let encoder = JSONEncoder()
        encoder.outputFormatting = .withoutEscapingSlashes
        encoder.dateEncodingStrategy = .custom { date, encoder in
            var container = encoder.singleValueContainer()
            try container.encode(RFC3339.string(from: date))
        }
        return encoder
    }()

    private static let decoder: JSONDecoder = {
        let decoder = JSONDecoder()
        decoder.dateDecodingStrategy = .custom { decoder in
            let container = try decoder.singleValueContainer()
            guard let date = RFC3339.date(from: try container.decode(String.self)) else {
                throw DecodingError.dataCorruptedError(in: container, debugDescription: "not an RFC 3339 timestamp")
            }
            return date
        }
        return decoder
    }()

    static func encode<E: SMAPEvent>(_ event: E) throws -> [UInt8] { Array(try encodedData(of: event)) }

    /// The data of an event, as the encoder hands it out.
    static func encodedData<E: SMAPEvent>(of event: E) throws -> Data {
        let data = try encodedData(of: event, "\(E.routingKey)", operation: "publish")
        guard data.first == UInt8(ascii: "{") else {
            throw EventsError(.invalidEvent, "\(E.routingKey) is not written as a JSON object", operation: "publish")
        }
        return data
    }

    /// Writes any value; `name` says what it is, in errors.
    static func encode(
        _ value: some Encodable, _ name: @autoclosure () -> String, operation: String
    ) throws -> [UInt8] { Array(try encodedData(of: value, name(), operation: operation)) }

    private static func encodedData(
        of value: some Encodable, _ name: @autoclosure () -> String, operation: String
    ) throws -> Data {
        do {
            return try encoder.encode(value)
        } catch let error as EncodingError {
            throw EventsError(
                .invalidEvent, "\(name()) cannot be written as JSON\(path(of: error))", operation: operation)
        }
    }

    static func decode<E: SMAPEvent>(_ type: E.Type, from data: [UInt8]) throws -> E {
        try decode(type, from: data, "\(E.routingKey)")
    }

    /// Reads any value; `name` says what it should be, in errors.
    static func decode<Value: Decodable>(
        _ type: Value.Type, from data: [UInt8], _ name: @autoclosure () -> String
    ) throws -> Value {
        do {
            return try decoder.decode(type, from: Data(data))
        } catch let error as DecodingError {
            // Only the path: descriptions of decoding errors quote the value, which may be personal data.
            throw EventsError(.undecodable, "the data is not a \(name())\(path(of: error))", operation: "decode")
        }
    }

    private static func path(of error: DecodingError) -> String {
        switch error {
        case .keyNotFound(let key, let context): ": \(join(context.codingPath + [key])) is missing"
        case .valueNotFound(_, let context): ": \(join(context.codingPath)) is null"
        case .typeMismatch(_, let context): ": \(join(context.codingPath)) has another type"
        case .dataCorrupted(let context):
            context.codingPath.isEmpty ? "" : ": \(join(context.codingPath)) is malformed"
        @unknown default: ""
        }
    }

    private static func path(of error: EncodingError) -> String {
        switch error {
        case .invalidValue(_, let context): context.codingPath.isEmpty ? "" : ": \(join(context.codingPath))"
        @unknown default: ""
        }
    }

    private static func join(_ path: [any CodingKey]) -> String {
        path.map { $0.intValue.map(String.init) ?? $0.stringValue }.joined(separator: ".")
    }
}
