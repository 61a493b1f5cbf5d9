internal import COpenSSL
internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents

extension ServerTLS {
    /// Opens an encrypted socket on a connection of the library, which owns it. Blocks until the deadline at most: the
    /// library's own handshake is non-blocking underneath.
    ///
    /// - Throws: `EventsError` with `tlsFailed` or `invalidConfiguration`, saying which check failed; ``AMQPFailure`` when
    ///   the server could not be reached.
    func open(_ handle: amqp_connection_state_t, host: String, port: Int, deadline: MonotonicTime) throws {
        guard let socket = amqp_ssl_socket_new(handle) else { throw AMQPFailure.unexpected("out of memory") }
        let context = amqp_ssl_socket_get_context(socket)
        smap_tls_never_ask(context)
        if let authorityFile {
            try check(amqp_ssl_socket_set_cacert(socket, authorityFile), "the authorities in \(authorityFile)")
        }
        if let certificateFile, let privateKeyFile {
            try check(
                amqp_ssl_socket_set_key(socket, certificateFile, privateKeyFile),
                "the certificate in \(certificateFile) or its key in \(privateKeyFile)")
        }
        // Its own checks come too late and know less; the context's make the handshake fail.
        amqp_ssl_socket_set_verify_peer(socket, verification.peer ? 1 : 0)
        amqp_ssl_socket_set_verify_hostname(socket, 0)
        guard
            smap_tls_prepare(
                context, host, verification.peer ? 1 : 0, verification.host ? 1 : 0, authorityFile == nil ? 1 : 0) == 1
        else { throw EventsError(.tlsFailed, "OpenSSL refused the settings", operation: "connect to \(host):\(port)") }
        let status = AMQPDriver.with(AMQPDriver.timeval(from: .now, to: deadline)) {
            amqp_socket_open_noblock(socket, host, Int32(port), $0)
        }
        guard status != AMQP_STATUS_OK.rawValue else { return }
        if let refusal = smap_tls_refusal_text(context) {
            throw EventsError(
                .tlsFailed, "the server's certificate was refused: \(String(cString: refusal))",
                operation: "connect to \(host):\(port)")
        }
        if let failure = smap_tls_failure_text() {
            throw EventsError(
                .tlsFailed, "no encryption (TLS 1.2 or newer) could be agreed on: \(String(cString: failure))",
                operation: "connect to \(host):\(port)")
        }
        throw AMQPFailure.library(status: status, doing: "\(host):\(port)")
    }

    private func check(_ status: Int32, _ what: String) throws {
        guard status == AMQP_STATUS_OK.rawValue else {
            throw EventsError(.invalidConfiguration, "\(what) cannot be used", operation: "TLS")
        }
    }
}
