internal import CRabbitMQ
internal import ConnectionThread
internal import Logging
internal import SMAPEvents

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// Speaks AMQP 0-9-1 over one connection with librabbitmq. Lives on its connection thread only.
///
/// After login nothing here blocks: methods are sent, and their replies are matched in the frame loop. The exception is a
/// message larger than the socket's buffer, which the library writes whole; the watchdog bounds that.
final class AMQPDriver: ConnectionDriver {
    static let topologyChannel: amqp_channel_t = 1
    static let publishingChannel: amqp_channel_t = 2
    static let firstConsumerChannel: amqp_channel_t = 3
    static let lastChannel: amqp_channel_t = 2_047
    static let frameSize: Int32 = 131_072
    /// So many bytes are written before confirms are read again.
    static let batchLimit = 256 * 1024

    let descriptor: Int32
    let connection: RabbitMQConnection
    let handle: amqp_connection_state_t
    let topology = AMQPChannel(number: topologyChannel, role: .topology)
    let publishing = AMQPChannel(number: publishingChannel, role: .publishing)
    var channels: [amqp_channel_t: AMQPChannel] = [:]
    var nextChannel = firstConsumerChannel
    var isBlocked = false
    var heartbeat: Int = 0
    /// Messages of the batch being written that no byte was written of.
    var unwritten = 0
    /// Declarations that are being repeated after a loss; nothing is published before they are back.
    var restoring = 0
    /// When the next of them must be answered.
    var restoreLimit = MonotonicTime.distantFuture

    // MARK: Opening

    /// Connects to the first node that answers and logs in; blocks, under the watchdog.
    init(connection: RabbitMQConnection, thread: ConnectionThread, name: String) throws {
        let configuration = connection.configuration
        let deadline = MonotonicTime.now.advanced(by: configuration.connectTimeout)
        let (handle, descriptor) = try Self.connect(configuration, thread, deadline)
        self.connection = connection
        self.descriptor = descriptor
        self.handle = handle
        do {
            let limit = Self.timeval(from: .now, to: deadline)
            try Self.check(Self.with(limit) { amqp_set_handshake_timeout(handle, $0) }, "handshake")
            // Also bounds the close at the end: the library's own default is to wait without end.
            try Self.check(Self.with(limit) { amqp_set_rpc_timeout(handle, $0) }, "handshake")
            try Self.logIn(handle, configuration, name: name)
            heartbeat = Int(amqp_get_heartbeat(handle))
            channels = [topology.number: topology, publishing.number: publishing]
            try open(topology)
            try restoreTopology()
            try open(publishing)
        } catch {
            amqp_destroy_connection(handle)
            throw error
        }
        connection.opened()
    }

    /// Connects to the first node that answers. The library owns the descriptor, and closes it with the connection.
    static func connect(
        _ configuration: RabbitMQConfiguration, _ thread: ConnectionThread, _ deadline: MonotonicTime
    ) throws -> (amqp_connection_state_t, Int32) {
        var failure: any Error = SocketError(.unresolved, "there is no node to connect to")
        let nodes = try configuration.nodes
        for (index, node) in nodes.enumerated() {
            guard let handle = amqp_new_connection() else { throw AMQPFailure.unexpected("out of memory") }
            do {
                // A node that swallows packets must leave time for the next one.
                let share = MonotonicTime.now.advanced(share: nodes.count - index, until: deadline)
                if let tls = configuration.tls {
                    try tls.open(handle, host: node.host, port: node.port, deadline: share)
                } else {
                    let descriptor = try Socket.connect(host: node.host, port: node.port, deadline: share)
                    guard let socket = amqp_tcp_socket_new(handle) else {
                        Socket.close(descriptor)
                        throw AMQPFailure.unexpected("out of memory")
                    }
                    amqp_tcp_socket_set_sockfd(socket, descriptor)
                }
                let descriptor = amqp_get_sockfd(handle)
                thread.guardSocket(descriptor)
                return (handle, descriptor)
            } catch {
                amqp_destroy_connection(handle)
                failure = error
            }
        }
        throw failure
    }

    /// Declares again what was declared on the connections before this one.
    func restoreTopology() throws {
        let topology = connection.topology.current
        let requests: [RemoteCall.Request] =
            topology.exchanges.map { .declareExchange($0) } + topology.queues.map { .declareQueue($0) }
            + topology.bindings.map { .bind($0) }
        restoring = requests.count
        let patience = connection.configuration.stallLimit
        restoreLimit = MonotonicTime.now.advanced(by: patience)
        for request in requests {
            // Nobody waits for it; the limit above holds instead of its deadline.
            let call = RemoteCall(request, operation: "declare again", deadline: .now)
            try begin(call) { [self] result in
                restoring -= 1
                restoreLimit = MonotonicTime.now.advanced(by: patience)
                guard case .failure(let error) = result else { return }
                connection.logger.warning("topology was not restored", metadata: ["reason": "\(error)"])
            }
        }
    }

