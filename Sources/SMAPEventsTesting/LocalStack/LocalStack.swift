internal import ConnectionThread
internal import SMAPEvents

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// A private RabbitMQ node and a private Redis on free loopback ports, for tests and trials.
///
/// It needs `rabbitmq-server` and `redis-server` installed, and no rights: the servers run as the current user, in a
/// temporary folder that is removed at the end. They are stopped by their process ids, whatever happens to this process,
/// `kill -9` included. Servers that run on the machine already are not touched.
public final class LocalStack: Sendable {
    /// What to start, and how.
    public struct Options: Sendable {
        /// Whether to start RabbitMQ. On by default.
        public var rabbitMQ = true
        /// Whether to start Redis. On by default.
        public var redis = true
        /// More settings for Redis, such as `["--appendonly", "yes"]`.
        public var redisArguments: [String] = []
        /// How long both may take until they are ready, 90 s by default.
        public var deadline: Duration = .seconds(90)

        /// The defaults.
        public init() {}
    }

    /// `amqp://guest:guest@127.0.0.1:…`
    public let rabbitMQURL: String
    /// RabbitMQ's port.
    public let rabbitMQPort: Int
    /// Redis's port on 127.0.0.1.
    public let redisPort: Int
    /// Where the servers keep their data and logs while they run.
    public let folder: String
    /// The process ids of what was started: epmd, RabbitMQ, Redis.
    public var processIDs: [Int32] { processes.map(\.processID) }

    private let processes: [LeashedProcess]

    /// The environment variables with which services find these servers.
    public var environment: [String: String] {
        [
            "RABBITMQ_URL": rabbitMQURL, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": String(redisPort),
            "REDIS_STATE_DB": "1",
        ]
    }

    /// Runs `body` with a stack and stops it afterwards, whatever happens.
    public static func withStack<Result: Sendable>(
        _ options: Options = Options(), _ body: (LocalStack) async throws -> Result
    ) async throws -> Result {
        let stack = try await start(options)
        do {
            let result = try await body(stack)
            await stack.stop()
            return result
        } catch {
            await stack.stop()
            throw error
        }
    }

    /// Starts a stack and returns when its servers answer. Call ``stop()`` at the end; if this process dies before, the
    /// servers are stopped all the same.
    ///
    /// Throws ``SMAPEvents/EventsError/Code/notFound`` when a server is not installed, and
    /// ``SMAPEvents/EventsError/Code/deadlineExceeded`` when one does not answer in time, with the end of its log.
    public static func start(_ options: Options = Options()) async throws -> LocalStack {
        let folder = try temporaryFolder()
        let ports = try freePorts(4)
        var processes: [LeashedProcess] = []
        do {
            if options.rabbitMQ {
                processes += try await startRabbitMQ(
                    folder: folder, port: ports[0], distribution: ports[1], epmd: ports[2])
            }
            if options.redis {
                processes.append(try await startRedis(folder: folder, port: ports[3], options.redisArguments))
            }
            let deadline = ContinuousClock.now + options.deadline
            if options.redis {
                try await waitUntilReady(
                    port: ports[3], send: Array("PING\r\n".utf8), expect: UInt8(ascii: "+"), deadline: deadline,
                    log: "\(folder)/redis/output.log")
            }
            if options.rabbitMQ {
                // The protocol header; the node answers it with a method frame once it is up.
                try await waitUntilReady(
                    port: ports[0], send: Array("AMQP".utf8) + [0, 0, 9, 1], expect: 1, deadline: deadline,
                    log: "\(folder)/rabbitmq/output.log")
            }
        } catch {
            for process in processes { await process.stop() }
            rmdir(folder)
            throw error
        }
        return LocalStack(folder: folder, rabbitMQPort: ports[0], redisPort: ports[3], processes: processes)
    }

    private init(folder: String, rabbitMQPort: Int, redisPort: Int, processes: [LeashedProcess]) {
        self.folder = folder
        self.rabbitMQPort = rabbitMQPort
        self.redisPort = redisPort
        self.processes = processes
        rabbitMQURL = "amqp://guest:guest@127.0.0.1:\(rabbitMQPort)"
    }

    /// Stops the servers, by their process ids, and removes their folder. Returns when they are gone.
    public func stop() async {
        await withTaskGroup { group in
            for process in processes { group.addTask { await process.stop() } }
        }
    }

    // MARK: Servers

