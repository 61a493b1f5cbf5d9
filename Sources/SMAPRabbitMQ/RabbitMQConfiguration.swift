public import Configuration
internal import ConnectionThread
public import SMAPEvents

/// Where RabbitMQ is, and the limits of talking to it.
///
/// Its description holds no password.
public struct RabbitMQConfiguration: Sendable, CustomStringConvertible {
    /// The host's name or address. `RABBITMQ_HOST`, `localhost` by default.
    public var host: String
    /// The port. `RABBITMQ_PORT`, 5672 by default, 5671 with ``tls``.
    public var port: Int
    /// More nodes of the same cluster, `host` or `host:port`, tried in turn when one does not answer; none by default.
    /// `RABBITMQ_HOST` may list them all, separated by commas.
    public var alternatives: [String] = []
    /// The user. `RABBITMQ_USERNAME`, `guest` by default.
    public var username: String
    /// The password. `RABBITMQ_PASSWORD`, `guest` by default.
    public var password: String
    /// The virtual host. `RABBITMQ_VHOST`, `/` by default.
    public var virtualHost: String

    /// How the connection is encrypted; nil, the default, for plain text. `amqps://` in a URL, or `RABBITMQ_TLS=true`.
    public var tls: ServerTLS?
    /// Whether the password may be sent in plain text to a host that is not this one. Off by default.
    /// `RABBITMQ_ALLOW_PLAINTEXT`.
    public var allowsPlainText = false

    /// How long connecting to a node and logging in may take, 10 s by default.
    public var connectTimeout: Duration = .seconds(10)
    /// The pause before a lost connection is tried again, 100 ms by default. It doubles with each failure, and a random
    /// part of it is waited ("full jitter"), so that a fleet of services does not return as one.
    public var reconnectDelay: Duration = .milliseconds(100)
    /// The longest pause between two attempts, 10 s by default; also the pause after the server has refused the
    /// credentials.
    public var maximumReconnectDelay: Duration = .seconds(10)
    /// How the client logs in, with ``username`` and ``password`` by default. `RABBITMQ_AUTH_MECHANISM`: `PLAIN` or
    /// `EXTERNAL`.
    public var authentication = Authentication.password
    /// The heartbeat asked for, in whole seconds; a server may ask for less. 10 s by default, 0 turns it off. A server that
    /// sends nothing for two intervals is given up.
    public var heartbeat: Duration = .seconds(10)
    /// How long a connection may be stuck before it is given up, 15 s by default: its thread in one system call, or the
    /// broker with one of the declarations that are repeated after a loss.
    public var stallLimit: Duration = .seconds(15)
    /// How many messages may be unconfirmed at a time, 1,000 by default. More callers wait. In windows of 16 or more, a
    /// quarter more is kept for destinations of which few messages are unconfirmed, so that one that does not confirm holds
    /// up none of the others.
    public var windowMessages: Int = 1_000
    /// How many bytes may be unconfirmed at a time, 16 MiB by default, with the same quarter more. One message over it is let
    /// through, so that a large one gets its turn.
    public var windowBytes: Int = 16 << 20
    /// How many callers may wait for room to publish, 10,000 by default. More are refused with
    /// ``SMAPEvents/EventsError/Code/overloaded``.
    public var maximumWaitingPublishes: Int = 10_000
    /// The largest body that is taken into memory, 16 MiB by default. Larger ones are rejected, and so go to the queue's
    /// dead letters.
    public var maximumBodySize: Int = 16 << 20

    /// How a client proves who it is (SASL).
    public struct Authentication: Sendable, Hashable, CustomStringConvertible {
        /// The SASL mechanism's name.
        let mechanism: String

        /// `PLAIN`: by user and password (RFC 4616).
        public static let password = Authentication(mechanism: "PLAIN")
        /// `EXTERNAL`: by the client's certificate in ``RabbitMQConfiguration/tls`` (RFC 4422, appendix A). The server needs
        /// the plugin `rabbitmq_auth_mechanism_ssl`, and takes the user's name from the certificate.
        public static let external = Authentication(mechanism: "EXTERNAL")

