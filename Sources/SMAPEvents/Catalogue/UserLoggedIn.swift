/// A user has logged in.
public struct UserLoggedIn: SMAPEvent, Hashable {
    /// `user.logged_in`.
    public static let routingKey: RoutingKey = "user.logged_in"

    /// The user. Not empty.
    public var userID: String
    /// The session.
    public var sessionID: String?

    /// Makes the event.
    public init(userID: String, sessionID: String? = nil) {
        self.userID = userID
        self.sessionID = sessionID
    }

    private enum CodingKeys: String, CodingKey {
        case userID = "user_id"
        case sessionID = "session_id"
    }

    /// Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(!userID.isEmpty, "user_id", "is empty")
    }
}
