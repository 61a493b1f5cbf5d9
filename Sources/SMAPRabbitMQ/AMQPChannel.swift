internal import CRabbitMQ
internal import DequeModule
internal import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// One AMQP channel: its methods in flight, one at a time, and the message that is being put together.
///
/// Lives on the connection thread only.
final class AMQPChannel {
    enum Role {
        case topology
        case publishing
        case consuming(Consumer)
    }

    /// A method to send, and what to do with its reply.
    struct Step {
        let reply: amqp_method_number_t
        /// Whether somebody still waits for it; checked before it is sent.
        let isWanted: () -> Bool
        let send: () throws -> Void
        let done: (Result<amqp_method_t, EventsError>) -> Void
    }

    /// A message whose frames are arriving: method, then header, then body.
    struct Assembly {
        enum Kind {
            case delivery(tag: UInt64, isRedelivered: Bool)
            case returned
        }

        let kind: Kind
        let exchange: String
        let routingKey: String
        var properties = MessageProperties()
        var expected: UInt64?
        var received: UInt64 = 0
        var body: [UInt8] = []
        var isTooLarge = false
    }

    let number: amqp_channel_t
    let role: Role
    var isOpen = false
    var isClosing = false
    var assembly: Assembly?
    private var steps: Deque<Step> = []
    private var awaiting: Step?

    init(number: amqp_channel_t, role: Role) {
        self.number = number
        self.role = role
    }

    func enqueue(_ step: Step, first: Bool = false) throws {
        if first { steps.prepend(step) } else { steps.append(step) }
        try sendNext()
    }

    /// Sends the next method unless one is under way: a channel answers in order, but an error closes it, and then it
    /// must be clear which method was at fault.
    func sendNext() throws {
        while awaiting == nil, let step = steps.popFirst() {
            guard step.isWanted() else { continue }
            awaiting = step
            try step.send()
        }
    }

    /// Takes a reply. False if nobody waits for it.
    func reply(_ method: amqp_method_t) throws -> Bool {
        guard let step = awaiting, step.reply == method.id else { return false }
        awaiting = nil
        step.done(.success(method))
        try sendNext()
        return true
    }

    /// The broker has closed the channel: the method under way was at fault. Those behind it stay, if there is to be
    /// another channel of this number.
    func closed(_ error: EventsError, keepSteps: Bool) {
        isOpen = false
        assembly = nil
        let failed = awaiting
        awaiting = nil
        failed?.done(.failure(error))
        if !keepSteps {
            for step in steps { step.done(.failure(error)) }
            steps = []
        }
    }
}