        /// The mechanism's name.
        public var description: String { mechanism }
    }

    /// Describes a server by its parts.
    public init(
        host: String = "localhost", port: Int = 5672, username: String = "guest", password: String = "guest",
        virtualHost: String = "/"
    ) {
        self.host = host
        self.port = port
        self.username = username
        self.password = password
        self.virtualHost = virtualHost
    }

    /// Reads `amqp://user:password@host:port/vhost`, or `amqps://…` (RabbitMQ URI Specification). Everything after the scheme is
    /// optional; user, password and vhost are percent-encoded; without a vhost, or with an empty one, it is `/`.
    ///
    /// - Throws: ``SMAPEvents/EventsError/Code/invalidConfiguration``, naming the part that is wrong and never quoting
    ///   the URL.
    public init(url: String) throws {
        self.init()
        let location = try ServerURL(parsing: url, setting: "RABBITMQ_URL")
        switch location.scheme {
        case "amqp": break
        case "amqps":
            tls = ServerTLS()
            port = 5671
        default: throw ServerURL.failure("RABBITMQ_URL", "the scheme is neither amqp nor amqps")
        }
        if let host = location.host { self.host = host }
        if let port = location.port { self.port = port }
        if let username = location.username { self.username = username }
        if let password = location.password { self.password = password }
        if !location.path.isEmpty { virtualHost = location.path }
        try validate()
    }

    /// Reads `RABBITMQ_URL`, or `RABBITMQ_HOST`, `RABBITMQ_PORT`, `RABBITMQ_USERNAME`, `RABBITMQ_PASSWORD` and
    /// `RABBITMQ_VHOST`.
    ///
    /// - Throws: ``SMAPEvents/EventsError/Code/invalidConfiguration``, naming the setting.
    public init(reader: ConfigReader) throws {
        let reader = reader.scoped(to: "rabbitmq")
        if let url = reader.string(forKey: "url", isSecret: true), !url.isEmpty {
            try self.init(url: url)
            try readTLS(reader)
            try readAuthentication(reader)
            return
        }
        self.init()
        try readTLS(reader)
        if let hosts = reader.string(forKey: "host"), !hosts.isEmpty {
            let names = hosts.split(separator: ",").map(String.init)
            host = names.first ?? ""
            alternatives = Array(names.dropFirst())
        }
        if let text = reader.string(forKey: "port"), !text.isEmpty {
            guard let port = Int(text) else { throw ServerURL.failure("RABBITMQ_PORT", "it is not a number") }
            self.port = port
        }
        if let username = reader.string(forKey: "username") { self.username = username }
        if let password = reader.string(forKey: "password", isSecret: true) { self.password = password }
        if let virtualHost = reader.string(forKey: "vhost"), !virtualHost.isEmpty { self.virtualHost = virtualHost }
        try readAuthentication(reader)
        try validate()
    }

    private mutating func readAuthentication(_ reader: ConfigReader) throws {
        switch reader.string(forKey: "auth.mechanism")?.uppercased() {
        case nil, "": break
        case "PLAIN": authentication = .password
        case "EXTERNAL": authentication = .external
        default: throw ServerURL.failure("RABBITMQ_AUTH_MECHANISM", "it is neither PLAIN nor EXTERNAL")
        }
        try validate()
    }

    private mutating func readTLS(_ reader: ConfigReader) throws {
        if let isPlainTextAllowed = try reader.flag("allow.plaintext", setting: "RABBITMQ_ALLOW_PLAINTEXT") {
            allowsPlainText = isPlainTextAllowed
        }
        let isPlain = tls == nil
        tls = try ServerTLS(reader: reader, name: "RABBITMQ", isEncrypted: !isPlain)
        if isPlain, tls != nil, port == 5672 { port = 5671 }
    }

