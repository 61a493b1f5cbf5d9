internal import CRabbitMQ
internal import ConnectionThread
internal import Logging
internal import SMAPEvents
internal import Synchronization

/// Speaks AMQP 0-9-1 over one connection. The socket is ours, and librabbitmq only encodes and decodes. Lives on its
/// connection thread only.
///
/// After login nothing here blocks: methods are appended to the stream, replies are matched as their frames come, and a full
/// socket is waited for by the thread's `poll`.
final class AMQPDriver: ConnectionDriver {
    static let topologyChannel: amqp_channel_t = 1
    static let publishingChannel: amqp_channel_t = 2
    /// So many bytes may wait for the socket before no more messages are taken: confirms are read in between.
    static let batchLimit = 256 * 1024
    /// How long the goodbye of the broker is waited for at most.
    static let goodbyeLimit = Duration.seconds(1)
    /// So many channels may be given up before the connection is.
    static let retiredLimit = 16
    static let heartbeatFrame: [UInt8] = [Frame.Kind.heartbeat.rawValue, 0, 0, 0, 0, 0, 0, FrameParser.end]

    enum RepliesState {
        case none, asked, consumed
    }

    let connection: RabbitMQConnection
    let stream: SocketStream
    let decoder: MethodDecoder
    var parser: FrameParser
    let limits: NegotiatedLimits
    private(set) var topology = AMQPChannel(number: topologyChannel, role: .topology)
    let publishing = AMQPChannel(number: publishingChannel, role: .publishing)
    var channels: [amqp_channel_t: AMQPChannel] = [:]
    var nextChannel: amqp_channel_t
    var isBlocked = false
    var lastSent = MonotonicTime.now
    var lastReceived = MonotonicTime.now
    /// Since when the socket takes nothing of what is to be sent; nil while it does.
    private var stuckSince: MonotonicTime?
    private var lastSentCount: UInt64 = 0
    /// Whether replies to requests are consumed on the publishing channel that is open now.
    var replies = RepliesState.none
    /// The requests that wait for that.
    var repliesRequests: [BrokerRequest] = []
    /// What one read has brought for the window, taken in under one lock.
    var publishEvents: [PublishWindow.Event] = []
    /// What one read has brought for each consumer.
    var deliveries: [(consumer: Consumer, deliveries: [InboundDelivery])] = []
    /// What is being declared again.
    var restoration = Restoration()

    var descriptor: Int32 { stream.descriptor }

    // MARK: Opening

    /// Connects to the first node that accepts the login; blocks, under the watchdog.
    init(connection: RabbitMQConnection, thread: ConnectionThread, name: String) throws {
        let configuration = connection.configuration
        let deadline = MonotonicTime.now.advanced(by: configuration.connectTimeout)
        self.connection = connection
        let decoder = MethodDecoder()
        var parser = FrameParser()
        (stream, limits) = try Self.connect(configuration, name, thread, deadline, &parser, decoder)
        self.decoder = decoder
        self.parser = parser
        connection.driverCount.add(1, ordering: .relaxed)
        nextChannel = connection.isForPublishing ? Self.publishingChannel + 1 : Self.publishingChannel
        do {
            try restoreTopology()
            if connection.isForPublishing { try open(publishing) }
            try sendSteps()
        } catch {
            stream.close()
            throw error
        }
        // Opening may have taken longer than a heartbeat.
        (lastSent, lastReceived) = (.now, .now)
        connection.opened()
    }

    deinit { connection.driverCount.subtract(1, ordering: .relaxed) }

