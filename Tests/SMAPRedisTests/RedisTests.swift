import Configuration
import ConnectionThread
import SMAPEvents
import Synchronization
import Testing

@testable import SMAPRedis

@Suite(.timeLimit(.minutes(1))) struct RedisTests {
    @Test func `commands are written in RESP, any bytes included`() {
        let bytes = RedisCommand(["SET", "k\r\n", "", "ü"]).bytes
        #expect(
            String(decoding: bytes, as: UTF8.self)
                == "*4\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$0\r\n\r\n$2\r\nü\r\n")
    }

    @Test(arguments: [
        ("LOADING Redis is loading", EventsError.Code.storeUnavailable), ("BUSY", .storeUnavailable),
        ("MASTERDOWN x", .storeUnavailable), ("NOREPLICAS x", .storeUnavailable),
        ("READONLY You can't", .storeUnavailable), ("OOM command", .storeFull),
        ("MISCONF x", .storeFull), ("NOAUTH x", .accessRefused), ("WRONGPASS x", .accessRefused),
        ("NOPERM x", .accessRefused), ("WRONGTYPE x", .corruptProgress), ("MOVED 1 h:1", .invalidConfiguration),
        ("ERR x", .protocolViolation),
    ])
    func `each class of error replies means what it should`(reply: String, code: EventsError.Code) {
        #expect(RedisFailure.error(reply, operation: "test").code == code)
    }

    @Test func `replies are matched by position, also past commands nobody waits for`() async throws {
        let answers = await withTaskGroup(of: String.self) { group in
            let bench = PipelineBench()
            for id in 1...3 {
                group.addTask { await bench.send(UInt64(id), isSubmitted: id) }
                await bench.untilSubmitted(id)
            }
            bench.take()
            bench.cancel(2)
            bench.reply([.integer(1), .integer(2), .integer(3)])
            var all: [String] = []
            for await answer in group { all.append(answer) }
            return all.sorted()
        }
        #expect(answers == ["1: integer(1)", "2: cancelled", "3: integer(3)"])
    }

    @Test func `what is to be on replicas is answered after the one WAIT under way, whatever becomes of that`()
        async throws
    {
        func outcome(_ end: @escaping @Sendable (PipelineBench) -> Void) async -> [String] {
            await withTaskGroup(of: String.self) { group in
                let bench = PipelineBench()
                for id in 1...2 {
                    group.addTask { await bench.send(UInt64(id), isSubmitted: id, awaitsReplicas: true) }
                    await bench.untilSubmitted(id)
                }
                #expect(bench.take().hasSuffix("WAIT\r\n$1\r\n1\r\n$3\r\n500\r\n"))
                // Redis would not look at it before `WAIT` has ended.
                group.addTask { await bench.send(3, isSubmitted: 3) }
                await bench.untilSubmitted(3)
                #expect(bench.take().isEmpty)
                bench.reply([.integer(1), .error("ERR x")])
                end(bench)
                bench.reply([.integer(3)])
                var all: [String] = []
                for await answer in group { all.append(answer) }
                return all.sorted()
            }
        }
        let third = "3: integer(3)"
        let answered = await outcome { bench in
            bench.reply([.integer(4)])
            #expect(!bench.take().contains("WAIT"), "nothing of this is to be on replicas")
        }
        #expect(answered == ["1: integer(1) on 4", "2: error(\"ERR x\")", third])
        let refused = await outcome { bench in
            bench.reply([.error("UNBLOCKED x")])
            _ = bench.take()
        }
        #expect(refused == ["1: integer(1) on 0", "2: error(\"ERR x\")", third])
        let late = await outcome { bench in
            bench.expire()
            bench.reply([.integer(4)])
            _ = bench.take()
        }
        #expect(late.first == "1: integer(1) on 0")
        let lost = await outcome { $0.fail() }
        #expect(lost == ["1: integer(1) on 0", "2: error(\"ERR x\")", "3: connectionLost"])
        let cancelled = await outcome { bench in
            bench.cancel(1)
            bench.reply([.integer(4)])
            _ = bench.take()
        }
        #expect(cancelled == ["1: cancelled", "2: error(\"ERR x\")", third])
    }

    @Test func `settings come from the environment, and a description holds no password`() throws {
        let reader = ConfigReader(
            provider: EnvironmentVariablesProvider(environmentVariables: [
                "REDIS_HOST": "h", "REDIS_PORT": "1234", "REDIS_PASSWORD": "s3cret", "REDIS_STATE_DB": "3",
            ]))
        let configuration = try RedisConfiguration(reader: reader)
        #expect("\(configuration)" == "h:1234/3")
        #expect(configuration.password == "s3cret")
        #expect(
            try RedisConfiguration(
                reader: ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: [:]))
            ).database == 1)
    }

    @Test func `a URL is read part by part, with the settings beside it`() throws {
        let full = try RedisConfiguration(url: "rediss://u:p%3A%40w@redis.example.org:6380/2")
        #expect("\(full)" == "redis.example.org:6380/2")
        #expect(full.username == "u" && full.password == "p:@w")
        #expect(full.tls == ServerTLS() && full.tls?.verification == .full)
        let short = try RedisConfiguration(url: "redis://:s3cret@[::1]")
        #expect("\(short)" == "[::1]:6379/1")
        #expect(short.username == nil && short.password == "s3cret" && short.tls == nil)

        func read(_ variables: [String: String]) throws -> RedisConfiguration {
            try RedisConfiguration(
                reader: ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: variables)))
        }
        let both = try read(["REDIS_URL": "rediss://h", "REDIS_CA_FILE": "ca", "REDIS_SENTINELS": "s"])
        #expect(both.tls?.authorityFile == "ca" && "\(both)" == "mymaster@s:26379/1")
        #expect("\(try read(["REDIS_URL": "redis://h", "REDIS_STATE_DB": "3"]))" == "h:6379/3")
        #expect("\(try read(["REDIS_URL": "redis://h/2", "REDIS_STATE_DB": "3"]))" == "h:6379/2")
        #expect(try read(["REDIS_TLS": "true"]).tls == ServerTLS())
        #expect(try read(["REDIS_URL": "rediss://h", "REDIS_TLS": "false"]).tls != nil, "the URL says so")
    }

    @Test(arguments: [
        "", "localhost", "http://h", "redisx://u:s3cret@h", "rediss://u:s3cret@h:port", "redis://u:s3cret@h:70000",
        "redis://u:s3cret%zz@h", "redis://u:s3 cret@h", "redis://u:s3cret%ff@h", "redis://u:s3cret@[::1",
        "redis://u:s3cret@h/s3", "redis://u:s3cret@h/-1", "redis://h?ssl=true", "redis://h/1#x",
    ])
    func `a malformed URL is refused, and never quoted`(url: String) {
        let error = #expect(throws: EventsError.self) { try RedisConfiguration(url: url) }
        #expect(error?.code == .invalidConfiguration)
        #expect(error?.description.contains("s3") == false)
        #expect(error?.description.contains("REDIS_") == true)
    }

    @Test(arguments: [-1, 0, 65])
    func `a number of connections that cannot be is refused`(connections: Int) {
        var configuration = RedisConfiguration()
        configuration.connections = connections
        let error = #expect(throws: EventsError.self) { try RedisProgressStore(configuration: configuration) }
        #expect(error?.code == .invalidConfiguration)
    }

    @Test func `sentinels are read from one setting, each with its port or the usual one`() throws {
        let reader = ConfigReader(
            provider: EnvironmentVariablesProvider(environmentVariables: [
                "REDIS_SENTINELS": "a:1, b,[::1]:3,[::2]", "REDIS_MASTER_NAME": "state",
                "REDIS_SENTINEL_PASSWORD": "s3cret", "REDIS_USERNAME": "u", "REDIS_PASSWORD": "p",
            ]))
        let configuration = try RedisConfiguration(reader: reader)
        #expect(configuration.sentinels.map(\.host) == ["a", "b", "::1", "::2"])
        #expect(configuration.sentinels.map(\.port) == [1, 26_379, 3, 26_379])
        #expect("\(configuration)" == "state@a:1,b:26379,[::1]:3,[::2]:26379/1")
        #expect(configuration.username == "u" && configuration.sentinelPassword == "s3cret")
    }

    @Test(arguments: [
        ["REDIS_PORT": "x"], ["REDIS_PORT": "70000"], ["REDIS_STATE_DB": "-1"], ["REDIS_SENTINELS": "a:x"],
        ["REDIS_SENTINELS": "a:0"], ["REDIS_USERNAME": "u"], ["REDIS_TLS": "maybe"],
    ])
    func `a wrong setting is refused by its name`(variables: [String: String]) {
        let reader = ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: variables))
        let error = #expect(throws: EventsError.self) { try RedisConfiguration(reader: reader) }
        #expect(error?.message.contains(variables.keys.first ?? "?") == true)
    }

    @Test func `a server that is not there is refused in time, naming host and port`() async throws {
        let store = try RedisProgressStore(
            configuration: RedisConfiguration(host: "127.0.0.1", port: 1, password: "s3cret"))
        let tracker = ProgressTracker(store: store)
        let project = try ProjectID("p")
        let error = await #expect(throws: EventsError.self) { try await tracker.start(project) }
        #expect(error?.code == .connectionFailed)
        #expect(error?.description.contains("127.0.0.1:1") == true)
        #expect(error?.description.contains("s3cret") == false)
    }
}

