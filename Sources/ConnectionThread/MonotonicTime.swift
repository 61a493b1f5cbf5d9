internal import Synchronization

/// A point in time that fits into an atomic: nanoseconds since the process first asked.
package struct MonotonicTime: Sendable, Hashable, Comparable {
    package let nanoseconds: UInt64

    private static let origin = ContinuousClock.now - .seconds(1)

    package static var now: MonotonicTime { MonotonicTime(.now) }

    package static let distantFuture = MonotonicTime(nanoseconds: .max)

    package init(nanoseconds: UInt64) {
        self.nanoseconds = nanoseconds
    }

    package init(_ instant: ContinuousClock.Instant) {
        let (seconds, attoseconds) = (instant - Self.origin).components
        guard seconds >= 0 else {
            nanoseconds = 0
            return
        }
        // A deadline centuries away is as good as none; it must not trap.
        nanoseconds = seconds > 1 << 33 ? .max : UInt64(seconds) * 1_000_000_000 + UInt64(attoseconds / 1_000_000_000)
    }

    package static func < (left: MonotonicTime, right: MonotonicTime) -> Bool {
        left.nanoseconds < right.nanoseconds
    }

    package func advanced(by duration: Duration) -> MonotonicTime {
        let (seconds, attoseconds) = duration.components
        guard seconds >= 0 else { return self }
        let step =
            seconds > 1 << 33 ? UInt64.max : UInt64(seconds) * 1_000_000_000 + UInt64(attoseconds / 1_000_000_000)
        let (sum, overflow) = nanoseconds.addingReportingOverflow(step)
        return overflow ? .distantFuture : MonotonicTime(nanoseconds: sum)
    }

    /// The time until `other`, zero if it has passed.
    package func duration(to other: MonotonicTime) -> Duration {
        .nanoseconds(other > self ? other.nanoseconds - nanoseconds : 0)
    }

    /// The end of one of `shares` equal parts of the time until `deadline`.
    package func advanced(share shares: Int, until deadline: MonotonicTime) -> MonotonicTime {
        guard deadline > self, shares > 0 else { return self }
        return MonotonicTime(nanoseconds: nanoseconds + (deadline.nanoseconds - nanoseconds) / UInt64(shares))
    }

    /// Milliseconds until `other`, rounded up, as `poll(2)` takes them; 0 when it has passed.
    package func pollTimeout(until other: MonotonicTime) -> Int32 {
        guard other > self else { return 0 }
        let milliseconds = (other.nanoseconds - nanoseconds - 1) / 1_000_000 + 1
        return Int32(clamping: min(milliseconds, 60_000))
    }
}
