internal import ConnectionThread
internal import DequeModule
internal import SMAPEvents
internal import Waiting

/// What is being published: callers that wait for room, messages to be written, and messages that wait for a confirm. It
/// outlives connections: what a lost one leaves unconfirmed is written again on the next.
///
/// A value behind a lock. It never calls out: the results that it returns are handed to their callers outside the lock.
///
/// Invariants:
/// - P1, P2: each caller is answered once. A message whose bytes may have been written ends as confirmed, as refused
///   (only if the broker cannot have taken it before) or as *unknown*, never as unsent.
/// - P8: messages and bytes are bounded, reservations included; and so are the callers that wait. Room is given back when the
///   broker has answered, or when the caller has been answered and no connection holds the message any more.
/// - P10: a destination that does not confirm cannot use up all room (``spare``), and a refused message never changes the
///   outcome of others: those are written again.
struct PublishWindow {
    struct Limits: Sendable {
        var messages: Int
        var bytes: Int
        var waiting: Int
    }

    /// What is to be done outside the lock.
    struct Resumptions {
        var publishes: [(PendingPublish, Result<Bool, EventsError>)] = []
        var reservations: [(Waiter<PublishGrant>, Result<PublishGrant, EventsError>)] = []
        var drained: [@Sendable () -> Void] = []
        /// The correlation ids of requests that are in a queue now.
        var requests: [String] = []

        var isEmpty: Bool { publishes.isEmpty && reservations.isEmpty && drained.isEmpty && requests.isEmpty }

        mutating func append(_ other: Resumptions) {
            publishes += other.publishes
            reservations += other.reservations
            drained += other.drained
            requests += other.requests
        }
    }

    /// An answer of the broker, as it is read.
    enum Event {
        case confirmed(tag: UInt64, multiple: Bool, isNack: Bool)
        case returned(exchange: String, routingKey: String, messageID: String?)
    }

    private enum Mode {
        case open
        /// Callers are refused until a connection opens: the server rejects the login, and waiting does not help.
        case refusing(EventsError)
        case closed(EventsError)
    }

    /// Destinations are told apart by so many remainders of their hash.
    private static let shareCount = 256
    /// So many callers at a time may encode what they had to wait for: sizes are guesses until then.
    static let encodingLimit = 16
    /// The watchdog looks no more often than this: a deadline is kept to within 10 ms.
    static let precision = Duration.milliseconds(10)
    /// A destination of which nothing is confirmed for so long does not get what is in spare, and is named by `health`.
    private static let silenceLimit = Duration.seconds(5)
    /// A message that was under way at so many losses is suspected of having caused them.
    private static let lossLimit = 3
    /// A message that was under way at so many closes of the channel for other messages is written in halves from then on,
    /// whatever else is confirmed meanwhile.
    private static let interruptionLimit = 4

    private let limits: Limits
    private var mode = Mode.open
    /// Reserved, to be written, or unconfirmed.
    private var messages = 0
    private var bytes = 0
    /// Reservations that were waited for and are not used yet.
    private var encoding = 0

    private var waiting = ReservationQueue(shares: shareCount)

    /// To be written, in order.
    private var unsent: Deque<PendingPublish> = []
    /// On the wire and not answered, in the order of their tags. Settled ones stand in between until there are as many of
    /// them as of others, so one that the broker does not answer keeps nothing behind it.
    private var sent: Deque<PendingPublish> = []
    /// How many of them are settled.
    private var settledCount = 0
    /// Tags count from 1 on each channel.
    private var nextTag: UInt64 = 1
    /// What is in the window of one destination.
    private struct Share {
        var messages = 0
        var bytes = 0
        /// How many of the messages are on the wire.
        var written = 0
        /// Since when nothing of what was written has been confirmed; nil while nothing is written.
        var silentSince: MonotonicTime?
        /// Whether the broker has answered something of it, and left nothing unanswered when a channel ended.
        var hasConfirmed = false
        /// Written messages whose callers have been answered, because the broker has not.
        var orphans = 0
        var orphanBytes = 0
    }

    private var shares = [Share](repeating: Share(), count: shareCount)
    /// The orphans of all destinations.
    private var orphans = 0
    private var orphanBytes = 0
    private var search = SuspectSearch()
    /// Whether the broker has answered anything since it closed the channel last because of a message.
    private var hasSettled = false

    private var refusals = PublishRefusals()
    private var draining: [@Sendable () -> Void] = []
    /// Why nothing is being written now, for those whose deadline passes meanwhile.
    private(set) var blockedReason: EventsError?
    /// No deadline is earlier than this; it may be too early.
    private(set) var nextDeadline = MonotonicTime.distantFuture
    /// What the channel was closed for last, because it was not confirmed. Nil once something of it is.
    private var lastUnconfirmed: (destination: UInt64, name: String, at: MonotonicTime)?

