/// Remembers which events have been handled, so that one that comes twice is handled once: `RedisInbox`, or
/// `InMemoryInbox`.
///
/// An entry is leased while its handler works, and becomes a tombstone when it is done. What dies inside its handler is
/// handled again when the lease has run out: that window cannot be closed from outside the handler's own store, so its
/// effects must bear a repetition there.
public protocol Inbox: Sendable {
    /// Leases an entry, unless it is done or leased to somebody else.
    func claim(
        _ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant
    ) async throws -> InboxClaim

    /// Makes an entry a tombstone: it is done.
    func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws

    /// Gives a lease back, so that the event can be handled again. Does nothing if it is another one's by now.
    func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws
}

/// An event in an inbox.
public struct InboxEntry: Sendable, Hashable {
    /// Who remembers: a queue's name, or one that several queues of a consumer share. 1 to 245 bytes.
    public let scope: String
    /// The event's id; one that is no UUID is joined with a hash of the message, since siblings have given such ids to
    /// different events. So a repetition under such an id is recognised only if it is the same to the byte, and the two legs
    /// of a dual publish are not: let events have the ids that they are given, or UUIDs.
    public let id: String

    /// Names an entry.
    public init(scope: String, id: String) {
        self.scope = scope
        self.id = id
    }

    /// Names the entry of an event that came as this message.
    public init(scope: String, eventID: EventID, body: [UInt8]) {
        let text = eventID.rawValue
        let isUnique = Self.isUUID(text.hasPrefix("evt_") ? text.dropFirst(4) : text[...])
        self.init(scope: scope, id: isUnique ? text : "\(text):\(Self.hash(body))")
    }

    private static func isUUID(_ text: Substring) -> Bool {
        let bytes = Array(text.utf8)
        return bytes.count == 36
            && bytes.enumerated().allSatisfy { index, byte in
                switch index {
                case 8, 13, 18, 23: byte == UInt8(ascii: "-")
                default: (0x30...0x39).contains(byte) || (0x61...0x66).contains(byte | 0x20)
                }
            }
    }

    /// FNV-1a, 64 bits: it tells accidental namesakes apart, and does not resist anybody who wants a collision.
    private static func hash(_ body: [UInt8]) -> String {
        String(body.reduce(0xCBF2_9CE4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 }, radix: 16)
    }
}

/// What an inbox says about an event.
public enum InboxClaim: Sendable, Hashable {
    /// Nobody has handled it: it is leased to the caller, under this token.
    case granted(token: String)
    /// It is leased, for so long at most: come again later.
    case busy(remaining: Duration)
    /// It has been handled.
    case done
}

/// How a subscription uses an inbox.
public struct InboxPolicy: Sendable, Hashable {
    /// The scope; the queue's name if nil. Subscriptions of one consumer to several queues, as during dual publishing, are
    /// given the same scope, and act once.
    public var scope: String?
    /// How long a handled event is remembered, 7 days by default. Longer than the longest span of retries, and than it may
    /// take until dead letters are replayed.
    public var timeToLive: Duration
    /// How long asking the inbox may take, 5 s by default.
    public var deadline: Duration

    /// Describes how.
    public init(scope: String? = nil, timeToLive: Duration = .seconds(604_800), deadline: Duration = .seconds(5)) {
        self.scope = scope
        self.timeToLive = timeToLive
        self.deadline = deadline
    }
}
