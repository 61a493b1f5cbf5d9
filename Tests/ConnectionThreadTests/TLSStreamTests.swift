import COpenSSL
import Foundation
import Synchronization
import Testing

@testable import ConnectionThread

#if canImport(Glibc)
import Glibc
#elseif canImport(Darwin)
import Darwin
#endif

/// A TLS server of OpenSSL's own, which can misbehave, for one connection.
private func withTLSServer<Result>(
    _ serve: @escaping @Sendable (_ session: OpaquePointer, _ descriptor: Int32) -> Void,
    _ body: (_ port: Int, _ files: URL) async throws -> Result
) async throws -> Result {
    let files = FileManager.default.temporaryDirectory.appendingPathComponent("smap-tls-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: files, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: files) }
    let openssl = Process()
    openssl.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    openssl.arguments = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files.path + "/key.pem", "-out",
        files.path + "/cert.pem",
    ]
    openssl.standardError = FileHandle.nullDevice
    try openssl.run()
    openssl.waitUntilExit()
    let context = try #require(SSL_CTX_new(TLS_server_method()))
    defer { SSL_CTX_free(context) }
    try #require(SSL_CTX_use_certificate_chain_file(context, files.path + "/cert.pem") == 1)
    try #require(SSL_CTX_use_PrivateKey_file(context, files.path + "/key.pem", SSL_FILETYPE_PEM) == 1)
    let (listener, port) = try #require(Socket.freePort())
    try #require(listen(listener, 1) == 0)
    // Sound: the thread has ended before the context is freed.
    nonisolated(unsafe) let shared = context
    let ended = AsyncStream.makeStream(of: Void.self)
    try startThread(name: "tls-server", stackSize: 1 << 20) {
        let descriptor = accept(listener, nil, nil)
        if descriptor >= 0, let session = SSL_new(shared) {
            SSL_set_fd(session, descriptor)
            serve(session, descriptor)
            SSL_free(session)
        }
        if descriptor >= 0 { Socket.close(descriptor) }
        ended.continuation.finish()
    }
    let result: Swift.Result<Result, any Error>
    do { result = .success(try await body(port, files)) } catch { result = .failure(error) }
    // Also where no connection was made.
    shutdown(listener, Int32(SHUT_RDWR))
    for await _ in ended.stream {}
    Socket.close(listener)
    return try result.get()
}

private func options(_ files: URL?) -> TLSOptions {
    TLSOptions(
        authorityFile: files.map { $0.path + "/cert.pem" }, certificateFile: nil, privateKeyFile: nil,
        verifiesPeer: true, verifiesHost: true)
}

@Suite(.timeLimit(.minutes(1))) struct TLSStreamTests {
    @Test func `a server that says goodbye has ended the connection, whatever it sends afterwards`() async throws {
        let mayEnd = Mutex(false)
        try await withTLSServer { session, descriptor in
            guard SSL_accept(session) == 1 else { return }
            SSL_write(session, "hello", 5)
            SSL_shutdown(session)
            // The socket stays open, and its bytes count for nothing.
            let noise = [UInt8](repeating: 0, count: 1_000)
            while !mayEnd.withLock({ $0 }), send(descriptor, noise, noise.count, Int32(MSG_NOSIGNAL)) > 0 {
                usleep(1_000)
            }
        } _: { port, files in
            defer { mayEnd.withLock { $0 = true } }
            let limit = MonotonicTime.now.advanced(by: .seconds(20))
            let stream = try SocketStream(host: "127.0.0.1", port: port, tls: options(files), deadline: limit)
            defer { stream.close() }
            var received: [UInt8] = []
            let error = #expect(throws: SocketError.self) {
                while true {
                    try stream.wait(until: limit) { "nothing" }
                    _ = try stream.receive { received += $0 }
                }
            }
            #expect(error?.kind == .lost)
            #expect(String(decoding: received, as: UTF8.self) == "hello")
        }
    }

    @Test func `a server whose certificate we refuse is told why`() async throws {
        let reason = Mutex("")
        try await withTLSServer { session, _ in
            guard SSL_accept(session) != 1 else { return }
            let text = ERR_reason_error_string(ERR_peek_last_error()).map { String(cString: $0) } ?? "none"
            reason.withLock { $0 = text }
        } _: { port, _ in
            let limit = MonotonicTime.now.advanced(by: .seconds(20))
            #expect(throws: TLSError.self) {
                _ = try SocketStream(host: "127.0.0.1", port: port, tls: options(nil), deadline: limit)
            }
        }
        #expect(reason.withLock { $0 }.contains("unknown ca"), "\(reason.withLock { $0 })")
    }

    @Test func `what the server has said is read, although nothing can be sent any more`() async throws {
        let isClosed = Mutex(false)
        try await withTLSServer { session, descriptor in
            guard SSL_accept(session) == 1 else { return }
            SSL_write(session, "why", 3)
            // Closed with bytes unread: the client's next send fails.
            var one: UInt8 = 0
            while recv(descriptor, &one, 1, 0) != 1 {}
            shutdown(descriptor, Int32(SHUT_RDWR))
            isClosed.withLock { $0 = true }
        } _: { port, files in
            let limit = MonotonicTime.now.advanced(by: .seconds(20))
            let stream = try SocketStream(host: "127.0.0.1", port: port, tls: options(files), deadline: limit)
            defer { stream.close() }
            while !isClosed.withLock({ $0 }), .now < limit {
                stream.append { $0 += Array(repeating: 0, count: 1_000) }
                try stream.flush()
                await Task.yield()
            }
            for _ in 0..<1_000 {
                stream.append { $0 += Array(repeating: 0, count: 1_000) }
                try stream.flush()
            }
            var received: [UInt8] = []
            #expect(throws: SocketError.self) {
                while true { _ = try stream.receive { received += $0 } }
            }
            #expect(String(decoding: received, as: UTF8.self) == "why")
        }
    }
}