    init(_ limits: Limits) {
        self.limits = limits
        blockedReason = EventsError(
            .connectionFailed, "the connection is being opened", operation: "connect")
    }

    // MARK: Room

    /// How many callers wait for room.
    var waitingCount: Int { waiting.count }
    /// How many messages are in the window, reservations included.
    var count: Int { messages }
    /// How many bytes are in the window, reservations included.
    var byteCount: Int { bytes }
    var hasUnsent: Bool { !unsent.isEmpty }

    /// The largest part of a list that is published in one go: half of the window.
    private func part(of wanted: PublishGrant) -> PublishGrant {
        let each = max(1, wanted.bytes / max(1, wanted.count))
        let count = max(1, min(wanted.count, limits.messages / 2, limits.bytes / 2 / each))
        return PublishGrant(count: count, bytes: count * each)
    }

    /// What a caller gets, for whom there is room.
    private func grant(_ wanted: PublishGrant, _ share: Int) -> PublishGrant {
        let part = part(of: wanted)
        guard part.count > 1 else { return part }
        // No more than there is room for; and of what is in spare no more than one destination may have.
        let room =
            hasRoom
            ? (messages: limits.messages - messages, bytes: limits.bytes - bytes)
            : (
                messages: limits.messages / 16 - shares[share].messages,
                bytes: limits.bytes / 16 - shares[share].bytes
            )
        let each = max(1, part.bytes / part.count)
        let count = max(1, min(part.count, room.messages, room.bytes / each))
        return PublishGrant(count: count, bytes: part.bytes / part.count * count)
    }

    /// Beyond the limits, so much is kept for destinations that have little in the window: one that does not confirm holds
    /// up itself, not the others. Destinations of which nothing has been confirmed share half of it.
    private var spare: (messages: Int, bytes: Int) { (limits.messages / 4, limits.bytes / 4) }

    // One message may go over the limit of bytes, so that a large one gets its turn.
    private var hasRoom: Bool { messages < limits.messages && bytes < limits.bytes }

    private func hasSpareRoom(for share: Int) -> Bool {
        // Many destinations that do not confirm must not use it up together.
        let part = shares[share].hasConfirmed ? 1 : 2
        guard messages < limits.messages + spare.messages / part, bytes < limits.bytes + spare.bytes / part,
            shares[share].messages < limits.messages / 16, shares[share].bytes < limits.bytes / 16
        else { return false }
        guard let silentSince = shares[share].silentSince else { return true }
        return silentSince.advanced(by: Self.silenceLimit) > .now
    }

    /// Takes room for messages, if there is some and no caller has waited longer for it. For a list it may be less than
    /// wanted.
    mutating func reserve(_ wanted: PublishGrant, for destination: UInt64) throws -> PublishGrant? {
        switch mode {
        case .open: break
        case .refusing(let error), .closed(let error): throw error
        }
        let share = Self.share(of: destination)
        guard hasRoom ? waiting.count == 0 : waiting.isEmpty(share) && hasSpareRoom(for: share) else { return nil }
        let granted = grant(wanted, share)
        messages += granted.count
        bytes += granted.bytes
        return granted
    }

    private static func share(of destination: UInt64) -> Int { Int(destination % UInt64(shareCount)) }

    /// Queues a caller for room. Throws when as many are waiting as may.
    mutating func wait(_ reservation: ReservationQueue.Reservation) throws -> Resumptions {
        switch mode {
        case .open: break
        case .refusing(let error), .closed(let error): throw error
        }
        guard waiting.count < limits.waiting else {
            throw EventsError(
                .overloaded, "\(limits.waiting) callers are waiting for room to publish already", operation: "publish",
                underlying: blockedReason)
        }
        waiting.append(reservation, share: Self.share(of: reservation.destination))
        nextDeadline = min(nextDeadline, reservation.deadline)
        var resumptions = Resumptions()
        admitWaiting(&resumptions)
        return resumptions
    }

    /// Gives back room that was not used.
    mutating func release(_ grant: PublishGrant) -> Resumptions {
        messages -= grant.count
        bytes -= grant.bytes
        if grant.hasWaited { encoding -= 1 }
        var resumptions = Resumptions()
        admitWaiting(&resumptions)
        return resumptions
    }

    /// The task of a caller that waits for room was cancelled.
    mutating func cancel(_ reservation: ReservationQueue.Reservation) {
        waiting.remove(reservation)
    }

