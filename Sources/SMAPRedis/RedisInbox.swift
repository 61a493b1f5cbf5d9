public import SMAPEvents

/// Remembers handled events in Redis 7, a key each: `smap:inbox:<scope>:<event_id>`.
///
/// A lease holds a random token and expires with the lease; a tombstone holds `done` and expires after the
/// ``SMAPEvents/InboxPolicy/timeToLive``. An event costs about 200 bytes of Redis's memory for that time (measured: 100,000
/// events of 40-byte ids in a scope of 18 bytes, 19.8 MB): at 100 events a second and 7 days, 12 GB; choose the time to live
/// accordingly. Two round trips an event, each pipelined with those of other handlers.
public final class RedisInbox: Inbox {
    private let client: RedisClient

    /// Makes an inbox; its connection is opened when it is needed. Throws
    /// ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public init(configuration: RedisConfiguration) throws {
        client = try RedisClient(configuration)
    }

    /// Closes the connection. Every later call throws ``SMAPEvents/EventsError/Code/closed``.
    public func close() async { await client.close() }

    /// Whether Redis answers a PING.
    public func health(deadline: ContinuousClock.Instant = .now + .seconds(5)) async -> Health {
        await client.health(deadline)
    }

    /// See ``SMAPEvents/Inbox``.
    public func claim(
        _ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant
    ) async throws -> InboxClaim {
        let operation = "inbox claim"
        let token = EventID().rawValue
        let reply = try await client.run(
            Self.claimScript, keys: [Self.key(entry)], [token, Self.milliseconds(lease)], operation, deadline
        ).reply
        switch reply {
        case .integer(-1): return .granted(token: token)
        case .integer(-2): return .done
        case .integer(let left): return .busy(remaining: .milliseconds(max(1, left)))
        default: throw EventsError(.protocolViolation, "an unexpected reply", operation: operation)
        }
    }

    /// See ``SMAPEvents/Inbox``.
    public func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws {
        // Whoever holds the lease by now: it is done.
        _ = try await client.command(
            ["SET", Self.key(entry), "done", "PX", Self.milliseconds(timeToLive)], "inbox complete", deadline)
    }

    /// See ``SMAPEvents/Inbox``.
    public func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws {
        _ = try await client.run(Self.releaseScript, keys: [Self.key(entry)], [token], "inbox release", deadline)
    }

    /// -1: granted. -2: done. Otherwise how many milliseconds the lease still lasts. A claim that is repeated because its
    /// answer was lost finds its own lease, and waits for that.
    private static let claimScript = RedisScript(
        """
        #!lua
        if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return -1 end
        if redis.call('GET', KEYS[1]) == 'done' then return -2 end
        return math.max(redis.call('PTTL', KEYS[1]), 0)
        """)

    private static let releaseScript = RedisScript(
        """
        #!lua flags=allow-oom
        if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
        return 0
        """)

    private static func key(_ entry: InboxEntry) -> String { "smap:inbox:\(entry.scope):\(entry.id)" }

    private static func milliseconds(_ duration: Duration) -> String {
        String(max(1, duration.components.seconds * 1000 + duration.components.attoseconds / 1_000_000_000_000_000))
    }
}
