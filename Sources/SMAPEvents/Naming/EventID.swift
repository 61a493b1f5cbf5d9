/// The id of an event: the same for every copy of it, so that a consumer can act once.
///
/// Ids made here are `evt_` and a version 4 UUID in lower case. Ids of sibling services may be any text of 1 to 255
/// bytes (an AMQP short string: it travels as `message_id` too).
public struct EventID: Sendable, Hashable, CustomStringConvertible {
    /// The id, verbatim.
    public let rawValue: String

    /// A new id that nobody has used before.
    public init() {
        var generator = SystemRandomNumberGenerator()
        // RFC 9562, section 5.4: 122 random bits, version 4, variant 10.
        let high = (generator.next() & 0xFFFF_FFFF_FFFF_0FFF) | 0x4000
        let low = (generator.next() & 0x3FFF_FFFF_FFFF_FFFF) | 0x8000_0000_0000_0000
        rawValue = String(unsafeUninitializedCapacity: 40) { buffer in
            // Sound: every one of the 40 bytes of the capacity asked for is written below, all of them ASCII.
            var position = 0
            func put(_ byte: UInt8) {
                buffer[position] = byte
                position += 1
            }
            for byte in "evt_".utf8 { put(byte) }
            for index in 0..<32 {
                if index == 8 || index == 12 || index == 16 || index == 20 { put(UInt8(ascii: "-")) }
                let word = index < 16 ? high : low
                let digit = UInt8((word >> UInt64((15 - index % 16) * 4)) & 0xF)
                put(digit < 10 ? 0x30 + digit : 0x57 + digit)
            }
            return position
        }
    }

    /// Checks and wraps an id from elsewhere: 1 to 255 bytes, no control characters. Throws
    /// ``EventsError/Code/invalidName``.
    public init(_ rawValue: String) throws {
        guard (1...255).contains(rawValue.utf8.count), rawValue.utf8.allSatisfy({ $0 >= 0x20 && $0 != 0x7F }) else {
            throw EventsError(
                .invalidName, "an event id has 1 to 255 bytes and no control characters", operation: "event id")
        }
        self.rawValue = rawValue
    }

    /// The id, verbatim.
    public var description: String { rawValue }
}
