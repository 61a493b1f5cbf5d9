internal import ConnectionThread
internal import SMAPEvents
internal import Subprocess
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

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
        /// More lines for `rabbitmq.conf`, such as `channel_max = 100`.
        public var rabbitMQSettings: [String] = []
        /// The plugins of RabbitMQ to enable, of those that come with it. None by default.
        public var rabbitMQPlugins: [String] = []
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
    public var processIDs: [Int32] { processes.withLock { $0.all.map(\.processID) } }

    /// One of the servers.
    public enum Server: Sendable {
        case rabbitMQ
        case redis
    }

    private struct Processes {
        var all: [LeashedProcess]
        var rabbitMQ: LeashedProcess?
        var redis: LeashedProcess?
    }

    private let ports: [Int]
    private let options: Options
    private let processes: Mutex<Processes>

    /// The environment variables with which services find these servers. Those that would lead elsewhere, or ask for more
    /// than these servers offer, are empty, which is as good as unset.
    public var environment: [String: String] {
        var environment = [
            "RABBITMQ_URL": rabbitMQURL, "REDIS_URL": "redis://127.0.0.1:\(redisPort)/1", "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": String(redisPort), "REDIS_STATE_DB": "1", "REDIS_SENTINELS": "",
            "REDIS_REPLICAS": "",
        ]
        for server in ["RABBITMQ", "REDIS"] {
            for setting in ["TLS", "CA_FILE", "CERT_FILE", "KEY_FILE"] { environment["\(server)_\(setting)"] = "" }
        }
        return environment
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
        let ports = try freePorts(4)
        let folder = try temporaryFolder()
        var processes = Processes(all: [])
        do {
            if options.rabbitMQ {
                try prepareRabbitMQ(
                    folder: folder, port: ports[0], options.rabbitMQSettings, plugins: options.rabbitMQPlugins)
                processes.all.append(try await startNames(folder: folder, epmd: ports[2]))
                let node = try await startRabbitMQ(folder: folder, ports: ports)
                processes.all.append(node)
                processes.rabbitMQ = node
            }
            if options.redis {
                try makeFolder("\(folder)/redis")
                let server = try await startRedis(folder: folder, port: ports[3], options.redisArguments)
                processes.all.append(server)
                processes.redis = server
            }
            let deadline = ContinuousClock.now + options.deadline
            if options.redis { try await waitUntilReady(.redis, folder, ports, deadline) }
            if options.rabbitMQ { try await waitUntilReady(.rabbitMQ, folder, ports, deadline) }
        } catch {
            for process in processes.all { await process.stop() }
            // Of what was not started nobody else removes it.
            try? FileManager.default.removeItem(atPath: folder)
            throw error
        }
        return LocalStack(folder: folder, ports: ports, options: options, processes: processes)
    }

    private init(folder: String, ports: [Int], options: Options, processes: Processes) {
        self.folder = folder
        self.ports = ports
        self.options = options
        self.processes = Mutex(processes)
        rabbitMQPort = ports[0]
        redisPort = ports[3]
        rabbitMQURL = "amqp://guest:guest@127.0.0.1:\(ports[0])"
    }

    /// Stops the servers, by their process ids, and removes their folder. Returns when they are gone.
    public func stop() async {
        await withTaskGroup { group in
            for process in processes.withLock({ $0.all }) { group.addTask { await process.stop() } }
        }
    }

    // MARK: Faults

    /// Stops a server where it stands (SIGSTOP): its connections stay open, and nobody answers.
    public func suspend(_ server: Server) { send(SIGSTOP, to: server) }

    /// Lets a suspended server go on (SIGCONT).
    public func resume(_ server: Server) { send(SIGCONT, to: server) }

    /// Kills a server (SIGKILL), and returns when nobody listens on its port any more.
    public func kill(_ server: Server) async throws {
        send(SIGKILL, to: server)
        let port = server == .rabbitMQ ? ports[0] : ports[3]
        let deadline = ContinuousClock.now + options.deadline
        while let descriptor = try? Socket.connect(
            host: "127.0.0.1", port: port, deadline: MonotonicTime(.now + .seconds(1)))
        {
            Socket.close(descriptor)
            guard ContinuousClock.now < deadline else {
                throw EventsError(.deadlineExceeded, "port \(port) is still open", operation: "local stack")
            }
            try await Task.sleep(for: .milliseconds(10))
        }
    }

    /// Starts a server that was killed, on its old port and with its old data, and returns when it answers.
    public func restart(_ server: Server) async throws {
        let home = "\(folder)/\(server == .rabbitMQ ? "rabbitmq" : "redis")"
        // Lets go of what is left of the old one, but not of its data.
        try Self.write("", to: "\(home)/.keep")
        let old = processes.withLock { server == .rabbitMQ ? $0.rabbitMQ : $0.redis }
        await old?.stop()
        unlink("\(home)/.keep")
        let process =
            switch server {
            case .rabbitMQ: try await Self.startRabbitMQ(folder: folder, ports: ports)
            case .redis: try await Self.startRedis(folder: folder, port: ports[3], options.redisArguments)
            }
        processes.withLock { processes in
            processes.all.removeAll { $0 === old }
            processes.all.append(process)
            if server == .rabbitMQ { processes.rabbitMQ = process } else { processes.redis = process }
        }
        try await Self.waitUntilReady(server, folder, ports, .now + options.deadline)
    }

    /// Runs `rabbitmqctl` against the private node, and returns what it prints.
    ///
    /// Throws ``SMAPEvents/EventsError/Code/protocolViolation`` when it exits with another code than 0.
    @discardableResult
    public func rabbitMQControl(_ arguments: String...) async throws -> String {
        let program = try Self.find(
            "rabbitmqctl", in: Self.rabbitMQFolders, package: "rabbitmq-server (apt-get) or rabbitmq (brew)")
        let result = try await Subprocess.run(
            .name("sh"),
            arguments: Arguments(
                ["-c", "exec \"$@\" 2>&1", "ctl", program, "-q", "-n", Self.nodeName(ports)] + arguments),
            environment: .inherit.updating([
                "HOME": "\(folder)/rabbitmq", "ERL_EPMD_PORT": String(ports[2]),
            ]), output: .string(limit: 1 << 20), error: .discarded)
        let text = result.standardOutput
        guard result.terminationStatus.isSuccess else {
            throw EventsError(.protocolViolation, text, operation: "rabbitmqctl \(arguments.first ?? "")")
        }
        return text
    }

    private func send(_ signal: Int32, to server: Server) {
        let process = processes.withLock { server == .rabbitMQ ? $0.rabbitMQ : $0.redis }
        guard let process else { return }
        #if canImport(Glibc)
        _ = Glibc.kill(process.processID, signal)
        #elseif canImport(Musl)
        _ = Musl.kill(process.processID, signal)
        #else
        _ = Darwin.kill(process.processID, signal)
        #endif
    }

    // MARK: Servers

    private static let rabbitMQFolders = [
        "/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin",
        "/opt/rabbitmq/sbin",
    ]

    private static func nodeName(_ ports: [Int]) -> String { "smap\(ports[0])@localhost" }

    private static func prepareRabbitMQ(
        folder: String, port: Int, _ settings: [String], plugins: [String]
    ) throws {
        let home = "\(folder)/rabbitmq"
        try makeFolder(home)
        try makeFolder("\(folder)/epmd")
        try write(
            """
            listeners.tcp.1 = 127.0.0.1:\(port)
            log.file.level = warning
            \(settings.joined(separator: "\n"))
            """, to: "\(home)/rabbitmq.conf")
        try write("[\(plugins.joined(separator: ","))].\n", to: "\(home)/enabled_plugins")
    }

    /// Erlang's port mapper, on a port of its own: the node would leave one behind.
    private static func startNames(folder: String, epmd: Int) async throws -> LeashedProcess {
        let daemon = try find("epmd", in: searchPath, package: "erlang-base (apt-get) or erlang (brew)")
        return try await LeashedProcess(
            [daemon, "-address", "127.0.0.1", "-port", String(epmd)], environment: [:],
            folder: "\(folder)/epmd", patience: 20)
    }

    private static func startRabbitMQ(folder: String, ports: [Int]) async throws -> LeashedProcess {
        // The script on the PATH switches to the user rabbitmq; this one runs as whoever calls it.
        let server = try find(
            "rabbitmq-server", in: rabbitMQFolders, package: "rabbitmq-server (apt-get) or rabbitmq (brew)")
        let home = "\(folder)/rabbitmq"
        let environment = [
            "HOME": home, "ERL_CRASH_DUMP": "\(home)/erl_crash.dump", "ERL_EPMD_PORT": String(ports[2]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            // Makes the script become the node, so that the process id is the node's.
            "RUNNING_UNDER_SYSTEMD": "1",
            "RABBITMQ_NODENAME": nodeName(ports),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1", "RABBITMQ_NODE_PORT": String(ports[0]),
            "RABBITMQ_DIST_PORT": String(ports[1]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": "\(home)/mnesia", "RABBITMQ_LOG_BASE": "\(home)/log",
            "RABBITMQ_CONFIG_FILE": "\(home)/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "\(home)/enabled_plugins", "RABBITMQ_PID_FILE": "\(home)/pid",
        ]
        // Nothing of a private node is kept, so there is no reason to wait for it to shut down in order.
        return try await LeashedProcess([server], environment: environment, folder: home, patience: 0)
    }

    private static func startRedis(folder: String, port: Int, _ arguments: [String]) async throws -> LeashedProcess {
        let server = try find("redis-server", in: searchPath, package: "redis-server (apt-get) or redis (brew)")
        let home = "\(folder)/redis"
        return try await LeashedProcess(
            [
                server, "--port", String(port), "--bind", "127.0.0.1", "--dir", home, "--save", "", "--appendonly",
                "no",
            ] + arguments, environment: [:], folder: home, patience: 20)
    }

    private static func waitUntilReady(
        _ server: Server, _ folder: String, _ ports: [Int], _ deadline: ContinuousClock.Instant
    ) async throws {
        switch server {
        case .redis:
            try await waitUntilReady(
                port: ports[3], send: Array("PING\r\n".utf8), expect: UInt8(ascii: "+"), deadline: deadline,
                log: "\(folder)/redis/output.log")
        case .rabbitMQ:
            // The protocol header; the node answers it with a method frame once it is up.
            try await waitUntilReady(
                port: ports[0], send: Array("AMQP".utf8) + [0, 0, 9, 1], expect: 1, deadline: deadline,
                log: "\(folder)/rabbitmq/output.log")
        }
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

    /// Ports that were free a moment ago, and that this process has not given out before: a server may take long to have
    /// its port. Not of those that systems give to connections (32768 and up on Linux): such a one may be gone by then.
    static func freePorts(_ count: Int) throws -> [Int] {
        var ports: [Int] = []
        for _ in 0..<1_000 where ports.count < count {
            let next = lastPort.wrappingAdd(1, ordering: .relaxed).newValue
            guard let (descriptor, port) = Socket.freePort(20_000 + next % 12_768) else { continue }
            close(descriptor)
            ports.append(port)
        }
        guard ports.count == count else {
            throw EventsError(.notFound, "no free port on 127.0.0.1", operation: "local stack")
        }
        return ports
    }

    /// Processes begin at different ones.
    private static let lastPort = Atomic<UInt16>(.random(in: 0..<12_768))
}