    private mutating func admitWaiting(_ resumptions: inout Resumptions) {
        guard case .open = mode, waiting.count > 0 else { return }
        var passed = 0
        while passed < waiting.turnCount, encoding < Self.encodingLimit, let share = waiting.beginTurn() {
            defer { waiting.endTurn(share) }
            guard hasRoom || hasSpareRoom(for: share), let first = waiting.popFirst(share) else {
                passed += 1
                continue
            }
            var granted = grant(first.wanted, share)
            granted.hasWaited = true
            messages += granted.count
            bytes += granted.bytes
            encoding += 1
            passed = 0
            resumptions.reservations.append((first.waiter, .success(granted)))
        }
    }

    // MARK: Callers

    /// Queues messages for which there is room.
    ///
    /// - Parameter granted: What was reserved for them: a guess, which their true size replaces.
    mutating func submit(_ publishes: [PendingPublish], granted: PublishGrant) -> Resumptions {
        if granted.hasWaited { encoding -= 1 }
        messages += publishes.count - granted.count
        bytes -= granted.bytes
        var resumptions = Resumptions()
        for publish in publishes {
            add(publish)
            nextDeadline = min(nextDeadline, publish.deadline)
            unsent.append(publish)
            if let error = refusals.reason(for: publish) { answer(publish, .failure(error), &resumptions) }
        }
        switch mode {
        case .open: if !resumptions.publishes.isEmpty { dropAnswered(&resumptions) }
        case .refusing(let error), .closed(let error):
            for publish in publishes { answer(publish, .failure(error), &resumptions) }
            dropAnswered(&resumptions)
        }
        if waiting.count > 0 { admitWaiting(&resumptions) }
        return resumptions
    }

    /// The same for one message.
    mutating func submit(_ publish: PendingPublish, granted: PublishGrant) -> Resumptions {
        if case .open = mode, waiting.count == 0, refusals.isEmpty {
            if granted.hasWaited { encoding -= 1 }
            messages += 1 - granted.count
            bytes -= granted.bytes
            add(publish)
            nextDeadline = min(nextDeadline, publish.deadline)
            unsent.append(publish)
            return Resumptions()
        }
        return submit([publish], granted: granted)
    }

    /// An exchange was declared: what was refused for its lack is refused no longer.
    mutating func exchangeDeclared(_ name: String) { refusals.exchangeDeclared(name) }

    /// The callers of messages were cancelled. What is written already stays until the broker answers.
    ///
    /// - Parameter result: What they are told, where they do not know yet.
    mutating func cancel(_ publishes: [PendingPublish], _ result: (Bool) -> EventsError) -> Resumptions {
        var resumptions = Resumptions()
        for publish in publishes where !publish.isAnswered {
            let isWritten = publish.isInDoubt || publish.isOnWire
            answer(publish, .failure(result(isWritten)), &resumptions)
        }
        dropAnswered(&resumptions)
        return resumptions
    }

    /// From so many in flight on callers do not wake the thread one by one.
    private static let busyCount = 32

    /// Whether the thread must be told of what was just submitted. While some messages are in flight their confirms bring
    /// it round soon enough, and it then finds a batch instead of one message; that is Nagle's rule (RFC 896), and saves
    /// a dozen system calls a message. Where they do not, ``patience`` does.
    var needsWake: Bool { sentCount < Self.busyCount || unsent.count % Self.busyCount == 0 }

    /// How long the thread may stay away when it has written what it could; nil for as long as it likes. A queue that
    /// cannot confirm (a quorum queue without a majority) must not hold up what goes to others.
    var patience: Duration? {
        hasUnsent ? .milliseconds(2) : sentCount < Self.busyCount ? nil : .milliseconds(10)
    }

    /// How many messages are on the wire and not answered.
    var sentCount: Int { sent.count - settledCount }
    /// How many places those take that are on the wire.
    var sentPlaces: Int { sent.count }

    // MARK: The connection thread

