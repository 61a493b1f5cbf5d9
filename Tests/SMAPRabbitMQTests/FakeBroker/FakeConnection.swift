import Glibc
import Synchronization

/// One client's connection to a ``FakeBroker``, and what the broker can do to it, from any thread.
///
/// Nothing here blocks: what the client does not take at once, the connection's thread writes later. What is sent is
/// not checked against the state of the connection, so that a test can send what no broker would.
final class FakeConnection: Sendable {
    /// 1 for the first connection that the broker served, and so on.
    let index: Int
    private let options: FakeBroker.Options
    private let wire: Mutex<Wire>
    /// The end of a socket pair that ends the thread's waiting; the other end is the wire's.
    private let wakeDescriptor: Int32

    /// Takes over a connected socket; `nil`, and the socket is still the caller's, when there are no descriptors left.
    init?(descriptor: Int32, index: Int, options: FakeBroker.Options) {
        var pair: [Int32] = [-1, -1]
        let type = SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue
        guard socketpair(AF_UNIX, Int32(type), 0, &pair) == 0 else { return nil }
        self.index = index
        self.options = options
        wakeDescriptor = pair[0]
        wire = Mutex(Wire(descriptor: descriptor, wakeDescriptor: pair[1], index: index, options: options))
    }
}

// MARK: - What a test can see and do

extension FakeConnection {
    /// Whether the socket is closed, by whichever side, or about to be once all bytes are out after ``drop()``.
    var isClosed: Bool { wire.withLock { !$0.isUsable } }

    /// The tags of the channel's consumers, in the order of their beginning.
    func consumers(channel: UInt16) -> [String] { wire.withLock { $0.channels[channel]?.consumers ?? [] } }

    /// Whether every byte to the client is written on its own, with a short pause after it.
    var writesByteByByte: Bool {
        get { wire.withLock { $0.writesByteByByte } }
        set {
            wire.withLock {
                $0.writesByteByByte = newValue
                $0.wake()
            }
        }
    }

    /// Stops reading the socket at once, and handling what has been read; what is sent still goes out.
    func stopReading() { wire.withLock { $0.isReading = false } }

    /// Reads and handles again.
    func resumeReading() {
        wire.withLock {
            $0.isReading = true
            $0.wake()
        }
    }

    /// Sends bytes as they are.
    func sendRaw(_ bytes: [UInt8]) { wire.withLock { $0.enqueue(bytes) } }

    /// Sends any method.
    func send(classID: UInt16, methodID: UInt16, arguments: [UInt8] = [], channel: UInt16) {
        let payload = AMQPWriter.method(classID, methodID) { $0.bytes += arguments }
        wire.withLock { $0.enqueue(payload, channel: channel) }
    }

    /// Confirms a publish, or with `multiple` all up to it.
    func ack(channel: UInt16, tag: UInt64, multiple: Bool = false) {
        wire.withLock { $0.enqueue(Self.ackMethod(tag: tag, multiple: multiple), channel: channel) }
    }

    /// Refuses a publish, or with `multiple` all up to it.
    func nack(channel: UInt16, tag: UInt64, multiple: Bool = false) {
        let payload = AMQPWriter.method(60, 120) {
            $0.longLong(tag)
            $0.flag(multiple)
        }
        wire.withLock { $0.enqueue(payload, channel: channel) }
    }

    /// Gives a message back with basic.return.
    func returnMessage(
        channel: UInt16, _ publish: FakeBroker.Publish, code: UInt16 = 312, text: String = "NO_ROUTE"
    ) {
        let method = AMQPWriter.method(60, 50) {
            $0.short(code)
            $0.shortString(text)
            $0.shortString(publish.exchange)
            $0.shortString(publish.routingKey)
        }
        wire.withLock { $0.enqueue(method, header: publish.header, body: publish.body, channel: channel) }
    }

