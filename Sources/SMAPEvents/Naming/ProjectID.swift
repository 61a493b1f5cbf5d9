/// The id of a project, as every service writes it: `proj_abc`, or a bare UUID.
///
/// It is part of a Redis key, so it holds no `:`, `{`, `}`, white space or control characters. 1 to 200 bytes.
public struct ProjectID: Sendable, Hashable, Codable, CustomStringConvertible {
    /// The id, verbatim.
    public let rawValue: String

    /// Checks and wraps an id. Throws ``EventsError/Code/invalidName``.
    public init(_ rawValue: String) throws {
        guard !rawValue.isEmpty, rawValue.utf8.count <= 200 else {
            throw EventsError(.invalidName, "a project id has 1 to 200 bytes", operation: "project id")
        }
        for scalar in rawValue.unicodeScalars {
            let properties = scalar.properties
            guard !":{}".unicodeScalars.contains(scalar), !properties.isWhitespace,
                properties.generalCategory != .control
            else {
                throw EventsError(
                    .invalidName, "a project id holds no ':', '{', '}', white space or control characters",
                    operation: "project id")
            }
        }
        self.rawValue = rawValue
    }

    /// Reads the id from a single string. Throws ``EventsError/Code/invalidName``.
    public init(from decoder: any Decoder) throws {
        try self.init(decoder.singleValueContainer().decode(String.self))
    }

    /// Writes the id as a single string.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(rawValue)
    }

    /// The id, verbatim.
    public var description: String { rawValue }
}