    /// The next messages to write, in order, no more bytes than `budget` but one at least. From here on they count as sent.
    ///
    /// - Parameters:
    ///   - position: Where the first of them will stand in the connection's stream.
    ///   - frameLimit: The largest frame that the broker takes. A message whose header is larger fails by itself.
    mutating func takeBatch(
        budget: Int, position: UInt64, frameLimit: Int, now: MonotonicTime, _ resumptions: inout Resumptions
    ) -> [PendingPublish] {
        var batch: [PendingPublish] = []
        var position = position
        var size = 0
        if search.isOnNewConnection, !unsent.isEmpty {
            search.beganConnection()
            putBackLoneSuspects()
        }
        // Suspects go one group at a time, and nothing else meanwhile: when the channel closes, the guilty one is among them.
        if search.left > 0 { putBackSilent() }
        let isTesting = unsent.first?.isSuspect == true
        if search.onWire > 0 {
            // The group may be larger than what the socket takes at a time.
            guard let next = unsent.first, isTesting, search.admits(next) else { return [] }
        } else if let next = unsent.first, isTesting, !sent.isEmpty {
            if search.left > 0, next.wasSilent { search.awaitLeft(now: now) } else { search.awaitOthers(now: now) }
            return []
        } else {
            search.testEnded()
        }
        var hasFreed = false
        while let next = unsent.first, next.isSuspect == isTesting, !isTesting || search.admits(next),
            let message = next.message
        {
            let length = message.length(frameLimit: frameLimit)
            if !batch.isEmpty, size + length > budget { break }
            unsent.removeFirst()
            guard message.largestHeadFrame <= frameLimit else {
                let error = EventsError(
                    .eventTooLarge,
                    "the headers have \(message.largestHeadFrame) bytes, and the broker takes \(frameLimit) (frame_max)",
                    operation: "publish")
                answer(next, .failure(next.isInDoubt ? unknown(error) : error), &resumptions)
                free(next)
                hasFreed = true
                continue
            }
            // Between the last look of the watchdog and now its time may have passed.
            guard next.deadline > now || next.isInDoubt || next.isAnswered else {
                let error = EventsError(.unsent, "not written by the deadline", operation: "publish")
                answer(next, .failure(error), &resumptions)
                free(next)
                hasFreed = true
                continue
            }
            size += length
            if isTesting { search.wrote(next, now: now) }
            let share = Self.share(of: next.destination)
            if shares[share].written == 0 { shares[share].silentSince = now }
            shares[share].written += 1
            next.isOnWire = true
            next.tag = nextTag
            nextTag += 1
            next.position = position
            next.writtenAt = now
            position += UInt64(length)
            batch.append(next)
        }
        sent.append(contentsOf: batch)
        if hasFreed {
            admitWaiting(&resumptions)
            noteDrained(&resumptions)
        }
        return batch
    }

    /// What has ended a connection alone does not stand before the others on the next one.
    private mutating func putBackLoneSuspects() {
        guard let first = unsent.first, first.isSuspect, first.loneLossCount > 0 else { return }
        // If there are no others, they take turns.
        let count = unsent.firstIndex { $0.loneLossCount == 0 } ?? 1
        unsent.append(contentsOf: unsent.prefix(count))
        unsent.removeFirst(count)
    }

    /// What is left on the wire may never be answered: all others pass the suspects that wait for it.
    private mutating func putBackSilent() {
        func isSilent(_ publish: PendingPublish) -> Bool { publish.isSuspect && publish.wasSilent }
        guard let first = unsent.first, isSilent(first), let count = unsent.firstIndex(where: { !isSilent($0) }) else {
            return
        }
        unsent.append(contentsOf: unsent.prefix(count))
        unsent.removeFirst(count)
    }

    /// Takes in what one read has brought. Nil for a confirm of what was not sent.
    mutating func apply(_ events: [Event], now: MonotonicTime) -> Resumptions? {
        var resumptions = Resumptions()
        if case .closed = mode { return resumptions }
        for event in events {
            switch event {
            case .returned(let exchange, let routingKey, let messageID):
                let hash = PublishDestination(exchange: exchange, routingKey: routingKey).hash
                // Where several match, it is not known which one was returned. Taken for a wrong one, it would tell the
                // caller of the right one that its message is in a queue.
                for publish in sent where publish.destination == hash {
                    guard let message = publish.message, message.messageID == messageID,
                        message.destination.routingKey == routingKey, message.destination.exchange == exchange
                    else { continue }
                    publish.isReturned = true
                }
            case .confirmed(let tag, let multiple, let isNack):
                guard confirmed(tag: tag, multiple: multiple, isNack: isNack, now, &resumptions) else { return nil }
            }
        }
        // Mostly the oldest are settled first.
        while let first = sent.first, first.isSettled {
            sent.removeFirst()
            settledCount -= 1
        }
        if settledCount > max(64, sentCount) {
            sent.removeAll(where: \.isSettled)
            settledCount = 0
        }
        admitWaiting(&resumptions)
        noteDrained(&resumptions)
        return resumptions
    }

    private mutating func confirmed(
        tag: UInt64, multiple: Bool, isNack: Bool, _ now: MonotonicTime, _ resumptions: inout Resumptions
    ) -> Bool {
        // Tag 0 with `multiple` means all so far (AMQP 0-9-1, basic.ack).
        let last = tag == 0 && multiple ? nextTag - 1 : tag
        guard last < nextTag else { return false }
        if multiple {
            for publish in sent {
                if publish.tag > last { break }
                settle(publish, isNack: isNack, now, &resumptions)
            }
        } else if let publish = written(last) {
            settle(publish, isNack: isNack, now, &resumptions)
        }
        return true
    }

