internal import DequeModule
internal import SMAPEvents

/// Which deliveries of a channel are outstanding, and which settlements are still to be sent.
///
/// Invariant (P3): each delivery is settled once. Contiguous acknowledgements at the front become one frame with
/// `multiple`, which covers everything before it: so rejections always go out before it.
struct SettlementLedger {
    enum Frame: Equatable {
        case acknowledge(tag: UInt64, multiple: Bool)
        case reject(tag: UInt64, requeue: Bool)
    }

    private enum Entry {
        case outstanding
        case decided(Settlement)
        case sent
    }

    /// The tag of the first entry. Tags are counted from 1 on each channel.
    private var firstTag: UInt64 = 1
    private var entries: Deque<Entry> = []
    private var decided: [UInt64] = []

    /// How many deliveries stand in the ledger: outstanding, or settled behind one that is.
    var count: Int { entries.count }

    /// Takes note of a delivery. False if its tag is not the next one, which no broker should send.
    mutating func delivered(_ tag: UInt64) -> Bool {
        guard tag == firstTag + UInt64(entries.count) else { return false }
        entries.append(.outstanding)
        return true
    }

    /// Decides about a delivery. False if there is no such delivery, or it was decided before.
    mutating func settle(_ tag: UInt64, _ settlement: Settlement) -> Bool {
        guard tag >= firstTag, tag < firstTag + UInt64(entries.count) else { return false }
        let index = Int(tag - firstTag)
        guard case .outstanding = entries[index] else { return false }
        entries[index] = .decided(settlement)
        decided.append(tag)
        return true
    }

    /// The frames to send for what was decided since the last call.
    mutating func flush() -> [Frame] {
        guard !decided.isEmpty else { return [] }
        var frames: [Frame] = []
        var acknowledged: (last: UInt64, count: Int)?
        front: while let first = entries.first {
            switch first {
            case .outstanding: break front
            case .sent: break
            case .decided(.acknowledge): acknowledged = (firstTag, (acknowledged?.count ?? 0) + 1)
            case .decided(let other): frames.append(.reject(tag: firstTag, requeue: other == .requeue))
            }
            entries.removeFirst()
            firstTag += 1
        }
        if let acknowledged {
            frames.append(.acknowledge(tag: acknowledged.last, multiple: acknowledged.count > 1))
        }
        for tag in decided where tag >= firstTag {
            let index = Int(tag - firstTag)
            guard case .decided(let settlement) = entries[index] else { continue }
            switch settlement {
            case .acknowledge: frames.append(.acknowledge(tag: tag, multiple: false))
            case .requeue, .reject: frames.append(.reject(tag: tag, requeue: settlement == .requeue))
            }
            entries[index] = .sent
        }
        decided.removeAll(keepingCapacity: true)
        return frames
    }
}
