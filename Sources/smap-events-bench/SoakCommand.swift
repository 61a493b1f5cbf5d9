import ArgumentParser
import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import Synchronization

struct SoakCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "soak",
        abstract: "Publish and consume under random faults, and compare what was promised with what came.",
        discussion: """
            Everything is written down in a ledger on disk: each event before it is published, how its publish ended, and \
            each delivery after it was handled. Meanwhile the network is cut, stalled, delayed and dribbled, and the \
            broker stopped, killed, filled up and told to close its connections. At the end the ledger is compared, and \
            one line is printed for each invariant. The exit code is 0 only if all hold.
            """)

    @Option(help: "How long to publish, in minutes.")
    var minutes = 20.0

    @Option(help: "The seed of the faults; a random one by default, which is printed.")
    var seed: UInt64?

    @Option(help: "Where to keep the ledger; a temporary folder by default, which is removed if all is well.")
    var ledger: String?

    @Flag(help: "Print JSON lines.")
    var json = false

    func validate() throws {
        guard minutes > 0, minutes <= 1_440 else { throw ValidationError("It takes above 0, up to 1440 minutes.") }
    }

    func run() async throws {
        let seed = seed ?? UInt64.random(in: 0...UInt64(UInt32.max))
        let folder = ledger ?? NSTemporaryDirectory() + "smap-soak-\(UUID().uuidString)"
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
        FileHandle.standardError.write(Data("seed \(seed), ledger in \(folder)\n".utf8))
        let verdicts = try await Soak(minutes: minutes, seed: seed, ledger: try Ledger("\(folder)/ledger.txt")).run()
        let encoder = JSONEncoder()
        encoder.outputFormatting = .sortedKeys
        for verdict in verdicts {
            let line =
                json
                ? String(decoding: try encoder.encode(verdict), as: UTF8.self)
                : "\(verdict.holds ? "holds " : "BROKEN")  \(verdict.invariant)  (\(verdict.figures))"
            FileHandle.standardOutput.write(Data((line + "\n").utf8))
        }
        guard verdicts.allSatisfy(\.holds) else { throw ExitCode(1) }
        if ledger == nil { try? FileManager.default.removeItem(atPath: folder) }
    }
}

/// One invariant, and whether it held.
struct Verdict: Encodable {
    var invariant: String
    var holds: Bool
    var figures: String
}

/// What was promised and what came, a line each, appended by one system call: it survives whatever happens next.
final class Ledger: Sendable {
    enum Entry: Character {
        case publishing = "p"
        case confirmed = "c"
        case unsent = "s"
        case unknown = "u"
        case failed = "f"
        case handled = "h"
    }

    private let path: String
    private let descriptor: Int32

    init(_ path: String) throws {
        self.path = path
        descriptor = open(path, O_WRONLY | O_CREAT | O_APPEND | O_TRUNC | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw ValidationError("\(path) cannot be written") }
    }

    deinit { close(descriptor) }

    func write(_ entry: Entry, _ number: Int) {
        let line = Array("\(entry.rawValue)\(number)\n".utf8)
        _ = Foundation.write(descriptor, line, line.count)
    }

    /// The events of each kind of entry, and how many lines there are of it.
    func read() throws -> (events: [Entry: Set<Int>], lines: [Entry: Int]) {
        var events: [Entry: Set<Int>] = [:]
        var lines: [Entry: Int] = [:]
        for line in try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n") {
            guard let entry = line.first.flatMap(Entry.init), let number = Int(line.dropFirst()) else { continue }
            events[entry, default: []].insert(number)
            lines[entry, default: 0] += 1
        }
        return (events, lines)
    }
}

private struct SoakEvent: SMAPEvent {
    static let routingKey: RoutingKey = "soak.event"
    var number: Int
    var text: String
}

/// SplitMix64: small, and the same on every machine.
private struct SeededGenerator: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var word = state
        word = (word ^ (word >> 30)) &* 0xBF58_476D_1CE4_E5B9
        word = (word ^ (word >> 27)) &* 0x94D0_49BB_1331_11EB
        return word ^ (word >> 31)
    }
}

private final class Soak: Sendable {
    private struct State {
        var nextNumber = 0
        var worstOverrun = -Double.infinity
        var faults: [String: Int] = [:]
        var samples: [Sample] = []
        var problems: [String] = []
        var isOver = false
    }

    private struct Sample {
        let memory: Double
        let threads: Double
        let descriptors: Double
    }

    private static let queue: QueueName = "soak.events"
    private static let subscription = EventSubscription(queue: queue, bindings: ["soak.#"])
    private let duration: Duration
    private let seed: UInt64
    private let ledger: Ledger
    private let state = Mutex(State())

    init(minutes: Double, seed: UInt64, ledger: Ledger) {
        self.duration = .seconds(minutes * 60)
        self.seed = seed
        self.ledger = ledger
    }

