/// A binding pattern of a topic exchange: `email.#`, `*.created`.
///
/// Words are separated by dots; `*` stands for exactly one word and `#` for any number of them, none included
/// (AMQP 0-9-1, section 3.1.3.3). At most 255 bytes, no white space or control characters.
public struct TopicPattern: Sendable, Hashable, CustomStringConvertible, ExpressibleByStringLiteral {
    /// The pattern as it is bound.
    public let rawValue: String
    private let words: [Substring]
    private let isLiteral: Bool

    /// Checks and wraps a pattern. Throws ``EventsError/Code/invalidName``.
    public init(_ rawValue: String) throws {
        if let problem = Self.problem(in: rawValue) {
            throw EventsError(.invalidName, problem, operation: "topic pattern")
        }
        self.init(checked: rawValue)
    }

    /// A pattern written in source code. An invalid literal traps; use ``init(_:)`` for input.
    public init(stringLiteral value: StaticString) {
        let pattern = value.withUTF8Buffer { String(decoding: $0, as: UTF8.self) }
        precondition(Self.problem(in: pattern) == nil, "\(pattern) is not a topic pattern")
        self.init(checked: pattern)
    }

    /// The pattern that matches just this key.
    public init(_ key: RoutingKey) {
        self.init(checked: key.rawValue)
    }

    private init(checked: String) {
        rawValue = checked
        words = Self.words(of: checked)
        isLiteral = checked.utf8.allBytes { $0 != UInt8(ascii: "*") && $0 != UInt8(ascii: "#") }
    }

    /// The pattern as it is bound.
    public var description: String { rawValue }

    /// Whether a topic exchange would send a message with this key along a binding with this pattern.
    public func matches(_ key: RoutingKey) -> Bool {
        matches(key.rawValue)
    }

    /// As ``matches(_:)-(RoutingKey)``, for a key as it came over the wire, the empty one included.
    public func matches(_ key: String) -> Bool {
        // Most patterns in a router are plain keys, or take everything.
        if isLiteral { return rawValue == key }
        if rawValue == "#" { return true }
        let key = Self.words(of: key)
        var word = 0
        var position = 0
        // The last `#`, and the word from which it would have to swallow one more. One step back is enough: a later
        // `#` can take over whatever an earlier one could have.
        var hash: (pattern: Int, word: Int)?
        while word < key.count {
            if position < words.count, words[position] == "#" {
                hash = (position, word)
                position += 1
            } else if position < words.count, words[position] == "*" || words[position] == key[word] {
                position += 1
                word += 1
            } else if let last = hash {
                hash = (last.pattern, last.word + 1)
                position = last.pattern + 1
                word = last.word + 1
            } else {
                return false
            }
        }
        return words[position...].allSatisfy { $0 == "#" }
    }

    private static func words(of text: String) -> [Substring] {
        text.isEmpty ? [] : text.split(separator: ".", omittingEmptySubsequences: false)
    }

    private static func problem(in pattern: String) -> String? {
        guard !pattern.isEmpty else { return "a pattern is not empty" }
        guard pattern.utf8.count <= 255 else {
            return "a pattern has at most 255 bytes, this one \(pattern.utf8.count)"
        }
        guard pattern.utf8.allSatisfy({ $0 > 0x20 && $0 != 0x7F }) else {
            return "a pattern holds no spaces or control characters"
        }
        for word in words(of: pattern) where word.utf8.count > 1 && word.contains(where: { $0 == "*" || $0 == "#" }) {
            return "'*' and '#' stand for whole words"
        }
        return nil
    }

    /// Patterns are equal when their text is.
    public static func == (left: TopicPattern, right: TopicPattern) -> Bool { left.rawValue == right.rawValue }

    /// Hashes the text.
    public func hash(into hasher: inout Hasher) { hasher.combine(rawValue) }
}
