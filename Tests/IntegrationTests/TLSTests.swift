import Foundation
import SMAPEvents
import SMAPRabbitMQ
import SMAPRedis
import Testing

@testable import SMAPEventsTesting

/// SCENARIOS 14: encrypted connections, to real servers and to those that are wrong in one way each.
@Suite(.timeLimit(.minutes(10))) struct TLSTests {
    struct Ping: SMAPEvent { static let routingKey: RoutingKey = "tls.ping" }

    /// An authority, and certificates of every kind, in a temporary folder.
    private func withCertificates(_ body: (String) async throws -> Void) async throws {
        let folder = NSTemporaryDirectory() + "smap-tls-\(UUID().uuidString)"
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(atPath: folder) }
        // Expired: `openssl ca` alone takes dates in the past.
        let script = """
            set -e; cd "$0"
            authority() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$1" -keyout $1.key -out $1.pem; }
            request() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" -keyout $1.key -out $1.csr; }
            sign() { printf "subjectAltName=$2\\n" > $1.ext
                openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $1.ext -out $1.pem; }
            authority ca; authority other
            for name in server elsewhere client expired; do request $name; done
            sign server DNS:localhost,IP:127.0.0.1; sign elsewhere DNS:example.org; sign client DNS:client
            openssl pkey -in client.key -aes256 -passout pass:secret -out locked.key
            printf '[ca]\\ndefault_ca=d\\n[d]\\ndatabase=index\\nserial=serial\\nnew_certs_dir=.\\ndefault_md=sha256\\npolicy=p\\n[p]\\ncommonName=supplied\\n' > ca.conf
            : > index; echo 77 > serial
            printf 'subjectAltName=DNS:localhost\\n' > expired.ext
            openssl ca -batch -config ca.conf -cert ca.pem -keyfile ca.key -startdate 20200101000000Z \
                -enddate 20200102000000Z -extfile expired.ext -in expired.csr -out expired.pem
            """
        let result = try await Program.run("sh", ["-c", script, folder])
        try #require(result.status == 0, "\(result.error)")
        try await body(folder)
    }

    private func tls(_ folder: String) -> ServerTLS {
        ServerTLS(
            authorityFile: "\(folder)/ca.pem", certificateFile: "\(folder)/client.pem",
            privateKeyFile: "\(folder)/client.key")
    }

    private func configuration(_ port: Int, _ folder: String, host: String = "localhost") -> RabbitMQConfiguration {
        var configuration = RabbitMQConfiguration(host: host, port: port)
        configuration.tls = tls(folder)
        configuration.connectTimeout = .seconds(5)
        return configuration
    }

    private func redis(_ port: Int, _ folder: String, host: String = "localhost") -> RedisConfiguration {
        var configuration = RedisConfiguration(host: host, port: port)
        configuration.tls = tls(folder)
        return configuration
    }

    private func redisArguments(_ port: Int, _ folder: String) -> [String] {
        [
            "--tls-port", "\(port)", "--tls-cert-file", "\(folder)/server.pem", "--tls-key-file",
            "\(folder)/server.key", "--tls-ca-cert-file", "\(folder)/ca.pem", "--tls-auth-clients", "yes",
        ]
    }

    /// How starting a project ends.
    private func start(_ configuration: RedisConfiguration) async throws -> EventsError? {
        try await RedisProgressStore.withStore(configuration: configuration) { store in
            do {
                try await ProgressTracker(store: store).start(ProjectID("tls_\(UUID())"))
                return nil
            } catch let error as EventsError {
                return error
            }
        }
    }

    /// How publishing ends.
    private func publish(_ configuration: RabbitMQConfiguration) async throws -> EventsError? {
        try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
            let publisher = EventPublisher(
                transport: transport, configuration: PublisherConfiguration(service: "test"))
            do {
                try await transport.declare(.events, deadline: .now + .seconds(10))
                try await publisher.publish(Ping(), options: PublishOptions(deadline: .seconds(10)))
                return nil
            } catch let error as EventsError {
                return error
            }
        }
    }

    @Test func `a broker that asks for a certificate is talked to by name and by address, with large messages too`()
        async throws
    {
        try await withCertificates { folder in
            let port = try freePort()
            var options = LocalStack.Options()
            options.redis = false
            options.rabbitMQSettings = [
                "listeners.ssl.1 = 127.0.0.1:\(port)", "ssl_options.cacertfile = \(folder)/ca.pem",
                "ssl_options.certfile = \(folder)/server.pem", "ssl_options.keyfile = \(folder)/server.key",
                "ssl_options.verify = verify_peer", "ssl_options.fail_if_no_peer_cert = true",
            ]
            try await LocalStack.withStack(options) { stack in
                for host in ["localhost", "127.0.0.1"] {
                    let error = try await publish(configuration(port, folder, host: host))
                    #expect(error == nil, "\(host): \(String(describing: error))")
                }
                var anonymous = configuration(port, folder)
                anonymous.tls?.certificateFile = nil
                anonymous.tls?.privateKeyFile = nil
                let refused = try await publish(anonymous)
                #expect(refused != nil, "the broker wants a certificate")

                // The whole contract holds over an encrypted connection.
                try await RabbitMQTransport.withTransport(configuration: configuration(port, folder)) { transport in
                    for check in TransportContract.checks { try await check.run(transport) }
                }
            }
        }
    }

    @Test func `with EXTERNAL the client's certificate is its login, without a password`() async throws {
        try await withCertificates { folder in
            let port = try freePort()
            var options = LocalStack.Options()
            options.redis = false
            options.rabbitMQPlugins = ["rabbitmq_auth_mechanism_ssl"]
            options.rabbitMQSettings = [
                "listeners.ssl.1 = 127.0.0.1:\(port)", "ssl_options.cacertfile = \(folder)/ca.pem",
                "ssl_options.certfile = \(folder)/server.pem", "ssl_options.keyfile = \(folder)/server.key",
                "ssl_options.verify = verify_peer", "ssl_options.fail_if_no_peer_cert = true",
                "auth_mechanisms.1 = PLAIN", "auth_mechanisms.2 = EXTERNAL", "ssl_cert_login_from = common_name",
            ]
            try await LocalStack.withStack(options) { stack in
                var external = configuration(port, folder)
                external.authentication = .external
                external.username = "nobody"
                external.password = "wrong"
                let unknown = try await publish(external)
                #expect(unknown?.code == .accessRefused, "there is no user of that name yet")
                try await stack.rabbitMQControl("add_user", "client", "unused")
                try await stack.rabbitMQControl("set_permissions", "client", ".*", ".*", ".*")
                let error = try await publish(external)
                #expect(error == nil, "\(String(describing: error))")
            }
        }
    }

    @Test func `a Redis that asks for a certificate keeps the contract by name and by address, and comes back`()
        async throws
    {
        try await withCertificates { folder in
            let port = try freePort()
            var options = LocalStack.Options()
            options.rabbitMQ = false
            options.redisArguments = redisArguments(port, folder)
            try await LocalStack.withStack(options) { stack in
                for host in ["localhost", "127.0.0.1"] {
                    let error = try await start(redis(port, folder, host: host))
                    #expect(error == nil, "\(host): \(String(describing: error))")
                }
                var anonymous = redis(port, folder)
                anonymous.tls?.certificateFile = nil
                anonymous.tls?.privateKeyFile = nil
                let refused = try await start(anonymous)
                #expect(refused?.code == .tlsFailed, "the server wants a certificate: \(refused as Any)")

                try await RedisProgressStore.withStore(configuration: redis(port, folder)) { store in
                    for check in StoreContract.checks { try await check.run(store) }

                    // Half a megabyte a command, many at a time: more than sockets and records hold.
                    let tracker = ProgressTracker(store: store)
                    let large = try ProjectID("tls_large")
                    try await tracker.start(large)
                    try await withThrowingTaskGroup { group in
                        for task in 0..<20 {
                            group.addTask {
                                let items = (0..<1_000).map { item in
                                    let name = "\(task)_\(item)_" + String(repeating: "x", count: 490)
                                    return ItemReport(.named(name), .success)
                                }
                                try await tracker.advance(large, items)
                            }
                        }
                        try await group.waitForAll()
                    }
                    #expect(try await tracker.progress(of: large)?.done == 20_000)

                    try await stack.kill(.redis)
                    await #expect(throws: EventsError.self) { try await tracker.progress(of: large) }
                    try await stack.restart(.redis)
                    #expect(try await tracker.progress(of: large) == nil, "it kept nothing")
                }
                var unverified = redis(port, folder)
                unverified.tls?.verification = .none
                let warnings = try await RedisProgressStore.withStore(configuration: unverified) { store in
                    await store.health().warnings
                }
                #expect(warnings.contains { $0.contains("not verified") }, "\(warnings)")
            }
        }
    }

    @Test func `sentinels are asked over an encrypted connection too`() async throws {
        try await withCertificates { folder in
            let (port, sentinelPort) = (try freePort(), try freePort())
            var options = LocalStack.Options()
            options.rabbitMQ = false
            options.redisArguments = redisArguments(port, folder)
            try await LocalStack.withStack(options) { _ in
                let settings = redisArguments(sentinelPort, folder)
                let lines = stride(from: 0, to: settings.count, by: 2).map { index in
                    settings[index].dropFirst(2) + " " + settings[index + 1]
                }
                let sentinel = try await sentinel(
                    "port 0", of: port, lines.map(String.init) + ["tls-replication yes"])
                var configuration = redis(port, folder)
                configuration.sentinels = [.init(host: "localhost", port: sentinelPort)]
                do {
                    try await eventually("the sentinel listens") { isListening(sentinelPort) }
                    let error = try await start(configuration)
                    #expect(error == nil, "\(error as Any)")
                    configuration.tls?.authorityFile = "\(folder)/other.pem"
                    let unknown = try await start(configuration)
                    #expect(unknown?.code == .tlsFailed, "permanent, as without sentinels: \(unknown as Any)")
                    configuration.tls = nil
                    let plain = try await start(configuration)
                    #expect(plain?.code == .connectionFailed, "\(plain as Any)")
                } catch {
                    await sentinel.stop()
                    throw error
                }
                await sentinel.stop()
            }
        }
    }

    enum Client: String, CaseIterable { case rabbitMQ, redis }

    @Test(arguments: Client.allCases)
    func `a wrong name, an expired certificate, an unknown authority, an old protocol and a plain port are told apart`(
        client: Client
    ) async throws {
        try await withCertificates { folder in
            func use(_ port: Int, _ tls: ServerTLS?) async throws -> EventsError? {
                switch client {
                case .rabbitMQ:
                    var configuration = configuration(port, folder)
                    configuration.tls = tls
                    return try await publish(configuration)
                case .redis:
                    var configuration = redis(port, folder)
                    configuration.tls = tls
                    return try await start(configuration)
                }
            }
            func refusal(
                _ certificate: String, _ more: [String] = [], _ change: (inout ServerTLS) -> Void = { _ in }
            ) async throws -> EventsError? {
                try await withServer(folder, certificate, more) { port in
                    var tls = tls(folder)
                    change(&tls)
                    return try await use(port, tls)
                }
            }
            var error = try await refusal("elsewhere")
            #expect(error?.code == .tlsFailed && error?.message.contains("ostname mismatch") == true, "\(error as Any)")
            error = try await refusal("expired")
            #expect(error?.code == .tlsFailed && error?.message.contains("expired") == true, "\(error as Any)")
            error = try await refusal("server") { $0.authorityFile = "\(folder)/other.pem" }
            #expect(error?.code == .tlsFailed && error?.message.contains("issuer") == true, "\(error as Any)")
            // The system's authorities do not know ours.
            error = try await refusal("server") { $0.authorityFile = nil }
            #expect(error?.code == .tlsFailed && error?.message.contains("refused") == true, "\(error as Any)")
            error = try await refusal("server", ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"])
            #expect(error?.code == .tlsFailed && error?.message.contains("TLS 1.2") == true, "\(error as Any)")
            error = try await refusal("server") { $0.authorityFile = "\(folder)/nowhere.pem" }
            #expect(error?.code == .invalidConfiguration && error?.message.contains("nowhere.pem") == true)

            // Nobody is asked for a pass phrase.
            error = try await refusal("server") { $0.privateKeyFile = "\(folder)/locked.key" }
            #expect(error?.code == .invalidConfiguration && error?.message.contains("locked.key") == true)

            // A plain Redis waits for the rest of what it takes for a line.
            let stack = try await SharedStack.current
            error = try await use(client == .rabbitMQ ? stack.rabbitMQPort : stack.redisPort, tls(folder))
            #expect(error?.code == (client == .rabbitMQ ? .tlsFailed : .connectionFailed), "\(error as Any)")
            #expect(error?.message.contains("TLS") == true, "a plain port: \(error as Any)")
        }
    }

    @Test func `a password goes to another host in plain text only where that is allowed`() throws {
        var configuration = RabbitMQConfiguration(host: "rabbit.example.org", password: "s3cret")
        let error = #expect(throws: EventsError.self) { try RabbitMQTransport(configuration: configuration) }
        #expect(error?.code == .invalidConfiguration)
        #expect(error?.message.contains("plain text") == true)
        #expect(error?.description.contains("s3cret") == false)
        configuration.allowsPlainText = true
        #expect(throws: Never.self) { try RabbitMQTransport(configuration: configuration) }
    }

    /// A TLS server that is no broker: what is wrong with it shows before anybody speaks AMQP.
    private func withServer(
        _ folder: String, _ certificate: String, _ more: [String], _ body: (Int) async throws -> EventsError?
    ) async throws -> EventsError? {
        let port = try freePort()
        let arguments =
            [
                "s_server", "-accept", "127.0.0.1:\(port)", "-cert", "\(folder)/\(certificate).pem", "-key",
                "\(folder)/\(certificate).key", "-quiet",
            ] + more
        return try await withThrowingTaskGroup(of: Void.self) { group in
            // Killed when its task is cancelled.
            group.addTask { _ = try? await Program.run("openssl", arguments) }
            defer { group.cancelAll() }
            try await eventually("the server listens", within: .seconds(10)) { isListening(port) }
            return try await body(port)
        }
    }
}

