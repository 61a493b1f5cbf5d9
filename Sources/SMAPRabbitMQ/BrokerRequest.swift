internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

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

    init(_ operation: Operation, name: String, deadline: MonotonicTime) {
        self.operation = operation
        self.name = name
        self.deadline = deadline
    }

    var isAnswered: Bool { waiter.isResolved }

    func succeed(_ reply: Reply) { waiter.resolve(.success(reply)) }

    func fail(_ code: EventsError.Code, _ message: String) {
        waiter.resolve(.failure(EventsError(code, message, operation: name)))
    }
}
