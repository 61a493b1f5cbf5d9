#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// The headers that copies of a message carry: where it was published first, and what has become of it since.
package enum HistoryHeader {
    package static let exchange = "x-smap-original-exchange"
    package static let routingKey = "x-smap-original-key"
    package static let attempts = "x-smap-attempts"
    package static let firstFailure = "x-smap-first-failure"
    package static let lastFailure = "x-smap-last-failure"
    package static let reason = "x-smap-reason"
    package static let errorType = "x-smap-error-type"
    package static let replays = "x-smap-replays"
    /// The call that has replayed it last.
    static let replayRun = "x-smap-replay-run"
    /// How often consumers died with it before this copy was made; its own deliveries are counted by its queue.
    static let deaths = "x-smap-deaths"

    /// What the message had as properties, which copies cannot have.
    static let userID = "x-smap-user-id"
    static let expiration = "x-smap-expiration"

    static let all: Set<String> = [
        exchange, routingKey, attempts, firstFailure, lastFailure, reason, errorType, replays, replayRun, deaths,
        expiration,
    ]

    /// Those that a copy has only if it is given them: what they say is in the delivery's properties, or was about the copy before.
    static let ofOneCopy: Set<String> = [userID, expiration, deaths]

    /// Headers of brokers and plugins that act on a message, or tell of what they did with it.
    static let steering: Set<String> = ["cc", "bcc", "x-death", "x-delivery-count", "x-delay", "x-stream-offset"]
}

extension InboundDelivery {
    /// The delivery as it was published first: a copy that comes through `smap.requeue` or `smap.dlx` has the queue's name as
    /// its key, and the original in its headers. Elsewhere such headers are somebody else's, and mean nothing.
    package func restored() -> InboundDelivery {
        guard exchange == ExchangeName.requeue || exchange == ExchangeName.deadLetters else { return self }
        var properties = properties
        properties.userID = text(HistoryHeader.userID)
        properties.expiration = text(HistoryHeader.expiration).flatMap { Self.isExpiration($0) ? $0 : nil }
        // What another consumer has rejected bears the broker's own record.
        let death = text(HistoryHeader.exchange) == nil ? headerTable?.firstDeath : nil
        return InboundDelivery(
            tag: tag, exchange: text(HistoryHeader.exchange) ?? death?.exchange ?? exchange,
            routingKey: text(HistoryHeader.routingKey) ?? death?.routingKey ?? properties.type ?? routingKey,
            isRedelivered: isRedelivered, properties: properties, body: body, receivedAt: receivedAt,
            isTruncated: isTruncated, headerTable: headerTable, rawTexts: rawTexts,
            // Those of a dead letter are over; a consumer of it counts from the beginning.
            failedAttempts: exchange == ExchangeName.requeue
                ? Int(clamping: min(max(0, number(HistoryHeader.attempts) ?? 0), 1_000_000)) : 0,
            isCopy: true)
    }

    /// Whether a broker takes a text as `expiration`. A publisher may have written the header, and a broker closes the
    /// channel for what is none.
    private static func isExpiration(_ text: String) -> Bool {
        (1...10).contains(text.utf8.count)
            && text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }
            && UInt32(text) != nil
    }

    /// How often consumers had died with it when this copy was made.
    var earlierDeaths: Int {
        guard exchange == ExchangeName.requeue else { return 0 }
        return Int(clamping: min(max(0, number(HistoryHeader.deaths) ?? 0), 1_000_000))
    }

    package func text(_ header: String) -> String? {
        guard case .string(let text) = properties.headers[header] else { return nil }
        return text
    }

    package func number(_ header: String) -> Int64? {
        guard case .integer(let number) = properties.headers[header] else { return nil }
        return number
    }

    /// This delivery, after one more failure.
    func failedOnce(now: Date = Date()) -> InboundDelivery {
        withFailures(failedAttempts + 1, since: firstFailure ?? RFC3339.string(from: now))
    }

    /// This delivery, after so many failures, the first of them at `first`.
    func withFailures(_ count: Int, since first: String?) -> InboundDelivery {
        var properties = properties
        properties.headers[HistoryHeader.firstFailure] = first.map { .string($0) }
        return InboundDelivery(
            tag: tag, exchange: exchange, routingKey: routingKey, isRedelivered: isRedelivered, properties: properties,
            body: body, receivedAt: receivedAt, isTruncated: isTruncated, headerTable: headerTable,
            rawTexts: rawTexts, failedAttempts: count, isCopy: isCopy)
    }

    /// A copy of the message to park, to bring back, or to keep as a dead letter. Its key is the queue's name.
    ///
    /// Body, properties and headers are those of the original, but for what would steer the copy: `CC`, `BCC`, and what
    /// brokers note of deaths, delays and deliveries. `user_id` would have to be our own user (RabbitMQ guide, "Validated
    /// User-ID"), and `expiration` would shorten a pause or delete a dead letter: both travel in headers of ours.
    ///
    /// - Parameter reset: Whether its attempts are counted from the beginning, and it may expire again.
    package func copy(
        to exchange: String, queue: QueueName, headers: [String: MessageProperties.HeaderValue], reset: Bool = false
    ) -> OutboundMessage {
        var properties = properties
        var table = headerTable ?? HeaderTable(properties.headers)
        let isLeftBehind = { (name: String) in
            let name = name.lowercased()
            return HistoryHeader.steering.contains(name) || name.hasPrefix("x-first-death-")
                || name.hasPrefix("x-last-death-") || HistoryHeader.ofOneCopy.contains(name)
                // What a publisher has made up would be believed in a copy.
                || ((reset || !isCopy) && HistoryHeader.all.contains(name))
        }
        properties.headers = properties.headers.filter { !isLeftBehind($0.key) }
        table.removeAll(where: isLeftBehind)
        var added = headers
        added[HistoryHeader.exchange] = .string(self.exchange)
        added[HistoryHeader.routingKey] = .string(routingKey)
        if let userID = properties.userID { added[HistoryHeader.userID] = .string(userID) }
        properties.userID = nil
        if !reset {
            if let expiration = properties.expiration { added[HistoryHeader.expiration] = .string(expiration) }
            properties.expiration = nil
        }
        for (name, value) in added.sorted(by: { $0.key < $1.key }) {
            properties.headers[name] = value
            table.set(name, value)
        }
        return OutboundMessage(
            copyTo: exchange, routingKey: queue.rawValue, properties: properties, headers: table, rawTexts: rawTexts,
            body: body)
    }

    /// When it failed first, as far as can be believed.
    var firstFailure: String? { isCopy || failedAttempts > 0 ? text(HistoryHeader.firstFailure) : nil }

    /// What a copy says of the failures so far.
    func failureHeaders(attempts: Int, now: Date = Date()) -> [String: MessageProperties.HeaderValue] {
        let now = RFC3339.string(from: now)
        return [
            HistoryHeader.attempts: .integer(Int64(attempts)),
            HistoryHeader.firstFailure: .string(firstFailure ?? now),
            HistoryHeader.lastFailure: .string(now),
        ]
    }
}
