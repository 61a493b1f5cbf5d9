/// A frame as it came off the wire, without its end byte.
struct AMQPFrame {
    static let method: UInt8 = 1
    static let header: UInt8 = 2
    static let body: UInt8 = 3
    static let heartbeat: UInt8 = 8
    static let endByte: UInt8 = 0xCE
    /// The bytes around a payload: type, channel, size and end byte.
    static let overhead = 8

    let type: UInt8
    let channel: UInt16
    let payload: [UInt8]

    /// The frame as it goes over the wire.
    var encoded: [UInt8] {
        var writer = AMQPWriter()
        writer.octet(type)
        writer.short(channel)
        writer.long(UInt32(truncatingIfNeeded: payload.count))
        writer.bytes += payload
        writer.octet(Self.endByte)
        return writer.bytes
    }

    /// The frames of one message: its method, its header, and its body in pieces of at most `limit` bytes.
    static func content(
        method: [UInt8], header: [UInt8], body: [UInt8], channel: UInt16, limit: Int
    ) -> [UInt8] {
        var bytes = AMQPFrame(type: Self.method, channel: channel, payload: method).encoded
        bytes += AMQPFrame(type: Self.header, channel: channel, payload: header).encoded
        for start in stride(from: 0, to: body.count, by: max(1, limit)) {
            let piece = Array(body[start..<min(body.count, start + max(1, limit))])
            bytes += AMQPFrame(type: Self.body, channel: channel, payload: piece).encoded
        }
        return bytes
    }
}

/// Bytes of the client that end before they should, or hold what cannot be.
struct AMQPMalformed: Error {}

/// Reads AMQP's basic types and never past the end.
struct AMQPReader {
    private var rest: ArraySlice<UInt8>

    init(_ bytes: [UInt8]) { rest = bytes[...] }

    mutating func take(_ count: Int) throws(AMQPMalformed) -> ArraySlice<UInt8> {
        guard count <= rest.count else { throw AMQPMalformed() }
        defer { rest = rest.dropFirst(count) }
        return rest.prefix(count)
    }

    private mutating func integer(_ count: Int) throws(AMQPMalformed) -> UInt64 {
        try take(count).reduce(0) { $0 << 8 | UInt64($1) }
    }

    mutating func octet() throws(AMQPMalformed) -> UInt8 { UInt8(truncatingIfNeeded: try integer(1)) }
    mutating func short() throws(AMQPMalformed) -> UInt16 { UInt16(truncatingIfNeeded: try integer(2)) }
    mutating func long() throws(AMQPMalformed) -> UInt32 { UInt32(truncatingIfNeeded: try integer(4)) }
    mutating func longLong() throws(AMQPMalformed) -> UInt64 { try integer(8) }

    mutating func shortString() throws(AMQPMalformed) -> String {
        String(decoding: try take(Int(try octet())), as: UTF8.self)
    }

    /// The bytes of a long string, or of a table with its entries still packed.
    mutating func longString() throws(AMQPMalformed) -> [UInt8] { Array(try take(Int(try long()))) }
}

/// Writes AMQP's basic types.
struct AMQPWriter {
    var bytes: [UInt8] = []

    mutating func octet(_ value: UInt8) { bytes.append(value) }
    mutating func flag(_ value: Bool) { bytes.append(value ? 1 : 0) }
    mutating func short(_ value: UInt16) { integer(value) }
    mutating func long(_ value: UInt32) { integer(value) }
    mutating func longLong(_ value: UInt64) { integer(value) }

