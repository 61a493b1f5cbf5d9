/// Where a message goes: an exchange and a key. A class, so that it is handed on as one reference.
public final class PublishDestination: Sendable {
    /// The exchange's name.
    public let exchange: String
    /// The key to route by; empty for a fanout exchange.
    public let routingKey: String
    /// Tells destinations apart, mostly: FNV-1a, the same in every process.
    package let hash: UInt64

    /// Names a destination.
    public init(exchange: String, routingKey: String) {
        self.exchange = exchange
        self.routingKey = routingKey
        var hash: UInt64 = 0xCBF2_9CE4_8422_2325
        for byte in exchange.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        hash = (hash ^ 0xFF) &* 0x100_0000_01B3
        for byte in routingKey.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        self.hash = hash
    }
}

/// Room for messages that are about to be published. What is not used is given back.
///
/// A caller reserves before it encodes: so what waits for room are callers, not messages.
public struct PublishReservation: ~Copyable, Sendable {
    /// For how many messages there is room.
    public let count: Int
    /// How many bytes were set aside for them.
    package let bytes: Int
    /// Whether the caller had to wait for it.
    package let hasWaited: Bool
    private var owner: (any PublishReservationOwner)?

    /// A reservation of a transport that has no limits.
    public init(count: Int = 1) {
        self.count = count
        bytes = 0
        hasWaited = false
    }

    package init(count: Int, bytes: Int, hasWaited: Bool, owner: any PublishReservationOwner) {
        self.count = count
        self.bytes = bytes
        self.hasWaited = hasWaited
        self.owner = owner
    }

    deinit { owner?.release(count: count, bytes: bytes, hasWaited: hasWaited) }

    /// Whether a transport has given it.
    package func isOwned(by other: any PublishReservationOwner) -> Bool { owner === other }

    /// Uses the room: from here on the transport accounts for it.
    package consuming func use() -> (count: Int, bytes: Int, hasWaited: Bool) {
        owner = nil
        return (count, bytes, hasWaited)
    }
}

/// The side of a transport that reservations are given back to.
package protocol PublishReservationOwner: AnyObject, Sendable {
    func release(count: Int, bytes: Int, hasWaited: Bool)
}
