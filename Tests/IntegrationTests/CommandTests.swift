import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import Testing

@Suite struct CommandTests {
    @Test func `events published from standard input are reported once each, and listened to`() async throws {
        let environment = try await SharedStack.current.environment
        let queue = "cli.\(EventID().rawValue.suffix(12))"
        let word = queue.suffix(12)
        let subscription = EventSubscription(
            queue: try QueueName(queue), bindings: [try TopicPattern("t\(word).#")])
        let transport = try await SharedStack.transport()
        try await subscription.topology.apply(to: transport)
        await transport.close()
        let lines = [
            #"{"routing_key":"t\#(word).one","data":{"n":1.50,"deep":[{}]},"project_id":"proj_x"}"#,
            "not json", #"{"routing_key":"T.x"}"#, "", #"{"routing_key":"user.registered","data":{}}"#,
            #"{"routing_key":"t\#(word).two"}"#, #"{"routing_key":"nobody.listens","data":{}}"#,
        ]
        let published = try await Program.events(
            ["publish", "--stdin"], input: lines.joined(separator: "\n"), environment: environment)
        #expect(published.status == 1)
        let outcomes = published.lines.compactMap { $0["outcome"] as? String }.sorted()
        #expect(outcomes == ["confirmed", "confirmed", "rejected", "rejected", "rejected", "returned"])
        let rejected = published.lines.filter { $0["outcome"] as? String == "rejected" }
        #expect(rejected.compactMap { $0["line"] as? Int }.sorted() == [2, 3, 5])
        #expect(rejected.contains { ($0["error"] as? String)?.contains("user_id") == true })

        let heard = try await Program.events(
            ["listen", "--queue", queue, "--bind", "t\(word).#", "--count", "2", "--timeout", "100"],
            environment: environment)
        #expect(heard.status == 0, "\(heard.error)")
        let one = try #require(heard.lines.first { $0["routing_key"] as? String == "t\(word).one" })
        #expect(one["project_id"] as? String == "proj_x")
        #expect(one["redelivered"] as? Bool == false)
        #expect(one["attempt"] as? Int == 1)
        #expect(heard.output.contains(#""data":{"n":1.50,"deep":[{}]}"#))
        let ids = Set(published.lines.compactMap { $0["event_id"] as? String })
        #expect(heard.lines.allSatisfy { ids.contains($0["event_id"] as? String ?? "") })
    }

