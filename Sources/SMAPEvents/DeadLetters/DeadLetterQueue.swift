internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// The dead letters of a queue, `<queue>.dlq`: to look at, to bring back, or to throw away.
///
/// Reading them is fetching and giving back: others that read at the same time see only the rest, and each time counts as a
/// delivery. RabbitMQ 4 drops what was delivered more than 20 times unless a policy sets another `delivery-limit`: set one
/// for dead letter queues there.
public struct DeadLetterQueue: Sendable {
    /// What was done with the dead letters of a queue.
    public struct Report: Sendable {
        /// How many were looked at.
        public internal(set) var examined = 0
        /// How many were chosen, and replayed or purged; with a dry run, how many would have been.
        public internal(set) var done = 0
        /// How many were chosen and could not be replayed: they are still there.
        public internal(set) var failed = 0
        /// The first reason of a failure.
        public internal(set) var failure: EventsError?
    }

    /// How many dead letters can be held unsettled at a time; AMQP has no larger prefetch.
    public static let lookLimit = 65_535

    private let queue: QueueName
    private let transport: any EventTransport
    /// How long nothing must have come for the queue to count as read through.
    private static let silence = Duration.seconds(1)

    /// Names a queue; its dead letters are meant.
    public init(of queue: QueueName, transport: any EventTransport) {
        self.queue = queue
        self.transport = transport
    }

    /// Shows the dead letters to `body`, oldest first, and leaves them where they are: ``lookLimit`` at most.
    ///
    /// - Returns: How many there were.
    /// - Throws: ``EventsError/Code/notFound`` when there is no such queue.
    @discardableResult
    public func read(
        limit: Int = .max, _ body: @escaping @Sendable (DeadLetter) async throws -> Void
    ) async throws
        -> Int
    {
        let count = Mutex(0)
        try await each(prefetch: Self.lookLimit) { _ in
            count.withLock { count in
                guard count < min(limit, Self.lookLimit) else { return .stop }
                count += 1
                return .act
            }
        } act: { letter, _, _ in
            try await body(letter)
        }
        return count.withLock { $0 }
    }

    /// Brings dead letters back to the queue that they come from, with their original body, properties, headers, key and
    /// exchange; their attempts are counted from the beginning, and the header `x-smap-replays` counts.
    ///
    /// Each is taken off only after its copy is confirmed to be in the queue: whatever dies in between leaves a duplicate
    /// under the same event id, which an inbox catches, and never a loss. Those that fail again come here again, and are not
    /// replayed twice by one call. Up to 100 are under way at a time, so their order is not kept.
    ///
    /// - Parameters:
    ///   - isChosen: Which; all by default. Those that are not are held unsettled meanwhile, ``lookLimit`` at most, and what
    ///     the broker sends ahead of a slow `rate` is held in memory: choose a few by `limit` where messages are large.
    ///   - limit: How many at most.
    ///   - rate: How many a second at most.
    ///   - isDryRun: Whether they are only counted.
    @discardableResult
    public func replay(
        where isChosen: (@Sendable (DeadLetter) -> Bool)? = nil, limit: Int = .max, rate: Double? = nil,
        isDryRun: Bool = false
    ) async throws -> Report {
        let run = EventID().rawValue
        return try await take(isChosen, limit, rate, isDryRun, run: run) { letter in
            guard !letter.isTruncated else {
                throw EventsError(
                    .eventTooLarge, "a message is larger than the transport takes", operation: "replay")
            }
            let copy = letter.replay(to: queue, run: run)
            guard try await transport.publish(copy, deadline: .now + .seconds(30)) else {
                throw EventsError(
                    .unroutable, "\(queue) is not bound to \(ExchangeName.requeue)", operation: "replay")
            }
        }
    }

    /// Throws dead letters away, for good. The parameters are those of ``replay(where:limit:rate:isDryRun:)``.
    @discardableResult
    public func purge(
        where isChosen: (@Sendable (DeadLetter) -> Bool)? = nil, limit: Int = .max, isDryRun: Bool = false
    ) async throws -> Report {
        try await take(isChosen, limit, nil, isDryRun, run: nil) { _ in }
    }

