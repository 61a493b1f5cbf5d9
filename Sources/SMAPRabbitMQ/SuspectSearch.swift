internal import ConnectionThread

/// The search for a message that ends channels or connections. All messages that were in flight are suspects then. They are
/// written again in groups, and nothing else meanwhile; a group that ends another channel is written again in halves, until
/// the guilty message is alone.
///
/// The end of a connection may be no message's fault. A message is given up only if it has ended connections alone while others
/// came through; until then, what has ended one alone stands behind the others.
///
/// Each suspect knows how large a group it may be in (``PendingPublish/groupLimit``), so the number of its copies is bounded
/// by the logarithm of what was in flight. The suspects themselves are kept by the ``PublishWindow``.
struct SuspectSearch {
    /// How long suspects may go unanswered: one of them may go where nothing is confirmed.
    private static let patience = Duration.seconds(2)
    /// A message is given up for ends without a reason when it has ended so many connections alone.
    private static let loneLossLimit = 3
    /// So many messages in a row may be given up for ends of connections, with no answer to another in between.
    private static let verdictLimit = 2
    /// So many losses in a row are followed by another attempt at once: halving finds one message among thousands.
    private static let quickLimit = 12

    /// How many suspects are on the wire and not answered.
    private(set) var onWire = 0
    /// Until when the broker must have answered something: one of them, or what stands before them.
    private(set) var limit = MonotonicTime.distantFuture
    /// How many messages are in the group that is being written, and how many may be.
    private var group = (count: 0, limit: Int.max)
    /// How many answers the broker has given.
    private var answers = 0
    /// How many messages were given up for ends of connections, and how many connections ended, since the last answer.
    private var verdicts = 0
    private var losses = 0
    /// Whether the next connection is to be opened soon: the last one has ended with suspects on the wire, and the search has
    /// not gone on for too long without an answer.
    private(set) var retriesSoon = false
    /// Whether nothing has been written on the connection yet.
    private(set) var isOnNewConnection = false

    /// Whether a suspect may be written together with those that are on the wire.
    func admits(_ suspect: PendingPublish) -> Bool { group.count < min(group.limit, suspect.groupLimit) }

    mutating func wrote(_ suspect: PendingPublish, now: MonotonicTime) {
        onWire += 1
        group = (group.count + 1, min(group.limit, suspect.groupLimit))
        limit = now.advanced(by: Self.patience)
    }

    /// The broker has answered a message, suspect or not.
    mutating func answered() {
        answers += 1
        (verdicts, losses) = (0, 0)
    }

    /// The broker has answered a suspect.
    mutating func settled(now: MonotonicTime) {
        onWire -= 1
        if onWire == 0 { takenBack() } else { limit = now.advanced(by: Self.patience) }
    }

    /// A connection has ended.
    ///
    /// - Parameter isTest: Whether suspects were on the wire, and one of them may have ended it.
    mutating func connectionLost(isTest: Bool) {
        losses += 1
        retriesSoon = isTest && losses <= Self.quickLimit
        isOnNewConnection = true
    }

    mutating func beganConnection() { isOnNewConnection = false }

    /// A connection has ended with one message on the wire. Returns whether the message is to blame.
    ///
    /// - Parameter isRefusal: Whether the broker says so. But one that says so of each message is not believed.
    mutating func endedConnectionAlone(_ publish: PendingPublish, isRefusal: Bool) -> Bool {
        if publish.loneLossCount == 0 { publish.answersBefore = answers }
        publish.loneLossCount += 1
        // If nothing comes through, broker or network may end every connection.
        let isGuilty = isRefusal || publish.loneLossCount >= Self.loneLossLimit && answers > publish.answersBefore
        guard isGuilty, verdicts < Self.verdictLimit else { return false }
        verdicts += 1
        return true
    }

    /// No suspect is on the wire any more.
    mutating func takenBack() { (onWire, limit, group) = (0, .distantFuture, (0, .max)) }

    /// Suspects wait until everything else is answered.
    mutating func awaitOthers(now: MonotonicTime) { limit = min(limit, now.advanced(by: Self.patience)) }

    /// The broker could not answer until now.
    mutating func unblocked(now: MonotonicTime) {
        if limit != .distantFuture { limit = now.advanced(by: Self.patience) }
    }
}