    /// Delivers a message whose content header is given as bytes, and sent as given even where it contradicts the body.
    func deliver(
        channel: UInt16, consumerTag: String, tag: UInt64, redelivered: Bool = false, exchange: String = "",
        key: String, header: [UInt8], body: [UInt8]
    ) {
        let method = AMQPWriter.method(60, 60) {
            $0.shortString(consumerTag)
            $0.longLong(tag)
            $0.flag(redelivered)
            $0.shortString(exchange)
            $0.shortString(key)
        }
        wire.withLock { $0.enqueue(method, header: header, body: body, channel: channel) }
    }

    /// Delivers a message with these properties.
    func deliver(
        channel: UInt16, consumerTag: String, tag: UInt64, redelivered: Bool = false, exchange: String = "",
        key: String, properties: AMQPProperties = AMQPProperties(), body: [UInt8]
    ) {
        deliver(
            channel: channel, consumerTag: consumerTag, tag: tag, redelivered: redelivered, exchange: exchange,
            key: key, header: properties.header(bodySize: body.count), body: body)
    }

    /// Tells the client that its consumer is cancelled.
    func cancelConsumer(channel: UInt16, tag: String) {
        let payload = AMQPWriter.method(60, 30) {
            $0.shortString(tag)
            $0.flag(true)
        }
        wire.withLock {
            $0.channels[channel]?.consumers.removeAll { $0 == tag }
            $0.enqueue(payload, channel: channel)
        }
    }

    /// Answers a queue.declare.
    func replyDeclareOK(channel: UInt16, queue: String, messageCount: UInt32 = 0, consumerCount: UInt32 = 0) {
        let payload = AMQPWriter.method(50, 11) {
            $0.shortString(queue)
            $0.long(messageCount)
            $0.long(consumerCount)
        }
        wire.withLock { $0.enqueue(payload, channel: channel) }
    }

    /// Answers a basic.consume, for a test that wants to send something right after.
    func replyConsumeOK(channel: UInt16, tag: String) {
        wire.withLock { $0.enqueue(AMQPWriter.method(60, 21) { $0.shortString(tag) }, channel: channel) }
    }

    /// Closes a channel, forgets its consumers and its tag counter, and ignores all that comes on it until close-ok.
    func closeChannel(
        _ channel: UInt16, code: UInt16, text: String, classID: UInt16 = 0, methodID: UInt16 = 0
    ) {
        let payload = Self.closeMethod(20, 40, code, text, classID, methodID)
        wire.withLock {
            $0.channels[channel] = Wire.Channel(isClosing: true)
            $0.enqueue(payload, channel: channel)
        }
    }

    /// Closes the connection: ignores all that comes until close-ok, and then closes the socket.
    func closeConnection(code: UInt16, text: String, classID: UInt16 = 0, methodID: UInt16 = 0) {
        let payload = Self.closeMethod(10, 50, code, text, classID, methodID)
        wire.withLock {
            $0.isClosing = true
            $0.enqueue(payload, channel: 0)
        }
    }

    /// Tells the client that the broker takes no more messages.
    func block(_ reason: String) {
        wire.withLock { $0.enqueue(AMQPWriter.method(10, 60) { $0.shortString(reason) }, channel: 0) }
    }

    /// Tells the client that the broker takes messages again.
    func unblock() { wire.withLock { $0.enqueue(AMQPWriter.method(10, 61), channel: 0) } }

    /// Closes the socket in an orderly way, once what was sent before is out; gives up on that after two seconds.
    func drop() { wire.withLock { $0.drop() } }

    /// Closes the socket with a reset.
    func reset() { wire.withLock { $0.closeDescriptor(withReset: true) } }

    /// Closes the socket at once, whatever was still to be sent.
    func shut() { wire.withLock { $0.closeDescriptor() } }

    fileprivate static func ackMethod(tag: UInt64, multiple: Bool) -> [UInt8] {
        AMQPWriter.method(60, 80) {
            $0.longLong(tag)
            $0.flag(multiple)
        }
    }

    private static func closeMethod(
        _ ownClass: UInt16, _ ownMethod: UInt16, _ code: UInt16, _ text: String, _ classID: UInt16, _ methodID: UInt16
    ) -> [UInt8] {
        AMQPWriter.method(ownClass, ownMethod) {
            $0.short(code)
            $0.shortString(text)
            $0.short(classID)
            $0.short(methodID)
        }
    }
}

