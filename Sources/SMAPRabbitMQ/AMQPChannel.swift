internal import CRabbitMQ
internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// One AMQP channel: its methods in flight, and the message that is being put together.
///
/// Lives on the connection thread only. It refers to nothing that refers to it: what is to be done with a reply is a
/// value (``Completion``), not a closure.
final class AMQPChannel {
    enum Role {
        case topology
        case publishing
        case consuming(Consumer)
    }

    /// What a reply is for.
    enum Completion {
        case opened
        case confirmsSelected
        case repliesConsumed(BrokerRequest?)
        case prefetchSet
        case restored
        case closedByUs
        case request(BrokerRequest)
    }

    /// A method, encoded already, and what to do with its reply.
    struct Step {
        let reply: amqp_method_number_t
        let frame: [UInt8]
        let completion: Completion

        /// Whether a caller still waits for it; checked before it is sent.
        var isWanted: Bool {
            switch completion {
            case .request(let request):
                // A channel is closed whoever waits for it: its deliveries go back to their queue only then.
                if case .closeConsumer = request.operation { true } else { !request.isAnswered }
            case .repliesConsumed(let request?): !request.isAnswered
            default: true
            }
        }
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
        /// Whether the body is not kept: it is too large, or it is not needed.
        var dropsBody = false
    }

    /// So many methods may be in flight. A channel answers in order, and an error concerns the oldest that is not answered,
    /// so that each reply and each error has its author.
    private static let pipelineLimit = 128

    let number: amqp_channel_t
    let role: Role
    var isOpen = false
    var isClosing = false
    var assembly: Assembly?
    /// When it is opened again after a failure; nil if it is not waiting for that.
    var reopenTime: MonotonicTime?
    /// How often in a row it was closed before anything was done on it.
    var failures = 0
    private var queued: Deque<Step> = []
    private var awaiting: Deque<Step> = []

    init(number: amqp_channel_t, role: Role) {
        self.number = number
        self.role = role
    }

    var isIdle: Bool { queued.isEmpty && awaiting.isEmpty }

    func enqueue(_ step: Step) { queued.append(step) }

    /// The methods to send now.
    func takeSteps() -> [Step] {
        guard !queued.isEmpty, reopenTime == nil else { return [] }
        var steps: [Step] = []
        while awaiting.count < Self.pipelineLimit, let step = queued.popFirst() {
            guard step.isWanted else { continue }
            awaiting.append(step)
            steps.append(step)
        }
        return steps
    }

    /// The step that a reply is for; nil if there is none.
    func takeStep(for method: amqp_method_t) -> Step? {
        guard let step = awaiting.first, step.reply == method.id else { return nil }
        return awaiting.removeFirst()
    }

    /// The broker has closed the channel: the oldest step in flight was at fault, if the broker closed it for a step.
    /// Those behind it were ignored, and are sent again on the next channel of this number.
    func closed(isFaultOfStep: Bool) -> Step? {
        isOpen = false
        assembly = nil
        let failed = isFaultOfStep ? awaiting.popFirst() : nil
        for step in awaiting.reversed() {
            switch step.completion {
            // Part of opening the channel, which begins again.
            case .opened, .confirmsSelected, .closedByUs: break
            default: queued.prepend(step)
            }
        }
        awaiting = []
        return failed
    }

    /// Everything that waits for a reply or to be sent, when there will be none.
    func takeAll() -> [Step] {
        defer {
            queued = []
            awaiting = []
        }
        return Array(awaiting) + Array(queued)
    }

    /// Puts the steps of opening before all others.
    func enqueueFirst(_ steps: [Step]) {
        for step in steps.reversed() { queued.prepend(step) }
    }
}
