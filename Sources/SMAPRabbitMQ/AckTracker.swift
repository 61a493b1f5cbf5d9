internal import DequeModule
internal import SMAPEvents

/// Which deliveries of a channel are outstanding, and which settlements are still to be sent.
///
/// Invariant (P3): each delivery is settled once. Acknowledgements of the oldest outstanding deliveries become one frame
/// with `multiple`, which covers everything before it: so rejections always go out before it. Settled deliveries leave
/// nothing behind, so there are never more entries than the prefetch allows.
struct AckTracker {
    enum Frame: Equatable {
        case acknowledge(tag: UInt64, multiple: Bool)
        case reject(tag: UInt64, requeue: Bool)
    }

    private struct Entry {
        let tag: UInt64
        var settlement: Settlement?
    }

    /// Tags are counted from 1 on each channel.
    private var lastTag: UInt64 = 0
    /// In the order of their tags.
    private var entries: Deque<Entry> = []
    private var decidedCount = 0

    /// How many deliveries are outstanding.
    var count: Int { entries.count - decidedCount }

    /// How many deliveries the broker has not been told of.
    var unsettledCount: Int { entries.count }

    /// Takes note of a delivery. False if its tag is not the next one, which no broker should send.
    mutating func delivered(_ tag: UInt64) -> Bool {
        guard tag == lastTag &+ 1 else { return false }
        lastTag = tag
        entries.append(Entry(tag: tag))
        return true
    }

    /// Decides about a delivery. False if there is no such delivery, or it was decided before.
    mutating func settle(_ tag: UInt64, _ settlement: Settlement) -> Bool {
        guard let index = index(of: tag), entries[index].settlement == nil else { return false }
        entries[index].settlement = settlement
        decidedCount += 1
        return true
    }

    private func index(of tag: UInt64) -> Int? {
        // Mostly it is the first.
        if let first = entries.first, first.tag == tag { return 0 }
        var low = 0
        var high = entries.count
        while low < high {
            let middle = (low + high) / 2
            if entries[middle].tag < tag { low = middle + 1 } else { high = middle }
        }
        return low < entries.count && entries[low].tag == tag ? low : nil
    }

    /// The frames to send for what was decided since the last call.
    mutating func flush() -> [Frame] {
        guard decidedCount > 0 else { return [] }
        var frames: [Frame] = []
        var acknowledged: (last: UInt64, count: Int)?
        while let first = entries.first, let settlement = first.settlement {
            switch settlement {
            case .acknowledge: acknowledged = (first.tag, (acknowledged?.count ?? 0) + 1)
            case .requeue, .reject: frames.append(.reject(tag: first.tag, requeue: settlement == .requeue))
            }
            entries.removeFirst()
            decidedCount -= 1
        }
        if let acknowledged {
            frames.append(.acknowledge(tag: acknowledged.last, multiple: acknowledged.count > 1))
        }
        guard decidedCount > 0 else { return frames }
        entries.removeAll { entry in
            switch entry.settlement {
            case nil: return false
            case .acknowledge: frames.append(.acknowledge(tag: entry.tag, multiple: false))
            case .requeue, .reject: frames.append(.reject(tag: entry.tag, requeue: entry.settlement == .requeue))
            }
            return true
        }
        decidedCount = 0
        return frames
    }
}