    /// The message with a tag; nil if it was settled and is gone.
    private func written(_ tag: UInt64) -> PendingPublish? {
        guard let first = sent.first, tag >= first.tag else { return nil }
        // As long as none between them has gone, the tag tells the place.
        var high = Int(min(tag - first.tag + 1, UInt64(sent.count)))
        if sent[high - 1].tag == tag { return sent[high - 1] }
        var low = 0
        while low < high {
            let middle = (low + high) / 2
            if sent[middle].tag < tag { low = middle + 1 } else { high = middle }
        }
        return low < sent.count && sent[low].tag == tag ? sent[low] : nil
    }

    private mutating func settle(
        _ publish: PendingPublish, isNack: Bool, _ now: MonotonicTime, _ resumptions: inout Resumptions
    ) {
        guard !publish.isSettled else { return }
        if publish.isAnswered { count(orphan: publish, -1) }
        if let message = publish.message { refusals.accepted(message.destination) }
        let requestID = publish.message?.requestID
        search.answered(publish, now: now)
        hasSettled = true
        if lastUnconfirmed?.destination == publish.destination { lastUnconfirmed = nil }
        publish.settle()
        settledCount += 1
        free(publish)
        let share = Self.share(of: publish.destination)
        shares[share].written -= 1
        shares[share].silentSince = shares[share].written == 0 ? nil : now
        shares[share].hasConfirmed = true
        guard !publish.isAnswered else { return }
        publish.isAnswered = true
        if isNack {
            let error = EventsError(.nacked, "the broker refused the message", operation: "publish")
            resumptions.publishes.append((publish, .failure(publish.isInDoubt ? unknown(error) : error)))
        } else if publish.isReturned, publish.isInDoubt {
            let error = EventsError(
                .unknownOutcome, "no queue is bound now, and an earlier copy may have reached one",
                operation: "publish")
            resumptions.publishes.append((publish, .failure(error)))
        } else {
            resumptions.publishes.append((publish, .success(!publish.isReturned)))
            if !publish.isReturned, let requestID { resumptions.requests.append(requestID) }
        }
    }

    // MARK: Refusals and losses

    /// The broker has closed the channel because of a message, and will open another.
    ///
    /// Guilty are the messages whose exchange (and key, where the broker names one) stands in its text; all others are
    /// written again. Where the text names none, or channels are closed for one message after the other and nothing is
    /// confirmed, what was in flight is written again in groups.
    mutating func channelClosed(_ error: EventsError, now: MonotonicTime) -> Resumptions {
        var resumptions = Resumptions()
        let refused = PublishRefusals.Subject(error.message)
        let guilty = sent.filter { publish in publish.message.map { refused.includes($0) } ?? false }
        if let message = guilty.first?.message { refusals.insert(refused, of: message, error, now: now) }
        // One alone, never written before: then it is the message that the broker refused. If it was taken before, the same
        // refusal does not tell: permissions may have changed since.
        let isCertain = guilty.count == 1 && !guilty[0].isInDoubt
        for publish in guilty { answer(publish, .failure(isCertain ? error : unknown(error)), &resumptions) }
        let limit = hasSettled ? Self.interruptionLimit : 1
        let isRepeated = sent.contains {
            !$0.isSettled && !$0.isAnswered && ($0.isSuspect || $0.interruptionCount >= limit)
        }
        hasSettled = false
        // A broker that closes a channel drops what stands behind the message that it refuses (AMQP 0-9-1, channel.close).
        let taken = takeBack(before: guilty.last?.position ?? .max, &resumptions)
        if guilty.isEmpty {
            if let alone = taken.alone {
                answer(alone, .failure(taken.wasInDoubt ? unknown(error) : error), &resumptions)
            } else {
                suspect(taken.count)
            }
        } else {
            for publish in unsent.prefix(taken.count) { publish.interruptionCount += 1 }
            // If more are refused by name, the broker must not take all others again for each of them.
            if isRepeated { suspect(taken.count) }
        }
        // What waits to be written would be refused as well.
        for publish in unsent where !publish.isAnswered {
            guard let error = refusals.reason(for: publish) else { continue }
            answer(publish, .failure(publish.isInDoubt ? unknown(error) : error), &resumptions)
        }
        dropAnswered(&resumptions)
        return resumptions
    }

    /// The channel is gone, and no message is to blame.
    mutating func channelLost() -> Resumptions {
        var resumptions = Resumptions()
        takeBack(&resumptions)
        return resumptions
    }

    /// Marks the first unsent messages as suspect, to be written in halves.
    private func suspect(_ count: Int) {
        for publish in unsent.prefix(count) {
            publish.isSuspect = true
            publish.groupLimit = max(1, min(publish.groupLimit, count / 2))
        }
    }

