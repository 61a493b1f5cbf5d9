/// A user has signed up.
public struct UserRegistered: SMAPEvent, Hashable {
    /// `user.registered`.
    public static let routingKey: RoutingKey = "user.registered"

    /// The user. Not empty.
    public var userID: String
    /// The role given.
    public var role: String?
    /// The company joined.
    public var companyID: String?

    /// Makes the event.
    public init(userID: String, role: String? = nil, companyID: String? = nil) {
        self.userID = userID
        self.role = role
        self.companyID = companyID
    }

    private enum CodingKeys: String, CodingKey {
        case userID = "user_id"
        case role
        case companyID = "company_id"
    }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(!userID.isEmpty, "user_id", "is empty")
    }
}