    func run() async throws -> [Verdict] {
        var options = LocalStack.Options()
        options.redis = false
        return try await LocalStack.withStack(options) { stack in
            try await FaultProxy.withProxy(to: stack.rabbitMQPort) { proxy in
                var configuration = RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
                configuration.heartbeat = .seconds(5)
                configuration.stallLimit = .seconds(5)
                configuration.maximumReconnectDelay = .seconds(2)
                configuration.connectTimeout = .seconds(5)
                return try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
                    try await Self.subscription.topology.apply(to: transport)
                    try await publishAndConsume(stack, proxy, transport)
                    return try verdicts(connections: proxy.acceptedCount)
                }
            }
        }
    }

    private func publishAndConsume(
        _ stack: LocalStack, _ proxy: FaultProxy, _ transport: RabbitMQTransport
    ) async throws {
        let publisher = EventPublisher(
            transport: transport, configuration: PublisherConfiguration(service: "soak"))
        var router = EventRouter()
        router.on(SoakEvent.self) { [ledger] delivery in
            ledger.write(.handled, delivery.event.number)
            return .acknowledge
        }
        let subscriber = EventSubscriber(transport: transport, subscription: Self.subscription, router: router)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            group.addTask { await self.sample() }
            defer { group.cancelAll() }
            let end = ContinuousClock.now + duration
            await withTaskGroup(of: Void.self) { work in
                for task in 0..<8 {
                    work.addTask {
                        await self.publish(publisher, until: end, SeededGenerator(state: self.seed &+ UInt64(task)))
                    }
                }
                work.addTask {
                    do {
                        try await self.disturb(stack, proxy, until: end)
                    } catch {
                        self.state.withLock { $0.problems.append("\(error)") }
                    }
                }
            }
            state.withLock { $0.isOver = true }
            try await drain(transport)
        }
    }

    /// Publishes one after the other, with deadlines of all lengths.
    private func publish(
        _ publisher: EventPublisher, until end: ContinuousClock.Instant, _ generator: SeededGenerator
    ) async {
        var random = generator
        while ContinuousClock.now < end {
            let number = state.withLock { state in
                state.nextNumber += 1
                return state.nextNumber
            }
            let size = Int.random(in: 0..<100, using: &random) == 0 ? 60_000 : 100
            let event = SoakEvent(number: number, text: String(repeating: "x", count: size))
            let deadline = Duration.milliseconds(Int.random(in: 500...20_000, using: &random))
            ledger.write(.publishing, number)
            let start = ContinuousClock.now
            do {
                try await publisher.publish(event, options: PublishOptions(deadline: deadline))
                ledger.write(.confirmed, number)
            } catch let error as EventsError {
                switch error.publishOutcome {
                case .unsent: ledger.write(.unsent, number)
                case .unknown: ledger.write(.unknown, number)
                default:
                    ledger.write(.failed, number)
                    state.withLock { $0.problems.append("event \(number): \(error)") }
                }
            } catch {
                ledger.write(.failed, number)
            }
            let overrun = (ContinuousClock.now - start - deadline) / .seconds(1)
            state.withLock { $0.worstOverrun = max($0.worstOverrun, overrun) }
            // A steady load, not all that goes: the ledger is to be read at the end.
            try? await Task.sleep(for: .milliseconds(10))
        }
    }

    /// One fault after the other, and each is undone.
    private func disturb(_ stack: LocalStack, _ proxy: FaultProxy, until end: ContinuousClock.Instant) async throws {
        var random = SeededGenerator(state: seed)
        // RabbitMQ 3.10 saves the table of quorum queues every half second; killed before that, a node comes back with a
        // queue that takes nothing, ever. There is nothing to await.
        try await Task.sleep(for: .seconds(2))
        while ContinuousClock.now < end {
            try await Task.sleep(for: .milliseconds(Int.random(in: 500...4_000, using: &random)))
            let length = Duration.milliseconds(Int.random(in: 200...8_000, using: &random))
            let name: String
            switch Int.random(in: 0..<11, using: &random) {
            case 0...1:
                name = "cut"
                proxy.cut()
            case 2:
                name = "stall"
                try await during(length) {
                    proxy.fault = .stall
                } undo: {
                    proxy.fault = .none
                }
            case 3:
                name = "trickle"
                try await during(length / 4) {
                    proxy.fault = .trickle
                } undo: {
                    proxy.fault = .none
                }
            case 4:
                name = "delay"
                try await during(length) {
                    proxy.fault = .delay(.milliseconds(50))
                } undo: {
                    proxy.fault = .none
                }
            case 5:
                name = "refuse"
                try await during(length / 2) {
                    proxy.fault = .refuse
                    proxy.cut()
                } undo: {
                    proxy.fault = .none
                }
            case 6:
                name = "half-close"
                proxy.halfClose(toward: .server)
            case 7:
                name = "broker stopped"
                try await during(length) {
                    stack.suspend(.rabbitMQ)
                } undo: {
                    stack.resume(.rabbitMQ)
                }
            case 8:
                name = "broker killed"
                try await stack.kill(.rabbitMQ)
                try await Task.sleep(for: length / 4)
                try await stack.restart(.rabbitMQ)
            case 9:
                name = "connections closed"
                try await stack.rabbitMQControl("close_all_connections", "soak")
            default:
                name = "memory alarm"
                try await stack.rabbitMQControl("set_vm_memory_high_watermark", "absolute", "1")
                try await Task.sleep(for: length / 2)
                try await stack.rabbitMQControl("set_vm_memory_high_watermark", "0.6")
            }
            state.withLock { $0.faults[name, default: 0] += 1 }
        }
    }

    private func during(_ length: Duration, _ fault: () -> Void, undo: () -> Void) async throws {
        fault()
        defer { undo() }
        try await Task.sleep(for: length)
    }

    /// Waits until everything that was confirmed has been handled, or nothing more comes.
    private func drain(_ transport: RabbitMQTransport) async throws {
        let end = ContinuousClock.now + .seconds(90)
        while ContinuousClock.now < end {
            let status = try? await transport.status(of: Self.queue, deadline: .now + .seconds(5))
            if let status, status.messages == 0, status.consumers == 1 {
                let (events, _) = try ledger.read()
                if (events[.confirmed] ?? []).isSubset(of: events[.handled] ?? []) { return }
            }
            try await Task.sleep(for: .seconds(1))
        }
    }

    private func sample() async {
        while !Task.isCancelled, !state.withLock({ $0.isOver }) {
            try? await Task.sleep(for: .milliseconds(500))
            let status = (try? String(contentsOfFile: "/proc/self/status", encoding: .utf8)) ?? ""
            func figure(_ name: String) -> Double {
                let line = status.split(separator: "\n").first { $0.hasPrefix(name) } ?? ""
                return Double(line.filter(\.isNumber)) ?? 0
            }
            let descriptors = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").count) ?? 0
            state.withLock {
                $0.samples.append(
                    Sample(
                        memory: figure("VmRSS:") / 1024, threads: figure("Threads:"), descriptors: Double(descriptors)))
            }
        }
    }

    private func verdicts(connections: Int) throws -> [Verdict] {
        let (events, lines) = try ledger.read()
        let state = state.withLock { $0 }
        func set(_ entry: Ledger.Entry) -> Set<Int> { events[entry] ?? [] }
        let (published, confirmed, handled) = (set(.publishing), set(.confirmed), set(.handled))
        let missing = confirmed.subtracting(handled)
        let ends = [Ledger.Entry.confirmed, .unsent, .unknown, .failed].map { lines[$0] ?? 0 }.reduce(0, +)
        let ghosts = set(.unsent).intersection(handled)
        let strangers = handled.subtracting(published)
        let faults = state.faults.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" }.joined(separator: ", ")
        var verdicts = [
            Verdict(
                invariant: "every confirmed event was delivered", holds: missing.isEmpty && !confirmed.isEmpty,
                figures: "\(confirmed.count) confirmed, \(missing.count) missing, \(lines[.handled] ?? 0) deliveries"),
            Verdict(
                invariant: "every publish ended once", holds: ends == published.count && set(.failed).isEmpty,
                figures: "\(published.count) published: \(confirmed.count) confirmed, \(set(.unsent).count) unsent, "
                    + "\(set(.unknown).count) unknown, \(set(.failed).count) failed"),
            Verdict(
                invariant: "nothing unsent was delivered, and nothing unpublished",
                holds: ghosts.isEmpty && strangers.isEmpty, figures: "\(ghosts.count) and \(strangers.count)"),
            Verdict(
                invariant: "no call overran its deadline by more than a second", holds: state.worstOverrun <= 1,
                figures: "worst \(Int(state.worstOverrun * 1000)) ms"),
            Verdict(
                invariant: "faults happened, and were survived",
                holds: !state.faults.isEmpty && connections > 2 && state.problems.isEmpty,
                figures: "\(faults); \(connections) connections; \(state.problems.first ?? "no other problem")"),
        ]
        for (name, figure, slack) in [
            ("memory is flat", \Sample.memory, 16.0), ("threads are flat", \Sample.threads, 4),
            ("descriptors are flat", \Sample.descriptors, 8),
        ] {
            // What it was at or above for a tenth of the time: with all connections up. They may be down for most of a short
            // quarter, and for a moment there may be one more.
            let values = state.samples.map { $0[keyPath: figure] }
            let quarter = max(1, values.count / 4)
            guard let first = upper(values.prefix(quarter)), let last = upper(values.suffix(quarter)) else {
                continue
            }
            verdicts.append(
                Verdict(
                    invariant: name, holds: last <= first * 1.1 + slack,
                    figures: "first quarter \(Int(first)), last quarter \(Int(last))"))
        }
        return verdicts
    }

    private func upper(_ values: ArraySlice<Double>) -> Double? {
        values.isEmpty ? nil : values.sorted()[values.count * 9 / 10]
    }
}