// MARK: - The connection's thread

extension FakeConnection {
    /// Serves the client on the calling thread until the socket is closed.
    func serve(
        react: (FakeBroker.Received, FakeConnection) -> Bool, record: (FakeBroker.Received) -> Void
    ) {
        var reader = AMQPFrameReader()
        var buffer = [UInt8](repeating: 0, count: 1 << 16)
        while let wait = wire.withLock({ $0.nextWait() }) {
            var polled = [
                pollfd(fd: wait.descriptor, events: wait.events, revents: 0),
                pollfd(fd: wakeDescriptor, events: Int16(POLLIN), revents: 0),
            ]
            guard poll(&polled, 2, wait.timeout) >= 0 || errno == EINTR else { break }
            if polled[1].revents != 0 {
                var wakes = [UInt8](repeating: 0, count: 256)
                while recv(wakeDescriptor, &wakes, wakes.count, Int32(MSG_DONTWAIT)) > 0 {}
            }
            let moved = wire.withLock { $0.move(polled[0].revents, into: &buffer) }
            if moved.wroteOneByte { usleep(20) }
            reader.append(buffer[..<moved.readCount])
            while let limit = wire.withLock({ $0.frameLimit }), let item = reader.next(limit: limit) {
                handle(item, react: react, record: record)
            }
        }
        finish()
        let ended = FakeBroker.Received(connection: index, channel: 0, kind: .disconnected)
        _ = react(ended, self)
        record(ended)
    }

    /// Closes all descriptors: the last thing that a connection does, on its thread or for want of one.
    func finish() {
        wire.withLock { $0.finish() }
        close(wakeDescriptor)
    }

    /// Takes in what the client sent, asks the test, reacts if the test does not, and only then shows it as received.
    private func handle(
        _ item: AMQPFrameReader.Item, react: (FakeBroker.Received, FakeConnection) -> Bool,
        record: (FakeBroker.Received) -> Void
    ) {
        var channel: UInt16 = 0
        if case .frame(let frame) = item { channel = frame.channel }
        guard let (kind, reaction) = wire.withLock({ $0.take(item) }) else { return }
        let received = FakeBroker.Received(connection: index, channel: channel, kind: kind)
        if !react(received, self) { perform(reaction, channel: channel) }
        record(received)
    }

    private func perform(_ reaction: Wire.Reaction, channel: UInt16) {
        switch reaction {
        case .nothing: break
        case .reply(let payload):
            // Another thread may have closed the channel or the connection since the request was read.
            wire.withLock {
                guard !$0.isClosing, channel == 0 || $0.channels[channel]?.isClosing == false else { return }
                $0.enqueue(payload, channel: channel)
            }
        case .replyAlways(let payload): wire.withLock { $0.enqueue(payload, channel: channel) }
        case .replyAndDrop(let payload):
            wire.withLock {
                if let payload { $0.enqueue(payload, channel: channel) }
                $0.drop()
            }
        case .refuseProtocol:
            wire.withLock {
                $0.enqueue(Wire.protocolHeader)
                $0.drop()
            }
        case .closeConnection(let code, let text, let classID, let methodID):
            closeConnection(code: code, text: text, classID: classID, methodID: methodID)
        }
    }
}

// MARK: - The state under the lock

/// A connection's socket, what waits to be written to it, and what the protocol remembers. All input and output here
/// is nonblocking, so that the lock around it is never held for long.
private struct Wire {
    /// A channel that the client opened, or one that the broker is closing.
    struct Channel {
        /// A message whose method has come, and perhaps its header and some of its body.
        struct Partial {
            let target: ClientMethod.PublishTarget
            var frameSizes: [Int]
            var header: [UInt8]?
            var bodySize: UInt64 = 0
            var body: [UInt8] = []
        }

        var isClosing = false
        /// How many messages came since confirm.select; `nil` before it.
        var publishCount: UInt64?
        var consumers: [String] = []
        var partial: Partial?
    }