    private static func connect(
        _ configuration: RabbitMQConfiguration, _ name: String, _ thread: ConnectionThread, _ deadline: MonotonicTime,
        _ parser: inout FrameParser, _ decoder: MethodDecoder
    ) throws -> (SocketStream, NegotiatedLimits) {
        var failure: any Error = SocketError(.unresolved, "there is no node to connect to")
        let nodes = try configuration.nodes
        // The later nodes' names are known when it is their turn, however slow the name server is.
        for node in nodes { Socket.resolve(host: node.host, port: node.port) }
        for (index, node) in nodes.enumerated() {
            // A node that swallows packets must leave time for the next one.
            let share = MonotonicTime.now.advanced(share: nodes.count - index, until: deadline)
            do {
                let stream = try SocketStream(
                    host: node.host, port: node.port, tls: configuration.tls?.options, deadline: share,
                    interrupt: thread.interrupt)
                do {
                    try thread.registerSocket(stream.descriptor)
                    parser = FrameParser()
                    var login = AMQPLogin(configuration, name: name)
                    return (
                        stream,
                        try login.run(stream, &parser, decoder, deadline: share, interrupt: thread.interrupt)
                    )
                } catch {
                    // The watchdog's copy would keep the connection to this node open.
                    thread.releaseSocket()
                    stream.close()
                    throw error
                }
            } catch let error as AMQPFailure {
                // The nodes of a cluster have the same users. Everything else may be a matter of this node.
                if case .closedByBroker(403, _, _) = error { throw error }
                failure = error
            } catch let error as SocketError where error.kind == .interrupted {
                throw error
            } catch {
                failure = error
            }
        }
        throw failure
    }

    /// Until when the broker must have answered what is asked of it now.
    var answerLimit: MonotonicTime { MonotonicTime.now.advanced(by: connection.configuration.stallLimit) }

    /// Puts the opening of a channel before all that is to be done on it.
    func open(_ channel: AMQPChannel) throws {
        channels[channel.number] = channel
        var open = amqp_channel_open_t()
        open.out_of_band = amqp_empty_bytes
        let isPublishing = channel === publishing
        var steps = [
            AMQPChannel.Step(
                reply: AMQP_CHANNEL_OPEN_OK_METHOD,
                frame: try MethodEncoder.frame(AMQP_CHANNEL_OPEN_METHOD, on: channel.number, open),
                completion: .opening(isLast: !isPublishing))
        ]
        if isPublishing {
            steps.append(
                AMQPChannel.Step(
                    reply: AMQP_CONFIRM_SELECT_OK_METHOD,
                    frame: try MethodEncoder.frame(
                        AMQP_CONFIRM_SELECT_METHOD, on: channel.number, amqp_confirm_select_t(nowait: 0)),
                    completion: .opening(isLast: true)))
            replies = .none
        }
        channel.beginOpening(steps, limit: answerLimit)
        if isPublishing, connection.repliesAreWanted || !repliesRequests.isEmpty { try consumeReplies() }
    }

    // MARK: The loop

    func runOnce(now: MonotonicTime, isReadable: Bool) throws -> PollInterest {
        let mayHaveMore = isReadable ? try read(now) : false
        try checkTimes(now)
        if !restoration.isAwaited {
            for request in connection.takeRequests() { try begin(request) }
        }
        if connection.window.withLock({ $0.needsReset(now: now) }) { try resetPublishing(now) }
        try sendSteps()
        try sendSettlements()
        try writePublishes(now)
        let before = stream.sentCount
        let isFlushed = try stream.flush()
        if stream.sentCount > before { lastSent = now }
        // Its end is in what comes before it.
        if stream.hasFailed { _ = try read(now) }
        // A broker that blocks reads nothing for as long as it likes.
        if isFlushed || isBlocked || stream.sentCount > lastSentCount {
            stuckSince = nil
            lastSentCount = stream.sentCount
        } else {
            stuckSince = stuckSince ?? now
        }
        return PollInterest(
            writable: !isFlushed, timer: mayHaveMore ? now : nextTime(now, isFlushed: isFlushed), pause: pause)
    }

    private func checkTimes(_ now: MonotonicTime) throws {
        for channel in channels.values where now >= channel.limit {
            switch (channel.state, channel.role) {
            case (.waiting, _): try open(channel)
            // A broker that blocks reads nothing, and so answers nothing.
            case _ where isBlocked: break
            case (.open, .publishing):
                // Only the consumer of replies is asked for on it.
                if let step = publishing.oldestStep(answeredBy: AMQP_BASIC_CONSUME_OK_METHOD) {
                    try complete(
                        step, on: publishing,
                        .failure(
                            EventsError(
                                .deadlineExceeded, "the broker did not answer within \(silence)", operation: "request"))
                    )
                }
                try resetPublishing(now)
            case (.open, _), (.closing, .consuming): try retire(channel)
            default:
                throw EventsError(
                    .connectionLost, "the broker did not open or close channel \(channel.number) within \(silence)",
                    operation: "connection")
            }
        }
        try continueRestoration(now)
        // The heartbeats of a broker that reads nothing come all the same.
        if let stuckSince, now >= stuckSince.advanced(by: connection.configuration.stallLimit) {
            throw AMQPFailure.silent(
                "the server has read nothing for \(connection.configuration.stallLimit) (stallLimit)")
        }
        guard limits.heartbeat > 0 else { return }
        // Two intervals without a sign of life (RabbitMQ guide, "Heartbeats").
        if now >= lastReceived.advanced(by: .seconds(2 * limits.heartbeat)) {
            throw AMQPFailure.silent("no heartbeat from the server for \(2 * limits.heartbeat) s")
        }
        if now >= lastSent.advanced(by: .milliseconds(500 * limits.heartbeat)), stream.isFlushed {
            stream.append { $0 += Self.heartbeatFrame }
        }
    }

