internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization
internal import Waiting

/// A request to the broker that is answered by one reply: declare, bind, consume, cancel, close.
///
/// It is answered once, by the first of these: the broker, its deadline, its caller's cancellation, the end of the
/// connection.
final class BrokerRequest: Sendable {
    enum Operation: Sendable {
        case declareExchange(ExchangeDeclaration)
        case declareQueue(QueueDeclaration)
        case bind(QueueBinding)
        case checkExchange(String)
        case checkQueue(QueueName)
        /// Compares a declaration with what exists, by declaring it; it is not declared again after a loss.
        case compareExchange(ExchangeDeclaration)
        case compareQueue(QueueDeclaration)
        /// Consumes the replies to requests on the publishing channel.
        case consumeReplies
        case consume(Consumer)
        /// Waits until the broker has the settlements that were made before.
        case flushSettlements(Consumer)
        case stopConsumer(Consumer)
        case closeConsumer(Consumer)
    }

    enum Reply: Sendable {
        case done
        case queue(QueueStatus)
    }

    let operation: Operation
    /// The operation in words, for errors.
    let name: String
    let deadline: MonotonicTime
    /// Later requests have higher numbers: after a loss they are repeated in this order.
    let number = BrokerRequest.numbers.add(1, ordering: .relaxed).newValue
    private static let numbers = Atomic<UInt64>(0)
    let waiter = Waiter<Reply>()
    /// How many connections have ended, naming nothing, while it was the oldest under way.
    let losses = Atomic<Int>(0)

    init(_ operation: Operation, name: String, deadline: MonotonicTime) {
        self.operation = operation
        self.name = name
        self.deadline = deadline
    }

    var isAnswered: Bool { waiter.isResolved }

    /// Whether it ends a consumer. That is done although no caller waits for it any more, and whatever else is waiting:
    /// only then do its deliveries go back to their queue.
    var isClose: Bool {
        switch operation {
        case .stopConsumer, .closeConsumer: true
        default: false
        }
    }

    func succeed(_ reply: Reply) { waiter.resolve(.success(reply)) }

    func fail(_ code: EventsError.Code, _ message: String) {
        waiter.resolve(.failure(EventsError(code, message, operation: name)))
    }
}

extension BrokerRequest.Operation: CustomStringConvertible {
    var description: String {
        switch self {
        case .declareExchange(let exchange), .compareExchange(let exchange): "exchange \(exchange.name)"
        case .declareQueue(let queue), .compareQueue(let queue): "queue \(queue.name)"
        case .bind(let binding): "binding of \(binding.queue) to \(binding.exchange) with '\(binding.routingKey)'"
        case .checkExchange(let name): "exchange \(name)"
        case .checkQueue(let name): "queue \(name)"
        case .consumeReplies: "consumer of replies"
        case .consume(let consumer), .flushSettlements(let consumer), .stopConsumer(let consumer),
            .closeConsumer(let consumer):
            "consumer of \(consumer.queue)"
        }
    }
}
