import SMAPEvents
import Testing

@testable import SMAPRabbitMQ

/// A tracker whose steps can stand in an expectation.
private final class Tracker {
    private var tracker = AckTracker()
    func delivered(_ tag: UInt64) -> Bool { tracker.delivered(tag) }
    func settle(_ tag: UInt64, _ settlement: Settlement) -> Bool { tracker.settle(tag, settlement) }
    func flush() -> [AckTracker.Frame] { tracker.flush() }
    var count: Int { tracker.count }

    init(_ count: Int) {
        for tag in 1...UInt64(count) { #expect(delivered(tag)) }
    }
}

@Suite struct AckTrackerTests {
    @Test func `acknowledgements of the oldest deliveries become one frame`() {
        let tracker = Tracker(5)
        for tag in [2, 1, 3] as [UInt64] { #expect(tracker.settle(tag, .acknowledge)) }
        #expect(tracker.flush() == [.acknowledge(tag: 3, multiple: true)])
        #expect(tracker.settle(5, .acknowledge))
        #expect(tracker.flush() == [.acknowledge(tag: 5, multiple: false)])
        #expect(tracker.settle(4, .acknowledge))
        #expect(tracker.flush() == [.acknowledge(tag: 4, multiple: false)])
        #expect(tracker.flush().isEmpty)
    }

    @Test func `a rejection goes out before the acknowledgement that covers it`() {
        let tracker = Tracker(4)
        #expect(tracker.settle(1, .acknowledge))
        #expect(tracker.settle(2, .reject))
        #expect(tracker.settle(3, .requeue))
        #expect(tracker.settle(4, .acknowledge))
        #expect(
            tracker.flush() == [
                .reject(tag: 2, requeue: false), .reject(tag: 3, requeue: true), .acknowledge(tag: 4, multiple: true),
            ])
    }

    @Test func `a delivery is settled once, and only if it was delivered`() {
        let tracker = Tracker(2)
        #expect(!tracker.settle(3, .acknowledge))
        #expect(!tracker.settle(0, .acknowledge))
        #expect(tracker.settle(2, .acknowledge))
        #expect(!tracker.settle(2, .reject))
        _ = tracker.flush()
        #expect(!tracker.settle(2, .acknowledge))
        #expect(!tracker.delivered(5), "tags are dense")
    }

    @Test func `behind a slow delivery nothing piles up, and only outstanding deliveries count`() {
        let tracker = Tracker(1)
        for tag in 2...10_000 as ClosedRange<UInt64> {
            #expect(tracker.delivered(tag))
            #expect(tracker.settle(tag, .acknowledge))
            #expect(tracker.flush() == [.acknowledge(tag: tag, multiple: false)])
            #expect(tracker.count == 1)
        }
        #expect(tracker.settle(1, .acknowledge))
        #expect(tracker.flush() == [.acknowledge(tag: 1, multiple: false)])
    }

    @Test func `gaps of settled deliveries do not keep the oldest from being acknowledged together`() {
        let tracker = Tracker(5)
        #expect(tracker.settle(2, .reject))
        #expect(tracker.flush() == [.reject(tag: 2, requeue: false)])
        for tag in [1, 3] as [UInt64] { #expect(tracker.settle(tag, .acknowledge)) }
        #expect(tracker.flush() == [.acknowledge(tag: 3, multiple: true)])
    }
}
