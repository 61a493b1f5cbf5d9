internal import ConnectionThread
internal import DequeModule
internal import Waiting

/// Room in a ``PublishWindow`` that was given to a caller.
struct PublishGrant: Sendable {
    var count: Int
    var bytes: Int
    /// Whether the caller had to wait for it.
    var hasWaited = false
}

/// The callers that wait for room in a ``PublishWindow``, in one line for each share of the destinations. Shares take turns,
/// so that one with many callers does not hold up another with few.
struct ReservationQueue {
    /// A caller that waits.
    final class Reservation: @unchecked Sendable {
        let waiter = Waiter<PublishGrant>()
        let wanted: PublishGrant
        let destination: UInt64
        let deadline: MonotonicTime
        /// Whether it waits no longer. Sound: read and written under the window's lock only.
        fileprivate var isGone = false

        init(_ wanted: PublishGrant, destination: UInt64, deadline: MonotonicTime) {
            self.wanted = wanted
            self.destination = destination
            self.deadline = deadline
        }
    }

    /// How many callers wait.
    private(set) var count = 0
    private var lines: [Deque<Reservation>]
    /// The shares that have a line, in the order of their turns.
    private var turns: Deque<Int> = []
    /// How many that are gone still stand in a line.
    private var goneCount = 0

    init(shares: Int) { lines = Array(repeating: [], count: shares) }

    var turnCount: Int { turns.count }

    /// Whether no caller of a share waits.
    func isEmpty(_ share: Int) -> Bool { lines[share].isEmpty }

    mutating func append(_ reservation: Reservation, share: Int) {
        if lines[share].isEmpty { turns.append(share) }
        lines[share].append(reservation)
        count += 1
    }

    /// Takes out a caller, if it still waits.
    mutating func remove(_ reservation: Reservation) {
        guard !reservation.isGone else { return }
        leave(reservation)
        dropGone()
    }

    /// Begins the next share's turn. Every turn must be ended.
    mutating func beginTurn() -> Int? {
        while let share = turns.popFirst() {
            while let first = lines[share].first, first.isGone {
                lines[share].removeFirst()
                goneCount -= 1
            }
            if !lines[share].isEmpty { return share }
        }
        return nil
    }

    /// Takes the caller whose turn it is.
    mutating func popFirst(_ share: Int) -> Reservation? {
        guard let first = lines[share].popFirst() else { return nil }
        first.isGone = true
        count -= 1
        return first
    }

    mutating func endTurn(_ share: Int) { if !lines[share].isEmpty { turns.append(share) } }

    /// Takes out those whose deadline has passed, and tells the earliest deadline of the others.
    mutating func removeExpired(now: MonotonicTime) -> (expired: [Reservation], next: MonotonicTime) {
        var expired: [Reservation] = []
        var next = MonotonicTime.distantFuture
        for share in turns {
            for reservation in lines[share] where !reservation.isGone {
                if reservation.deadline <= now {
                    leave(reservation)
                    expired.append(reservation)
                } else {
                    next = min(next, reservation.deadline)
                }
            }
        }
        dropGone()
        return (expired, next)
    }

    mutating func removeAll() -> [Reservation] {
        var all: [Reservation] = []
        for share in turns {
            for reservation in lines[share] where !reservation.isGone {
                reservation.isGone = true
                all.append(reservation)
            }
            lines[share] = []
        }
        (turns, count, goneCount) = ([], 0, 0)
        return all
    }

    private mutating func leave(_ reservation: Reservation) {
        reservation.isGone = true
        count -= 1
        goneCount += 1
    }

    /// Those that are gone are taken out together, when there are many.
    private mutating func dropGone() {
        guard goneCount > count + 1024 else { return }
        for share in turns { lines[share].removeAll(where: \.isGone) }
        turns.removeAll { lines[$0].isEmpty }
        goneCount = 0
    }
}
