#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A message as a transport received it. It must be settled, once, through the consumer that it came from.
public struct InboundDelivery: Sendable {
    /// The consumer's own number for this delivery.
    public let tag: UInt64
    /// The exchange that it was published to.
    public let exchange: String
    /// The key that it was published with.
    public let routingKey: String
    /// Whether it may have been delivered before.
    public let isRedelivered: Bool
    /// Its properties.
    public let properties: MessageProperties
    /// The message itself; empty if ``isTruncated``.
    public let body: [UInt8]
    /// Whether the message is larger than the transport takes into memory, and its body was left out. It can be given back
    /// or rejected; a copy of it would be empty.
    public let isTruncated: Bool
    /// When it arrived here.
    public let receivedAt: Date
    /// All of its headers as they came, if the transport has them so.
    package let headerTable: HeaderTable?
    /// Those of its properties that are no UTF-8, as they came, by their names in AMQP. Nearly always there are none.
    package let rawTexts: [String: [UInt8]]
    /// How many attempts at handling it have failed, as a copy of it remembers.
    package let failedAttempts: Int
    /// Whether it is a copy that a subscriber has made, whose headers about that can be believed.
    package let isCopy: Bool

    /// Puts a delivery together, as a transport does.
    public init(
        tag: UInt64, exchange: String, routingKey: String, isRedelivered: Bool, properties: MessageProperties,
        body: [UInt8], receivedAt: Date = Date(), isTruncated: Bool = false
    ) {
        self.init(
            tag: tag, exchange: exchange, routingKey: routingKey, isRedelivered: isRedelivered, properties: properties,
            body: body, receivedAt: receivedAt, isTruncated: isTruncated, headerTable: nil, failedAttempts: 0)
    }

    package init(
        tag: UInt64, exchange: String, routingKey: String, isRedelivered: Bool, properties: MessageProperties,
        body: [UInt8], receivedAt: Date = Date(), isTruncated: Bool, headerTable: HeaderTable?,
        rawTexts: [String: [UInt8]] = [:], failedAttempts: Int = 0, isCopy: Bool = false
    ) {
        self.isCopy = isCopy
        self.tag = tag
        self.exchange = exchange
        self.routingKey = routingKey
        self.isRedelivered = isRedelivered
        self.properties = properties
        self.body = body
        self.receivedAt = receivedAt
        self.isTruncated = isTruncated
        self.headerTable = headerTable
        self.rawTexts = rawTexts
        self.failedAttempts = failedAttempts
    }

    /// Which attempt at handling this message it is, from 1: those that failed, and those that were cut short because a
    /// process died or a connection was lost.
    public var attempt: Int { failedAttempts + redeliveries + 1 }

    /// How often it was delivered before without an answer, since it was put into its queue.
    ///
    /// Quorum queues count deliveries (`x-delivery-count`). Other queues only tell that there was one before: then it
    /// is 1.
    public var redeliveries: Int {
        // A publisher may have written the header; the broker's own comes with a redelivery.
        guard isRedelivered else { return 0 }
        if case .integer(let count) = properties.headers["x-delivery-count"] {
            return max(1, Int(clamping: min(count, 1_000_000_000)))
        }
        return 1
    }
}