    /// The channel is closed by us, because destinations do not confirm: what no caller waits for is given up, the rest is
    /// written again. Returns also which destination it is, the first if there are several.
    ///
    /// Suspects stay suspects, in groups as large as before: a slow broker has not answered for the guilty one either.
    mutating func channelReset(now: MonotonicTime) -> (Resumptions, destination: String?) {
        var resumptions = Resumptions()
        let unanswered = sent.first { $0.isAnswered && !$0.isSettled } ?? sent.first { !$0.isSettled }
        if let unanswered, let message = unanswered.message {
            lastUnconfirmed = (unanswered.destination, Self.name(message), now)
        }
        let destination = unanswered == nil ? nil : lastUnconfirmed?.name
        let stuck = Set(sent.lazy.filter { !$0.isSettled }.map { Self.share(of: $0.destination) })
        let taken = takeBack(&resumptions)
        search.reset()
        for publish in unsent.prefix(taken.count) {
            // The channel was not closed for it.
            publish.interruptionCount = 0
            if publish.isSuspect { (publish.isPutBack, publish.wasSilent) = (true, true) }
        }
        if unsent.contains(where: \.isSuspect) { putBack(stuck, tried: taken.count) }
        return (resumptions, destination)
    }

    /// Puts what goes to destinations that do not confirm behind everything else: none of them holds up the others for longer than
    /// suspects may go unanswered.
    ///
    /// - Parameter tried: So many messages were in flight. They come last, so that another search begins with others.
    private mutating func putBack(_ stuck: Set<Int>, tried: Int) {
        let last = unsent.prefix(tried)
        var (others, untried): (Deque<PendingPublish>, Deque<PendingPublish>) = ([], [])
        for publish in unsent.dropFirst(tried) {
            guard publish.isSuspect, stuck.contains(Self.share(of: publish.destination)) else {
                others.append(publish)
                continue
            }
            publish.isPutBack = true
            untried.append(publish)
        }
        unsent = others + untried + last
    }

    /// Whether the next connection is to be opened soon, to find a message that ends connections.
    var retriesSoon: Bool { search.retriesSoon }

    /// When the channel must be opened again, if nothing is confirmed before: half of the room is held by messages that no
    /// caller waits for, to destinations of which nothing is confirmed; or suspects go unanswered.
    var resetTime: MonotonicTime {
        func isHalf(_ messages: Int, _ bytes: Int) -> Bool {
            messages > 0 && (messages >= limits.messages / 2 || bytes >= limits.bytes / 2)
        }
        // Callers that give up before a slow broker has answered are no reason.
        guard isHalf(orphans, orphanBytes) else { return search.limit }
        var held = (messages: 0, bytes: 0)
        let silent = shares.filter { $0.orphans > 0 && $0.silentSince != nil }
        for share in silent.sorted(by: { $0.silentSince ?? .distantFuture < $1.silentSince ?? .distantFuture }) {
            held.messages += share.orphans
            held.bytes += share.orphanBytes
            guard isHalf(held.messages, held.bytes), let silentSince = share.silentSince else { continue }
            return min(search.limit, silentSince.advanced(by: Self.silenceLimit))
        }
        return search.limit
    }

    /// Whether the channel must be opened again now. Not for suspects that it was opened again for before: those have ended no
    /// connection in their time, and stay on the wire. So a slow broker can answer them, and the others go on beside them.
    mutating func needsReset(now: MonotonicTime) -> Bool {
        guard now >= resetTime else { return false }
        if search.onWire > 0, now >= search.limit, sent.allSatisfy({ $0.isSettled || !$0.isSuspect || $0.wasSilent }) {
            search.leave()
            for publish in sent where publish.isSuspect { publish.isLeft = true }
        }
        return now >= resetTime
    }

    /// What is written and not confirmed, for longer than it should be; nil if there is no such destination.
    func unconfirmedDestination(now: MonotonicTime) -> String? {
        if let first = sent.first(where: { !$0.isSettled }), let message = first.message,
            let silentSince = shares[Self.share(of: first.destination)].silentSince,
            silentSince.advanced(by: Self.silenceLimit) <= now
        {
            return Self.name(message)
        }
        return lastUnconfirmed.flatMap { $0.at.advanced(by: .seconds(60)) > now ? $0.name : nil }
    }

    /// The key of the default exchange is a queue's name or an address for replies: it is not told.
    private static func name(_ message: EncodedMessage) -> String {
        message.destination.exchange.isEmpty
            ? "a queue" : "\(message.destination.exchange) \(message.destination.routingKey)"
    }

