/// The name of a queue: `<service>.<purpose>`, such as `notification.email`.
///
/// 1 to 245 bytes, no white space or control characters, and not `amq.…`, which AMQP reserves. An AMQP name may have 255
/// bytes; ten are kept free for the names derived from it, such as the dead letter queue's `<queue>.dlq`.
public struct QueueName: Sendable, Hashable, CustomStringConvertible, ExpressibleByStringLiteral {
    /// The name as it goes over the wire.
    public let rawValue: String

    /// Checks and wraps a name. Throws ``EventsError/Code/invalidName``.
    public init(_ rawValue: String) throws {
        if let problem = Self.problem(in: rawValue) {
            throw EventsError(.invalidName, problem, operation: "queue name")
        }
        self.rawValue = rawValue
    }

    /// A name written in source code. An invalid literal traps; use ``init(_:)`` for input.
    public init(stringLiteral value: StaticString) {
        let name = value.withUTF8Buffer { String(decoding: $0, as: UTF8.self) }
        precondition(Self.problem(in: name) == nil, "\(name) is not a queue name")
        rawValue = name
    }

    private init(derived rawValue: String) {
        self.rawValue = rawValue
    }

    /// The queue that takes what this one's consumers could not handle: `<queue>.dlq`.
    public var deadLetterQueue: QueueName { QueueName(derived: rawValue + ".dlq") }

    /// The queue of this one's messages that may have killed their consumers, and are handled alone: `<queue>.suspects`.
    public var suspectQueue: QueueName { QueueName(derived: rawValue + ".suspects") }

    /// The name as it goes over the wire.
    public var description: String { rawValue }

    private static func problem(in name: String) -> String? {
        guard (1...245).contains(name.utf8.count) else { return "a queue name has 1 to 245 bytes" }
        guard name.utf8.allSatisfy({ $0 > 0x20 && $0 != 0x7F }) else {
            return "a queue name holds no white space or control characters"
        }
        return name.hasPrefix("amq.") ? "queue names that begin with 'amq.' belong to the broker" : nil
    }
}
