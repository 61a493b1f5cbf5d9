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

    static let all: Set<String> = [
        exchange, routingKey, attempts, firstFailure, lastFailure, reason, errorType, replays,
    ]
}

extension InboundDelivery {
    /// The delivery as it was published first: a copy that comes through `smap.requeue` or `smap.dlx` has the queue's name as
    /// its key, and the original in its headers. Elsewhere such headers are somebody else's, and mean nothing.
    package func restored() -> InboundDelivery {
        guard exchange == ExchangeName.requeue || exchange == ExchangeName.deadLetters else { return self }
        return InboundDelivery(
            tag: tag, exchange: text(HistoryHeader.exchange) ?? exchange,
            routingKey: text(HistoryHeader.routingKey) ?? properties.type ?? routingKey, isRedelivered: isRedelivered,
            properties: properties, body: body, receivedAt: receivedAt, isTruncated: isTruncated,
            // Those of a dead letter are over; whoever consumes it begins anew.
            failedAttempts: exchange == ExchangeName.requeue
                ? Int(clamping: min(max(0, number(HistoryHeader.attempts) ?? 0), 1_000_000)) : 0)
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
    func failedOnce() -> InboundDelivery {
        InboundDelivery(
            tag: tag, exchange: exchange, routingKey: routingKey, isRedelivered: isRedelivered, properties: properties,
            body: body, receivedAt: receivedAt, isTruncated: isTruncated, failedAttempts: failedAttempts + 1)
    }

    /// A copy of the message to park, to bring back, or to keep as a dead letter. Its key is the queue's name.
    ///
    /// Headers that a broker or anybody else has put beside ours (`x-…`, `CC`, `BCC`) stay behind: they would steer the
    /// copy.
    ///
    /// - Parameter reset: Whether its attempts begin anew.
    package func copy(
        to exchange: String, queue: QueueName, headers: [String: MessageProperties.HeaderValue], reset: Bool = false
    ) -> OutboundMessage {
        var properties = properties
        properties.headers = properties.headers.filter { name, _ in
            let name = name.lowercased()
            if HistoryHeader.all.contains(name) { return !reset }
            return name != "cc" && name != "bcc" && (!name.hasPrefix("x-") || name.hasPrefix("x-smap-"))
        }
        properties.headers[HistoryHeader.exchange] = .string(self.exchange)
        properties.headers[HistoryHeader.routingKey] = .string(routingKey)
        properties.headers.merge(headers) { $1 }
        return OutboundMessage(
            exchange: exchange, routingKey: queue.rawValue, properties: properties, body: body)
    }

    /// What a copy says of the failures so far.
    func failureHeaders(attempts: Int, now: Date = Date()) -> [String: MessageProperties.HeaderValue] {
        let now = RFC3339.string(from: now)
        return [
            HistoryHeader.attempts: .integer(Int64(attempts)),
            HistoryHeader.firstFailure: .string(text(HistoryHeader.firstFailure) ?? now),
            HistoryHeader.lastFailure: .string(now),
        ]
    }
}