/// A port on 127.0.0.1 that was free a moment ago.
func freePort() throws -> Int {
    try #require(LocalStack.freePorts(1).first)
}

func isListening(_ port: Int) -> Bool {
    let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    defer { close(descriptor) }
    return withLoopback(port) { connect(descriptor, $0, $1) } == 0
}

func listener() -> (descriptor: Int32, port: Int)? {
    let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    guard withLoopback(0, { bind(descriptor, $0, $1) }) == 0, listen(descriptor, 8) == 0 else { return nil }
    var address = sockaddr_in()
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let result = withUnsafeMutableBytes(of: &address) { raw in
        // Sound: a sockaddr_in is what this call fills in for AF_INET, and its length goes along.
        raw.baseAddress.map { getsockname(descriptor, $0.assumingMemoryBound(to: sockaddr.self), &length) } ?? -1
    }
    return result == 0 ? (descriptor, Int(UInt16(bigEndian: address.sin_port))) : nil
}

private func withLoopback(_ port: Int, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32) -> Int32 {
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = UInt16(port).bigEndian
    address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
    return withUnsafeBytes(of: &address) { raw in
        // Sound: a sockaddr_in is what these calls take for AF_INET, and its length goes along.
        raw.baseAddress.map { body($0.assumingMemoryBound(to: sockaddr.self), socklen_t(raw.count)) } ?? -1
    }
}
