package import Configuration

/// How a connection to a server is encrypted, and whom it trusts. Everything is verified by default, with TLS 1.2 or newer.
public struct ServerTLS: Sendable, Hashable {
    /// What is verified of the server.
    public struct Verification: Sendable, Hashable {
        /// Whether an authority that we trust must vouch for it.
        package let peer: Bool
        /// Whether it must be the host that was asked for.
        package let host: Bool

        /// That an authority that we trust vouches for it, and that it is the host that was asked for. The default.
        public static let full = Verification(peer: true, host: true)
        /// Only that an authority that we trust vouches for it. For one's own authority, which issues certificates for
        /// nothing else.
        public static let authorityOnly = Verification(peer: true, host: false)
        /// Nothing: the connection is encrypted, and may be to anybody. The log (RabbitMQ) or `health()` (Redis) warns of it.
        public static let none = Verification(peer: false, host: false)
    }

    /// A file of PEM certificates of the authorities to trust, instead of the system's. `…_CA_FILE`.
    public var authorityFile: String?
    /// A file with the client's certificate and its chain in PEM, for servers that ask for one. `…_CERT_FILE`.
    public var certificateFile: String?
    /// A file with the client's private key in PEM, without a pass phrase. `…_KEY_FILE`.
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

    /// Reads `<NAME>_TLS`, `<NAME>_CA_FILE`, `<NAME>_CERT_FILE` and `<NAME>_KEY_FILE`. Nil for plain text.
    ///
    /// Throws ``EventsError/Code/invalidConfiguration``, naming the setting.
    ///
    /// - Parameters:
    ///   - reader: Scoped to the name.
    ///   - isEncrypted: Whether the URL says so already; `<NAME>_TLS` cannot take that back.
    package init?(reader: ConfigReader, name: String, isEncrypted: Bool) throws {
        func file(_ key: ConfigKey) -> String? {
            reader.string(forKey: key).flatMap { $0.isEmpty ? nil : $0 }
        }
        self.init(
            authorityFile: file("ca.file"), certificateFile: file("cert.file"), privateKeyFile: file("key.file"))
        guard try reader.flag("tls", setting: "\(name)_TLS") == true || isEncrypted else {
            guard self == ServerTLS() else {
                throw ServerURL.failure("\(name)_TLS", "there are certificates, but the connection is not encrypted")
            }
            return nil
        }
        try validate(name)
    }

    /// Throws ``EventsError/Code/invalidConfiguration`` where the parts do not go together.
    package func validate(_ name: String) throws {
        guard (certificateFile == nil) == (privateKeyFile == nil) else {
            throw ServerURL.failure("\(name)_CERT_FILE", "a certificate and its key come together")
        }
    }
}

extension ConfigReader {
    /// A yes or no; nil if it is not set.
    package func flag(_ key: ConfigKey, setting: String) throws -> Bool? {
        guard let text = string(forKey: key), !text.isEmpty else { return nil }
        switch text.lowercased() {
        case "true", "1", "yes", "on": return true
        case "false", "0", "no", "off": return false
        default: throw ServerURL.failure(setting, "it is true or false")
        }
    }
}
