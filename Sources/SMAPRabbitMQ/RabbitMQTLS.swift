/// How a connection is encrypted, and whom it trusts. Everything is verified by default, with TLS 1.2 or newer.
public struct RabbitMQTLS: Sendable, Hashable {
    /// What is verified of the server.
    public struct Verification: Sendable, Hashable {
        let peer: Bool
        let host: Bool

        /// That an authority that we trust vouches for it, and that it is the host that was asked for. The default.
        public static let full = Verification(peer: true, host: true)
        /// Only that an authority that we trust vouches for it. For one's own authority, which issues certificates for
        /// nothing else.
        public static let authorityOnly = Verification(peer: true, host: false)
        /// Nothing: the connection is encrypted, and may be to anybody. Logged as a warning.
        public static let none = Verification(peer: false, host: false)
    }

    /// A file of PEM certificates of the authorities to trust, instead of the system's. `RABBITMQ_CA_FILE`.
    public var authorityFile: String?
    /// A file with the client's certificate and its chain in PEM, for servers that ask for one. `RABBITMQ_CERT_FILE`.
    public var certificateFile: String?
    /// A file with the client's private key in PEM, without a pass phrase. `RABBITMQ_KEY_FILE`.
    public var privateKeyFile: String?
    /// What is verified, ``Verification/full`` by default.
    public var verification: Verification

    /// Describes an encrypted connection.
    public init(
        authorityFile: String? = nil, certificateFile: String? = nil, privateKeyFile: String? = nil,
        verification: Verification = .full
    ) {
        self.authorityFile = authorityFile
        self.certificateFile = certificateFile
        self.privateKeyFile = privateKeyFile
        self.verification = verification
    }
}