    private mutating func integer(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.bigEndian) { bytes += $0 }
    }

    /// Writes at most 255 bytes of the text, which is all that a short string holds.
    mutating func shortString(_ text: String) {
        let content = Array(text.utf8.prefix(255))
        octet(UInt8(content.count))
        bytes += content
    }

    mutating func longString(_ content: [UInt8]) {
        long(UInt32(truncatingIfNeeded: content.count))
        bytes += content
    }

    mutating func table(_ entries: [String: AMQPField]) {
        var inner = AMQPWriter()
        for (key, value) in entries.sorted(by: { $0.key < $1.key }) {
            inner.shortString(key)
            inner.field(value)
        }
        longString(inner.bytes)
    }

    private mutating func field(_ value: AMQPField) {
        switch value {
        case .string(let text):
            octet(UInt8(ascii: "S"))
            longString(Array(text.utf8))
        case .integer(let number):
            octet(UInt8(ascii: "l"))
            integer(number)
        case .bool(let flag):
            octet(UInt8(ascii: "t"))
            self.flag(flag)
        case .table(let entries):
            octet(UInt8(ascii: "F"))
            table(entries)
        case .array(let elements):
            octet(UInt8(ascii: "A"))
            var inner = AMQPWriter()
            for element in elements { inner.field(element) }
            longString(inner.bytes)
        }
    }

    /// A method's payload: its ids, and its arguments as the closure writes them.
    static func method(
        _ classID: UInt16, _ methodID: UInt16, _ arguments: (inout AMQPWriter) -> Void = { _ in }
    ) -> [UInt8] {
        var writer = AMQPWriter()
        writer.short(classID)
        writer.short(methodID)
        arguments(&writer)
        return writer.bytes
    }
}

/// A value in a table, such as a message's headers.
indirect enum AMQPField: Sendable {
    case string(String)
    case integer(Int64)
    case bool(Bool)
    case table([String: AMQPField])
    case array([AMQPField])
}

extension AMQPField: ExpressibleByStringLiteral {
    init(stringLiteral value: String) { self = .string(value) }
}

extension AMQPField: ExpressibleByIntegerLiteral {
    init(integerLiteral value: Int64) { self = .integer(value) }
}

extension AMQPField: ExpressibleByBooleanLiteral {
    init(booleanLiteral value: Bool) { self = .bool(value) }
}

/// A message's properties, for messages that a test makes up.
struct AMQPProperties: Sendable {
    var messageID: String?
    var headers: [String: AMQPField] = [:]
    var contentType: String?
    var deliveryMode: UInt8?
    var priority: UInt8?
    var correlationID: String?
    var replyTo: String?
    var expiration: String?
    /// Whole seconds since 1970.
    var timestamp: UInt64?
    var type: String?
    var userID: String?
    var appID: String?

    /// The payload of the content header frame for a body of this many bytes.
    func header(bodySize: Int) -> [UInt8] {
        var flags: UInt16 = 0
        var values = AMQPWriter()
        func put<Value>(_ value: Value?, bit: UInt16, _ write: (Value) -> Void) {
            guard let value else { return }
            flags |= 1 << bit
            write(value)
        }
        put(contentType, bit: 15) { values.shortString($0) }
        put(headers.isEmpty ? nil : headers, bit: 13) { values.table($0) }
        put(deliveryMode, bit: 12) { values.octet($0) }
        put(priority, bit: 11) { values.octet($0) }
        put(correlationID, bit: 10) { values.shortString($0) }
        put(replyTo, bit: 9) { values.shortString($0) }
        put(expiration, bit: 8) { values.shortString($0) }
        put(messageID, bit: 7) { values.shortString($0) }
        put(timestamp, bit: 6) { values.longLong($0) }
        put(type, bit: 5) { values.shortString($0) }
        put(userID, bit: 4) { values.shortString($0) }
        put(appID, bit: 3) { values.shortString($0) }

        var writer = AMQPWriter()
        writer.short(60)
        writer.short(0)
        writer.longLong(UInt64(bodySize))
        writer.short(flags)
        writer.bytes += values.bytes
        return writer.bytes
    }

    /// The message id in a content header's payload, if there is one and all before it can be read.
    static func messageID(inHeader payload: [UInt8]) -> String? {
        do throws(AMQPMalformed) {
            var reader = AMQPReader(payload)
            _ = try reader.take(12)
            let flags = try reader.short()
            guard flags & 1 << 7 != 0, flags & 1 == 0 else { return nil }
            if flags & 1 << 15 != 0 { _ = try reader.shortString() }
            if flags & 1 << 14 != 0 { _ = try reader.shortString() }
            if flags & 1 << 13 != 0 { _ = try reader.longString() }
            if flags & 1 << 12 != 0 { _ = try reader.octet() }
            if flags & 1 << 11 != 0 { _ = try reader.octet() }
            for bit in [10, 9, 8] where flags & 1 << bit != 0 { _ = try reader.shortString() }
            return try reader.shortString()
        } catch {
            return nil
        }
    }
}

