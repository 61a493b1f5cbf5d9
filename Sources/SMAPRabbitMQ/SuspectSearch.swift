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
    /// How long suspects may go unanswered at least and at most: one of them may go where nothing is confirmed.
    private static let patienceRange = Duration.seconds(2)...Duration.seconds(16)
    /// So much longer than this may the next answer take as one has taken lately.
    private static let patienceFactor = 2
    /// The longest time that an answer has taken counts for less as time passes: one second less in so many.
    private static let forgetting = 8
    /// A message is given up for ends without a reason when it has ended so many connections alone.
    private static let loneLossLimit = 3
    /// So many messages in a row may be given up for ends of connections, with no answer to another in between.
    private static let verdictLimit = 2
    /// So many losses in a row are followed by another attempt at once: halving finds one message among thousands.
    private static let quickLimit = 12

    /// How many suspects are on the wire and not answered, of those that the others wait for.
    private(set) var onWire = 0
    /// How many are on the wire that the others do not wait for any more.
    private(set) var left = 0
    /// Until when the broker must have answered something: one of them, or what stands before them.
    private(set) var limit = MonotonicTime.distantFuture
    /// How many messages are in the group that is being written, how many may be, and whether they go where nothing is confirmed.
    private var group = (count: 0, limit: Int.max, isPutBack: false)
    /// How many answers the broker has given, and how many it had when the connection was lost last.
    private var answers = 0
    private var answersBeforeConnection = 0
    /// The longest time that an answer has taken lately, and when the last one came.
    private var longest = Duration.zero
    private var answeredAt = MonotonicTime(nanoseconds: 0)
    /// How many messages were given up for ends of connections, and how many connections ended, since the last answer.
    private var verdicts = 0
    private var losses = 0
    /// Whether the next connection is to be opened soon: the last one has ended with suspects on the wire, and the search has
    /// not gone on for too long without an answer.
    private(set) var retriesSoon = false
    /// Whether nothing has been written on the connection yet.
    private(set) var isOnNewConnection = false

    /// Whether a suspect may be written together with those that are on the wire.
    func admits(_ suspect: PendingPublish) -> Bool {
        group.count < min(group.limit, suspect.groupLimit) && (group.count == 0 || group.isPutBack == suspect.isPutBack)
    }

    mutating func wrote(_ suspect: PendingPublish, now: MonotonicTime) {
        onWire += 1
        group = (group.count + 1, min(group.limit, suspect.groupLimit), suspect.isPutBack)
        limit = now.advanced(by: patience)
    }

    /// How long suspects may go unanswered: a broker with a slow disk must not be asked again before it can answer.
    private var patience: Duration {
        min(max(longest * Self.patienceFactor, Self.patienceRange.lowerBound), Self.patienceRange.upperBound)
    }

    /// The broker has answered a message.
    mutating func answered(_ publish: PendingPublish, now: MonotonicTime) {
        answers += 1
        (verdicts, losses) = (0, 0)
        longest = max(
            publish.writtenAt.duration(to: now), longest - answeredAt.duration(to: now) / Self.forgetting)
        answeredAt = now
        if publish.isSuspect, publish.isLeft {
            left -= 1
        } else if publish.isSuspect {
            onWire -= 1
            if onWire == 0 { testEnded() } else { limit = now.advanced(by: patience) }
        }
        // Suspects wait for this one too, and there may be many more before them.
        if onWire == 0, limit != .distantFuture { limit = now.advanced(by: patience) }
    }

    /// A connection has ended.
    ///
    /// - Parameter isTest: Whether suspects were on the wire, and one of them may have ended it.
    mutating func connectionLost(isTest: Bool) {
        losses += 1
        answersBeforeConnection = answers
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

    /// Nothing is on the wire any more.
    mutating func takenBack() {
        testEnded()
        left = 0
    }

    /// No suspect is on the wire that the others wait for, and none waits for the others.
    mutating func testEnded() { (onWire, limit, group) = (0, .distantFuture, (0, .max, false)) }

    /// The suspects on the wire have not ended the connection in their time, and were not answered. They stay there, and the
    /// others go on.
    mutating func leave() {
        left += onWire
        testEnded()
    }

    /// The channel was reset, since nothing was answered in time.
    mutating func reset() {
        // A broker that has answered nothing at all may need longer.
        if answers == answersBeforeConnection { longest = patience }
    }

    /// Suspects wait until everything else is answered.
    mutating func awaitOthers(now: MonotonicTime) { limit = min(limit, now.advanced(by: patience)) }

    /// Suspects that were not answered before wait for those that were left on the wire: for longer, since each reset is another
    /// copy.
    mutating func awaitLeft(now: MonotonicTime) {
        limit = min(limit, now.advanced(by: patience * 8))
    }

    /// The broker could not answer until now.
    mutating func unblocked(now: MonotonicTime) {
        if limit != .distantFuture { limit = now.advanced(by: patience) }
    }
}
