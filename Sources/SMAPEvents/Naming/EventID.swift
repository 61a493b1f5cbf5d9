internal import Synchronization

/// The id of an event: the same for every copy of it, so that a consumer can act once.
///
/// Ids made here are `evt_` and a version 4 UUID in lower case. Ids of sibling services may be any text of 1 to 255
/// bytes (an AMQP short string: it travels as `message_id` too).
public struct EventID: Sendable, Hashable, CustomStringConvertible {
    /// The id, verbatim.
    public let rawValue: String

    /// A new id that nobody has used before.
    public init() {
        let random = IdentifierSequence.pair()
        // RFC 9562, section 5.4: 122 random bits, version 4, variant 10.
        let high = (random.0 & 0xFFFF_FFFF_FFFF_0FFF) | 0x4000
        let low = (random.1 & 0x3FFF_FFFF_FFFF_FFFF) | 0x8000_0000_0000_0000
        rawValue = String(unsafeUninitializedCapacity: 40) { buffer in
            // Sound: every one of the 40 bytes of the capacity asked for is written below, all of them ASCII.
            var position = 4
            for (offset, byte) in "evt_".utf8.enumerated() { buffer[offset] = byte }
            for index in 0..<32 {
                if index == 8 || index == 12 || index == 16 || index == 20 {
                    buffer[position] = UInt8(ascii: "-")
                    position += 1
                }
                let word = index < 16 ? high : low
                let digit = UInt8(truncatingIfNeeded: word >> UInt64((15 - index % 16) * 4)) & 0xF
                buffer[position] = digit < 10 ? 0x30 + digit : 0x57 + digit
                position += 1
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

/// Numbers for ids, without a system call or a lock for each: two sequences that never repeat, from a seed of 128 random
/// bits drawn once per process, and mixed so that neighbours have nothing in common (SplitMix64).
///
/// They are unique, which is what an id needs; they are no secret.
private enum IdentifierSequence {
    private static let seed = (UInt64.random(in: .min ... .max), UInt64.random(in: .min ... .max))
    private static let drawn = Atomic<UInt64>(0)

    static func pair() -> (UInt64, UInt64) {
        let step = drawn.add(1, ordering: .relaxed).newValue
        // Two odd steps, so that two processes would have to meet in both sequences at once.
        return (mix(seed.0 &+ step &* 0x9E37_79B9_7F4A_7C15), mix(seed.1 &+ step &* 0xD1B5_4A32_D192_ED03))
    }

    private static func mix(_ value: UInt64) -> UInt64 {
        var value = value
        value = (value ^ (value >> 30)) &* 0xBF58_476D_1CE4_E5B9
        value = (value ^ (value >> 27)) &* 0x94D0_49BB_1331_11EB
        return value ^ (value >> 31)
    }
}