    /// What the broker does about something received, unless the test says otherwise.
    enum Reaction {
        case nothing
        /// Answers, if the channel and the connection are still open by then.
        case reply([UInt8])
        case replyAlways([UInt8])
        case replyAndDrop([UInt8]?)
        case refuseProtocol
        case closeConnection(code: UInt16, text: String, classID: UInt16, methodID: UInt16)
    }

    /// What the thread waits for next.
    struct Wait {
        let descriptor: Int32
        let events: Int16
        let timeout: Int32
    }

    typealias Kind = FakeBroker.Received.Kind

    static let protocolHeader: [UInt8] = Array("AMQP".utf8) + [0, 0, 9, 1]
    /// What a frame may have where the two sides agreed on no limit.
    static let largestFrame = 1 << 28
    /// What a frame may have before the two sides agreed on anything.
    static let firstFrameLimit = 8192
    static let brokenFrame = Reaction.closeConnection(code: 501, text: "FRAME_ERROR", classID: 0, methodID: 0)

    private let index: Int
    private let options: FakeBroker.Options
    /// `nil` once closed.
    private var descriptor: Int32?
    /// `nil` once the thread has ended.
    private var wakeDescriptor: Int32?
    private var outbox: [UInt8] = []
    private var sentCount = 0
    private var isBroken = false
    private var dropDeadline: ContinuousClock.Instant?
    private var lastWrite = ContinuousClock.now
    private var madeNames = 0
    private var channelMax: UInt16
    private var frameMax: UInt32
    private var heartbeat: UInt16 = 0
    private var isTuned = false

    var writesByteByByte = false
    var isReading = true
    var isClosing = false
    var channels: [UInt16: Channel] = [:]

    init(descriptor: Int32, wakeDescriptor: Int32, index: Int, options: FakeBroker.Options) {
        self.descriptor = descriptor
        self.wakeDescriptor = wakeDescriptor
        self.index = index
        self.options = options
        channelMax = options.channelMax
        frameMax = options.frameMax
    }

    var isUsable: Bool { descriptor != nil && dropDeadline == nil }

    /// The largest frame that may come now; `nil` while nothing is to be read.
    var frameLimit: Int? {
        guard isUsable, isReading else { return nil }
        guard isTuned else { return Self.firstFrameLimit }
        return frameMax == 0 ? Self.largestFrame : Int(frameMax)
    }
}

// MARK: Writing

extension Wire {
    /// Ends the thread's waiting.
    func wake() {
        guard let wakeDescriptor else { return }
        var byte: UInt8 = 1
        // A full pair has woken the thread already.
        _ = Glibc.send(wakeDescriptor, &byte, 1, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
    }

    mutating func enqueue(_ payload: [UInt8], channel: UInt16) {
        enqueue(AMQPFrame(type: AMQPFrame.method, channel: channel, payload: payload).encoded)
    }

    mutating func enqueue(_ method: [UInt8], header: [UInt8], body: [UInt8], channel: UInt16) {
        let limit = frameMax == 0 ? 1 << 17 : Int(frameMax)
        enqueue(
            AMQPFrame.content(
                method: method, header: header, body: body, channel: channel, limit: limit - AMQPFrame.overhead))
    }

    /// Sends what the socket takes at once, and leaves the rest to the thread.
    mutating func enqueue(_ bytes: [UInt8]) {
        guard isUsable, !isBroken else { return }
        outbox += bytes
        if !writesByteByByte { flush() }
        if !outbox.isEmpty { wake() }
    }

    /// Writes what the socket takes, or one byte of it; says whether something was written.
    @discardableResult private mutating func flush() -> Bool {
        var didWrite = false
        while let descriptor, sentCount < outbox.count, !(didWrite && writesByteByByte) {
            let flags = Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT)
            let count = outbox.withUnsafeBytes { bytes in
                let rest = UnsafeRawBufferPointer(rebasing: bytes[sentCount...])
                return Glibc.send(descriptor, rest.baseAddress, writesByteByByte ? 1 : rest.count, flags)
            }
            if count > 0 {
                sentCount += count
                didWrite = true
                lastWrite = .now
            } else if errno != EINTR {
                if errno != EAGAIN { isBroken = true }
                break
            }
        }
        if sentCount == outbox.count || isBroken {
            outbox = []
            sentCount = 0
        } else if sentCount > 1 << 20 {
            outbox.removeFirst(sentCount)
            sentCount = 0
        }
        return didWrite
    }