    // MARK: Reading

    private func take(
        _ isChosen: (@Sendable (DeadLetter) -> Bool)?, _ limit: Int, _ rate: Double?, _ isDryRun: Bool, run: String?,
        _ act: @escaping @Sendable (DeadLetter) async throws -> Void
    ) async throws -> Report {
        let progress = Mutex((report: Report(), chosen: 0))
        let start = ContinuousClock.now
        // Those that are not chosen are not settled, so that they do not come again at once. What is unsettled when the process
        // dies may have been replayed: no more than keeps those under way busy.
        let prefetch = isChosen == nil && !isDryRun ? 200 : Self.lookLimit
        try await each(prefetch: prefetch, concurrency: 100) { letter in
            // One of those that this call has replayed: not again. Clocks, which differ, have no say in it.
            if let run, letter.wasReplayed(by: run) { return .skip }
            let choice = progress.withLock { progress -> Choice in
                guard progress.chosen < limit else { return .stop }
                progress.report.examined += 1
                guard isChosen?(letter) ?? true else { return .skip }
                progress.chosen += 1
                return .act
            }
            if case .act = choice, let rate {
                let number = progress.withLock { $0.chosen - 1 }
                try await Task.sleep(until: start + .seconds(Double(number) / rate))
            }
            return choice
        } act: { letter, delivery, consumer in
            do {
                if !isDryRun {
                    try await act(letter)
                    try consumer.settle(delivery, .acknowledge)
                }
                progress.withLock { $0.report.done += 1 }
            } catch let error as EventsError {
                // It stays unsettled, and goes back when this is over.
                progress.withLock { progress in
                    progress.report.failed += 1
                    progress.report.failure = progress.report.failure ?? error
                }
            }
        }
        return progress.withLock { $0.report }
    }

    private enum Choice {
        case act
        case skip
        case stop
    }

    /// Hands out what is there now, until nothing has come for a while. What is not settled goes back at the end.
    private func each(
        prefetch: Int, concurrency: Int = 1, _ choose: @escaping @Sendable (DeadLetter) async throws -> Choice,
        act: @escaping @Sendable (DeadLetter, InboundDelivery, any TransportConsumer) async throws -> Void
    ) async throws {
        let deadline = ContinuousClock.now + .seconds(30)
        // Throws for a queue that is missing. A slow broker may be silent for longer while there is something to come.
        let expected = try await transport.status(of: queue.deadLetterQueue, deadline: deadline)
        try await transport.withConsumer(on: queue.deadLetterQueue, prefetch: prefetch, deadline: deadline) {
            consumer in
            let idle = IdleTime()
            idle.missing.withLock { $0 = expected.messages }
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask {
                    while true {
                        let silence = idle.missing.withLock { $0 } > 0 ? Self.silence * 10 : Self.silence
                        let end = (idle.since.withLock { $0 } ?? .now) + silence
                        if end <= .now { break }
                        // What is still missing may be here before that.
                        try await Task.sleep(until: min(end, .now + Self.silence))
                    }
                    await consumer.stop()
                }
                defer { group.cancelAll() }
                try await withThrowingTaskGroup(of: Void.self) { actions in
                    var running = 0
                    reading: while let delivery = try await consumer.next() {
                        idle.since.withLock { $0 = nil }
                        idle.missing.withLock { $0 -= 1 }
                        let letter = DeadLetter(delivery)
                        switch try await choose(letter) {
                        case .stop: break reading
                        case .skip: break
                        case .act:
                            if running == concurrency {
                                try await actions.next()
                                running -= 1
                            }
                            running += 1
                            actions.addTask { try await act(letter, delivery, consumer) }
                        }
                        idle.since.withLock { $0 = .now }
                    }
                    try await actions.waitForAll()
                }
            }
        }
    }

    /// Since when nothing has come; nil while a dead letter is being looked at.
    private final class IdleTime: Sendable {
        let since = Mutex<ContinuousClock.Instant?>(.now)
        /// How many are still to come, by the broker's count at the beginning.
        let missing = Mutex(0)
    }
}