    /// The connection is gone, and there will be another: what was sent and not confirmed is written again on it, in
    /// order and under the same ids, as long as its caller waits.
    ///
    /// - Parameters:
    ///   - sentBytes: How much of the stream may have left; what stands behind it has not been written at all.
    ///   - cause: Whether a message may have ended the connection.
    mutating func connectionLost(
        _ error: EventsError, sentBytes: UInt64, cause: AMQPFailure.Cause
    ) -> Resumptions {
        var resumptions = Resumptions()
        blockedReason = error
        // The next broker may have other limits and permissions.
        refusals = PublishRefusals()
        let hadSuspects = sent.contains { $0.isSuspect && $0.position < sentBytes }
        search.connectionLost(isTest: cause != .other && hadSuspects)
        let taken = takeBack(before: sentBytes, &resumptions)
        guard cause != .other else { return resumptions }
        let count = unsent.prefix(taken.count).prefix { $0.position < sentBytes }.count
        for publish in unsent.prefix(count) { publish.lossCount += 1 }
        // Where the broker says nothing, only those are suspected that were lost before: the oldest.
        let suspects =
            cause == .message ? count : unsent.prefix(count).prefix { $0.lossCount >= Self.lossLimit }.count
        guard let alone = taken.alone else {
            suspect(suspects)
            return resumptions
        }
        if search.endedConnectionAlone(alone, isRefusal: cause == .message) {
            // By its losses alone no message is known to be refused.
            let error =
                cause == .message ? error : EventsError(.connectionLost, error.message, operation: "publish")
            answer(alone, .failure(taken.wasInDoubt ? unknown(error) : error), &resumptions)
            dropAnswered(&resumptions)
        } else {
            suspect(suspects)
        }
        return resumptions
    }

    /// Refuses all callers that wait or come, until ``connected()``.
    mutating func refuse(_ error: EventsError) -> Resumptions {
        var resumptions = Resumptions()
        if case .closed = mode { return resumptions }
        mode = .refusing(error)
        blockedReason = error
        takeBack(&resumptions)
        failAll(error, &resumptions)
        return resumptions
    }

    /// A connection is open, and nothing stands in the way.
    mutating func connected() {
        if case .closed = mode { return }
        mode = .open
        blockedReason = nil
    }

    /// The broker takes messages again. It has answered none meanwhile.
    mutating func unblocked(now: MonotonicTime) {
        for index in shares.indices where shares[index].silentSince != nil { shares[index].silentSince = now }
        search.unblocked(now: now)
    }

    /// Nothing can be written now, and callers wait.
    mutating func blocked(_ reason: EventsError) {
        if case .refusing = mode { mode = .open }
        blockedReason = reason
    }

    /// The end: answers everyone, and refuses all who come later.
    mutating func close(_ error: EventsError) -> Resumptions {
        var resumptions = Resumptions()
        if case .closed = mode { return resumptions }
        let never = EventsError(.unsent, error.message, operation: "publish", underlying: error)
        mode = .closed(never)
        takeBack(&resumptions)
        failAll(never, &resumptions)
        return resumptions
    }

    // MARK: The watchdog

    /// Answers every caller whose deadline has passed.
    mutating func expire(now: MonotonicTime) -> Resumptions {
        var resumptions = Resumptions()
        guard nextDeadline <= now else { return resumptions }
        let room = "\(messages) of \(limits.messages) messages, \(bytes) of \(limits.bytes) bytes"
        let reason = blockedReason.map { ": \($0.message)" } ?? ""
        var (late, next) = waiting.removeExpired(now: now)
        for reservation in late {
            let error = EventsError(
                .unsent, "no room in the publish window by the deadline (\(room))\(reason)",
                operation: "publish", underlying: blockedReason)
            resumptions.reservations.append((reservation.waiter, .failure(error)))
        }
        for publish in sent where !publish.isAnswered {
            guard publish.deadline <= now else {
                next = min(next, publish.deadline)
                continue
            }
            let error = EventsError(
                .unknownOutcome, "not confirmed by the deadline\(reason)", operation: "publish",
                underlying: blockedReason)
            answer(publish, .failure(error), &resumptions)
        }
        var hasOverdue = false
        for publish in unsent where !publish.isAnswered {
            guard publish.deadline <= now else {
                next = min(next, publish.deadline)
                continue
            }
            hasOverdue = true
            let error =
                publish.isInDoubt
                ? EventsError(
                    .unknownOutcome, "not confirmed by the deadline\(reason)", operation: "publish",
                    underlying: blockedReason)
                : EventsError(
                    .unsent, "not written by the deadline\(reason)", operation: "publish", underlying: blockedReason)
            answer(publish, .failure(error), &resumptions)
        }
        if hasOverdue { dropAnswered(&resumptions) }
        // However many deadlines there are, they are looked at a hundred times a second at most.
        nextDeadline = next == .distantFuture ? next : max(next, now.advanced(by: Self.precision))
        admitWaiting(&resumptions)
        noteDrained(&resumptions)
        return resumptions
    }

