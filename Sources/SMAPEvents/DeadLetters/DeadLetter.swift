#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A message that could not be handled, with what is known of why.
public struct DeadLetter: Sendable {
    private let delivery: InboundDelivery

    init(_ delivery: InboundDelivery) { self.delivery = delivery.restored() }

    /// The event's id, as the message carries it.
    public var eventID: String? { delivery.properties.messageID }
    /// The exchange that it was published to first; `smap.dlx` if the broker put it aside by itself.
    public var exchange: String { delivery.exchange }
    /// The key that it was published with.
    public var routingKey: String { delivery.routingKey }
    /// Why it is here.
    public var reason: String? { delivery.text(HistoryHeader.reason) }
    /// The type of the error: that of the last handler's, or `undecodable`, `unhandled`, `poison`, `rejected`.
    public var errorType: String? { delivery.text(HistoryHeader.errorType) }
    /// How often it was handled.
    public var attempts: Int? { delivery.number(HistoryHeader.attempts).map { Int(clamping: $0) } }
    /// When it failed for the first time.
    public var firstFailure: Date? { delivery.text(HistoryHeader.firstFailure).flatMap(RFC3339.date) }
    /// When it failed for the last time.
    public var lastFailure: Date? { delivery.text(HistoryHeader.lastFailure).flatMap(RFC3339.date) }
    /// How often it was replayed before.
    public var replays: Int { Int(clamping: delivery.number(HistoryHeader.replays) ?? 0) }
    /// Its properties and headers.
    public var properties: MessageProperties { delivery.properties }
    /// The message itself: it may hold personal data. Empty if ``isTruncated``.
    public var body: [UInt8] { delivery.body }
    /// Whether it is larger than the transport takes into memory; then it cannot be replayed.
    public var isTruncated: Bool { delivery.isTruncated }

    /// The value of a field that dead letters can be chosen by: `event_id`, `routing_key`, `exchange`, `error_type`,
    /// `reason`, `attempts`, `replays`, or the name of a header.
    public subscript(field: String) -> String? {
        switch field {
        case "event_id": eventID
        case "routing_key": routingKey
        case "exchange": exchange
        case "error_type": errorType
        case "reason": reason
        case "attempts": attempts.map(String.init)
        case "replays": String(replays)
        default: properties.headers[field]?.description
        }
    }

    /// A copy to bring back: the original message, attempts counted from the beginning, marked as replayed.
    ///
    /// - Parameter run: The call that does so, which must not replay it twice.
    func replay(to queue: QueueName, run: String) -> OutboundMessage {
        delivery.copy(
            to: ExchangeName.requeue, queue: queue,
            headers: [
                HistoryHeader.replays: .integer(Int64(clamping: replays + 1)), HistoryHeader.replayRun: .string(run),
            ], reset: true)
    }

    /// Whether a call has replayed it, and it has failed again since.
    func wasReplayed(by run: String) -> Bool { delivery.text(HistoryHeader.replayRun) == run }
}
