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
    /// More arguments, by their names at the broker, such as `x-message-ttl` or `x-max-length`. They win over those that
    /// the other settings stand for.
    public var additionalArguments: [String: MessageProperties.HeaderValue]

    /// Describes a queue.
    public init(
        _ name: QueueName, kind: Kind = .quorum, deadLetters: Bool = false,
        additionalArguments: [String: MessageProperties.HeaderValue] = [:]
    ) {
        self.name = name
        self.kind = kind
        self.deadLetters = deadLetters
        self.additionalArguments = additionalArguments
    }

    /// The arguments that go with the declaration.
    ///
    /// At-least-once dead-lettering holds only with `reject-publish` beside the strategy; lacking it, the broker falls
    /// back silently (RabbitMQ guide, "Quorum Queues: Dead Lettering").
    public var arguments: [String: MessageProperties.HeaderValue] {
        var arguments: [String: MessageProperties.HeaderValue] = ["x-queue-type": .string(kind.rawValue)]
        if deadLetters {
            arguments["x-dead-letter-exchange"] = .string(ExchangeName.deadLetters)
            arguments["x-dead-letter-routing-key"] = .string(name.rawValue)
            if kind == .quorum {
                arguments["x-dead-letter-strategy"] = .string("at-least-once")
                arguments["x-overflow"] = .string("reject-publish")
            }
        }
        return arguments.merging(additionalArguments) { $1 }
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