    /// What must hold before a password is sent.
    func validateForConnecting() throws {
        try validate()
        guard tls == nil, !allowsPlainText else { return }
        for node in try nodes where !Self.isLoopback(node.host) {
            throw ServerURL.failure(
                "RABBITMQ_URL",
                "the password would go to \(node.host) in plain text: use amqps, or allow it (RABBITMQ_ALLOW_PLAINTEXT)"
            )
        }
    }

    private static func isLoopback(_ host: String) -> Bool {
        host == "localhost" || host == "::1" || (host.hasPrefix("127.") && host.allSatisfy { $0.isNumber || $0 == "." })
    }

    func validate() throws {
        func require(_ condition: Bool, _ setting: String, _ rule: String) throws {
            guard condition else { throw ServerURL.failure(setting, rule) }
        }
        try require((1...65_535).contains(port), "RABBITMQ_PORT", "a port is 1 to 65535")
        try require(!host.isEmpty && !host.contains("\0"), "RABBITMQ_HOST", "it is not a host name")
        for (setting, value) in [
            ("RABBITMQ_USERNAME", username), ("RABBITMQ_PASSWORD", password), ("RABBITMQ_VHOST", virtualHost),
        ] {
            try require(value.utf8.count <= 255 && !value.contains("\0"), setting, "it has at most 255 bytes, no NUL")
        }
        try require((1...1_000_000).contains(windowMessages), "windowMessages", "it is 1 to 1,000,000")
        try require((1...(1 << 40)).contains(windowBytes), "windowBytes", "it is 1 byte to 1 TiB")
        try require(
            (0...10_000_000).contains(maximumWaitingPublishes), "maximumWaitingPublishes", "it is 0 to 10,000,000")
        try require(
            (0...(1 << 30)).contains(maximumBodySize), "maximumBodySize", "it is 0 to 1 GiB")
        try require(
            authentication != .external || tls?.certificateFile != nil, "RABBITMQ_AUTH_MECHANISM",
            "EXTERNAL needs amqps and a client certificate (RABBITMQ_CERT_FILE, RABBITMQ_KEY_FILE)")
        try require(
            heartbeat >= .zero && heartbeat <= .seconds(3600) && heartbeat.components.attoseconds == 0, "heartbeat",
            "it is 0 to 3600 s, in whole seconds")
        for (name, timeout) in [("connectTimeout", connectTimeout), ("stallLimit", stallLimit)] {
            try require(timeout > .zero && timeout <= .seconds(86_400), name, "it is above zero, and a day at most")
        }
        try require(
            reconnectDelay > .zero && maximumReconnectDelay >= reconnectDelay, "reconnect delays",
            "the first is above zero, and the longest is not shorter")
        _ = try nodes
        try tls?.validate("RABBITMQ")
    }

    /// All nodes, in the order in which they are tried.
    var nodes: [(host: String, port: Int)] {
        get throws {
            try [(host, port)]
                + alternatives.map { text in
                    let location = try ServerURL(parsing: "amqp://\(text)", setting: "RABBITMQ_HOST")
                    guard let host = location.host else {
                        throw ServerURL.failure("RABBITMQ_HOST", "a host is missing in its list")
                    }
                    return (host, location.port ?? port)
                }
        }
    }

    var backoff: Backoff { Backoff(first: reconnectDelay, longest: maximumReconnectDelay) }

    /// `host:port/vhost`, for logs and errors.
    public var description: String {
        "\(host.contains(":") ? "[\(host)]" : host):\(port)\(virtualHost == "/" ? "" : "/\(virtualHost)")"
    }
}

extension ServerTLS {
    var options: TLSOptions {
        TLSOptions(
            authorityFile: authorityFile, certificateFile: certificateFile, privateKeyFile: privateKeyFile,
            verifiesPeer: verification.peer, verifiesHost: verification.host)
    }
}
