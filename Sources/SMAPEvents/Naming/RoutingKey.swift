/// The routing key of an event: `<domain>.<action>`, such as `email.verification.requested`.
///
/// Two or more words of `a-z`, `0-9`, `_` and `-`, separated by dots, at most 255 bytes (AMQP 0-9-1 short string). Keys
/// with `*`, `#`, spaces, upper case or control characters are refused, so that one cannot be taken for a pattern.
public struct RoutingKey: Sendable, Hashable, CustomStringConvertible, ExpressibleByStringLiteral {
    /// The key as it goes over the wire.
    public let rawValue: String

    /// Checks and wraps a key. Throws ``EventsError/Code/invalidName`` and says what is wrong with it.
    public init(_ rawValue: String) throws {
        if let problem = Self.problem(in: rawValue) {
            throw EventsError(.invalidName, problem, operation: "routing key")
        }
        self.rawValue = rawValue
    }

    /// A key written in source code. An invalid literal is a programming error and traps; use ``init(_:)`` for input.
    public init(stringLiteral value: StaticString) {
        let key = value.withUTF8Buffer { String(decoding: $0, as: UTF8.self) }
        precondition(Self.problem(in: key) == nil, "\(key) is not a routing key")
        rawValue = key
    }

    /// The first word: `email` of `email.verification.requested`.
    public var domain: Substring { rawValue[..<firstDot] }

    /// What follows the first word: `verification.requested` of `email.verification.requested`.
    public var action: Substring { rawValue[rawValue.utf8.index(after: firstDot)...] }

    private var firstDot: String.Index {
        rawValue.utf8.firstIndex(of: UInt8(ascii: ".")) ?? rawValue.startIndex
    }

    /// The key as it goes over the wire.
    public var description: String { rawValue }

    private static func problem(in key: String) -> String? {
        guard key.utf8.count <= 255 else { return "a routing key has at most 255 bytes, this one \(key.utf8.count)" }
        var words = 1
        var isWordEmpty = true
        for byte in key.utf8 {
            switch byte {
            case UInt8(ascii: "."):
                if isWordEmpty { return "a routing key has no empty words" }
                words += 1
                isWordEmpty = true
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"),
                UInt8(ascii: "-"):
                isWordEmpty = false
            default:
                return "a routing key is made of a-z, 0-9, '_', '-' and dots"
            }
        }
        if isWordEmpty { return key.isEmpty ? "a routing key is not empty" : "a routing key has no empty words" }
        return words < 2 ? "a routing key is <domain>.<action>, two words or more" : nil
    }
}
