internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents

/// What client and broker have agreed on at login.
struct NegotiatedLimits: Sendable {
    /// The highest channel number.
    var channelLimit: amqp_channel_t
    /// The largest frame that may be sent, header and end included.
    var frameLimit: Int
    /// In seconds; 0 for none.
    var heartbeat: Int
}

/// The opening of an AMQP connection: protocol header, start, tune, open (AMQP 0-9-1, 2.2.4).
struct AMQPLogin {
    /// What is asked for; a broker may say less.
    private static let wanted = NegotiatedLimits(channelLimit: 2_047, frameLimit: 131_072, heartbeat: 0)
    private static let protocolHeader: [UInt8] = Array("AMQP".utf8) + [0, 0, 9, 1]
    /// The smallest `frame_max` that the protocol allows (AMQP 0-9-1, 4.2.3).
    private static let smallestFrameLimit = 4_096

    private enum Stage {
        case start, tune, open, done
    }

    let configuration: RabbitMQConfiguration
    let name: String
    private var stage = Stage.start
    private var limits = AMQPLogin.wanted

    init(_ configuration: RabbitMQConfiguration, name: String) {
        self.configuration = configuration
        self.name = name
    }

    /// Logs in; blocks, until the deadline at most.
    mutating func run(
        _ stream: SocketStream, _ parser: inout FrameParser, _ decoder: MethodDecoder, deadline: MonotonicTime,
        interrupt: Wakeup
    ) throws -> NegotiatedLimits {
        stream.append { $0 += Self.protocolHeader }
        var failure: (any Error)?
        while true {
            // What comes behind the last reply stays in the parser.
            try parser.forEachFrame { frame in
                switch frame.kind {
                case .method: try take(try decoder.method(frame), stream)
                case .heartbeat: break
                case .header, .body: throw AMQPFailure.unexpected("login was answered by a frame of a message")
                }
                return stage != .done
            }
            if stage == .done { return limits }
            // What came before the end says why.
            if let failure { throw failure }
            try stream.wait(until: deadline, interrupt: interrupt) {
                "login: no answer in time (is this the broker's port?)"
            }
            do {
                _ = try stream.receive { parser.append($0) }
            } catch let error as SocketError where error.kind == .lost {
                failure = SocketError(.lost, "login: \(error.description)")
            }
        }
    }

    private mutating func take(_ method: amqp_method_t, _ stream: SocketStream) throws {
        switch (method.id, stage) {
        case (AMQP_CONNECTION_START_METHOD, .start):
            guard let start = method.decoded?.load(as: amqp_connection_start_t.self) else { break }
            try reply(to: start, stream)
            stage = .tune
            return
        case (AMQP_CONNECTION_TUNE_METHOD, .tune):
            guard let tune = method.decoded?.load(as: amqp_connection_tune_t.self) else { break }
            try reply(to: tune, stream)
            stage = .open
            return
        case (AMQP_CONNECTION_OPEN_OK_METHOD, .open):
            stage = .done
            return
        case (AMQP_CONNECTION_CLOSE_METHOD, _):
            guard let close = method.decoded?.load(as: amqp_connection_close_t.self) else { break }
            throw AMQPFailure.closedByBroker(
                code: Int(close.reply_code), text: AMQPDriver.text(close.reply_text), method: 0)
        default: break
        }
        throw AMQPFailure.unexpected("login was answered by something else")
    }

    private func reply(to start: amqp_connection_start_t, _ stream: SocketStream) throws {
        let mechanism = configuration.authentication.mechanism
        guard AMQPDriver.string(start.mechanisms).split(separator: " ").contains(where: { $0 == mechanism }) else {
            throw EventsError(
                .accessRefused,
                "the server does not offer the mechanism \(mechanism), but: \(AMQPDriver.text(start.mechanisms))",
                operation: "connect to \(configuration)")
        }
        let frame = try CArena.with { arena in
            // Without the first of these a deleted queue starves its consumer silently; without the second a memory alarm
            // goes unnoticed.
            let capabilities = [
                "consumer_cancel_notify", "connection.blocked", "publisher_confirms", "basic.nack",
                "authentication_failure_close",
            ].map { arena.entry($0, .boolean(true)) }
            var method = amqp_connection_start_ok_t()
            method.client_properties = arena.table([
                arena.entry("product", .string("smap-events")),
                arena.entry("connection_name", .string("smap-events.\(name)")),
                arena.entry("capabilities", arena.table(capabilities)),
            ])
            method.mechanism = arena.bytes(mechanism)
            // PLAIN: authorisation identity, user, password, each after a NUL (RFC 4616). EXTERNAL: the server knows who it
            // is from the certificate (RFC 4422, appendix A).
            method.response = arena.bytes(
                configuration.authentication == .external
                    ? "" : "\0\(configuration.username)\0\(configuration.password)")
            method.locale = arena.bytes("en_US")
            return try MethodEncoder.frame(AMQP_CONNECTION_START_OK_METHOD, on: 0, method)
        }
        stream.append { $0 += frame }
    }

    private mutating func reply(to tune: amqp_connection_tune_t, _ stream: SocketStream) throws {
        // 0 stands for no limit of the server's.
        if tune.channel_max > 0 { limits.channelLimit = min(limits.channelLimit, tune.channel_max) }
        if tune.frame_max > 0 { limits.frameLimit = min(limits.frameLimit, Int(tune.frame_max)) }
        guard limits.frameLimit >= Self.smallestFrameLimit else {
            throw AMQPFailure.unexpected("the server takes frames of \(limits.frameLimit) bytes only (frame_max)")
        }
        guard limits.channelLimit >= 2 else {
            throw AMQPFailure.unexpected("the server allows one channel (channel_max), and two are needed")
        }
        limits.heartbeat = Int(configuration.heartbeat.components.seconds)
        if tune.heartbeat > 0 { limits.heartbeat = min(limits.heartbeat, Int(tune.heartbeat)) }
        var ok = amqp_connection_tune_ok_t()
        ok.channel_max = limits.channelLimit
        ok.frame_max = UInt32(limits.frameLimit)
        ok.heartbeat = UInt16(clamping: limits.heartbeat)
        let frames = try CArena.with { arena in
            var open = amqp_connection_open_t()
            open.virtual_host = arena.bytes(configuration.virtualHost)
            open.capabilities = arena.bytes("")
            return try MethodEncoder.frame(AMQP_CONNECTION_TUNE_OK_METHOD, on: 0, ok)
                + MethodEncoder.frame(AMQP_CONNECTION_OPEN_METHOD, on: 0, open)
        }
        stream.append { $0 += frames }
    }
}
