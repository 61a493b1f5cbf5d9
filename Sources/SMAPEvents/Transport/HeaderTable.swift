/// The headers of a message as the wire has them, so that copies carry those of every type unchanged, byte for byte
/// (AMQP 0-9-1, 4.2.5.5; the types are those of RabbitMQ's errata).
package struct HeaderTable: Sendable, Hashable {
    /// The entries one after the other, without the length before them.
    package private(set) var bytes: [UInt8]

    /// Takes entries as they came. Nil if they are no table.
    package init?(bytes: [UInt8]) {
        self.bytes = bytes
        guard entries() != nil else { return nil }
    }

    /// Lays headers out, in the order of their names.
    init(_ headers: [String: MessageProperties.HeaderValue]) {
        bytes = []
        for (name, value) in headers.sorted(by: { $0.key < $1.key }) { append(name, value) }
    }

    /// Sets a header; another value of that name goes.
    mutating func set(_ name: String, _ value: MessageProperties.HeaderValue) {
        removeAll { $0 == name }
        append(name, value)
    }

    /// Takes headers off by their names.
    mutating func removeAll(where isRemoved: (String) -> Bool) {
        guard let entries = entries() else { return }
        for entry in entries.reversed() where isRemoved(entry.name) { bytes.removeSubrange(entry.range) }
    }

    private mutating func append(_ name: String, _ value: MessageProperties.HeaderValue) {
        let name = Array(name.utf8.prefix(255))
        bytes.append(UInt8(name.count))
        bytes += name
        func append<Number: FixedWidthInteger>(_ number: Number) {
            withUnsafeBytes(of: number.bigEndian) { bytes += $0 }
        }
        switch value {
        case .string(let text):
            bytes.append(UInt8(ascii: "S"))
            append(UInt32(text.utf8.count))
            bytes += text.utf8
        case .integer(let number):
            bytes.append(UInt8(ascii: "l"))
            append(number)
        case .boolean(let flag): bytes += [UInt8(ascii: "t"), flag ? 1 : 0]
        }
    }

    // MARK: Reading

    private struct Entry {
        let name: String
        /// The whole entry.
        let range: Range<Int>
        /// The value with its type before it.
        let value: Range<Int>
    }

    private func entries() -> [Entry]? { entries(in: bytes.indices) }

    /// Nil if the range holds no entries, one after the other.
    private func entries(in range: Range<Int>) -> [Entry]? {
        var entries: [Entry] = []
        var position = range.lowerBound
        while position < range.upperBound {
            let start = position
            let length = Int(bytes[position])
            guard length < range.upperBound - position else { return nil }
            let name = String(decoding: bytes[position + 1..<position + 1 + length], as: UTF8.self)
            position += 1 + length
            guard let end = end(ofValueAt: position, limit: range.upperBound) else { return nil }
            entries.append(Entry(name: name, range: start..<end, value: position..<end))
            position = end
        }
        return entries
    }

    /// Where a value ends. Tables and arrays are not looked into.
    private func end(ofValueAt position: Int, limit: Int) -> Int? {
        guard position < limit else { return nil }
        let size: Int
        switch bytes[position] {
        case UInt8(ascii: "V"): size = 0
        case UInt8(ascii: "t"), UInt8(ascii: "b"), UInt8(ascii: "B"): size = 1
        case UInt8(ascii: "s"), UInt8(ascii: "u"), UInt8(ascii: "U"): size = 2
        case UInt8(ascii: "I"), UInt8(ascii: "i"), UInt8(ascii: "f"): size = 4
        case UInt8(ascii: "D"): size = 5
        case UInt8(ascii: "l"), UInt8(ascii: "L"), UInt8(ascii: "d"), UInt8(ascii: "T"): size = 8
        case UInt8(ascii: "S"), UInt8(ascii: "x"), UInt8(ascii: "A"), UInt8(ascii: "F"):
            guard let length = length(at: position + 1, limit: limit) else { return nil }
            size = 4 + length
        default: return nil
        }
        return size <= limit - position - 1 ? position + 1 + size : nil
    }

    private func length(at position: Int, limit: Int) -> Int? {
        guard limit - position >= 4 else { return nil }
        return bytes[position..<position + 4].reduce(0) { $0 << 8 | Int($1) }
    }

    /// What is in a value of a certain type that has a length.
    private func content(_ value: Range<Int>?, type: Character) -> Range<Int>? {
        guard let value, let ascii = type.asciiValue, bytes[value.lowerBound] == ascii else { return nil }
        return value.lowerBound + 5..<value.upperBound
    }

    private func text(_ value: Range<Int>?) -> String? {
        content(value, type: "S").map { String(decoding: bytes[$0], as: UTF8.self) }
    }

    /// Where the message was published before a broker put it aside for the first time: the last entry of RabbitMQ's
    /// `x-death` (RabbitMQ guide, "Dead Letter Exchanges").
    package var firstDeath: (exchange: String, routingKey: String)? {
        guard let deaths = content(entries()?.first { $0.name == "x-death" }?.value, type: "A") else { return nil }
        var last: Range<Int>?
        var position = deaths.lowerBound
        while position < deaths.upperBound {
            guard let end = end(ofValueAt: position, limit: deaths.upperBound) else { return nil }
            last = position..<end
            position = end
        }
        guard let table = content(last, type: "F"), let fields = entries(in: table),
            let exchange = text(fields.first { $0.name == "exchange" }?.value),
            let keys = content(fields.first { $0.name == "routing-keys" }?.value, type: "A"),
            let end = end(ofValueAt: keys.lowerBound, limit: keys.upperBound),
            let key = text(keys.lowerBound..<end)
        else { return nil }
        return (exchange, key)
    }
}
