#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A user has subscribed to a plan. Carries ids, never names or addresses.
public struct SubscriptionCreated: SMAPEvent, Hashable {
    /// `subscription.created`.
    public static let routingKey: RoutingKey = "subscription.created"

    /// The subscription, a UUID.
    public var subscriptionID: String
    /// The user. Not empty.
    public var userID: String
    /// The plan.
    public var planID: String?
    /// When it begins.
    public var startsAt: Date?
    /// When it ends.
    public var endsAt: Date?

    /// Makes the event.
    public init(
        subscriptionID: String, userID: String, planID: String? = nil, startsAt: Date? = nil, endsAt: Date? = nil
    ) {
        self.subscriptionID = subscriptionID
        self.userID = userID
        self.planID = planID
        self.startsAt = startsAt
        self.endsAt = endsAt
    }

    private enum CodingKeys: String, CodingKey {
        case subscriptionID = "subscription_id"
        case userID = "user_id"
        case planID = "plan_id"
        case startsAt = "starts_at"
        case endsAt = "ends_at"
    }

    /// The subscription's own id: cause and event are one.
    public var idempotencyKey: String? { subscriptionID }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(UUID(uuidString: subscriptionID) != nil, "subscription_id", "is not a UUID")
        try Self.require(!userID.isEmpty, "user_id", "is empty")
    }
}
