internal import ConnectionThread

/// The search for a message that ends channels or connections. All messages that were in flight are suspects then. They are
/// written again in groups, and nothing else meanwhile; a group that ends another channel is written again in halves, until
/// the guilty message is alone.
///
/// Each suspect knows how large a group it may be in (``PendingPublish/groupLimit``), so the number of its copies is bounded
/// by the logarithm of what was in flight. The suspects themselves are kept by the ``PublishWindow``.
struct SuspectSearch {
    /// How long suspects may go unanswered: one of them may go where nothing is confirmed.
    private static let patience = Duration.seconds(2)

    /// How many suspects are on the wire and not answered.
    private(set) var onWire = 0
    /// Until when the broker must have answered something: one of them, or what stands before them.
    private(set) var limit = MonotonicTime.distantFuture
    /// How many messages are in the group that is being written, and how many may be.
    private var group = (count: 0, limit: Int.max)

    /// Whether a suspect may be written together with those that are on the wire.
    func admits(_ suspect: PendingPublish) -> Bool { group.count < min(group.limit, suspect.groupLimit) }

    mutating func wrote(_ suspect: PendingPublish, now: MonotonicTime) {
        onWire += 1
        group = (group.count + 1, min(group.limit, suspect.groupLimit))
        limit = now.advanced(by: Self.patience)
    }

    /// The broker has answered a suspect.
    mutating func settled(now: MonotonicTime) {
        onWire -= 1
        if onWire == 0 { takenBack() } else { limit = now.advanced(by: Self.patience) }
    }

    /// No suspect is on the wire any more.
    mutating func takenBack() { (onWire, limit, group) = (0, .distantFuture, (0, .max)) }

    /// Suspects wait until everything else is answered.
    mutating func awaitOthers(now: MonotonicTime) { limit = min(limit, now.advanced(by: Self.patience)) }

    /// The broker could not answer until now.
    mutating func unblocked(now: MonotonicTime) { if onWire > 0 { limit = now.advanced(by: Self.patience) } }
}
