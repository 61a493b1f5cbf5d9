/// How a connection to a broker stands.
public struct ConnectionState: Sendable, Hashable, CustomStringConvertible {
    /// The state's name, as in logs and in the output of `smap-events health`.
    public let description: String

    private init(_ description: String) { self.description = description }

    /// It is being opened for the first time.
    public static let connecting = ConnectionState("connecting")
    /// It works.
    public static let open = ConnectionState("open")
    /// It works, but the broker takes no messages: it is short of memory or disk.
    public static let blocked = ConnectionState("blocked")
    /// It was lost, or could not be opened; it is tried again.
    public static let recovering = ConnectionState("recovering")
    /// Its owner has closed it.
    public static let closed = ConnectionState("closed")
}

/// A connection went from one state to another.
public struct ConnectionChange: Sendable {
    /// Which one: `publish` or `consume`.
    public let connection: String
    /// How it stands now.
    public let state: ConnectionState
    /// Why it is ``ConnectionState/recovering`` or ``ConnectionState/closed``.
    public let reason: EventsError?

    /// Reports a change.
    public init(connection: String, state: ConnectionState, reason: EventsError? = nil) {
        self.connection = connection
        self.state = state
        self.reason = reason
    }
}
