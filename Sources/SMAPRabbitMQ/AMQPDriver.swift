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
    static let heartbeatFrame: [UInt8] = [Frame.Kind.heartbeat.rawValue, 0, 0, 0, 0, 0, 0, FrameParser.end]

    /// How many there are, for the test that looks for retain cycles.
    static let liveCount = Atomic<Int>(0)

    let connection: RabbitMQConnection
    let stream: SocketStream
    let decoder: MethodDecoder
    var parser: FrameParser
    let limits: NegotiatedLimits
    let topology = AMQPChannel(number: topologyChannel, role: .topology)
    let publishing = AMQPChannel(number: publishingChannel, role: .publishing)
    var channels: [amqp_channel_t: AMQPChannel] = [:]
    var nextChannel: amqp_channel_t
    var isBlocked = false
    var lastSent = MonotonicTime.now
    var lastReceived = MonotonicTime.now
    /// What one read has brought for the window, taken in under one lock.
    var publishEvents: [PublishWindow.Event] = []
    /// What one read has brought for each consumer.
    var deliveries: [(consumer: Consumer, deliveries: [InboundDelivery])] = []
    /// Declarations that are being repeated after a loss; nothing else is done before they are back.
    var restoring = 0
    /// When the next of them must be answered.
    var restoreLimit = MonotonicTime.distantFuture

    var descriptor: Int32 { stream.descriptor }

    // MARK: Opening

    /// Connects to the first node that lets us in; blocks, under the watchdog.
    init(connection: RabbitMQConnection, thread: ConnectionThread, name: String) throws {
        let configuration = connection.configuration
        let deadline = MonotonicTime.now.advanced(by: configuration.connectTimeout)
        self.connection = connection
        let decoder = MethodDecoder()
        var parser = FrameParser()
        (stream, limits) = try Self.connect(configuration, name, thread, deadline, &parser, decoder)
        self.decoder = decoder
        self.parser = parser
        Self.liveCount.add(1, ordering: .relaxed)
        nextChannel = connection.isForPublishing ? Self.publishingChannel + 1 : Self.publishingChannel
        Socket.setAcknowledgementLimit(descriptor, configuration.acknowledgementLimit)
        do {
            try restoreTopology()
            if connection.isForPublishing { try open(publishing) }
            try sendSteps()
        } catch {
            stream.close()
            throw error
        }
        connection.opened()
    }

    deinit { Self.liveCount.subtract(1, ordering: .relaxed) }

    private static func connect(
        _ configuration: RabbitMQConfiguration, _ name: String, _ thread: ConnectionThread, _ deadline: MonotonicTime,
        _ parser: inout FrameParser, _ decoder: MethodDecoder
    ) throws -> (SocketStream, NegotiatedLimits) {
        var failure: any Error = SocketError(.unresolved, "there is no node to connect to")
        let nodes = try configuration.nodes
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
                    stream.close()
                    throw error
                }
            } catch let error as AMQPFailure {
                // The nodes of a cluster have the same users.
                if case .closedByBroker = error { throw error }
                failure = error
            } catch let error as SocketError where error.kind == .interrupted {
                throw error
            } catch {
                failure = error
            }
        }
        throw failure
    }

    /// Declares again what was declared on the connections before this one, without waiting in between.
    private func restoreTopology() throws {
        let operations = connection.topology.operations
        restoring = operations.count
        restoreLimit = MonotonicTime.now.advanced(by: connection.configuration.stallLimit)
        guard restoring > 0 else { return }
        try open(topology)
        for operation in operations { topology.enqueue(try step(for: operation, .restored)) }
    }

    /// Puts the opening of a channel before all that is to be done on it.
    func open(_ channel: AMQPChannel) throws {
        channels[channel.number] = channel
        channel.reopenTime = nil
        var open = amqp_channel_open_t()
        open.out_of_band = amqp_empty_bytes
        var steps = [
            AMQPChannel.Step(
                reply: AMQP_CHANNEL_OPEN_OK_METHOD,
                frame: try MethodEncoder.frame(AMQP_CHANNEL_OPEN_METHOD, on: channel.number, open), completion: .opened)
        ]
        if case .publishing = channel.role {
            steps.append(
                AMQPChannel.Step(
                    reply: AMQP_CONFIRM_SELECT_OK_METHOD,
                    frame: try MethodEncoder.frame(
                        AMQP_CONFIRM_SELECT_METHOD, on: channel.number, amqp_confirm_select_t(nowait: 0)),
                    completion: .confirmsSelected))
            if connection.repliesAreWanted { steps.append(try consumeReplies(nil)) }
        }
        channel.enqueueFirst(steps)
    }

    // MARK: The loop

    func runOnce(now: MonotonicTime, isReadable: Bool) throws -> PollInterest {
        let mayHaveMore = isReadable ? try read(now) : false
        try checkTimes(now)
        if restoring == 0 {
            for request in connection.takeRequests() { try begin(request) }
        }
        if connection.window.withLock({ $0.needsReset }) { try resetPublishing(now) }
        try sendSteps()
        try sendSettlements()
        try writePublishes()
        let before = stream.sentCount
        let isFlushed = try stream.flush()
        if stream.sentCount > before { lastSent = now }
        return PollInterest(
            writable: !isFlushed, timer: mayHaveMore ? now : nextTime(now, isFlushed: isFlushed), pause: pause)
    }

    private func checkTimes(_ now: MonotonicTime) throws {
        if restoring > 0, now >= restoreLimit {
            throw EventsError(
                .connectionLost,
                "the topology was not declared again within \(connection.configuration.stallLimit) (stallLimit)",
                operation: "connection")
        }
        for channel in [topology, publishing] {
            if let time = channel.reopenTime, now >= time { try open(channel) }
        }
        guard limits.heartbeat > 0 else { return }
        // Two intervals without a sign of life (RabbitMQ guide, "Heartbeats").
        if now >= lastReceived.advanced(by: .seconds(2 * limits.heartbeat)) {
            throw SocketError(.lost, "no heartbeat from the server for \(2 * limits.heartbeat) s")
        }
        if now >= lastSent.advanced(by: .milliseconds(500 * limits.heartbeat)), stream.isFlushed {
            stream.append { $0 += Self.heartbeatFrame }
        }
    }

    /// When to come round at the latest.
    private func nextTime(_ now: MonotonicTime, isFlushed: Bool) -> MonotonicTime? {
        var time = MonotonicTime.distantFuture
        if limits.heartbeat > 0 {
            time = min(
                lastReceived.advanced(by: .seconds(2 * limits.heartbeat)),
                // What is stuck in the socket is no heartbeat less.
                isFlushed ? lastSent.advanced(by: .milliseconds(500 * limits.heartbeat)) : .distantFuture)
        }
        if restoring > 0 { time = min(time, restoreLimit) }
        for channel in [topology, publishing] { time = min(time, channel.reopenTime ?? .distantFuture) }
        // What cannot be written now waits for something else than time.
        if isFlushed, canPublish, let patience = connection.window.withLock({ $0.patience }) {
            time = min(time, now.advanced(by: patience))
        }
        return time == .distantFuture ? nil : time
    }

    /// How long work may pile up before the next round, in microseconds. While hundreds of messages are in flight both
    /// sides have enough to do meanwhile, and each round then handles dozens at once.
    private var pause: UInt32 {
        let sent = connection.window.withLock { $0.sentCount }
        if sent >= 256 { return 2_000 }
        let isConsuming = channels.values.contains {
            if case .consuming(let consumer) = $0.role { consumer.isBusy } else { false }
        }
        return isConsuming ? 1_000 : 0
    }

    // MARK: The end

    func finish(_ error: (any Error)?) {
        if let error {
            connection.ended(error, sentBytes: stream.sentCount, blamed: requestInFlight(error))
        } else {
            sayGoodbye()
            connection.end(EventsError(.closed, "the transport was closed", operation: "connection"))
        }
        for channel in channels.values { _ = channel.takeAll() }
        channels = [:]
        // After an error half a frame may be out: the stream is never resumed.
        stream.close()
    }

    /// The request that the broker has closed the connection for.
    private func requestInFlight(_ error: any Error) -> BrokerRequest? {
        guard case AMQPFailure.closedByBroker(_, _, let method) = error, method != 0 else { return nil }
        for channel in channels.values {
            for step in channel.takeAll() where step.reply == method | 1 {
                if case .request(let request) = step.completion { return request }
            }
        }
        return nil
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