    private var silence: String { "\(connection.configuration.stallLimit) (stallLimit)" }

    /// The broker does not answer on a channel, which others must not pay for: it is closed, and its number is not used until
    /// the broker has done so.
    private func retire(_ channel: AMQPChannel) throws {
        let error = EventsError(
            .deadlineExceeded, "the broker did not answer within \(silence)", operation: "channel \(channel.number)")
        connection.logger.warning(
            "the broker does not answer on a channel, and it is replaced",
            metadata: ["connection": "\(connection.name)", "channel": "\(channel.number)"])
        if !channel.isClosing {
            let close = try closeStep(channel, .closedByUs)
            stream.append { $0 += close.frame }
        }
        var steps = channel.takeAll()
        channels[channel.number] = AMQPChannel(number: channel.number, role: .retired)
        switch channel.role {
        case .consuming(let consumer):
            for step in steps {
                switch step.completion {
                case .request(let request): answer(request, request.isClose ? .success(.done) : .failure(error))
                default: break
                }
            }
            answerStops(channel)
            failFlushes(channel)
            connection.remove(consumer)
            consumer.fail(EventsError(.connectionLost, error.message, operation: "consume from \(consumer.queue)"))
        default:
            guard retiredCount <= Self.retiredLimit, let number = freeChannel() else {
                throw EventsError(
                    .connectionLost, "the broker does not answer on \(retiredCount) channels", operation: "connection")
            }
            topology = AMQPChannel(number: number, role: .topology)
            let failed = steps.removeFirst()
            // What callers wait for goes first: the broker may leave more of the others unanswered.
            steps = steps.filter(\.isRequested) + steps.filter { !$0.isRequested }
            for step in steps where try !givesUp(step, error) { topology.enqueue(step.moved(to: number)) }
            try complete(failed, on: topology, .failure(error))
            try open(topology)
        }
    }

    /// When the next round is due at the latest.
    private func nextTime(_ now: MonotonicTime, isFlushed: Bool) -> MonotonicTime? {
        var time = MonotonicTime.distantFuture
        if limits.heartbeat > 0 {
            time = min(
                lastReceived.advanced(by: .seconds(2 * limits.heartbeat)),
                // No heartbeat is due while other bytes wait for the socket.
                isFlushed ? lastSent.advanced(by: .milliseconds(500 * limits.heartbeat)) : .distantFuture)
        }
        if restoration.isAwaited { time = min(time, restoration.limit) }
        if restoration.pendingCount == 0, !isBlocked { time = min(time, restoration.repeatTime) }
        if let stuckSince {
            time = min(time, stuckSince.advanced(by: connection.configuration.stallLimit))
        }
        if !isBlocked { for channel in channels.values { time = min(time, channel.limit) } }
        // What cannot be written now waits for something else than time.
        if isFlushed, canPublish {
            let (patience, resetTime) = connection.window.withLock { ($0.patience, $0.resetTime) }
            time = min(time, resetTime)
            if let patience { time = min(time, now.advanced(by: patience)) }
        }
        return time == .distantFuture ? nil : time
    }

    /// How long work may pile up before the next round, in microseconds. While hundreds of messages are in flight both
    /// sides have enough to do meanwhile, and each round then handles dozens at once.
    ///
    /// With fewer in flight a pause was measured and is not worth its latency: confirms come in groups, as the broker writes
    /// its log, and the callers that they answer publish again before the next group.
    private var pause: UInt32 {
        if connection.window.withLock({ $0.sentCount }) >= 256 { return 2_000 }
        let isConsuming = channels.values.contains {
            if case .consuming(let consumer) = $0.role { consumer.isBusy } else { false }
        }
        return isConsuming ? 1_000 : 0
    }