    /// Closes the socket once everything is out.
    mutating func drop() {
        guard isUsable else { return }
        if !writesByteByByte { flush() }
        if outbox.isEmpty {
            closeDescriptor()
        } else {
            dropDeadline = .now + .seconds(2)
            wake()
        }
    }

    /// Closes the socket, with a reset or with an orderly end.
    mutating func closeDescriptor(withReset: Bool = false) {
        guard let descriptor else { return }
        self.descriptor = nil
        if withReset {
            var value = linger(l_onoff: 1, l_linger: 0)
            setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &value, socklen_t(MemoryLayout<linger>.size))
        } else {
            // Unread bytes would make the system reset the connection.
            var scratch = [UInt8](repeating: 0, count: 1 << 16)
            for _ in 0..<256 where recv(descriptor, &scratch, scratch.count, Int32(MSG_DONTWAIT)) <= 0 {
                break
            }
            shutdown(descriptor, Int32(SHUT_RDWR))
        }
        close(descriptor)
        outbox = []
        sentCount = 0
        wake()
    }

    /// Closes what the thread leaves behind.
    mutating func finish() {
        closeDescriptor()
        if let wakeDescriptor { close(wakeDescriptor) }
        wakeDescriptor = nil
    }
}

// MARK: The thread's steps

extension Wire {
    private var heartbeatDue: ContinuousClock.Instant? {
        guard heartbeat > 0, options.sendsHeartbeats, isUsable, !isBroken else { return nil }
        return lastWrite + .milliseconds(Int(heartbeat) * 500)
    }

    /// What to wait for, or `nil` when the socket is closed.
    func nextWait() -> Wait? {
        guard let descriptor else { return nil }
        var events: Int32 = 0
        if frameLimit != nil { events |= Int32(POLLIN) }
        if !outbox.isEmpty { events |= Int32(POLLOUT) }
        var timeout: Int32 = -1
        if let due = [heartbeatDue, dropDeadline].compactMap({ $0 }).min() {
            let left = max(.zero, due - .now)
            timeout = Int32(left / .milliseconds(1)) + 1
        }
        return Wait(descriptor: descriptor, events: Int16(events), timeout: timeout)
    }

    /// Writes and reads what the socket is ready for, and notices its end.
    mutating func move(_ events: Int16, into buffer: inout [UInt8]) -> (readCount: Int, wroteOneByte: Bool) {
        guard let descriptor else { return (0, false) }
        if let due = heartbeatDue, due <= .now {
            // A client that takes nothing does not need to hear more.
            lastWrite = .now
            if outbox.isEmpty { enqueue(AMQPFrame(type: AMQPFrame.heartbeat, channel: 0, payload: []).encoded) }
        }
        let wroteOneByte = flush() && writesByteByByte
        if let dropDeadline, outbox.isEmpty || dropDeadline <= .now { closeDescriptor() }

        let isOver = Int32(events) & Int32(POLLERR) | Int32(events) & Int32(POLLHUP) != 0
        guard frameLimit != nil else {
            if isOver { closeDescriptor() }
            return (0, wroteOneByte)
        }
        guard Int32(events) & Int32(POLLIN) != 0 || isOver else { return (0, wroteOneByte) }
        let count = recv(descriptor, &buffer, buffer.count, Int32(MSG_DONTWAIT))
        if count == 0 || count < 0 && errno != EAGAIN && errno != EINTR { closeDescriptor() }
        return (max(0, count), wroteOneByte)
    }
}

// MARK: Taking in

