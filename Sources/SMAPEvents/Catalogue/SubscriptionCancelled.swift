#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A user has given up a subscription. Carries ids, never names or addresses.
public struct SubscriptionCancelled: SMAPEvent, Hashable {
    /// `subscription.cancelled`.
    public static let routingKey: RoutingKey = "subscription.cancelled"

    /// The subscription, a UUID.
    public var subscriptionID: String
    /// The user. Not empty.
    public var userID: String
    /// Why, if known.
    public var reason: String?
    /// When.
    public var cancelledAt: Date?

    /// Makes the event.
    public init(subscriptionID: String, userID: String, reason: String? = nil, cancelledAt: Date? = nil) {
        self.subscriptionID = subscriptionID
        self.userID = userID
        self.reason = reason
        self.cancelledAt = cancelledAt
    }

    private enum CodingKeys: String, CodingKey {
        case subscriptionID = "subscription_id"
        case userID = "user_id"
        case reason
        case cancelledAt = "cancelled_at"
    }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(UUID(uuidString: subscriptionID) != nil, "subscription_id", "is not a UUID")
        try Self.require(!userID.isEmpty, "user_id", "is empty")
    }
}
