import ArgumentParser
import Dispatch
import Foundation
import SMAPEvents
import SMAPRabbitMQ
import Synchronization
import UnixSignals

struct PublishCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "publish",
        abstract: "Publish events and wait for the broker's confirms.",
        discussion: """
            One event by its key, or many with --stdin, one JSON object a line:
              {"routing_key": "order.shipped", "data": {"order_id": "7"}, "project_id": "proj_abc"}

            Each event is reported once, with its outcome:
              confirmed  the broker has it, and a queue
              returned   the broker took it, but no queue is bound for its key
              nacked     the broker refused it
              rejected   it is not valid; it was never sent
              unsent     it is valid, and not one byte was written: repeat it
              unknown    it was sent, and the answer was lost: repeat it with --event-id
            """)

    @Argument(help: "The routing key, such as email.verification.requested.")
    var key: String?

    @Option(help: "The event's data, a JSON object.")
    var data: String = "{}"

    @Option(help: "The project that the event belongs to.")
    var project: String?

    @Option(help: "The event's id; a new one by default. Repeat an unknown event under its own.")
    var eventID: String?

    @Flag(help: "Read events from standard input, one JSON object a line.")
    var stdin = false

    @Flag(help: "Publish to the legacy exchange too, as the migration's phase says (SMAP_MIGRATION_PHASE).")
    var dual = false

    @Option(help: "How many seconds each event may take.")
    var deadline: Double = 30

    @Flag(help: "Print JSON lines, on a terminal too.")
    var json = false

    func validate() throws {
        guard (key != nil) != stdin else {
            throw ValidationError("Give either a routing key or --stdin.")
        }
        guard !stdin || (project == nil && eventID == nil && data == "{}") else {
            throw ValidationError("With --stdin, data, project and id stand in the lines.")
        }
        guard deadline > 0, deadline <= 86_400 else { throw ValidationError("A deadline is above 0, up to 86400 s.") }
    }

    private struct Report: Encodable, Sendable {
        var eventID: String?
        var routingKey: String?
        var outcome: PublishOutcome
        var error: String?
        var line: Int?

        enum CodingKeys: String, CodingKey {
            case outcome, error, line
            case eventID = "event_id"
            case routingKey = "routing_key"
        }

        func encode(to encoder: any Encoder) throws {
            var container = encoder.container(keyedBy: CodingKeys.self)
            try container.encodeIfPresent(eventID, forKey: .eventID)
            try container.encodeIfPresent(routingKey, forKey: .routingKey)
            try container.encode(outcome.rawValue, forKey: .outcome)
            try container.encodeIfPresent(error, forKey: .error)
            try container.encodeIfPresent(line, forKey: .line)
        }

        var text: String {
            let place = line.map { "line \($0)  " } ?? ""
            let what = [routingKey, eventID].compactMap(\.self).joined(separator: "  ")
            return "\(outcome.rawValue.padding(toLength: 9, withPad: " ", startingAt: 0))  \(place)\(what)"
                + (error.map { what.isEmpty ? $0 : "  \($0)" } ?? "")
        }
    }

    func run() async throws {
        let isComplete = try await publishAll()
        if !isComplete { throw ExitCode(1) }
    }

    private func publishAll() async throws -> Bool {
        var isComplete = true
        try await Console.reporting {
            let configuration = try Settings.rabbitMQ()
            isComplete = try await RabbitMQTransport.withTransport(
                configuration: configuration, logger: Console.logger
            ) { transport in
                let settings = Settings.publisher(deadline: seconds(deadline))
                let publisher: any EventPublishing =
                    if dual {
                        DualPublisher(
                            transport: transport, configuration: settings,
                            phase: try MigrationPhase(reader: Settings.reader))
                    } else {
                        EventPublisher(transport: transport, configuration: settings)
                    }
                return try await publish(with: publisher)
            }
        }
        return isComplete
    }

    private func publish(with publisher: any EventPublishing) async throws -> Bool {
        // If the exchanges cannot be declared, nothing is sent: then every event is reported with that error.
        var obstacle: EventsError?
        do {
            try await publisher.declareExchanges()
        } catch let error as EventsError {
            // Who may only write can still publish, where the exchanges are there.
            if error.code != .accessRefused || error.operation.hasPrefix("connect") {
                obstacle = error.with(outcome: error.publishOutcome == .rejected ? .rejected : .unsent)
            }
        }
        guard stdin else {
            let report = await single(publisher, obstacle)
            try show(report)
            return report.outcome == .confirmed
        }
        var isComplete = true
        let isInterrupted = Interruption()
        // On the first signal no more lines are read, and what is under way is reported.
        let signals = await UnixSignalsSequence(trapping: .sigint, .sigterm)
        let watcher = Task {
            for await _ in signals {
                isInterrupted.value.store(true, ordering: .releasing)
                Console.error("interrupted: waiting for what is under way")
                break
            }
        }
        defer { watcher.cancel() }
        var failure: (any Error)?
        try await withThrowingTaskGroup(of: (lines: Int, bytes: Int, areConfirmed: Bool).self) { group in
            var running = (lines: 0, bytes: 0)
            func finishOne() async throws {
                guard let done = try await group.next() else { return }
                running.lines -= done.lines
                running.bytes -= done.bytes
                if !done.areConfirmed { isComplete = false }
            }
            do {
                // What has arrived goes out together; it never waits for more.
                for try await lines in StandardInputLines(isInterrupted: isInterrupted) {
                    for (lines, events) in try parse(lines, isComplete: &isComplete) {
                        while running.lines >= 2 * StandardInputLines.limit
                            || running.bytes >= StandardInputLines.sizeLimit
                        { try await finishOne() }
                        running.lines += events.count
                        running.bytes += lines
                        group.addTask { [obstacle] in
                            (events.count, lines, try await report(events, publisher, obstacle))
                        }
                    }
                }
            } catch {
                // What is under way ends first: it may have been published.
                failure = error
            }
            while running.lines > 0 { try await finishOne() }
        }
        if let failure { throw failure }
        return isComplete && !isInterrupted.value.load(ordering: .acquiring)
    }

    private func single(_ publisher: any EventPublishing, _ obstacle: EventsError?) async -> Report {
        do {
            let event = UntypedEvent(
                routingKey: try RoutingKey(key ?? ""), data: Array(data.utf8),
                projectID: try project.map { try ProjectID($0) })
            let id = try eventID.map { try EventID($0) } ?? EventID()
            let result: Result<PublishReceipt, EventsError>
            do {
                if let obstacle { throw obstacle }
                result = .success(try await publisher.publish(event, options: PublishOptions(eventID: id)))
            } catch let error as EventsError {
                result = .failure(error)
            }
            return report(event, id, result, line: nil)
        } catch {
            return Report(eventID: eventID, routingKey: key, outcome: .rejected, error: Self.text(of: error))
        }
    }

    private typealias NumberedEvent = (number: Int, event: UntypedEvent, id: EventID)

    /// The events of some lines, and how many bytes those have; together are those of one key, so that a queue that does
    /// not confirm holds back no report of others. What is no event is reported at once.
    private func parse(
        _ lines: [StandardInputLines.Line], isComplete: inout Bool
    ) throws -> [(bytes: Int, events: [NumberedEvent])] {
        var groups: [(bytes: Int, events: [NumberedEvent])] = []
        var indices: [RoutingKey: Int] = [:]
        for (number, line) in lines {
            do {
                guard let line else {
                    throw EventsError(
                        .eventTooLarge, "the line has more than \(StandardInputLines.sizeLimit >> 20) MiB",
                        operation: "read events")
                }
                guard !line.allSatisfy({ $0 == 0x20 || $0 == 0x09 || $0 == 0x0D }) else { continue }
                var event = try UntypedEvent(parsing: line)
                let id = event.eventID ?? EventID()
                event.eventID = id
                let index = indices[event.routingKey] ?? groups.count
                if index == groups.count {
                    groups.append((0, []))
                    indices[event.routingKey] = index
                }
                groups[index].bytes += line.count
                groups[index].events.append((number, event, id))
            } catch {
                isComplete = false
                try show(Report(outcome: .rejected, error: Self.text(of: error), line: number))
            }
        }
        return groups
    }

    /// Publishes some events, and reports each. True if all were confirmed.
    private func report(
        _ events: [NumberedEvent], _ publisher: any EventPublishing, _ obstacle: EventsError?
    ) async throws -> Bool {
        var areConfirmed = true
        let results: [Result<PublishReceipt, EventsError>]
        if let obstacle {
            results = Array(repeating: .failure(obstacle), count: events.count)
        } else {
            results = await publisher.publish(contentsOf: events.map(\.event))
        }
        for ((number, event, id), result) in zip(events, results) {
            let report = report(event, id, result, line: number)
            if report.outcome != .confirmed { areConfirmed = false }
            try show(report)
        }
        return areConfirmed
    }

    private func report(
        _ event: UntypedEvent, _ id: EventID, _ result: Result<PublishReceipt, EventsError>, line: Int?
    ) -> Report {
        var report = Report(eventID: id.rawValue, routingKey: event.routingKey.rawValue, outcome: .confirmed)
        switch result {
        case .success(let receipt): if !receipt.routed { report.outcome = .returned }
        case .failure(let error):
            report.outcome = error.publishOutcome
            report.error = Self.text(of: error)
            if report.outcome == .rejected { report.line = line }
        }
        return report
    }

    private static func text(of error: any Error) -> String {
        guard let error = error as? EventsError else { return "\(type(of: error))" }
        // Where a connection failed says more than that publishing did.
        return error.operation.hasPrefix("connect") ? "\(error.operation): \(error.message)" : error.message
    }

    private func show(_ report: Report) throws {
        Console.line(json || !Console.isOutputTerminal ? try Console.json(report) : report.text)
    }
}