extension Wire {
    /// Remembers what the client did, and says what it was and what is due; `nil` for what is to be ignored.
    mutating func take(_ item: AMQPFrameReader.Item) -> (Kind, Reaction)? {
        switch item {
        case .protocolHeader(Self.protocolHeader):
            enqueue(startMethod, channel: 0)
            return nil
        case .protocolHeader: return (.other(classID: 0, methodID: 0), .refuseProtocol)
        case .broken:
            guard isClosing else { return (.other(classID: 0, methodID: 0), Self.brokenFrame) }
            // A client that is told of its nonsense and goes on with it will send no close-ok.
            drop()
            return nil
        case .frame(let frame):
            switch frame.type {
            case AMQPFrame.heartbeat: return isClosing ? nil : (.heartbeat, .nothing)
            case AMQPFrame.method: return takeMethod(frame)
            default: return takeContent(frame)
            }
        }
    }

    private var startMethod: [UInt8] {
        let capabilities: [String: AMQPField] = [
            "publisher_confirms": true, "exchange_exchange_bindings": true, "basic.nack": true,
            "consumer_cancel_notify": true, "connection.blocked": true, "consumer_priorities": true,
            "authentication_failure_close": true, "per_consumer_qos": true, "direct_reply_to": true,
        ]
        return AMQPWriter.method(10, 10) {
            $0.octet(0)
            $0.octet(9)
            $0.table(["product": "FakeBroker", "version": "1.0", "capabilities": .table(capabilities)])
            $0.longString(Array(options.mechanisms.utf8))
            $0.longString(Array("en_US".utf8))
        }
    }

    private mutating func takeMethod(_ frame: AMQPFrame) -> (Kind, Reaction)? {
        let ids = Array(frame.payload.prefix(4))
        let channel = frame.channel
        if isClosing, ids != [0, 10, 0, 50], ids != [0, 10, 0, 51] { return nil }
        if channels[channel]?.isClosing == true, ids != [0, 20, 0, 40], ids != [0, 20, 0, 41] { return nil }

        let method: ClientMethod
        do throws(AMQPMalformed) {
            method = try ClientMethod(frame.payload, options: options) { prefix in
                madeNames += 1
                return "\(prefix)-fake-\(index)-\(madeNames)"
            }
        } catch {
            var reader = AMQPReader(frame.payload)
            let classID = (try? reader.short()) ?? 0
            let methodID = (try? reader.short()) ?? 0
            return (
                .other(classID: classID, methodID: methodID),
                .closeConnection(code: 502, text: "SYNTAX_ERROR", classID: classID, methodID: methodID)
            )
        }
        if let complaint = complaint(about: method, channel: channel) { return (method.kind, complaint) }

        if let target = method.publish {
            channels[channel]?.partial = Channel.Partial(target: target, frameSizes: [frame.payload.count])
            return nil
        }
        return (method.kind, remember(method, channel: channel))
    }

    /// Why a broker would close the connection because of this method, if it would.
    private func complaint(about method: ClientMethod, channel: UInt16) -> Reaction? {
        func close(_ code: UInt16, _ text: String) -> Reaction {
            .closeConnection(code: code, text: text, classID: method.classID, methodID: method.methodID)
        }
        guard method.isKnown else { return close(540, "NOT_IMPLEMENTED - unknown method") }
        guard (channel == 0) == (method.classID == 10) else { return close(503, "COMMAND_INVALID - wrong channel") }
        guard channels[channel]?.partial == nil else { return close(505, "UNEXPECTED_FRAME - content expected") }
        switch method.kind {
        case .tuneOK(let channelMax, let frameMax, _):
            // 0 means no limit, which is more than any other.
            if options.channelMax != 0, channelMax == 0 || channelMax > options.channelMax {
                return close(530, "NOT_ALLOWED - negotiated channel_max is higher than the maximum allowed value")
            }
            if options.frameMax != 0, frameMax == 0 || frameMax > options.frameMax {
                return close(530, "NOT_ALLOWED - negotiated frame_max is higher than the maximum allowed value")
            }
            if frameMax != 0, frameMax < 4096, frameMax < options.frameMax {
                return close(530, "NOT_ALLOWED - negotiated frame_max is lower than the minimum allowed value")
            }
            return nil
        case .channelOpen:
            if channels[channel] != nil { return close(504, "CHANNEL_ERROR - second 'channel.open' seen") }
            if channelMax != 0, channel > channelMax {
                return close(530, "NOT_ALLOWED - channel number above the negotiated channel_max")
            }
            return nil
        case .consume(_, let tag) where channels[channel]?.consumers.contains(tag) == true:
            return close(530, "NOT_ALLOWED - attempt to reuse consumer tag '\(tag)'")
        case .channelCloseOK: return nil
        default:
            guard channel == 0 || channels[channel] != nil else {
                return close(504, "CHANNEL_ERROR - expected 'channel.open'")
            }
            return nil
        }
    }