    private static func startRabbitMQ(
        folder: String, port: Int, distribution: Int, epmd: Int
    ) async throws
        -> [LeashedProcess]
    {
        // The script on the PATH switches to the user rabbitmq; this one runs as whoever calls it.
        let server = try find(
            "rabbitmq-server",
            in: [
                "/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin",
                "/opt/rabbitmq/sbin",
            ], package: "rabbitmq-server (apt-get) or rabbitmq (brew)")
        let daemon = try find("epmd", in: searchPath, package: "erlang-base (apt-get) or erlang (brew)")
        let home = "\(folder)/rabbitmq"
        try makeFolder(home)
        try write(
            """
            listeners.tcp.1 = 127.0.0.1:\(port)
            log.file.level = warning
            """, to: "\(home)/rabbitmq.conf")
        try write("[].\n", to: "\(home)/enabled_plugins")
        let environment = [
            "HOME": home,
            // Started directly below, on a port of its own: the node would leave one behind.
            "ERL_EPMD_PORT": String(epmd), "ERL_EPMD_ADDRESS": "127.0.0.1",
            // Makes the script become the node, so that the process id is the node's.
            "RUNNING_UNDER_SYSTEMD": "1",
            "RABBITMQ_NODENAME": "smap\(port)@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1", "RABBITMQ_NODE_PORT": String(port),
            "RABBITMQ_DIST_PORT": String(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": "\(home)/mnesia", "RABBITMQ_LOG_BASE": "\(home)/log",
            "RABBITMQ_CONFIG_FILE": "\(home)/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "\(home)/enabled_plugins", "RABBITMQ_PID_FILE": "\(home)/pid",
        ]
        try makeFolder("\(folder)/epmd")
        let names = try await LeashedProcess(
            [daemon, "-address", "127.0.0.1", "-port", String(epmd)], environment: [:],
            folder: "\(folder)/epmd", patience: 20)
        do {
            // Nothing of a private node is kept, so there is no reason to wait for it to shut down in order.
            let node = try await LeashedProcess(
                [server], environment: environment, folder: home, patience: 0)
            return [names, node]
        } catch {
            await names.stop()
            throw error
        }
    }

    private static func startRedis(folder: String, port: Int, _ arguments: [String]) async throws -> LeashedProcess {
        let server = try find("redis-server", in: searchPath, package: "redis-server (apt-get) or redis (brew)")
        let home = "\(folder)/redis"
        try makeFolder(home)
        return try await LeashedProcess(
            [
                server, "--port", String(port), "--bind", "127.0.0.1", "--dir", home, "--save", "", "--appendonly",
                "no",
            ] + arguments, environment: [:], folder: home, patience: 20)
    }

    private static func waitUntilReady(
        port: Int, send: [UInt8], expect: UInt8, deadline: ContinuousClock.Instant, log: String
    ) async throws {
        repeat {
            if await answers(port: port, send: send, expect: expect) { return }
            // There is nothing to await: a port that nobody listens on tells nobody when that changes.
            try await Task.sleep(for: .milliseconds(50))
        } while ContinuousClock.now < deadline
        throw EventsError(
            .deadlineExceeded, "no answer on port \(port); its log ends with: \(tail(of: log))",
            operation: "local stack")
    }

    private static func answers(port: Int, send: [UInt8], expect: UInt8) async -> Bool {
        guard
            let descriptor = try? Socket.connect(
                host: "127.0.0.1", port: port, deadline: MonotonicTime(.now + .seconds(1)))
        else { return false }
        defer { Socket.close(descriptor) }
        _ = send.withUnsafeBytes { Socket.send(descriptor, $0) }
        var byte: [UInt8] = [0]
        for _ in 0..<100 {
            switch byte.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
            case .bytes: return byte[0] == expect
            case .closed: return false
            case .wouldBlock: try? await Task.sleep(for: .milliseconds(10))
            }
        }
        return false
    }

    // MARK: The machine

    private static var searchPath: [String] {
        (getenv("PATH").map { String(cString: $0) } ?? "").split(separator: ":").map(String.init)
            + ["/usr/bin", "/usr/sbin", "/opt/homebrew/bin", "/usr/local/bin"]
    }

    private static func find(_ name: String, in folders: [String], package: String) throws -> String {
        for folder in folders where access("\(folder)/\(name)", X_OK) == 0 { return "\(folder)/\(name)" }
        throw EventsError(
            .notFound, "\(name) is not installed; the package is \(package)", operation: "local stack")
    }

    private static func temporaryFolder() throws -> String {
        let base = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
        var template = Array("\(base.hasSuffix("/") ? String(base.dropLast()) : base)/smap-events.XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else {
            throw EventsError(.notFound, "no folder can be made in \(base)", operation: "local stack")
        }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private static func makeFolder(_ path: String) throws {
        guard mkdir(path, 0o700) == 0 else {
            throw EventsError(.notFound, "cannot make \(path): \(describe(errno: errno))", operation: "local stack")
        }
    }

    private static func write(_ text: String, to path: String) throws {
        guard let file = fopen(path, "w") else {
            throw EventsError(.notFound, "cannot write \(path): \(describe(errno: errno))", operation: "local stack")
        }
        fputs(text, file)
        fclose(file)
    }

    private static func tail(of path: String) -> String {
        guard let file = fopen(path, "r") else { return "(no log)" }
        defer { fclose(file) }
        fseek(file, 0, SEEK_END)
        fseek(file, max(0, ftell(file) - 600), SEEK_SET)
        var buffer = [UInt8](repeating: 0, count: 600)
        let count = fread(&buffer, 1, buffer.count, file)
        return String(decoding: buffer.prefix(count), as: UTF8.self)
    }

    /// Ports that were free a moment ago: all are held at once, so that they differ.
    private static func freePorts(_ count: Int) throws -> [Int] {
        var held: [Int32] = []
        defer { for descriptor in held { close(descriptor) } }
        return try (0..<count).map { _ in
            guard let (descriptor, port) = Socket.freePort() else {
                throw EventsError(.notFound, "no free port on 127.0.0.1", operation: "local stack")
            }
            held.append(descriptor)
            return port
        }
    }
}