/// The lines of standard input with their numbers, from 1; those that have arrived together. Read on a thread that may
/// block, one block ahead: a slow consumer holds back the writer, not memory.
private struct StandardInputLines: AsyncSequence {
    /// The line is nil if it is too long to be kept.
    typealias Line = (number: Int, line: [UInt8]?)
    typealias Element = [Line]

    /// So many lines are handed out at most.
    static let limit = 500
    /// So many bytes of a line are kept at most.
    static let sizeLimit = 16 << 20

    struct Iterator: AsyncIteratorProtocol {
        private var buffer: [UInt8] = []
        private var start = 0
        /// Before it there is no line's end.
        private var searched = 0
        private var number = 0
        private var isAtEnd = false
        /// Whether the line that is being read is too long.
        private var isSkipping = false
        private let isInterrupted: Interruption

        init(isInterrupted: Interruption) { self.isInterrupted = isInterrupted }

        mutating func next() async throws -> Element? {
            // Half a line is no line, and whole ones that were not handed out have not been touched.
            while !isInterrupted.value.load(ordering: .acquiring) {
                var lines: [Line] = []
                while lines.count < StandardInputLines.limit, let end = buffer[searched...].firstIndex(of: 0x0A) {
                    number += 1
                    lines.append((number, isSkipping ? nil : Array(buffer[start..<end])))
                    isSkipping = false
                    start = end + 1
                    searched = start
                }
                if !lines.isEmpty { return lines }
                if isAtEnd {
                    guard start < buffer.count || isSkipping else { return nil }
                    defer { (start, isSkipping) = (buffer.count, false) }
                    number += 1
                    return [(number, isSkipping ? nil : Array(buffer[start...]))]
                }
                buffer.removeFirst(start)
                (start, searched) = (0, buffer.count)
                if buffer.count > StandardInputLines.sizeLimit || isSkipping {
                    isSkipping = true
                    (buffer, searched) = ([], 0)
                }
                let block = try await Self.block(isInterrupted)
                isAtEnd = block.isEmpty
                buffer += block
            }
            return nil
        }

