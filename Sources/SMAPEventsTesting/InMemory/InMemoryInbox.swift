public import SMAPEvents
internal import Synchronization

/// An inbox in memory, for tests.
public final class InMemoryInbox: Inbox {
    private enum Entry {
        case leased(token: String, end: Duration)
        case done(end: Duration)
    }

    private let entries = Mutex<[InboxEntry: Entry]>([:])
    private let stopwatch: Stopwatch

    /// Makes an empty inbox.
    ///
    /// - Parameter clock: What leases and tombstones are measured by.
    public init(clock: any Clock<Duration> = ContinuousClock()) { stopwatch = Stopwatch(clock) }

    /// How many events it remembers or leases.
    public var count: Int {
        let now = stopwatch.elapsed()
        return entries.withLock { entries in
            entries.values.count {
                switch $0 {
                case .leased(_, let end), .done(let end): end > now
                }
            }
        }
    }

    /// See ``SMAPEvents/Inbox``.
    public func claim(
        _ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant
    ) async throws -> InboxClaim {
        let now = stopwatch.elapsed()
        return entries.withLock { entries in
            switch entries[entry] {
            case .done(let end) where end > now: return .done
            case .leased(_, let end) where end > now: return .busy(remaining: end - now)
            default:
                let token = EventID().rawValue
                entries[entry] = .leased(token: token, end: now + lease)
                return .granted(token: token)
            }
        }
    }

    /// See ``SMAPEvents/Inbox``.
    public func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws {
        let end = stopwatch.elapsed() + timeToLive
        entries.withLock { $0[entry] = .done(end: end) }
    }

    /// See ``SMAPEvents/Inbox``.
    public func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws {
        entries.withLock { entries in
            if case .leased(token, _) = entries[entry] { entries[entry] = nil }
        }
    }
}