    private mutating func remember(_ method: ClientMethod, channel: UInt16) -> Reaction {
        switch method.kind {
        case .tuneOK(let channelMax, let frameMax, let heartbeat):
            self.channelMax = channelMax
            self.frameMax = frameMax
            self.heartbeat = heartbeat
            isTuned = true
        case .channelOpen: channels[channel] = Channel()
        case .channelClose:
            // When both sides close at once, the broker answers, and goes on waiting for its own answer.
            if channels[channel]?.isClosing == false { channels[channel] = nil }
            return method.reply.map { .replyAlways($0) } ?? .nothing
        case .channelCloseOK: channels[channel] = nil
        case .connectionClose:
            guard let reply = method.reply else { return .nothing }
            return isClosing ? .replyAlways(reply) : .replyAndDrop(reply)
        case .connectionCloseOK: return .replyAndDrop(nil)
        case .confirmSelect:
            if channels[channel]?.publishCount == nil { channels[channel]?.publishCount = 0 }
        case .consume(_, let tag): channels[channel]?.consumers.append(tag)
        case .cancel(let tag): channels[channel]?.consumers.removeAll { $0 == tag }
        default: break
        }
        return method.reply.map { .reply($0) } ?? .nothing
    }

    /// Takes in a header or body frame, and hands out the message once it is whole.
    private mutating func takeContent(_ frame: AMQPFrame) -> (Kind, Reaction)? {
        guard !isClosing, channels[frame.channel]?.isClosing != true else { return nil }
        guard channels[frame.channel]?.takeContent(frame) == true else {
            channels[frame.channel]?.partial = nil
            return (
                .other(classID: 0, methodID: 0),
                .closeConnection(code: 505, text: "UNEXPECTED_FRAME", classID: 0, methodID: 0)
            )
        }
        guard let publish = channels[frame.channel]?.finishedPublish() else { return nil }
        guard publish.tag > 0 else { return (.publish(publish), .nothing) }
        return (.publish(publish), .reply(FakeConnection.ackMethod(tag: publish.tag, multiple: false)))
    }
}

extension Wire.Channel {
    /// Adds a header or body frame to the message that is coming in; `false` if it does not belong there.
    fileprivate mutating func takeContent(_ frame: AMQPFrame) -> Bool {
        // Taken out meanwhile, so that the body grows in place.
        guard var partial = partial.take() else { return false }
        if frame.type == AMQPFrame.header {
            var reader = AMQPReader(frame.payload)
            guard partial.header == nil, (try? reader.short()) == 60, (try? reader.short()) != nil,
                let size = try? reader.longLong(), (try? reader.short()) != nil
            else { return false }
            partial.bodySize = size
            partial.header = frame.payload
        } else {
            guard partial.header != nil, UInt64(partial.body.count + frame.payload.count) <= partial.bodySize else {
                return false
            }
            partial.body += frame.payload
        }
        partial.frameSizes.append(frame.payload.count)
        self.partial = partial
        return true
    }

    /// The message, once its whole body is there.
    fileprivate mutating func finishedPublish() -> FakeBroker.Publish? {
        guard let header = partial?.header, let whole = partial, UInt64(whole.body.count) == whole.bodySize else {
            return nil
        }
        partial = nil
        if let count = publishCount { publishCount = count + 1 }
        return FakeBroker.Publish(
            tag: publishCount ?? 0, exchange: whole.target.exchange, routingKey: whole.target.routingKey,
            isMandatory: whole.target.isMandatory, messageID: AMQPProperties.messageID(inHeader: header),
            header: header, body: whole.body, frameSizes: whole.frameSizes)
    }
}