        private static func block(_ isInterrupted: Interruption) async throws -> [UInt8] {
            try await withCheckedThrowingContinuation { continuation in
                DispatchQueue.global().async {
                    var bytes = [UInt8](repeating: 0, count: 64 * 1024)
                    var count = 0
                    var entry = pollfd(fd: STDIN_FILENO, events: Int16(POLLIN), revents: 0)
                    // A read cannot be called off; a poll that looks up now and then can.
                    while !isInterrupted.value.load(ordering: .acquiring), poll(&entry, 1, 200) <= 0 {}
                    guard !isInterrupted.value.load(ordering: .acquiring) else {
                        return continuation.resume(returning: [])
                    }
                    repeat { count = read(STDIN_FILENO, &bytes, bytes.count) } while count < 0 && errno == EINTR
                    guard count >= 0 else {
                        return continuation.resume(
                            throwing: EventsError(
                                .invalidConfiguration,
                                "standard input cannot be read: \(String(cString: strerror(errno)))",
                                operation: "read events"))
                    }
                    continuation.resume(returning: Array(bytes.prefix(count)))
                }
            }
        }
    }

    let isInterrupted: Interruption

    func makeAsyncIterator() -> Iterator { Iterator(isInterrupted: isInterrupted) }
}

/// Whether a signal has asked for an end.
private final class Interruption: Sendable {
    let value = Atomic(false)
}
