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
        /// The broker does not answer on it: its number is not used until it is closed, and what comes on it is ignored.
        case retired
    }

    /// How the channel stands. One value, so that no two parts of it can contradict each other.
    enum State {
        /// There is none of this number at the broker.
        case closed
        /// It is opened; the broker has until `limit` to answer.
        case opening(limit: MonotonicTime)
        case open
        /// We are closing it; the broker has until `limit` to answer. Nothing else is sent on it.
        case closing(limit: MonotonicTime)
        /// It could not be opened, or was closed at once; it is opened again at that time.
        case waiting(until: MonotonicTime)
    }

    /// What a reply is for.
    enum Completion {
        /// A part of opening the channel; the last one makes it usable.
        case opening(isLast: Bool)
        case repliesConsumed
        case prefetchSet
        /// The consumer is cancelled, to consume again with another prefetch.
        case cancelled(Consumer)
        case consumedAgain
        /// A declaration that was made before a loss.
        case restored(BrokerRequest.Operation)
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
            case .request(let request): !request.isAnswered || request.isClose
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
        var headers: HeaderTable?
        var rawTexts: [String: [UInt8]] = [:]
        var expected: UInt64?
        var received: UInt64 = 0
        var body: [UInt8] = []
        /// Whether the body is not kept: it is too large, or it is not needed.
        var dropsBody = false

        mutating func take(_ received: (properties: MessageProperties, rawTexts: [String: [UInt8]])) {
            (properties, rawTexts) = received
        }
    }

    /// So many methods may be in flight. A channel answers in order, and an error concerns the oldest that is not answered,
    /// so that each reply and each error has its author.
    private static let pipelineLimit = 128

    let number: amqp_channel_t
    let role: Role
    private(set) var state = State.closed
    var assembly: Assembly?
    /// How often its consumer has begun to consume again.
    var consumers = 0
    /// Whether its consumer is cancelled at the moment, to consume again.
    var isWidening = false
    /// Those who want its consumer stopped, who wait for that.
    var stops: [BrokerRequest] = []
    /// Those who wait until the settlements of its consumer are out.
    var flushes: [BrokerRequest] = []
    /// Whether its consumer is to be stopped, or is.
    var isStopped = false
    /// How often in a row it was closed before anything was done on it.
    var failures = 0
    private var queued: Deque<Step> = []
    private var awaiting: Deque<Step> = []
    /// Until when the oldest method in flight must be answered.
    private var stepLimit = MonotonicTime.distantFuture

    init(number: amqp_channel_t, role: Role) {
        self.number = number
        self.role = role
    }

    /// Whether messages and settlements can be sent on it.
    var isOpen: Bool { if case .open = state { true } else { false } }

    /// Whether we are closing it.
    var isClosing: Bool { if case .closing = state { true } else { false } }

    /// When the driver must look at it, if nothing comes before.
    var limit: MonotonicTime {
        switch state {
        case .opening(let limit), .closing(let limit), .waiting(let limit): limit
        case .open: awaiting.isEmpty ? .distantFuture : stepLimit
        case .closed: .distantFuture
        }
    }

    func enqueue(_ step: Step) { queued.append(step) }

    /// Begins to open it: these steps go before all others.
    func beginOpening(_ steps: [Step], limit: MonotonicTime) {
        state = .opening(limit: limit)
        for step in steps.reversed() { queued.prepend(step) }
    }

    /// The last step of opening was answered. One that is being closed meanwhile stays so.
    func opened() { if case .opening = state { state = .open } }

    /// The broker's answer to opening or closing may take until then.
    func renewLimit(_ limit: MonotonicTime) {
        switch state {
        case .opening: state = .opening(limit: limit)
        case .closing: state = .closing(limit: limit)
        case .open: stepLimit = limit
        case .closed, .waiting: break
        }
    }

    /// It is opened again later.
    func wait(until time: MonotonicTime) { state = .waiting(until: time) }

    /// The methods to send now: none on a channel that is being closed, since the broker would ignore them.
    ///
    /// - Parameters:
    ///   - limit: Until when the first of them must be answered.
    ///   - isPipelined: Whether more than one may be in flight.
    func takeSteps(limit: MonotonicTime, isPipelined: @autoclosure () -> Bool) -> [Step] {
        guard !queued.isEmpty else { return [] }
        switch state {
        case .opening, .open: break
        case .closed, .closing, .waiting: return []
        }
        if awaiting.isEmpty { stepLimit = limit }
        var steps: [Step] = []
        let room = isPipelined() ? Self.pipelineLimit : 1
        while awaiting.count < room, let step = queued.popFirst() {
            guard step.isWanted else { continue }
            awaiting.append(step)
            steps.append(step)
        }
        return steps
    }

    /// Begins to close it. What is in flight is answered before; what is queued waits for the next channel of this number.
    func beginClosing(_ step: Step, limit: MonotonicTime) {
        state = .closing(limit: limit)
        awaiting.append(step)
    }

    /// The step that a reply is for; nil if it is for none, which no broker should send.
    ///
    /// - Parameter limit: Until when the next one must be answered.
    func takeStep(for method: amqp_method_t, limit: MonotonicTime) -> Step? {
        guard let step = awaiting.first, step.reply == method.id else { return nil }
        stepLimit = limit
        return awaiting.removeFirst()
    }

    /// The broker has closed the channel as asked. What was in flight before is not answered any more: RabbitMQ leaves out the
    /// answer to a cancel that it has not carried out yet.
    func takeStepsBeforeClosing() -> [Step] {
        guard isClosing, let index = awaiting.firstIndex(where: \.isPartOfClosing) else { return [] }
        defer { awaiting.removeFirst(index) }
        return Array(awaiting.prefix(index))
    }

    /// The channel is gone: the broker has closed it, or has answered our close.
    ///
    /// Where the broker has closed it for a step, that is the oldest one in flight, which is returned. Those behind it were
    /// ignored, and are sent again on the next channel of this number; opening and closing begin again.
    func closed(isFaultOfStep: Bool) -> (failed: Step?, closing: Step?) {
        state = .closed
        assembly = nil
        var failed: Step?
        var closing: Step?
        if isFaultOfStep, let first = awaiting.first, !first.isPartOfClosing { failed = awaiting.popFirst() }
        for step in awaiting.reversed() {
            switch step.completion {
            case .opening, .repliesConsumed, .prefetchSet: break
            case _ where step.isPartOfClosing: closing = step
            default: queued.prepend(step)
            }
        }
        awaiting = []
        queued.removeAll { if case .repliesConsumed = $0.completion { true } else { false } }
        return (failed, closing)
    }

    /// Whether no method is in flight.
    var isIdle: Bool { awaiting.isEmpty }

    /// The oldest method in flight that a certain reply is for.
    func oldestStep(answeredBy reply: amqp_method_number_t) -> Step? { awaiting.first { $0.reply == reply } }

    /// The oldest declaration in flight, of a caller or of before a loss.
    var oldestDeclaration: Completion? {
        awaiting.lazy.map(\.completion).first {
            switch $0 {
            case .restored, .request: true
            default: false
            }
        }
    }

    /// Everything that waits for a reply or to be sent, when there will be none.
    func takeAll() -> [Step] {
        defer {
            queued = []
            awaiting = []
        }
        return Array(awaiting) + Array(queued)
    }
}

extension AMQPChannel.Step {
    /// Whether it is `channel.close`.
    var isPartOfClosing: Bool { reply == AMQP_CHANNEL_CLOSE_OK_METHOD }

    /// The same method on another channel.
    func moved(to channel: amqp_channel_t) -> AMQPChannel.Step {
        var frame = frame
        // Behind the frame's type (AMQP 0-9-1, 2.3.5).
        frame[1] = UInt8(channel >> 8)
        frame[2] = UInt8(channel & 0xFF)
        return AMQPChannel.Step(reply: reply, frame: frame, completion: completion)
    }

    /// Whether a caller has asked for it.
    var isRequested: Bool { if case .request = completion { true } else { false } }

    /// Whether the channel cannot be used without it.
    var isPartOfOpening: Bool { if case .opening = completion { true } else { false } }
}
