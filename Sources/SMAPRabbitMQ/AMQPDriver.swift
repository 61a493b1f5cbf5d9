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
    private static let topologyChannel: amqp_channel_t = 1
    private static let publishingChannel: amqp_channel_t = 2
    private static let firstConsumerChannel: amqp_channel_t = 3
    private static let lastChannel: amqp_channel_t = 2_047
    private static let frameSize: Int32 = 131_072
    /// So many bytes are written before confirms are read again.
    private static let batchLimit = 256 * 1024

    let descriptor: Int32
    private let connection: RabbitMQConnection
    private let handle: amqp_connection_state_t
    private let topology = AMQPChannel(number: topologyChannel, role: .topology)
    private let publishing = AMQPChannel(number: publishingChannel, role: .publishing)
    private var channels: [amqp_channel_t: AMQPChannel] = [:]
    private var nextChannel = firstConsumerChannel
    private var isBlocked = false
    private var heartbeat: Int = 0
    /// Messages of the batch being written that no byte was written of.
    private var unwritten = 0
    /// Declarations that are being repeated after a loss; nothing is published before they are back.
    private var restoring = 0

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
    private static func connect(
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
    private func restoreTopology() throws {
        let topology = connection.topology.current
        let requests: [RemoteCall.Request] =
            topology.exchanges.map { .declareExchange($0) } + topology.queues.map { .declareQueue($0) }
            + topology.bindings.map { .bind($0) }
        restoring = requests.count
        for request in requests {
            let call = RemoteCall(request, operation: "declare again", deadline: .now + .seconds(30))
            try begin(call) { [self] result in
                restoring -= 1
                guard case .failure(let error) = result else { return }
                connection.logger.warning("topology was not restored", metadata: ["reason": "\(error)"])
            }
        }
    }

    private static func logIn(
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

    private func open(_ channel: AMQPChannel) throws {
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
        for call in connection.takeCalls() { try begin(call) }
        try sendSettlements()
        let publishDelay = try writePublishes()

        var timer: MonotonicTime?
        // The library sends and checks heartbeats only when it is called.
        if heartbeat > 0 { timer = now.advanced(by: .milliseconds(heartbeat * 500)) }
        // After a batch at once: a publish may have read frames into the library's own queue, where poll does not see
        // them.
        if let publishDelay { timer = min(timer ?? .distantFuture, now.advanced(by: publishDelay)) }
        if isMoreToRead { timer = now }
        return Interest(timer: timer, pause: pause)
    }

    /// How long work may pile up before the next round, in microseconds. While hundreds of messages are in flight both
    /// sides have enough to do meanwhile, and each round then handles dozens at once.
    private var pause: UInt32 {
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

    // MARK: Reading

    /// Reads until the socket is silent. True if there may be more, after so many frames that others must have a turn.
    private func readFrames() throws -> Bool {
        for _ in 0..<4096 {
            var frame = amqp_frame_t()
            var immediately = CRabbitMQTimeval()
            let status = amqp_simple_wait_frame_noblock(handle, &frame, &immediately)
            if status == AMQP_STATUS_TIMEOUT.rawValue { return false }
            try Self.check(status, "reading")
            try take(frame)
            // Everything that is kept has been copied.
            amqp_maybe_release_buffers_on_channel(handle, frame.channel)
        }
        return true
    }

    private func take(_ frame: amqp_frame_t) throws {
        switch Int32(frame.frame_type) {
        case AMQP_FRAME_METHOD:
            if frame.channel == 0 {
                try takeConnectionMethod(frame.payload.method)
            } else {
                try takeMethod(frame.payload.method, on: frame.channel)
            }
        case AMQP_FRAME_HEADER:
            guard let channel = channels[frame.channel], channel.assembly != nil else { return }
            let header = frame.payload.properties
            channel.assembly?.expected = header.body_size
            if header.body_size > UInt64(connection.configuration.maximumBodySize) {
                channel.assembly?.isTooLarge = true
            } else {
                channel.assembly?.body.reserveCapacity(Int(header.body_size))
            }
            if let decoded = header.decoded {
                channel.assembly?.properties = Self.properties(decoded.load(as: amqp_basic_properties_t.self))
            }
            try completeMessage(channel)
        case AMQP_FRAME_BODY:
            guard let channel = channels[frame.channel], channel.assembly != nil else { return }
            let fragment = frame.payload.body_fragment
            channel.assembly?.received += UInt64(fragment.len)
            if channel.assembly?.isTooLarge == false {
                // Sound: the fragment is valid until the channel's buffers are released.
                channel.assembly?.body.append(
                    contentsOf: UnsafeRawBufferPointer(start: fragment.bytes, count: fragment.len))
            }
            try completeMessage(channel)
        default: break
        }
    }

    private func takeConnectionMethod(_ method: amqp_method_t) throws {
        switch method.id {
        case AMQP_CONNECTION_BLOCKED_METHOD:
            isBlocked = true
            let blocked = method.decoded?.load(as: amqp_connection_blocked_t.self)
            connection.blocked(blocked.map { Self.string($0.reason) } ?? "")
        case AMQP_CONNECTION_UNBLOCKED_METHOD:
            isBlocked = false
            connection.blocked(nil)
        case AMQP_CONNECTION_CLOSE_METHOD:
            let close = method.decoded?.load(as: amqp_connection_close_t.self)
            var ok = amqp_connection_close_ok_t()
            _ = amqp_send_method(handle, 0, AMQP_CONNECTION_CLOSE_OK_METHOD, &ok)
            throw AMQPFailure.closedByBroker(
                code: Int(close?.reply_code ?? 0), text: close.map { Self.string($0.reply_text) } ?? "")
        default: break
        }
    }

    private func takeMethod(_ method: amqp_method_t, on number: amqp_channel_t) throws {
        guard let channel = channels[number], let decoded = method.decoded else { return }
        switch method.id {
        case AMQP_BASIC_DELIVER_METHOD:
            let deliver = decoded.load(as: amqp_basic_deliver_t.self)
            channel.assembly = AMQPChannel.Assembly(
                kind: .delivery(tag: deliver.delivery_tag, isRedelivered: deliver.redelivered != 0),
                exchange: Self.string(deliver.exchange), routingKey: Self.string(deliver.routing_key))
        case AMQP_BASIC_RETURN_METHOD:
            let returned = decoded.load(as: amqp_basic_return_t.self)
            channel.assembly = AMQPChannel.Assembly(
                kind: .returned, exchange: Self.string(returned.exchange),
                routingKey: Self.string(returned.routing_key))
        case AMQP_BASIC_ACK_METHOD:
            let ack = decoded.load(as: amqp_basic_ack_t.self)
            try confirm(ack.delivery_tag, multiple: ack.multiple != 0, isNack: false)
        case AMQP_BASIC_NACK_METHOD:
            let nack = decoded.load(as: amqp_basic_nack_t.self)
            try confirm(nack.delivery_tag, multiple: nack.multiple != 0, isNack: true)
        case AMQP_BASIC_CANCEL_METHOD:
            guard case .consuming(let consumer) = channel.role else { return }
            consumer.fail(
                EventsError(
                    .subscriptionCancelled, "the broker has cancelled the consumer: its queue is gone",
                    operation: "consume from \(consumer.queue)"), isChannelOpen: true)
        case AMQP_CHANNEL_CLOSE_METHOD:
            let close = decoded.load(as: amqp_channel_close_t.self)
            try channelClosed(channel, code: Int(close.reply_code), text: Self.string(close.reply_text))
        default:
            _ = try channel.reply(method)
        }
    }

    private func confirm(_ tag: UInt64, multiple: Bool, isNack: Bool) throws {
        let answers = connection.withWindow { $0.confirmed(tag: tag, multiple: multiple, isNack: isNack) }
        guard let answers else {
            throw AMQPFailure.unexpected("a confirm for a message that was not sent")
        }
        answers.give()
    }

    private func completeMessage(_ channel: AMQPChannel) throws {
        guard let assembly = channel.assembly, let expected = assembly.expected, assembly.received >= expected else {
            return
        }
        channel.assembly = nil
        switch (assembly.kind, channel.role) {
        case (.returned, .publishing):
            connection.withWindow {
                $0.returned(
                    exchange: assembly.exchange, routingKey: assembly.routingKey,
                    messageID: assembly.properties.messageID)
            }
        case (.delivery(let tag, let isRedelivered), .consuming(let consumer)):
            if assembly.isTooLarge {
                connection.logger.warning(
                    "a message is larger than the limit",
                    metadata: ["queue": "\(consumer.queue)", "bytes": "\(expected)"])
            }
            let isOrdered = consumer.deliver(delivery(assembly, tag, isRedelivered))
            if !isOrdered { throw AMQPFailure.unexpected("a delivery out of order") }
        case (.delivery(let tag, let isRedelivered), .publishing):
            connection.replies.deliver(delivery(assembly, tag, isRedelivered))
        default: break
        }
    }

    private func delivery(
        _ assembly: AMQPChannel.Assembly, _ tag: UInt64, _ isRedelivered: Bool
    ) -> InboundDelivery {
        InboundDelivery(
            tag: tag, exchange: assembly.exchange, routingKey: assembly.routingKey, isRedelivered: isRedelivered,
            properties: assembly.properties, body: assembly.body, isTruncated: assembly.isTooLarge)
    }

    private func channelClosed(_ channel: AMQPChannel, code: Int, text: String) throws {
        var ok = amqp_channel_close_ok_t()
        try send(channel, AMQP_CHANNEL_CLOSE_OK_METHOD, &ok)
        let error = EventsError(
            AMQPFailure.brokerCode(code) ?? .connectionLost, text, operation: "channel \(channel.number)")
        switch channel.role {
        case .topology:
            channel.closed(error, keepSteps: true)
            try open(channel)
        case .publishing:
            channel.closed(error, keepSteps: false)
            // "NOT_FOUND - no exchange 'x' in vhost '/'", "ACCESS_REFUSED - access to exchange 'x' in vhost …".
            let exchange = text.split(separator: "'", omittingEmptySubsequences: false).dropFirst().first.map(
                String.init)
            connection.answer { $0.channelClosed(text, refused: exchange.map { ($0, error.code) }) }
            try open(channel)
        case .consuming(let consumer):
            channel.closed(error, keepSteps: false)
            channels[channel.number] = nil
            connection.remove(consumer)
            consumer.fail(EventsError(error.code, text, operation: "consume from \(consumer.queue)"))
        }
    }

    // MARK: Writing

    private func sendSettlements() throws {
        for channel in channels.values {
            guard case .consuming(let consumer) = channel.role, channel.isOpen, !channel.isClosing else { continue }
            try sendSettlements(of: consumer, on: channel)
        }
    }

    private func sendSettlements(of consumer: Consumer, on channel: AMQPChannel) throws {
        let frames = consumer.settlements()
        if frames.count > 1 { Socket.cork(descriptor, true) }
        for frame in frames {
            switch frame {
            case .acknowledge(let tag, let multiple):
                try Self.check(amqp_basic_ack(handle, channel.number, tag, multiple ? 1 : 0), "acknowledging")
            case .reject(let tag, let requeue):
                try Self.check(amqp_basic_reject(handle, channel.number, tag, requeue ? 1 : 0), "rejecting")
            }
        }
        if frames.count > 1 { Socket.cork(descriptor, false) }
    }

    /// Writes what the socket takes. Returns when to go on if something is left, nil if nothing is.
    private func writePublishes() throws -> Duration? {
        guard publishing.isOpen, !isBlocked, restoring == 0 else { return nil }
        // The kernel counts its own bookkeeping in the buffer too, hence the half.
        let budget = min(Socket.freeSendBuffer(descriptor) / 2, Self.batchLimit)
        let batch = connection.withWindow { window -> [PackedMessage] in
            guard let size = window.nextSize else { return [] }
            // A message larger than the buffer goes out alone, once the buffer is empty.
            if size > budget, Socket.unsentBytes(descriptor) > 0 { return [] }
            return window.takeBatch(budget: budget)
        }
        guard !batch.isEmpty else {
            return connection.withWindow { $0.hasUnsent } ? .milliseconds(2) : nil
        }
        // A body that is a multiple of the frame's size would lie 200 ms in the kernel (the library sets MSG_MORE on
        // its last frame); uncorking sends it.
        Socket.cork(descriptor, true)
        unwritten = batch.count
        for message in batch {
            unwritten -= 1
            try write(message)
        }
        Socket.cork(descriptor, false)
        return .zero
    }

    private func write(_ message: PackedMessage) throws {
        let status = message.bytes.withUnsafeBytes { raw -> Int32 in
            // Sound: the library only reads through these pointers, and only during the call.
            let base = UnsafeMutableRawPointer(mutating: raw.baseAddress)
            func bytes(_ range: Range<Int>) -> amqp_bytes_t {
                amqp_bytes_t(len: range.count, bytes: base.map { $0 + range.lowerBound })
            }
            var properties = amqp_basic_properties_t()
            properties._flags = amqp_flags_t(AMQP_BASIC_DELIVERY_MODE_FLAG)
            properties.delivery_mode = 2
            if let range = message.contentType {
                properties.content_type = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_CONTENT_TYPE_FLAG)
            }
            if let range = message.messageID {
                properties.message_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_MESSAGE_ID_FLAG)
            }
            if let range = message.type {
                properties.type = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_TYPE_FLAG)
            }
            if let range = message.appID {
                properties.app_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_APP_ID_FLAG)
            }
            if let range = message.correlationID {
                properties.correlation_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_CORRELATION_ID_FLAG)
            }
            if let range = message.replyTo {
                properties.reply_to = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_REPLY_TO_FLAG)
            }
            if let timestamp = message.timestamp {
                properties.timestamp = timestamp
                properties._flags |= amqp_flags_t(AMQP_BASIC_TIMESTAMP_FLAG)
            }
            return withUnsafeTemporaryAllocation(of: amqp_table_entry_t.self, capacity: message.headers.count) {
                entries in
                for (index, header) in message.headers.enumerated() {
                    var value = amqp_field_value_t()
                    switch header.value {
                    case .string(let range):
                        value.kind = UInt8(AMQP_FIELD_KIND_UTF8.rawValue)
                        value.value.bytes = bytes(range)
                    case .integer(let number):
                        value.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
                        value.value.i64 = number
                    case .boolean(let flag):
                        value.kind = UInt8(AMQP_FIELD_KIND_BOOLEAN.rawValue)
                        value.value.boolean = flag ? 1 : 0
                    }
                    entries.initializeElement(at: index, to: amqp_table_entry_t(key: bytes(header.name), value: value))
                }
                if !message.headers.isEmpty {
                    properties.headers = amqp_table_t(
                        num_entries: Int32(message.headers.count), entries: entries.baseAddress)
                    properties._flags |= amqp_flags_t(AMQP_BASIC_HEADERS_FLAG)
                }
                return amqp_basic_publish(
                    handle, publishing.number, bytes(message.exchange), bytes(message.routingKey), 1, 0, &properties,
                    bytes(message.body))
            }
        }
        try Self.check(status, "publishing")
    }

    private func send<Method: BitwiseCopyable>(
        _ channel: AMQPChannel, _ id: amqp_method_number_t, _ method: inout Method
    ) throws {
        try Self.check(amqp_send_method(handle, channel.number, id, &method), "sending")
    }

    // MARK: Calls

    private func step(
        _ channel: AMQPChannel, reply: amqp_method_number_t, isWanted: @escaping () -> Bool = { true },
        send: @escaping () throws -> Void, done: @escaping (Result<amqp_method_t, EventsError>) -> Void
    ) -> AMQPChannel.Step {
        AMQPChannel.Step(reply: reply, isWanted: isWanted, send: send, done: done)
    }

    private func begin(_ call: RemoteCall) throws {
        try begin(call) { [self] result in
            if case .success = result { connection.topology.insert(call.request) }
            answer(call, result)
        }
    }

    private func begin(
        _ call: RemoteCall, _ done: @escaping (Result<RemoteCall.Reply, EventsError>) -> Void
    ) throws {
        switch call.request {
        case .declareExchange(let exchange):
            try ask(call, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_exchange_declare_t()
                method.exchange = arena.bytes(exchange.name)
                method.type = arena.bytes(exchange.kind.rawValue)
                method.durable = 1
                try send(topology, AMQP_EXCHANGE_DECLARE_METHOD, &method)
            }
        case .checkExchange(let name):
            try ask(call, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_exchange_declare_t()
                method.exchange = arena.bytes(name)
                method.passive = 1
                try send(topology, AMQP_EXCHANGE_DECLARE_METHOD, &method)
            }
        case .declareQueue(let queue):
            try ask(call, reply: AMQP_QUEUE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_declare_t()
                method.queue = arena.bytes(queue.name.rawValue)
                method.durable = 1
                method.arguments = arena.table(queue.arguments.map { arena.entry($0.key, $0.value) })
                try send(topology, AMQP_QUEUE_DECLARE_METHOD, &method)
            }
        case .checkQueue(let name):
            try ask(call, reply: AMQP_QUEUE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_declare_t()
                method.queue = arena.bytes(name.rawValue)
                method.passive = 1
                try send(topology, AMQP_QUEUE_DECLARE_METHOD, &method)
            }
        case .bind(let binding):
            try ask(call, reply: AMQP_QUEUE_BIND_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_bind_t()
                method.queue = arena.bytes(binding.queue.rawValue)
                method.exchange = arena.bytes(binding.exchange)
                method.routing_key = arena.bytes(binding.routingKey)
                try send(topology, AMQP_QUEUE_BIND_METHOD, &method)
            }
        case .consume(let consumer): try beginConsuming(consumer, call)
        case .stopConsumer(let consumer): try stop(consumer, call)
        case .closeConsumer(let consumer): try close(consumer, call)
        }
    }

    /// Sends a method on the topology channel and hands on its reply.
    private func ask(
        _ call: RemoteCall, reply: amqp_method_number_t,
        _ done: @escaping (Result<RemoteCall.Reply, EventsError>) -> Void, _ method: @escaping (CArena) throws -> Void
    ) throws {
        try topology.enqueue(
            step(topology, reply: reply, isWanted: { !call.isAnswered }) {
                try method(CArena())
            } done: { result in
                done(
                    result.map { method in
                        guard method.id == AMQP_QUEUE_DECLARE_OK_METHOD,
                            let ok = method.decoded?.load(as: amqp_queue_declare_ok_t.self)
                        else { return .done }
                        return .queue(
                            QueueStatus(messages: Int(ok.message_count), consumers: Int(ok.consumer_count)))
                    })
            })
    }

    private func answer(_ call: RemoteCall, _ result: Result<RemoteCall.Reply, EventsError>) {
        connection.forget(call)
        switch result {
        case .success(let reply): call.answer(.success(reply))
        case .failure(let error): call.fail(error.code, error.message)
        }
    }

    private func beginConsuming(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard !call.isAnswered else { return }
        guard let number = freeChannel() else {
            answer(call, .failure(EventsError(.overloaded, "all channels are in use", operation: call.operation)))
            return
        }
        let channel = AMQPChannel(number: number, role: .consuming(consumer))
        channels[number] = channel
        connection.add(consumer)
        try open(channel)
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_QOS_OK_METHOD) { [self] in
                var method = amqp_basic_qos_t()
                method.prefetch_count = UInt16(clamping: consumer.prefetch)
                try send(channel, AMQP_BASIC_QOS_METHOD, &method)
            } done: { _ in
            })
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_CONSUME_OK_METHOD) { [self] in
                let arena = CArena()
                var method = amqp_basic_consume_t()
                method.queue = arena.bytes(consumer.queue.rawValue)
                method.consumer_tag = arena.bytes(Self.consumerTag(channel))
                try send(channel, AMQP_BASIC_CONSUME_METHOD, &method)
            } done: { [self] result in
                answer(call, result.map { _ in .done })
            })
    }

    private static func consumerTag(_ channel: AMQPChannel) -> String { "smap.\(channel.number)" }

    private func freeChannel() -> amqp_channel_t? {
        // The library's pools live as long as the connection, so numbers are used again; but not at once, so that a
        // late frame of the old channel is not taken for one of the new.
        for _ in Self.firstConsumerChannel...Self.lastChannel {
            let number = nextChannel
            nextChannel = number == Self.lastChannel ? Self.firstConsumerChannel : number + 1
            if nextChannel > 64, channels.count < 32 { nextChannel = Self.firstConsumerChannel }
            if channels[number] == nil { return number }
        }
        return nil
    }

    private func channel(of consumer: Consumer) -> AMQPChannel? {
        channels.values.first { if case .consuming(let other) = $0.role { other === consumer } else { false } }
    }

    private func stop(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(call, .success(.done))
            return
        }
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_CANCEL_OK_METHOD) { [self] in
                let arena = CArena()
                var method = amqp_basic_cancel_t()
                method.consumer_tag = arena.bytes(Self.consumerTag(channel))
                try send(channel, AMQP_BASIC_CANCEL_METHOD, &method)
            } done: { [self] result in
                answer(call, result.map { _ in .done })
            })
    }

    /// Sends what is settled, then closes the channel: the broker takes everything else back.
    private func close(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(call, .success(.done))
            return
        }
        if channel.isOpen { try sendSettlements(of: consumer, on: channel) }
        channel.isClosing = true
        try channel.enqueue(
            step(channel, reply: AMQP_CHANNEL_CLOSE_OK_METHOD) { [self] in
                var method = amqp_channel_close_t()
                method.reply_code = UInt16(AMQP_REPLY_SUCCESS)
                try send(channel, AMQP_CHANNEL_CLOSE_METHOD, &method)
            } done: { [self] result in
                channels[channel.number] = nil
                connection.remove(consumer)
                answer(call, result.map { _ in .done })
            })
    }

    // MARK: Values

    private static func check(_ status: Int32, _ doing: String) throws {
        guard status == AMQP_STATUS_OK.rawValue else { throw AMQPFailure.library(status: status, doing: doing) }
    }

    private static func string(_ bytes: amqp_bytes_t) -> String {
        // Sound: the library's buffers are valid until they are released, after this frame was taken.
        String(decoding: UnsafeRawBufferPointer(start: bytes.bytes, count: bytes.len), as: UTF8.self)
    }

    private static func properties(_ raw: amqp_basic_properties_t) -> MessageProperties {
        func text(_ flag: Int32, _ value: amqp_bytes_t) -> String? {
            raw._flags & amqp_flags_t(flag) != 0 ? string(value) : nil
        }
        var properties = MessageProperties(
            contentType: text(AMQP_BASIC_CONTENT_TYPE_FLAG, raw.content_type),
            messageID: text(AMQP_BASIC_MESSAGE_ID_FLAG, raw.message_id), type: text(AMQP_BASIC_TYPE_FLAG, raw.type),
            appID: text(AMQP_BASIC_APP_ID_FLAG, raw.app_id),
            correlationID: text(AMQP_BASIC_CORRELATION_ID_FLAG, raw.correlation_id),
            replyTo: text(AMQP_BASIC_REPLY_TO_FLAG, raw.reply_to))
        if raw._flags & amqp_flags_t(AMQP_BASIC_TIMESTAMP_FLAG) != 0 {
            properties.timestamp = Date(timeIntervalSince1970: Double(raw.timestamp))
        }
        if raw._flags & amqp_flags_t(AMQP_BASIC_HEADERS_FLAG) != 0 {
            for entry in UnsafeBufferPointer(start: raw.headers.entries, count: Int(raw.headers.num_entries)) {
                // Nested tables and arrays are left out: nothing of ours is in them.
                if let value = headerValue(entry.value) { properties.headers[string(entry.key)] = value }
            }
        }
        return properties
    }

    private static func headerValue(_ field: amqp_field_value_t) -> MessageProperties.HeaderValue? {
        switch UInt32(field.kind) {
        case AMQP_FIELD_KIND_UTF8.rawValue, AMQP_FIELD_KIND_BYTES.rawValue: .string(string(field.value.bytes))
        case AMQP_FIELD_KIND_BOOLEAN.rawValue: .boolean(field.value.boolean != 0)
        case AMQP_FIELD_KIND_I8.rawValue: .integer(Int64(field.value.i8))
        case AMQP_FIELD_KIND_U8.rawValue: .integer(Int64(field.value.u8))
        case AMQP_FIELD_KIND_I16.rawValue: .integer(Int64(field.value.i16))
        case AMQP_FIELD_KIND_U16.rawValue: .integer(Int64(field.value.u16))
        case AMQP_FIELD_KIND_I32.rawValue: .integer(Int64(field.value.i32))
        case AMQP_FIELD_KIND_U32.rawValue: .integer(Int64(field.value.u32))
        case AMQP_FIELD_KIND_I64.rawValue: .integer(field.value.i64)
        case AMQP_FIELD_KIND_U64.rawValue, AMQP_FIELD_KIND_TIMESTAMP.rawValue:
            .integer(Int64(clamping: field.value.u64))
        default: nil
        }
    }

    private static func timeval(from now: MonotonicTime, to deadline: MonotonicTime) -> CRabbitMQTimeval {
        let left = deadline > now ? deadline.nanoseconds - now.nanoseconds : 1_000_000
        return CRabbitMQTimeval(tv_sec: Int(left / 1_000_000_000), tv_usec: Int(left % 1_000_000_000 / 1000))
    }

    private static func with(_ value: CRabbitMQTimeval, _ body: (UnsafePointer<CRabbitMQTimeval>) -> Int32) -> Int32 {
        withUnsafePointer(to: value, body)
    }
}

private typealias CRabbitMQTimeval = timeval