    // MARK: The end

    func finish(_ error: (any Error)?) {
        if let error {
            var blamed: BrokerRequest?
            switch stepInFlight(error)?.completion {
            case .request(let request): blamed = request
            case .restored(let operation):
                connection.restorationFailed(operation, error, endedConnection: true)
            default: break
            }
            // Without a name, a message is to blame only where there was nothing else.
            let cause =
                connection.hasStalled
                ? .other : AMQPFailure.cause(of: error, hasRequests: channels.values.contains { !$0.isIdle })
            if cause == .unexplained {
                switch unnamedStepInFlight(error) {
                case .request(let request):
                    let losses = request.losses.add(1, ordering: .relaxed).newValue
                    if losses >= DeclaredTopology.lossLimit { blamed = request }
                case .restored(let operation): connection.restorationLost(operation, error)
                default: break
                }
            }
            // Where there is not even a close, a declaration that is under way is as likely.
            let isDeclaring = (error is SocketError || error is TLSError) && topology.oldestDeclaration != nil
            connection.ended(
                error, sentBytes: stream.sentCount, blamed: blamed, cause: isDeclaring ? .other : cause)
        } else {
            // What waited until a consumer is widened waits no longer.
            for channel in channels.values where channel.isOpen {
                if case .consuming(let consumer) = channel.role {
                    sendSettlements(of: consumer, on: channel, isLast: true)
                }
            }
            sayGoodbye()
            connection.end(EventsError(.closed, "the transport was closed", operation: "connection"))
        }
        for channel in channels.values { _ = channel.takeAll() }
        channels = [:]
        // After an error half a frame may be out: the stream is never resumed.
        stream.close()
    }

    /// The step that the broker has closed the connection for: the oldest of its method that is in flight. Nil if there are such
    /// steps on several channels: the broker does not say on which.
    private func stepInFlight(_ error: any Error) -> AMQPChannel.Step? {
        // It may concern a method on a channel that was given up: then no other one is to blame.
        guard case AMQPFailure.closedByBroker(_, _, let method) = error, method != 0, retiredCount == 0 else {
            return nil
        }
        // A reply's number is one above its method's (AMQP 0-9-1, 1.3).
        let candidates = channels.values.compactMap { $0.oldestStep(answeredBy: method &+ 1) }
        return candidates.count == 1 ? candidates[0] : nil
    }

    /// What a connection that has ended without naming a method may have ended for: a channel that crashes in RabbitMQ takes
    /// it along (541, method 0).
    private func unnamedStepInFlight(_ error: any Error) -> AMQPChannel.Completion? {
        guard retiredCount == 0 else { return nil }
        if case AMQPFailure.closedByBroker(_, _, let method) = error, method != 0 { return nil }
        return topology.oldestDeclaration
    }

    /// Closes the connection in order. A broker that blocks does not read, and would not answer.
    private func sayGoodbye() {
        let deadline = min(connection.closeDeadline, MonotonicTime.now.advanced(by: Self.goodbyeLimit))
        guard !isBlocked, MonotonicTime.now < deadline else { return }
        var close = amqp_connection_close_t()
        close.reply_code = UInt16(AMQP_REPLY_SUCCESS)
        close.reply_text = amqp_empty_bytes
        guard let frame = try? MethodEncoder.frame(AMQP_CONNECTION_CLOSE_METHOD, on: 0, close) else { return }
        stream.append { $0 += frame }
        var isAnswered = false
        do {
            while !isAnswered {
                try stream.wait(until: deadline) { "" }
                _ = try stream.receive { parser.append($0) }
                try parser.forEachFrame { frame in
                    guard frame.kind == .method else { return true }
                    let id = try decoder.method(frame).id
                    isAnswered = id == AMQP_CONNECTION_CLOSE_OK_METHOD || id == AMQP_CONNECTION_CLOSE_METHOD
                    return !isAnswered
                }
            }
        } catch {
            // The socket is closed next; the broker sees for itself.
        }
    }
}