/// Cuts the client's bytes into the protocol header and frames.
struct AMQPFrameReader {
    /// What comes next on the wire.
    enum Item {
        /// The eight bytes before the first frame.
        case protocolHeader([UInt8])
        case frame(AMQPFrame)
        /// A frame of an unknown type, too large, or with a wrong end byte; it is left out.
        case broken
    }

    private var bytes: [UInt8] = []
    private var start = 0
    private var skipping = 0
    private var isPastHeader = false

    mutating func append(_ more: ArraySlice<UInt8>) {
        if start > 0, start == bytes.count || start > 1 << 20 {
            bytes.removeFirst(start)
            start = 0
        }
        bytes += more
    }

    /// The next item, or `nil` until more bytes have come; a frame has at most `limit` bytes, payload and all.
    mutating func next(limit: Int) -> Item? {
        let skipped = min(skipping, bytes.count - start)
        start += skipped
        skipping -= skipped
        guard skipping == 0 else { return nil }

        if !isPastHeader {
            guard bytes.count - start >= 8 else { return nil }
            defer { start += 8 }
            isPastHeader = true
            return .protocolHeader(Array(bytes[start..<start + 8]))
        }

        guard bytes.count - start >= 7 else { return nil }
        let type = bytes[start]
        let channel = UInt16(bytes[start + 1]) << 8 | UInt16(bytes[start + 2])
        let size = bytes[start + 3..<start + 7].reduce(0) { $0 << 8 | Int($1) }
        let types = [AMQPFrame.method, AMQPFrame.header, AMQPFrame.body, AMQPFrame.heartbeat]
        guard size + AMQPFrame.overhead <= limit, types.contains(type) else {
            skipping = size + AMQPFrame.overhead
            return .broken
        }
        guard bytes.count - start >= size + AMQPFrame.overhead else { return nil }
        defer { start += size + AMQPFrame.overhead }
        guard bytes[start + 7 + size] == AMQPFrame.endByte else { return .broken }
        return .frame(AMQPFrame(type: type, channel: channel, payload: Array(bytes[start + 7..<start + 7 + size])))
    }
}

/// A method that the client sent, and the payload of the right reply to it.
struct ClientMethod {
    /// What a basic.publish says before its header and body.
    struct PublishTarget {
        let exchange: String
        let routingKey: String
        let isMandatory: Bool
    }

    let classID: UInt16
    let methodID: UInt16
    let kind: FakeBroker.Received.Kind
    /// `nil` where none is due: the client said noWait, or the method has no answer.
    let reply: [UInt8]?
    let publish: PublishTarget?
    /// Whether the broker knows what this method is.
    let isKnown: Bool

