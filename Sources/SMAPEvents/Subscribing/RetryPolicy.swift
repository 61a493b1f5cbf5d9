/// How often and after what pauses a delivery is handled again when its handler fails.
///
/// The pauses grow exponentially up to a cap, and are taken from a ladder of fixed delays, the ``rungs``: each rung is a
/// queue at the broker, `smap.retry.<delay>`, that all subscriptions share. So a retry holds no handler and no memory here,
/// survives the process, and a long pause never holds up a short one.
public struct RetryPolicy: Sendable, CustomStringConvertible {
    /// How often a delivery is handled at most, the first time included; then it is dead-lettered. 1 or more, 10 by
    /// default.
    public var maximumAttempts: Int
    /// The pause after the first failure, 1 s by default.
    public var firstDelay: Duration
    /// What each further pause is multiplied by, 2 by default; 1 or more.
    public var multiplier: Double
    /// The longest pause, 5 min by default.
    public var maximumDelay: Duration
    /// The pauses that there are queues for, ascending; whole milliseconds. ``standardRungs`` by default. Queues are
    /// declared for those up to ``maximumDelay``.
    public var rungs: [Duration]
    /// Whether a pause may be one rung shorter, at random, so that what failed together does not come back together. On
    /// by default; the first pause is never shortened.
    public var hasJitter: Bool
    /// Whether an error that a handler throws is worth another attempt; all are by default. Otherwise the delivery is
    /// dead-lettered at once.
    public var isRetriable: @Sendable (any Error) -> Bool

    /// 1, 2, 5, 10 and 30 s, 1, 2, 5, 10 and 30 min, and 1 h.
    public static let standardRungs: [Duration] = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1_800, 3_600].map {
        .seconds($0)
    }

    /// Describes a policy.
    public init(
        maximumAttempts: Int = 10, firstDelay: Duration = .seconds(1), multiplier: Double = 2,
        maximumDelay: Duration = .seconds(300), rungs: [Duration] = standardRungs, hasJitter: Bool = true,
        isRetriable: @escaping @Sendable (any Error) -> Bool = { _ in true }
    ) {
        self.maximumAttempts = maximumAttempts
        self.firstDelay = firstDelay
        self.multiplier = multiplier
        self.maximumDelay = maximumDelay
        self.rungs = rungs
        self.hasJitter = hasJitter
        self.isRetriable = isRetriable
    }

    /// The rungs that this policy uses: those up to the cap, but at least one.
    var usedRungs: [Duration] {
        let used = rungs.filter { $0 <= maximumDelay }
        return used.isEmpty ? Array(rungs.prefix(1)) : used
    }

    /// The pause after so many failures without jitter, which is the longest that it can be.
    func longestDelay(after failures: Int) -> Duration {
        var target = firstDelay
        for _ in 1..<max(1, min(failures, 1_000)) where target < maximumDelay { target = target * multiplier }
        return usedRungs.last { $0 <= target } ?? usedRungs.first ?? .zero
    }

    /// The pause after so many failures.
    func delay(after failures: Int) -> Duration {
        let longest = longestDelay(after: failures)
        guard hasJitter, failures > 1, let index = usedRungs.firstIndex(of: longest), index > 0 else { return longest }
        return usedRungs[Int.random(in: index - 1...index)]
    }

    /// The shortest rung that is not below what a handler has asked for.
    func rung(for delay: Duration) -> Duration {
        usedRungs.first { $0 >= delay } ?? usedRungs.last ?? .zero
    }

    /// How long a delivery can be on its way through all attempts, pauses alone: what handlers may ask for included.
    public var longestSpan: Duration { (usedRungs.last ?? .zero) * (maximumAttempts - 1) }

    /// The worst case in words: the attempts, each pause at its longest, and their sum.
    public var description: String {
        let pauses = (1..<max(1, min(maximumAttempts, 1_000))).map { longestDelay(after: $0) }
        guard !pauses.isEmpty else { return "1 attempt" }
        var texts = pauses.prefix(12).map(Self.text(of:))
        if pauses.count > 12 { texts.append("…") }
        return "\(maximumAttempts) attempts, after at most \(texts.joined(separator: ", ")): "
            + "\(Self.text(of: pauses.reduce(.zero, +))) in all"
    }

    func validate(_ operation: String) throws {
        func require(_ condition: Bool, _ rule: String) throws {
            guard condition else {
                throw EventsError(.invalidConfiguration, "retry: \(rule)", operation: operation)
            }
        }
        try require((1...1_000_000).contains(maximumAttempts), "attempts are 1 to 1,000,000")
        try require(firstDelay >= .zero && maximumDelay >= .zero, "delays are not negative")
        try require(multiplier >= 1 && multiplier.isFinite, "the multiplier is 1 or more")
        try require(!rungs.isEmpty && rungs == rungs.sorted(), "there is a rung, and they ascend")
        try require(
            rungs.allSatisfy {
                $0 >= .milliseconds(1) && $0 <= .seconds(86_400)
                    && $0.components.attoseconds % 1_000_000_000_000_000 == 0
            }, "rungs are whole milliseconds, up to a day")
    }

    // MARK: At the broker

    /// Where a message is parked for a delay: the exchange and its queue have the same name. The key stays the queue that
    /// it comes from, since the delay queue hands it on under its own key.
    static func parkingPlace(_ rung: Duration) -> String { "smap.retry.\(text(of: rung))" }

    /// The exchanges and queues of the ladder. A queue for each delay, since a message that waits longer at the head of a
    /// queue would hold up those behind it (RabbitMQ guide, "Time-To-Live": expiry at the head only).
    var topology: Topology {
        var topology = Topology(exchanges: [.requeue])
        for rung in usedRungs {
            let place = Self.parkingPlace(rung)
            guard let queue = try? QueueName(place) else { continue }
            topology.insert(ExchangeDeclaration(name: place, kind: .fanout))
            topology.insert(
                QueueDeclaration(
                    queue,
                    additionalArguments: [
                        "x-message-ttl": .integer(Self.milliseconds(rung)),
                        "x-dead-letter-exchange": .string(ExchangeName.requeue),
                        // All three, or the broker falls back to at most once, silently.
                        "x-dead-letter-strategy": .string("at-least-once"),
                        "x-overflow": .string("reject-publish"),
                    ]))
            topology.insert(QueueBinding(queue: queue, exchange: place, routingKey: ""))
        }
        return topology
    }

    private static func milliseconds(_ duration: Duration) -> Int64 {
        duration.components.seconds * 1000 + duration.components.attoseconds / 1_000_000_000_000_000
    }

    /// `250ms` or `30s`.
    private static func text(of duration: Duration) -> String {
        let milliseconds = milliseconds(duration)
        return milliseconds % 1000 == 0 ? "\(milliseconds / 1000)s" : "\(milliseconds)ms"
    }
}