    /// Tells once no caller waits any more for what is under way.
    mutating func whenDrained(_ tell: @escaping @Sendable () -> Void) -> Resumptions {
        var resumptions = Resumptions()
        draining.append(tell)
        noteDrained(&resumptions)
        return resumptions
    }

    // MARK: Parts

    /// The same error for a message that the broker may have taken before: then its outcome is unknown.
    private func unknown(_ error: EventsError) -> EventsError {
        // What no repetition helps against keeps its code, so that it is not repeated.
        error.isRetriable || error.code == .closed
            ? EventsError(.unknownOutcome, error.message, operation: error.operation, underlying: error)
            : error.with(outcome: .unknown)
    }

    /// Gives a message's caller its result.
    private mutating func answer(
        _ publish: PendingPublish, _ result: Result<Bool, EventsError>, _ resumptions: inout Resumptions
    ) {
        guard !publish.isAnswered else { return }
        publish.isAnswered = true
        if publish.isOnWire, !publish.isSettled { count(orphan: publish, 1) }
        resumptions.publishes.append((publish, result))
    }

    private mutating func count(orphan publish: PendingPublish, _ change: Int) {
        let share = Self.share(of: publish.destination)
        orphans += change
        orphanBytes += change * publish.size
        shares[share].orphans += change
        shares[share].orphanBytes += change * publish.size
    }

    /// What was on the wire when a channel or connection ended.
    private struct TakenBack {
        /// How many messages are to be written again: the first that are unsent.
        var count = 0
        /// How many the broker may have handled.
        var handledCount = 0
        /// The first of those.
        var first: PendingPublish?
        /// Whether the broker may have taken that one before.
        var wasInDoubt = false

        /// The message that was in flight alone, if its caller waits.
        var alone: PendingPublish? { handledCount == 1 && first?.isAnswered == false ? first : nil }
    }

    /// Makes everything that was sent unsent again, in its place. What is settled goes, and what no caller waits for.
    ///
    /// - Parameter limit: Where in the stream stands what the broker cannot have handled any more.
    @discardableResult
    private mutating func takeBack(before limit: UInt64 = .max, _ resumptions: inout Resumptions) -> TakenBack {
        var taken = TakenBack()
        while let publish = sent.popLast() {
            guard !publish.isSettled else { continue }
            if publish.position < limit {
                taken.handledCount += 1
                (taken.first, taken.wasInDoubt) = (publish, publish.isInDoubt)
                publish.isInDoubt = true
            }
            publish.isOnWire = false
            publish.isLeft = false
            publish.isReturned = false
            unsent.prepend(publish)
            if !publish.isAnswered { taken.count += 1 }
        }
        (nextTag, settledCount, orphans, orphanBytes) = (1, 0, 0, 0)
        search.takenBack()
        for index in shares.indices {
            let share = shares[index]
            shares[index] = Share(
                messages: share.messages, bytes: share.bytes, hasConfirmed: share.hasConfirmed && share.written == 0)
        }
        dropAnswered(&resumptions)
        return taken
    }

    /// Takes unsent messages out of the window whose callers have been answered.
    private mutating func dropAnswered(_ resumptions: inout Resumptions) {
        for publish in unsent where publish.isAnswered { free(publish) }
        unsent.removeAll(where: \.isAnswered)
        // The suspect that waited for the others may be among them.
        if search.onWire == 0, unsent.first?.isSuspect != true { search.testEnded() }
        admitWaiting(&resumptions)
        noteDrained(&resumptions)
    }

    /// Answers everyone. Nothing is on the wire any more.
    private mutating func failAll(_ error: EventsError, _ resumptions: inout Resumptions) {
        for publish in unsent {
            answer(publish, .failure(publish.isInDoubt ? unknown(error) : error), &resumptions)
            free(publish)
        }
        unsent = []
        for reservation in waiting.removeAll() {
            resumptions.reservations.append((reservation.waiter, .failure(error)))
        }
        noteDrained(&resumptions)
    }

    private mutating func add(_ publish: PendingPublish) {
        let share = Self.share(of: publish.destination)
        bytes += publish.size
        shares[share].messages += 1
        shares[share].bytes += publish.size
    }

    private mutating func free(_ publish: PendingPublish) {
        let share = Self.share(of: publish.destination)
        messages -= 1
        bytes -= publish.size
        shares[share].messages -= 1
        shares[share].bytes -= publish.size
    }

    private mutating func noteDrained(_ resumptions: inout Resumptions) {
        guard !draining.isEmpty, sent.allSatisfy(\.isAnswered), unsent.allSatisfy(\.isAnswered) else { return }
        resumptions.drained += draining
        draining = []
    }
}
