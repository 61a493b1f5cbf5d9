public import Configuration
public import SMAPEvents

/// Where Redis is, and the limits of talking to it.
///
/// Its description holds no password.
public struct RedisConfiguration: Sendable, CustomStringConvertible {
    /// A server's address.
    public struct Address: Sendable, Hashable, CustomStringConvertible {
        /// The host's name or address.
        public var host: String
        /// The port.
        public var port: Int

        /// Describes an address.
        public init(host: String, port: Int) {
            self.host = host
            self.port = port
        }

        /// `host:port`.
        public var description: String { "\(host.contains(":") ? "[\(host)]" : host):\(port)" }
    }

    /// The sentinels that know the master; with them, ``host`` and ``port`` are not used. None by default.
    /// `REDIS_SENTINELS`, as `host:port` separated by commas; the port is 26379 by default.
    ///
    /// Each connection asks one of them where the master is, and checks that it is one.
    public var sentinels: [Address] = []
    /// What the sentinels call the master, `mymaster` by default. `REDIS_MASTER_NAME`.
    public var masterName = "mymaster"
    /// The password of the sentinels themselves; none by default. `REDIS_SENTINEL_PASSWORD`.
    public var sentinelPassword: String?
    /// The host's name or address. `REDIS_HOST`, `localhost` by default.
    public var host: String
    /// The port. `REDIS_PORT`, 6379 by default, with ``tls`` too.
    public var port: Int
    /// How connections are encrypted, those to the sentinels too; nil, the default, for plain text. `rediss://` in a URL, or
    /// `REDIS_TLS=true`.
    ///
    /// There is no falling back to plain text. With sentinels, the host that is verified is the one that they name, most
    /// often an address.
    public var tls: ServerTLS?
    /// The user of an access control list; none by default, which is Redis's user `default`. `REDIS_USERNAME`. Needs a
    /// password.
    public var username: String?
    /// The password; none by default. `REDIS_PASSWORD`.
    public var password: String?
    /// The database, 1 by default: database 0 is a cache that may evict. `REDIS_STATE_DB`.
    public var database: Int

    /// How long connecting and logging in may take, 5 s by default.
    public var connectTimeout: Duration = .seconds(5)
    /// How long a server that owes a reply may send nothing at all before the connection is given up, 8 s by default. The
    /// next call opens another, and asks the sentinels again.
    ///
    /// Longer than Redis's `busy-reply-threshold` (5 s): until then it says nothing while it works on somebody's script.
    public var silenceLimit: Duration = .seconds(8)
    /// How many replicas the master waits for after an update, with `WAIT`; 0, the default, for none. How many had it is in
    /// ``SMAPEvents/ProgressUpdate/replicas``. `REDIS_REPLICAS`.
    ///
    /// It makes losing an update in a failover less likely, not impossible (Redis's documentation of `WAIT`). While the
    /// master waits it does nothing else for the connection, so that updates go out in groups, one per round trip to the
    /// replicas.
    public var replicas = 0
    /// How long it waits for them, 500 ms by default. Below ``silenceLimit``.
    public var replicaTimeout: Duration = .milliseconds(500)
    /// How many connections the progress store shares its projects out to, 2 by default, 1 to 64. The inbox has one.
    public var connections: Int = 2
    /// How many commands may be under way at a time on a connection, 10,000 by default. More are refused as
    /// ``SMAPEvents/EventsError/Code/overloaded``.
    public var maximumInFlight: Int = 10_000
    /// How long a project's keys live after its last update, 604,800 s (a week) by default. Whole seconds.
    public var timeToLive: Duration = .seconds(604_800)

    /// How often a watched project is looked at although no message about it has come, 2 s by default.
    public var watchInterval: Duration = .seconds(2)
    /// How hashes are read that siblings have started, who do not write down their layout: flat by default. Those with
    /// stages are recognised.
    public var assumedLayout: ProgressLayout = .flat

    /// Describes a server.
    public init(host: String = "localhost", port: Int = 6379, password: String? = nil, database: Int = 1) {
        self.host = host
        self.port = port
        self.password = password
        self.database = database
    }

    /// Reads `redis://user:password@host:port/database`, or `rediss://…` for an encrypted connection (IANA's registry of URI
    /// schemes). Everything after the scheme is optional; user and password are percent-encoded.
    ///
    /// - Throws: ``SMAPEvents/EventsError/Code/invalidConfiguration``, naming the part that is wrong and never quoting
    ///   the URL.
    public init(url: String) throws {
        self.init()
        let location = try ServerURL(parsing: url, setting: "REDIS_URL")
        switch location.scheme {
        case "redis": break
        case "rediss": tls = ServerTLS()
        default: throw ServerURL.failure("REDIS_URL", "the scheme is neither redis nor rediss")
        }
        guard !location.hasQuery else {
            throw ServerURL.failure("REDIS_URL", "it has a query, which means nothing here: rediss:// encrypts")
        }
        if let host = location.host { self.host = host }
        if let port = location.port { self.port = port }
        if let username = location.username, !username.isEmpty { self.username = username }
        if let password = location.password, !password.isEmpty { self.password = password }
        if !location.path.isEmpty {
            guard let database = Int(location.path) else {
                throw ServerURL.failure(
                    "REDIS_URL", "the database is not a number (in a password, / is written %2F)")
            }
            self.database = database
        }
        try validate()
    }