    /// Reads a method frame's payload; `makeName` makes a name, from a prefix, where the client gave none.
    init(
        _ payload: [UInt8], options: FakeBroker.Options, makeName: (String) -> String
    ) throws(AMQPMalformed) {
        var reader = AMQPReader(payload)
        let classID = try reader.short()
        let methodID = try reader.short()
        var kind = FakeBroker.Received.Kind.other(classID: classID, methodID: methodID)
        var reply: [UInt8]?
        var publish: PublishTarget?
        var isKnown = true

        /// The reply whose id follows the method's, as with nearly all methods.
        func answer(_ arguments: (inout AMQPWriter) -> Void = { _ in }) {
            reply = AMQPWriter.method(classID, methodID + 1, arguments)
        }
        func answer(unless noWait: Bool, _ arguments: (inout AMQPWriter) -> Void = { _ in }) {
            if !noWait { answer(arguments) }
        }

        switch (classID, methodID) {
        case (10, 11):
            _ = try reader.longString()
            kind = .startOK(mechanism: try reader.shortString(), response: try reader.longString())
            reply = AMQPWriter.method(10, 30) {
                $0.short(options.channelMax)
                $0.long(options.frameMax)
                $0.short(options.heartbeat)
            }
        case (10, 31):
            kind = .tuneOK(
                channelMax: try reader.short(), frameMax: try reader.long(), heartbeat: try reader.short())
        case (10, 40):
            kind = .open(virtualHost: try reader.shortString())
            answer { $0.shortString("") }
        case (10, 50):
            kind = .connectionClose
            answer()
        case (10, 51): kind = .connectionCloseOK
        case (10, 70): answer()
        case (20, 10):
            kind = .channelOpen
            answer { $0.longString([]) }
        case (20, 20):
            let isActive = try reader.octet()
            answer { $0.octet(isActive) }
        case (20, 40):
            kind = .channelClose
            answer()
        case (20, 41): kind = .channelCloseOK
        case (40, 10):
            _ = try reader.short()
            let name = try reader.shortString()
            _ = try reader.shortString()
            let flags = try reader.octet()
            kind = .declareExchange(name: name, passive: flags & 1 != 0)
            answer(unless: flags & 1 << 4 != 0)
        case (40, 20):
            _ = try reader.short()
            _ = try reader.shortString()
            answer(unless: try reader.octet() & 1 << 1 != 0)
        case (40, 30), (40, 40):
            _ = try reader.short()
            for _ in 1...3 { _ = try reader.shortString() }
            let noWait = try reader.octet() & 1 != 0
            // exchange.unbind-ok has an id of its own: 51.
            if !noWait { reply = AMQPWriter.method(40, methodID == 30 ? 31 : 51) }
        case (50, 10):
            _ = try reader.short()
            let given = try reader.shortString()
            let flags = try reader.octet()
            let name = given.isEmpty ? makeName("amq.gen") : given
            kind = .declareQueue(name: name, passive: flags & 1 != 0)
            answer(unless: flags & 1 << 4 != 0) {
                $0.shortString(name)
                $0.long(0)
                $0.long(0)
            }
        case (50, 20):
            _ = try reader.short()
            kind = .bind(
                queue: try reader.shortString(), exchange: try reader.shortString(), key: try reader.shortString())
            answer(unless: try reader.octet() & 1 != 0)
        case (50, 50): answer()
        case (50, 30):
            _ = try reader.short()
            _ = try reader.shortString()
            answer(unless: try reader.octet() & 1 != 0) { $0.long(0) }
        case (50, 40):
            _ = try reader.short()
            _ = try reader.shortString()
            answer(unless: try reader.octet() & 1 << 2 != 0) { $0.long(0) }
        case (60, 10):
            _ = try reader.long()
            kind = .qos(try reader.short())
            answer()
        case (60, 20):
            _ = try reader.short()
            let queue = try reader.shortString()
            let given = try reader.shortString()
            let flags = try reader.octet()
            let tag = given.isEmpty ? makeName("amq.ctag") : given
            kind = .consume(queue: queue, tag: tag)
            answer(unless: flags & 1 << 3 != 0) { $0.shortString(tag) }
        case (60, 30):
            let tag = try reader.shortString()
            kind = .cancel(tag: tag)
            answer(unless: try reader.octet() & 1 != 0) { $0.shortString(tag) }
        case (60, 40):
            _ = try reader.short()
            publish = PublishTarget(
                exchange: try reader.shortString(), routingKey: try reader.shortString(),
                isMandatory: try reader.octet() & 1 != 0)
        case (60, 70): reply = AMQPWriter.method(60, 72) { $0.shortString("") }
        case (60, 80): kind = .ack(tag: try reader.longLong(), multiple: try reader.octet() & 1 != 0)
        case (60, 90): kind = .reject(tag: try reader.longLong(), requeue: try reader.octet() & 1 != 0)
        case (60, 120): kind = .reject(tag: try reader.longLong(), requeue: try reader.octet() & 1 << 1 != 0)
        case (60, 110), (90, 10), (90, 20), (90, 30): answer()
        case (85, 10):
            kind = .confirmSelect
            answer(unless: try reader.octet() & 1 != 0)
        // secure-ok, flow-ok, cancel-ok and recover-async want nothing.
        case (10, 21), (20, 21), (60, 31), (60, 100): break
        default: isKnown = false
        }

        self.classID = classID
        self.methodID = methodID
        self.kind = kind
        self.reply = reply
        self.publish = publish
        self.isKnown = isKnown
    }
}
