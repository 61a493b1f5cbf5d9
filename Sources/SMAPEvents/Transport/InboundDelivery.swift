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
    /// The message itself.
    public let body: [UInt8]
    /// When it arrived here.
    public let receivedAt: Date

    /// Puts a delivery together, as a transport does.
    public init(
        tag: UInt64, exchange: String, routingKey: String, isRedelivered: Bool, properties: MessageProperties,
        body: [UInt8], receivedAt: Date = Date()
    ) {
        self.tag = tag
        self.exchange = exchange
        self.routingKey = routingKey
        self.isRedelivered = isRedelivered
        self.properties = properties
        self.body = body
        self.receivedAt = receivedAt
    }

    /// Which attempt at handling this message it is, from 1.
    ///
    /// Quorum queues count deliveries (`x-delivery-count`). Other queues only tell that there was one before: then it
    /// is 2.
    public var attempt: Int {
        if case .integer(let count) = properties.headers["x-delivery-count"] {
            return Int(clamping: max(0, count)).addingReportingOverflow(1).partialValue
        }
        return isRedelivered ? 2 : 1
    }
}