    static func logIn(
        _ handle: amqp_connection_state_t, _ configuration: RabbitMQConfiguration, name: String
    )
        throws
    {
        let arena = CArena()
        // Without the first of these a deleted queue starves its consumer silently; without the second a memory alarm
        // goes unnoticed. The library itself advertises neither.
        let capabilities = [
            "consumer_cancel_notify", "connection.blocked", "publisher_confirms", "basic.nack",
            "authentication_failure_close",
        ].map { arena.entry($0, .boolean(true)) }
        let properties = arena.table([
            arena.entry("product", .string("smap-events")),
            arena.entry("connection_name", .string("smap-events.\(name)")),
            arena.entry("capabilities", arena.table(capabilities)),
        ])
        var table = properties
        let reply = smap_amqp_login_plain(
            handle, configuration.virtualHost, Int32(lastChannel), frameSize,
            Int32(configuration.heartbeat.components.seconds), &table, configuration.username, configuration.password)
        _ = arena  // The table points into it.
        switch reply.reply_type {
        case AMQP_RESPONSE_NORMAL: return
        case AMQP_RESPONSE_SERVER_EXCEPTION where reply.reply.id == AMQP_CONNECTION_CLOSE_METHOD:
            guard let close = reply.reply.decoded?.load(as: amqp_connection_close_t.self) else { break }
            throw AMQPFailure.closedByBroker(code: Int(close.reply_code), text: string(close.reply_text))
        case AMQP_RESPONSE_LIBRARY_EXCEPTION:
            throw AMQPFailure.library(status: reply.library_error, doing: "login")
        default: break
        }
        throw AMQPFailure.unexpected("login was answered by something else")
    }

    func open(_ channel: AMQPChannel) throws {
        try channel.enqueue(
            step(channel, reply: AMQP_CHANNEL_OPEN_OK_METHOD) { [self] in
                var open = amqp_channel_open_t(out_of_band: amqp_empty_bytes)
                try send(channel, AMQP_CHANNEL_OPEN_METHOD, &open)
            } done: { result in
                if case .publishing = channel.role { return }
                if case .success = result { channel.isOpen = true }
            }, first: true)
        guard case .publishing = channel.role else { return }
        try channel.enqueue(
            step(channel, reply: AMQP_CONFIRM_SELECT_OK_METHOD) { [self] in
                var select = amqp_confirm_select_t(nowait: 0)
                try send(channel, AMQP_CONFIRM_SELECT_METHOD, &select)
            } done: { _ in
            })
        // Replies to requests come on the channel that asks, from a queue that is none (RabbitMQ guide, "Direct
        // Reply-to"): it must be consumed before the first request, without acknowledgements.
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_CONSUME_OK_METHOD) { [self] in
                let arena = CArena()
                var method = amqp_basic_consume_t()
                method.queue = arena.bytes(RabbitMQTransport.directReplyTo)
                method.no_ack = 1
                try send(channel, AMQP_BASIC_CONSUME_METHOD, &method)
            } done: { result in
                if case .success = result { channel.isOpen = true }
            })
    }

    // MARK: The loop

    func round(now: MonotonicTime) throws -> Interest {
        // First of all, also because a publish must not find the receive heartbeat overdue: it would then wait for a
        // frame without end (rabbitmq-c #780).
        let isMoreToRead = try readFrames()
        if restoring > 0, now >= restoreLimit {
            throw EventsError(
                .connectionLost, "what was declared before is not declared again", operation: "connection")
        }
        for call in connection.takeCalls() { try begin(call) }
        try sendSettlements()
        let publishDelay = try writePublishes()

        var timer: MonotonicTime?
        // The library sends and checks heartbeats only when it is called.
        if heartbeat > 0 { timer = now.advanced(by: .milliseconds(heartbeat * 500)) }
        // After a batch at once: a publish may have read frames into the library's own queue, where poll does not see
        // them.
        if let publishDelay { timer = min(timer ?? .distantFuture, now.advanced(by: publishDelay)) }
        if restoring > 0 { timer = min(timer ?? .distantFuture, restoreLimit) }
        if isMoreToRead { timer = now }
        return Interest(timer: timer, pause: pause)
    }

    /// How long work may pile up before the next round, in microseconds. While hundreds of messages are in flight both
    /// sides have enough to do meanwhile, and each round then handles dozens at once.
    var pause: UInt32 {
        if connection.withWindow({ $0.isBusy }) { return 2_000 }
        let isConsuming = channels.values.contains {
            if case .consuming(let consumer) = $0.role { consumer.isBusy } else { false }
        }
        return isConsuming ? 1_000 : 0
    }

    func finish(_ error: (any Error)?) {
        if let error {
            connection.ended(error, unwritten: unwritten)
        } else {
            _ = amqp_connection_close(handle, Int32(AMQP_REPLY_SUCCESS))
            connection.end(EventsError(.closed, "the transport was closed", operation: "connection"))
        }
        // After an error half a frame may be out: the stream is never resumed.
        amqp_destroy_connection(handle)
    }
}

typealias CRabbitMQTimeval = timeval