private final class PipelineBench: Sendable {
    private let pipeline: Mutex<RedisPipeline>
    private let submitted = Mutex(0)

    init() {
        var configuration = RedisConfiguration()
        configuration.replicas = 1
        pipeline = Mutex(RedisPipeline(configuration))
    }

    func send(_ id: UInt64, isSubmitted number: Int, awaitsReplicas: Bool = false) async -> String {
        do {
            let answer = try await withCheckedThrowingContinuation { continuation in
                let command = RedisCommand(["PING"], awaitsReplicas: awaitsReplicas)
                let deadline = MonotonicTime.now.advanced(by: .seconds(60))
                pipeline.withLock { $0.submit(id, command, deadline: deadline, continuation) }.give()
                submitted.withLock { $0 = number }
            }
            return "\(id): \(answer.reply)" + (answer.replicas.map { " on \($0)" } ?? "")
        } catch let error as EventsError {
            return "\(id): \(error.code)"
        } catch {
            return "\(id): cancelled"
        }
    }

    func untilSubmitted(_ number: Int) async {
        while submitted.withLock({ $0 }) < number { await Task.yield() }
    }

    /// What goes to the server.
    @discardableResult
    func take() -> String {
        var buffer: [UInt8] = []
        pipeline.withLock { $0.takeUnsent(into: &buffer, now: .now) }
        return String(decoding: buffer, as: UTF8.self)
    }

    func cancel(_ id: UInt64) { pipeline.withLock { $0.cancel(id) }.give() }

    /// A minute passes, and a bit.
    func expire() { pipeline.withLock { $0.expire(now: MonotonicTime.now.advanced(by: .seconds(61))) }.give() }

    func fail() { pipeline.withLock { $0.fail(EventsError(.connectionLost, "gone", operation: "redis")) }.give() }

    func reply(_ replies: [RedisReply]) {
        pipeline.withLock { pipeline in
            var answers = RedisPipeline.Answers()
            _ = pipeline.replied(replies, now: .now, &answers)
            return answers
        }.give()
    }
}
