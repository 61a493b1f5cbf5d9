internal import ConnectionThread
internal import SMAPEvents

/// What the broker has refused a moment ago: destinations, and bodies that are too large. Each message like that would close
/// the channel for all others, so for a while they are refused here. It holds for one connection.
struct PublishRefusals {
    /// What a broker's text is about.
    struct Subject {
        private let text: String
        private let size: Int?
        fileprivate let bodyLimit: Int?

        init(_ text: String) {
            self.text = text
            // "message size 10201 is larger than configured max size 4000"
            let match = text.firstMatch(of: /message size (\d+) is larger than .*max size (\d+)/)
            size = match.flatMap { Int($0.1) }
            bodyLimit = match.flatMap { Int($0.2) }
        }

        /// Whether a message is meant. RabbitMQ writes "no exchange 'x' in vhost …", "access to exchange 'x' in vhost …" and
        /// "access to topic 'key' in exchange 'x' in vhost …", and calls the default exchange `amq.default`.
        func includes(_ message: EncodedMessage) -> Bool {
            if let size { return message.body.count == size }
            let destination = message.destination
            let exchange = "exchange '\(destination.exchange.isEmpty ? "amq.default" : destination.exchange)'"
            return text.contains(
                isTopic ? "topic '\(destination.routingKey)' in \(exchange)" : exchange)
        }

        fileprivate var isTopic: Bool { text.contains("topic '") }
    }

    private struct Refusal {
        let exchange: String
        /// Nil for all keys.
        let routingKey: String?
        var error: EventsError
        var until: MonotonicTime
        var count: Int

        func includes(_ destination: PublishDestination) -> Bool {
            exchange == destination.exchange && (routingKey == nil || routingKey == destination.routingKey)
        }
    }

    /// So many refused destinations are remembered.
    private static let limit = 64
    private static let backoff = Backoff(first: .milliseconds(100), longest: .seconds(5))

    private var refusals: [Refusal] = []
    /// The largest body that the broker takes, if it has said so.
    private var bodyLimit: Int?

    var isEmpty: Bool { refusals.isEmpty && bodyLimit == nil }

    /// Remembers what was refused, for a while that grows.
    ///
    /// - Parameter message: One of the messages that it includes.
    mutating func insert(_ subject: Subject, of message: EncodedMessage, _ error: EventsError, now: MonotonicTime) {
        if let limit = subject.bodyLimit {
            bodyLimit = min(bodyLimit ?? .max, limit)
            return
        }
        let exchange = message.destination.exchange
        let key = subject.isTopic ? message.destination.routingKey : nil
        var count = 1
        if let index = refusals.firstIndex(where: { $0.exchange == exchange && $0.routingKey == key }) {
            count += refusals.remove(at: index).count
        }
        if refusals.count >= Self.limit { refusals.removeFirst() }
        refusals.append(
            Refusal(
                exchange: exchange, routingKey: key, error: error,
                until: now.advanced(by: Self.backoff.delay(after: count)), count: count))
    }

    /// Why a message would be refused, as one like it was a moment ago.
    func reason(for publish: PendingPublish) -> EventsError? {
        guard !isEmpty, let message = publish.message else { return nil }
        if let bodyLimit, message.body.count > bodyLimit {
            return EventsError(
                .eventTooLarge,
                "the message has \(message.body.count) bytes, and the broker takes \(bodyLimit) (max_message_size)",
                operation: "publish")
        }
        let now = MonotonicTime.now
        return refusals.first { $0.until > now && $0.includes(message.destination) }?.error.with(outcome: .unsent)
    }

    /// An exchange is there: what was refused for its lack is refused no longer.
    mutating func exchangeDeclared(_ name: String) { refusals.removeAll { $0.exchange == name } }

    /// The broker has taken a message to a destination.
    mutating func accepted(_ destination: PublishDestination) {
        if !refusals.isEmpty { refusals.removeAll { $0.includes(destination) } }
    }
}