    /// Reads `REDIS_URL`, or `REDIS_HOST`, `REDIS_PORT`, `REDIS_USERNAME`, `REDIS_PASSWORD`; `REDIS_STATE_DB` where a
    /// URL names no database, and the settings of ``tls``, ``sentinels`` and ``replicas`` in both cases.
    ///
    /// - Throws: ``SMAPEvents/EventsError/Code/invalidConfiguration``, naming the setting.
    public init(reader: ConfigReader) throws {
        let reader = reader.scoped(to: "redis")
        func text(_ key: ConfigKey, isSecret: Bool = false) -> String? {
            reader.string(forKey: key, isSecret: isSecret).flatMap { $0.isEmpty ? nil : $0 }
        }
        func number(_ key: ConfigKey, _ setting: String) throws -> Int? {
            try text(key).map { text in
                guard let number = Int(text) else { throw ServerURL.failure(setting, "it is not a number") }
                return number
            }
        }
        let url = text("url", isSecret: true)
        if let url {
            try self.init(url: url)
        } else {
            self.init()
            if let host = text("host") { self.host = host }
            if let port = try number("port", "REDIS_PORT") { self.port = port }
            username = text("username")
            password = text("password", isSecret: true)
        }
        if let database = try number("state.db", "REDIS_STATE_DB"),
            try url.map({ try ServerURL(parsing: $0, setting: "REDIS_URL").path.isEmpty }) ?? true
        {
            self.database = database
        }
        if let replicas = try number("replicas", "REDIS_REPLICAS") { self.replicas = replicas }
        tls = try ServerTLS(reader: reader, name: "REDIS", isEncrypted: tls != nil)
        if let list = text("sentinels") {
            sentinels = try list.split(separator: ",").map { try Self.sentinel($0.filter { $0 != " " }) }
        }
        if let name = text("master.name") { masterName = name }
        sentinelPassword = text("sentinel.password", isSecret: true)
        try validate()
    }

    private static func sentinel(_ text: String) throws -> Address {
        var (host, port) = (text[...], "26379"[...])
        // An IPv6 address stands in brackets.
        if let colon = text.lastIndex(of: ":"), !text[colon...].contains("]") {
            (host, port) = (text[..<colon], text[text.index(after: colon)...])
        }
        if host.hasPrefix("["), host.hasSuffix("]") { host = host.dropFirst().dropLast() }
        guard let port = Int(port) else { throw ServerURL.failure("REDIS_SENTINELS", "a port is no number") }
        return Address(host: String(host), port: port)
    }

    func validate() throws {
        func require(_ condition: Bool, _ setting: String, _ rule: String) throws {
            guard condition else { throw ServerURL.failure(setting, rule) }
        }
        try require(!host.isEmpty && !host.contains("\0"), "REDIS_HOST", "it is not a host name")
        try require((1...65_535).contains(port), "REDIS_PORT", "a port is 1 to 65535")
        for sentinel in sentinels {
            try require(
                !sentinel.host.isEmpty && !sentinel.host.contains("\0"), "REDIS_SENTINELS", "it is not a host name")
            try require((1...65_535).contains(sentinel.port), "REDIS_SENTINELS", "a port is 1 to 65535")
        }
        try require(!masterName.isEmpty, "REDIS_MASTER_NAME", "it is empty")
        try require((0...1_000_000).contains(database), "REDIS_STATE_DB", "it is 0 or more")
        try require(username == nil || password != nil, "REDIS_USERNAME", "it needs a password")
        try require((1...64).contains(connections), "connections", "it is 1 to 64")
        try require(maximumInFlight > 0, "maximumInFlight", "it is 1 or more")
        try require(connectTimeout > .zero, "connectTimeout", "it is above zero")
        try require((0...1_000).contains(replicas), "REDIS_REPLICAS", "it is 0 to 1,000")
        try require(silenceLimit > .zero, "silenceLimit", "it is above zero")
        try require(
            replicas == 0 || (replicaTimeout > .zero && replicaTimeout < silenceLimit), "replicaTimeout",
            "it is above zero and below the silence limit")
        try require(timeToLive >= .seconds(1), "timeToLive", "it is 1 s or more")
        try tls?.validate("REDIS")
    }

    /// `host:port/database`, or `master@sentinels/database`, for logs and errors.
    public var description: String {
        let place =
            sentinels.isEmpty
            ? Address(host: host, port: port).description
            : "\(masterName)@\(sentinels.map(\.description).joined(separator: ","))"
        return "\(place)/\(database)"
    }
}
