/// An exchange to be declared. Durable, not auto-delete, not internal.
public struct ExchangeDeclaration: Sendable, Hashable {
    /// How an exchange routes.
    public enum Kind: String, Sendable {
        /// By pattern.
        case topic
        /// To every queue.
        case fanout
        /// By equal key.
        case direct
    }

    /// The exchange's name.
    public var name: String
    /// How it routes.
    public var kind: Kind

    /// Describes an exchange.
    public init(name: String, kind: Kind) {
        self.name = name
        self.kind = kind
    }

    /// `smap.events`: topic.
    public static let events = ExchangeDeclaration(name: ExchangeName.events, kind: .topic)
    /// `smtp_send_email_exc`: fanout.
    public static let legacyEmail = ExchangeDeclaration(name: ExchangeName.legacyEmail, kind: .fanout)
    /// `smap.dlx`: direct.
    public static let deadLetters = ExchangeDeclaration(name: ExchangeName.deadLetters, kind: .direct)
}

/// A queue to be declared. Durable, not exclusive, not auto-delete.
public struct QueueDeclaration: Sendable, Hashable {
    /// How a queue is stored.
    public enum Kind: String, Sendable {
        /// Replicated, and the default: on one node too it takes more confirmed messages a second than a classic one.
        case quorum
        /// Neither replicated nor counting deliveries; what the legacy queue is.
        case classic
    }

    /// The queue's name.
    public var name: QueueName
    /// How it is stored.
    public var kind: Kind
    /// Whether messages that are rejected go to ``QueueName/deadLetterQueue`` through `smap.dlx`. On quorum queues at
    /// least once, which needs RabbitMQ 3.10's feature flag `stream_queue`; on classic ones at most once.
    public var deadLetters: Bool

    /// Describes a queue.
    public init(_ name: QueueName, kind: Kind = .quorum, deadLetters: Bool = false) {
        self.name = name
        self.kind = kind
        self.deadLetters = deadLetters
    }

    /// The arguments that go with the declaration.
    ///
    /// At-least-once dead-lettering holds only with `reject-publish` beside the strategy; lacking it, the broker falls
    /// back silently (RabbitMQ guide, "Quorum Queues: Dead Lettering").
    public var arguments: [String: String] {
        var arguments = ["x-queue-type": kind.rawValue]
        if deadLetters {
            arguments["x-dead-letter-exchange"] = ExchangeName.deadLetters
            arguments["x-dead-letter-routing-key"] = name.rawValue
            if kind == .quorum {
                arguments["x-dead-letter-strategy"] = "at-least-once"
                arguments["x-overflow"] = "reject-publish"
            }
        }
        return arguments
    }
}

/// What a queue holds, as the broker told when it was declared.
public struct QueueStatus: Sendable, Hashable {
    /// Messages that are ready to be delivered.
    public let messages: Int
    /// Consumers that are active.
    public let consumers: Int

    /// Reports a queue.
    public init(messages: Int, consumers: Int) {
        self.messages = messages
        self.consumers = consumers
    }
}