    @Test(arguments: [
        ("a whole line", #"{"routing_key":"nobody.listens","data":{}}\n"#),
        ("and half a line", #"{"routing_key":"nobody.listens","data":{}}\n{"routing_key":"nobo"#),
    ])
    func `an event is reported before the next line is read, and SIGTERM ends the reading in order`(
        _ name: String, input: String
    ) async throws {
        let folder = FileManager.default.temporaryDirectory.appending(path: "smap-cli-\(EventID())")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let processFile = folder.appending(path: "pid").path
        let output = folder.appending(path: "reports").path
        // Keeps the standard input open for as long as the command runs.
        let script = """
            mkfifo "$1/lines"; exec 9<>"$1/lines"
            printf '\(input)' >&9
            exec "$0" publish --stdin <"$1/lines" >"$1/reports"
            """
        let environment = try await SharedStack.current.environment
        async let run = Program.run(
            "sh", ["-c", script, try Program.command, folder.path], environment: environment, processFile: processFile)
        try await eventually("the event is reported") {
            (try? String(contentsOfFile: output, encoding: .utf8).contains("returned")) == true
        }
        try Program.signal(SIGTERM, processFile: processFile)
        let result = try await run
        #expect(result.status == 1)
        #expect(result.error.contains("interrupted"))
        // Half a line is not published.
        let reports = try String(contentsOfFile: output, encoding: .utf8)
        #expect(reports.split(separator: "\n").count == 1, "\(name): \(reports)")
    }

    @Test func `a line that is far too long is rejected by itself, and an input that cannot be read is an error`()
        async throws
    {
        let environment = try await SharedStack.current.environment
        let line = #"{"routing_key":"nobody.listens","data":{}}"#
        let input = line + "\n" + String(repeating: "x", count: 17 << 20) + "\n" + line
        let result = try await Program.events(["publish", "--stdin"], input: input, environment: environment)
        #expect(result.status == 1)
        let outcomes = result.lines.compactMap { $0["outcome"] as? String }.sorted()
        #expect(outcomes == ["rejected", "returned", "returned"])
        let rejected = result.lines.first { $0["outcome"] as? String == "rejected" }
        #expect(rejected?["line"] as? Int == 2)
        #expect((rejected?["error"] as? String)?.contains("16 MiB") == true)
        let directory = try await Program.run(
            "sh", ["-c", #"exec "$0" publish --stdin </"#, try Program.command], environment: environment)
        #expect(directory.status == 1)
        #expect(directory.error.contains("standard input cannot be read: Is a directory"), "\(directory.error)")
    }

    @Test func `what listen has printed is acknowledged when it ends`() async throws {
        let environment = try await SharedStack.current.environment
        let queue = try QueueName("cli.acked.\(EventID().rawValue.suffix(12))")
        let transport = try await SharedStack.transport()
        let deadline = ContinuousClock.now + .seconds(60)
        try await EventSubscription(queue: queue, bindings: [TopicPattern("no.thing")]).topology.apply(
            to: transport)
        // Whether an acknowledgement comes before the end is a race, which large messages lose more easily.
        var properties = MessageProperties(messageID: "evt_1")
        properties.headers["trace"] = .string(String(repeating: "x", count: 60_000))
        for _ in 0..<8 {
            #expect(
                try await transport.publish(
                    OutboundMessage(
                        exchange: "", routingKey: queue.rawValue, properties: properties,
                        body: Array(#"{"event_id":"evt_1","timestamp":"2025-12-05T10:30:45Z","payload":{}}"#.utf8)),
                    deadline: deadline))
            let heard = try await Program.events(
                ["listen", "--queue", queue.rawValue, "--bind", "no.thing", "--count", "1", "--timeout", "60"],
                environment: environment)
            #expect(heard.lines.map { $0["redelivered"] as? Bool } == [false], "\(heard.error)")
        }
        await transport.close()
    }

    @Test func `listening for more than comes ends with exit code 1`() async throws {
        let result = try await Program.events(
            ["listen", "--queue", "cli.silent", "--bind", "silent.#", "--count", "1", "--timeout", "0.2"],
            environment: try await SharedStack.current.environment)
        #expect(result.status == 1)
    }

    @Test(.timeLimit(.minutes(10)))
    func `a dual publish under a given id reaches both exchanges`() async throws {
        let environment = try await SharedStack.current.environment
        let transport = try await SharedStack.transport()
        let queue = try QueueName("cli.legacy.\(EventID().rawValue.suffix(12))")
        let deadline = ContinuousClock.now + .seconds(20)
        try await transport.declare(.legacyEmail, deadline: deadline)
        try await transport.declare(QueueDeclaration(queue, kind: .classic), deadline: deadline)
        try await transport.bind(queue, to: ExchangeName.legacyEmail, routingKey: "", deadline: deadline)
        let arguments = [
            "publish", "email.verification.requested", "--dual", "--event-id", "evt_again", "--data",
            #"{"recipient":"a@b.c","subject":"s","body":"b"}"#,
        ]
        let result = try await Program.events(arguments, environment: environment)
        #expect(result.lines.first?["event_id"] as? String == "evt_again", "\(result.error)")
        // Other tests use this exchange too; without it, the time limit ends this.
        try await transport.withConsumer(on: queue, prefetch: 1, deadline: .now + .seconds(20)) { consumer in
            while let delivery = try await consumer.next() {
                try consumer.settle(delivery, .acknowledge)
                if delivery.properties.messageID == "evt_again" { break }
            }
        }
        await transport.close()
    }

    @Test func `a project is tracked to its finish, and the state is printed at each step`() async throws {
        let environment = try await SharedStack.current.environment
        let project = "cli_\(EventID())"
        func track(_ arguments: String...) async throws -> Program.Output {
            try await Program.events(["track"] + arguments, environment: environment)
        }
        #expect(try await track("start", project).lines.first?["status"] as? String == "INITIALIZING")
        #expect(try await track("expect", project, "2", "--batch", "a").lines.first?["total"] as? Int == 2)
        #expect(try await track("seal", project).lines.first?["verdict"] as? String == "sealed")
        #expect(try await track("advance", project, "--index", "0", "--failed").lines.first?["errors"] as? Int == 1)
        let last = try await track("advance", project, "--index", "1")
        #expect(last.lines.first?["verdict"] as? String == "finished")
        #expect(last.lines.first?["percent"] as? Double == 100)
        let shown = try await track("show", project)
        #expect(shown.lines.first?["finish_event_id"] as? String == last.lines.first?["finish_event_id"] as? String)
        #expect(try await track("watch", project, "--json").status == 0)
        let late = try await track("fail", project)
        #expect(late.status == 1)
        #expect(late.error.contains("alreadyFinished"))
        #expect(try await track("show", "cli_nobody").status == 1)
    }

    @Test func `unreachable servers and malformed settings are told on standard error, without the password`()
        async throws
    {
        for (environment, command) in [
            (["RABBITMQ_URL": "amqp://u:s3cret@127.0.0.1:1"], ["publish", "a.b", "--deadline", "2"]),
            (["RABBITMQ_URL": "amqp://u:s3cret@127.0.0.1:1"], ["health", "--deadline", "2"]),
            (["RABBITMQ_URL": "amqp://u:s3cret%@h"], ["publish", "a.b"]),
            (["REDIS_HOST": "127.0.0.1", "REDIS_PORT": "1", "REDIS_PASSWORD": "s3cret"], ["track", "show", "p"]),
        ] {
            let result = try await Program.events(command, environment: environment)
            #expect(result.status == 1)
            #expect(!(result.output + result.error).contains("s3cret"))
            let isNamed = (result.output + result.error).contains(
                environment["RABBITMQ_URL"]?.hasSuffix("@h") == true ? "RABBITMQ_URL" : "127.0.0.1:1")
            #expect(isNamed, "\(result.output)\(result.error)")
        }
    }

    @Test(.timeLimit(.minutes(10)))
    func `servers of a process that is killed are stopped all the same`() async throws {
        // The command prints the servers' ports and is then killed by itself, with no chance to clean up.
        let script = """
            "$0" local > "$1" & pid=$!
            while ! grep -q REDIS_STATE_DB "$1"; do sleep 0.1; done
            kill -9 $pid
            """
        let file = NSTemporaryDirectory() + "smap-test-\(UUID().uuidString)"
        defer { try? FileManager.default.removeItem(atPath: file) }
        let result = try await Program.run("sh", ["-c", script, try Program.command, file])
        #expect(result.status == 0, "\(result.error)")
        let printed = try String(contentsOfFile: file, encoding: .utf8)
        let port = try #require(printed.firstMatch(of: /REDIS_PORT=(\d+)/)?.output.1)
        let end = ContinuousClock.now + .seconds(20)
        var isUp = true
        while isUp, ContinuousClock.now < end {
            isUp = try await Program.run("redis-cli", ["-p", String(port), "ping"]).output.contains("PONG")
        }
        #expect(!isUp)
    }

    @Test(.timeLimit(.minutes(10)))
    func `local runs a command with the servers' addresses, and exits with its exit code`() async throws {
        let result = try await Program.events(["local", "--", "sh", "-c", "echo $RABBITMQ_URL $REDIS_PORT; exit 7"])
        #expect(result.status == 7)
        #expect(result.output.contains("amqp://guest:guest@127.0.0.1:"))
    }

    @Test(.timeLimit(.minutes(10)))
    func `health tells of each server, also while the other is away`() async throws {
        struct Report: Decodable {
            var rabbitmq: [String]
            var redis: [String]
        }
        var environment = try await SharedStack.current.environment
        func health(deadline: Int) async throws -> Report {
            let result = try await Program.events(["health", "--deadline", "\(deadline)"], environment: environment)
            return try JSONDecoder().decode(Report.self, from: Data(result.output.utf8))
        }
        environment["RABBITMQ_URL"] = "amqp://guest:guest@127.0.0.1:1"
        var report = try await health(deadline: 2)
        #expect(report.rabbitmq.count == 1 && report.redis.isEmpty, "\(report)")
        environment = try await SharedStack.current.environment
        environment["REDIS_URL"] = "redis://127.0.0.1:1"
        report = try await health(deadline: 30)
        #expect(report.redis.count == 1 && !report.rabbitmq.contains { $0.contains("deadline") }, "\(report)")
    }

    @Test(.timeLimit(.minutes(10)))
    func `track exits with 1 when an item was not counted, and names what is there instead`() async throws {
        let environment = try await SharedStack.current.environment
        let project = "exits_\(EventID())"
        func track(_ arguments: String...) async throws -> Program.Output {
            try await Program.events(
                ["track", arguments[0], project] + arguments.dropFirst(), environment: environment)
        }
        #expect(try await track("start").status == 0)
        #expect(try await track("seal", "--total", "1").status == 0)
        let beyond = try await track("advance", "--index", "7")
        #expect(beyond.status == 1 && beyond.output.contains("unexpectedItem"))
        let early = try await track("advance", "--index", "0", "--generation", "2")
        #expect(early.status == 1 && early.error.contains("generation 1"), "\(early.error)")
        let last = try await track("advance", "--index", "0")
        #expect(last.status == 0 && last.output.contains("\"sealed\":true") && last.output.contains("finished"))
    }

    @Test(.timeLimit(.minutes(10)))
    func `local leads to its own servers, whatever the environment says of others`() async throws {
        let others = [
            "REDIS_URL": "rediss://u:p@192.0.2.1", "REDIS_SENTINELS": "192.0.2.1", "REDIS_TLS": "true",
            "REDIS_REPLICAS": "x",
            "RABBITMQ_TLS": "true", "RABBITMQ_CA_FILE": "/nowhere", "RABBITMQ_URL": "amqps://192.0.2.1",
        ]
        let script = "\"$0\" topology apply >&2 && \"$0\" health"
        let result = try await Program.events(
            ["local", "--", "sh", "-c", script, try Program.command], environment: others)
        #expect(result.status == 0, "\(result.output) \(result.error)")
    }
}
