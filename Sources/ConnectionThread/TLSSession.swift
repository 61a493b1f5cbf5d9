internal import COpenSSL

/// How to encrypt a connection, and what to check of the server.
package struct TLSOptions: Sendable {
    /// The authorities to trust, in PEM; nil for the system's.
    package var authorityFile: String?
    /// The client's own certificate and key, in PEM; both or neither.
    package var certificateFile: String?
    package var privateKeyFile: String?
    package var verifiesPeer: Bool
    package var verifiesHost: Bool

    package init(
        authorityFile: String?, certificateFile: String?, privateKeyFile: String?, verifiesPeer: Bool,
        verifiesHost: Bool
    ) {
        self.authorityFile = authorityFile
        self.certificateFile = certificateFile
        self.privateKeyFile = privateKeyFile
        self.verifiesPeer = verifiesPeer
        self.verifiesHost = verifiesHost
    }
}

/// Why a connection could not be encrypted, or a record not be read or written. Holds no credentials.
package struct TLSError: Error, Sendable, CustomStringConvertible {
    package enum Kind: Sendable {
        /// A file that cannot be used.
        case invalidOptions
        /// The handshake or the session has failed.
        case failed
    }

    package let kind: Kind
    package let description: String
}

/// The client's side of an encrypted connection. It turns bytes into other bytes, and the socket stays the caller's: OpenSSL
/// would write with `write()`, and a broken connection would raise SIGPIPE and kill the process. For one thread at a time.
///
/// Sound: the pointers are made in `init`, freed in `deinit` only, and known to nobody else.
final class TLSSession {
    private let context: OpaquePointer
    private let session: OpaquePointer
    /// What has come from the server, and what is to go to it: memory of the session's.
    private let incoming: OpaquePointer
    private let outgoing: OpaquePointer
    /// Whether the server has said goodbye (`close_notify`): nothing that comes after it is read.
    private(set) var hasEnded = false
    /// Room for what is handed out, as much as a record holds.
    private var record = [UInt8](repeating: 0, count: 16 * 1024)

    /// Throws ``TLSError``.
    init(_ tls: TLSOptions, host: String) throws {
        // The dot at the end of a full name is no part of it in SNI and certificates (RFC 6066, 3).
        let host = host.hasSuffix(".") ? String(host.dropLast()) : host
        guard let context = SSL_CTX_new(TLS_client_method()) else { throw Self.failure("out of memory") }
        do {
            session = try Self.makeSession(context, tls, host)
        } catch {
            SSL_CTX_free(context)
            throw error
        }
        self.context = context
        incoming = SSL_get_rbio(session)
        outgoing = SSL_get_wbio(session)
    }

    deinit {
        SSL_free(session)
        SSL_CTX_free(context)
    }

    private static func makeSession(
        _ context: OpaquePointer, _ tls: TLSOptions, _ host: String
    ) throws -> OpaquePointer {
        func require(_ isFine: Bool, _ what: String) throws {
            guard isFine else { throw TLSError(kind: .invalidOptions, description: "\(what) cannot be used") }
        }
        smap_tls_never_ask(UnsafeMutableRawPointer(context))
        if let file = tls.authorityFile {
            try require(SSL_CTX_load_verify_locations(context, file, nil) == 1, "the authorities in \(file)")
        }
        if let certificate = tls.certificateFile, let key = tls.privateKeyFile {
            try require(
                SSL_CTX_use_certificate_chain_file(context, certificate) == 1
                    && SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1
                    && SSL_CTX_check_private_key(context) == 1,
                "the certificate in \(certificate) or its key in \(key)")
        }
        guard
            smap_tls_prepare(
                UnsafeMutableRawPointer(context), host, tls.verifiesPeer ? 1 : 0, tls.verifiesHost ? 1 : 0,
                tls.authorityFile == nil ? 1 : 0) == 1
        else { throw failure("OpenSSL refused the settings") }
        guard let incoming = BIO_new(BIO_s_mem()) else { throw failure("out of memory") }
        guard let outgoing = BIO_new(BIO_s_mem()) else {
            BIO_free(incoming)
            throw failure("out of memory")
        }
        guard let session = smap_tls_session(context, host, incoming, outgoing) else {
            BIO_free(incoming)
            BIO_free(outgoing)
            throw failure("out of memory")
        }
        return session
    }

    /// Goes on with the handshake after ``received(_:)``. True once it is done.
    func shakeHands() throws -> Bool {
        ERR_clear_error()
        let status = SSL_do_handshake(session)
        if status == 1 { return true }
        if SSL_get_error(session, status) == SSL_ERROR_WANT_READ { return false }
        if let refusal = smap_tls_refusal_text(UnsafeMutableRawPointer(context)) {
            throw Self.failure("the server's certificate was refused: \(String(cString: refusal))")
        }
        throw Self.failure("no encryption (TLS 1.2 or newer) could be agreed on: \(Self.reason)")
    }

    /// Takes what has come from the server.
    func received(_ bytes: UnsafeRawBufferPointer) throws {
        guard bytes.isEmpty || BIO_write(incoming, bytes.baseAddress, Int32(bytes.count)) == bytes.count else {
            throw Self.failure("out of memory")
        }
    }

    /// Hands out what is complete of it, in pieces.
    func decrypt(_ body: (UnsafeRawBufferPointer) throws -> Void) throws {
        while true {
            ERR_clear_error()
            var count = 0
            let status = record.withUnsafeMutableBytes { SSL_read_ex(session, $0.baseAddress, $0.count, &count) }
            if status == 1 {
                try record.withUnsafeBytes { try body(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
                continue
            }
            switch SSL_get_error(session, status) {
            case SSL_ERROR_WANT_READ: return
            case SSL_ERROR_ZERO_RETURN:
                hasEnded = true
                return
            default: throw Self.failure("the server refuses the connection, or it was tampered with: \(Self.reason)")
            }
        }
    }

    /// To be called after the handshake.
    func encrypt(_ bytes: UnsafeRawBufferPointer) throws {
        guard !bytes.isEmpty else { return }
        ERR_clear_error()
        var count = 0
        let status = SSL_write_ex(session, bytes.baseAddress, bytes.count, &count)
        guard status == 1 else { throw Self.failure("nothing can be written any more: \(Self.reason)") }
    }

    /// Says goodbye.
    func end() {
        ERR_clear_error()
        _ = SSL_shutdown(session)
    }

    /// Appends what is to go to the server.
    func takeOutput(into output: inout [UInt8]) {
        while true {
            let count = record.withUnsafeMutableBytes { BIO_read(outgoing, $0.baseAddress, Int32($0.count)) }
            guard count > 0 else { return }
            record.withUnsafeBytes { output.append(contentsOf: $0[..<Int(count)]) }
        }
    }

    private static var reason: String {
        smap_tls_failure_text().map { String(cString: $0) } ?? "the server broke it off"
    }

    private static func failure(_ problem: String) -> TLSError {
        TLSError(kind: .failed, description: problem)
    }
}
