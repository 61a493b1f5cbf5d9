import ConnectionThread
import SMAPEvents
import Synchronization
import Testing

@testable import SMAPRabbitMQ

/// Drives a window as callers and the connection thread would, and collects the answers.
private final class Bench: Sendable {
    let window: Mutex<PublishWindow>
    let results = Mutex<[Int: String]>([:])
    let requests = Mutex<[String]>([])

    init(messages: Int = 100, bytes: Int = 1 << 20) {
        window = Mutex(PublishWindow(messageLimit: messages, byteLimit: bytes))
    }

    static func message(
        _ id: Int, exchange: String = "x", size: Int = 0, isRequest: Bool = false
    ) throws -> PackedMessage {
        var properties = MessageProperties(messageID: "m\(id)", correlationID: "c\(id)")
        if isRequest { properties.replyTo = "asker" }
        return try PackedMessage(
            OutboundMessage(
                exchange: exchange, routingKey: "a.b", properties: properties, body: Array(repeating: 0, count: size)))
    }

    /// Submits, and returns the task that waits for the answer once the window has it.
    func submit(
        _ id: Int, exchange: String = "x", size: Int = 0, isRequest: Bool = false,
        deadline: MonotonicTime = .distantFuture
    ) async throws
        -> Task<Void, Never>
    {
        let message = try Self.message(id, exchange: exchange, size: size, isRequest: isRequest)
        _ = try window.withLock { try $0.tryAdmit() }
        let (submitted, done) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        let task = Task {
            let text: String
            do {
                let routed = try await withCheckedThrowingContinuation { continuation in
                    window.withLock { $0.submit(UInt64(id), message, deadline: deadline, continuation) }.give()
                    done.yield()
                }
                text = routed ? "confirmed" : "returned"
            } catch let error as EventsError {
                text = error.code.description
            } catch {
                text = "cancelled"
            }
            results.withLock { $0[id] = text }
        }
        for await _ in submitted { break }
        return task
    }

    func answer(_ step: (inout PublishWindow) -> PublishWindow.Answers?) -> Bool {
        let answers = window.withLock { step(&$0) }
        answers?.give()
        if let answers { requests.withLock { $0 += answers.requests } }
        return answers != nil
    }

    func admits() throws -> Bool { try window.withLock { try $0.tryAdmit() } != nil }

    func take(_ budget: Int = 1 << 20) -> Int { window.withLock { $0.takeBatch(budget: budget).count } }
}

@Suite(.timeLimit(.minutes(1))) struct PublishWindowTests {
    @Test func `confirms settle by tag, with multiple, and out of order`() async throws {
        let bench = Bench()
        var tasks: [Task<Void, Never>] = []
        for id in 1...5 { tasks.append(try await bench.submit(id)) }
        #expect(bench.take() == 5)
        #expect(bench.answer { $0.confirmed(tag: 4, multiple: false, isNack: false) })
        #expect(bench.answer { $0.confirmed(tag: 2, multiple: false, isNack: true) })
        #expect(bench.answer { $0.confirmed(tag: 3, multiple: true, isNack: false) })
        #expect(bench.answer { $0.confirmed(tag: 0, multiple: true, isNack: false) })
        for task in tasks { await task.value }
        #expect(
            bench.results.withLock { $0 }
                == [1: "confirmed", 2: "nacked", 3: "confirmed", 4: "confirmed", 5: "confirmed"])
        #expect(bench.window.withLock { $0.count == 0 })
        #expect(!bench.answer { $0.confirmed(tag: 6, multiple: false, isNack: false) }, "a tag that was never given")
    }

    @Test func `a return is matched with its message, in order`() async throws {
        let bench = Bench()
        var tasks: [Task<Void, Never>] = []
        for id in 1...2 { tasks.append(try await bench.submit(id)) }
        _ = bench.take()
        bench.window.withLock { $0.returned(exchange: "x", routingKey: "a.b", messageID: "m2") }
        _ = bench.answer { $0.confirmed(tag: 2, multiple: true, isNack: false) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "confirmed", 2: "returned"])
    }

    @Test func `a closing window waits for callers, not for messages whose callers are gone`() async throws {
        let bench = Bench()
        let tasks = [try await bench.submit(1), try await bench.submit(2)]
        #expect(bench.take() == 2)
        _ = bench.answer { $0.cancel(1) }
        let isDrained = Task {
            await withCheckedContinuation { continuation in
                bench.window.withLock { $0.whenDrained(continuation) }.give()
            }
        }
        _ = bench.answer { $0.confirmed(tag: 2, multiple: false, isNack: false) }
        await isDrained.value
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "cancelled", 2: "confirmed"])
        #expect(bench.window.withLock { $0.count } == 1, "its place is kept until the broker answers")
    }

    @Test func `of what is confirmed, the requests that reached a queue are named`() async throws {
        let bench = Bench()
        var tasks: [Task<Void, Never>] = []
        for id in 1...4 { tasks.append(try await bench.submit(id, isRequest: id > 1)) }
        _ = bench.take()
        bench.window.withLock { $0.returned(exchange: "x", routingKey: "a.b", messageID: "m3") }
        _ = bench.answer { $0.confirmed(tag: 3, multiple: true, isNack: false) }
        _ = bench.answer { $0.confirmed(tag: 4, multiple: false, isNack: true) }
        for task in tasks { await task.value }
        #expect(bench.requests.withLock { $0 } == ["c2"])
    }

    @Test func `both legs of a dual publish share an id, and only the returned one counts as returned`() async throws {
        let bench = Bench()
        let message = { (exchange: String) in
            try PackedMessage(
                OutboundMessage(
                    exchange: exchange, routingKey: "a.b", properties: MessageProperties(messageID: "same"), body: []))
        }
        let legs = [try message("topic"), try message("fanout")]
        #expect(legs[0].matches(exchange: "topic", routingKey: "a.b", messageID: "same"))
        #expect(!legs[1].matches(exchange: "topic", routingKey: "a.b", messageID: "same"))
        _ = bench
    }

    @Test func `when the window closes, what was written is unknown and the rest is unsent`() async throws {
        let bench = Bench()
        var tasks: [Task<Void, Never>] = []
        for id in 1...4 { tasks.append(try await bench.submit(id)) }
        #expect(bench.take(1) == 1)
        #expect(bench.take(10) >= 1)
        let lost = EventsError(.connectionLost, "gone", operation: "test")
        // Of the second batch, not one byte was written of the last message.
        _ = bench.answer { $0.close(lost, unwritten: 1) }
        for task in tasks { await task.value }
        let results = bench.results.withLock { $0 }
        #expect(results[1] == "unknownOutcome")
        #expect(results[4] == "unsent")
        #expect(Set(results.values) == ["unknownOutcome", "unsent"])
        #expect(throws: EventsError.self) { try bench.admits() }
    }

    @Test func `after a lost connection the unconfirmed is written again, in order, and the confirmed is not`()
        async throws
    {
        let bench = Bench(messages: 4)
        var tasks: [Task<Void, Never>] = []
        for id in 1...4 { tasks.append(try await bench.submit(id)) }
        #expect(bench.take() == 4)
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        // Settled before an earlier one.
        _ = bench.answer { $0.confirmed(tag: 3, multiple: false, isNack: false) }
        bench.window.withLock { $0.returned(exchange: "x", routingKey: "a.b", messageID: "m4") }
        _ = bench.answer {
            $0.connectionLost(
                EventsError(.connectionLost, "gone", operation: "test"), unwritten: 0, isPoisoned: false)
        }
        #expect(bench.results.withLock { $0.count } <= 2, "nobody is told of the loss")
        let again = bench.window.withLock { $0.takeBatch(budget: 1 << 20) }
        #expect(again.map { $0.matches(exchange: "x", routingKey: "a.b", messageID: "m2") } == [true, false])
        #expect(again.map { $0.matches(exchange: "x", routingKey: "a.b", messageID: "m4") } == [false, true])
        // Tags count from 1 again, and what was returned on the old channel may be routed on the new one.
        _ = bench.answer { $0.confirmed(tag: 2, multiple: true, isNack: false) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "confirmed", 2: "confirmed", 3: "confirmed", 4: "confirmed"])
        #expect(bench.window.withLock { !$0.hasUnsent && $0.count == 0 }, "all room has been given back, once")
    }

    @Test func `what may have been written is unknown at its deadline, although it waits to be written again`()
        async throws
    {
        let bench = Bench()
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        let tasks = [
            try await bench.submit(1, deadline: due), try await bench.submit(2, deadline: due),
            try await bench.submit(3, deadline: due),
        ]
        #expect(bench.window.withLock { $0.takeBatch(budget: 1).count } == 1)
        #expect(bench.window.withLock { $0.takeBatch(budget: 1).count } == 1)
        _ = bench.answer {
            $0.connectionLost(
                EventsError(.connectionLost, "gone", operation: "test"), unwritten: 1, isPoisoned: false)
        }
        _ = bench.answer { $0.expire(now: due) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "unknownOutcome", 2: "unsent", 3: "unsent"])
        #expect(bench.window.withLock { !$0.hasUnsent && $0.count == 0 })
    }

    @Test func `a caller that was cancelled or is late is not published again`() async throws {
        let bench = Bench()
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        let tasks = [
            try await bench.submit(1), try await bench.submit(2, deadline: due), try await bench.submit(3),
        ]
        _ = bench.take()
        _ = bench.answer { $0.cancel(1) }
        _ = bench.answer { $0.expire(now: due) }
        _ = bench.answer {
            $0.connectionLost(
                EventsError(.connectionLost, "gone", operation: "test"), unwritten: 0, isPoisoned: false)
        }
        let again = bench.window.withLock { $0.takeBatch(budget: 1 << 20) }
        #expect(again.count == 1)
        #expect(again.first?.matches(exchange: "x", routingKey: "a.b", messageID: "m3") == true)
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "cancelled", 2: "unknownOutcome", 3: "confirmed"])
        #expect(bench.window.withLock { $0.count } == 0)
    }

    @Test func `what the broker closes the connection for is not written again`() async throws {
        let bench = Bench()
        let task = try await bench.submit(1)
        _ = bench.take()
        let later = try await bench.submit(2)
        _ = bench.answer {
            $0.connectionLost(
                EventsError(.protocolViolation, "bad frame", operation: "test"), unwritten: 0, isPoisoned: true)
        }
        await task.value
        #expect(bench.results.withLock { $0 } == [1: "unknownOutcome"])
        #expect(bench.take() == 1)
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        await later.value
        #expect(bench.results.withLock { $0[2] } == "confirmed")
    }

    @Test func `a server that refuses us refuses callers at once, until a connection opens`() async throws {
        let bench = Bench()
        let task = try await bench.submit(1)
        _ = bench.answer { $0.refuse(EventsError(.accessRefused, "no", operation: "test")) }
        await task.value
        #expect(bench.results.withLock { $0 } == [1: "accessRefused"])
        #expect(throws: EventsError.self) { try bench.admits() }
        bench.window.withLock { $0.connected() }
        #expect(try bench.admits())
    }

    @Test func `a closed channel fails the missing exchange's messages by name, and the others are written again`()
        async throws
    {
        let bench = Bench()
        var tasks = [try await bench.submit(1), try await bench.submit(2, exchange: "missing")]
        _ = bench.take()
        tasks.append(try await bench.submit(3))
        _ = bench.answer { $0.channelClosed("no exchange", refused: ("missing", .notFound)) }
        #expect(bench.take() == 2, "they go out on the new channel")
        _ = bench.answer { $0.confirmed(tag: 2, multiple: true, isNack: false) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "confirmed", 2: "exchangeNotFound", 3: "confirmed"])
    }

    @Test func `where the broker does not say which message closed the channel, none is written again`() async throws {
        let bench = Bench()
        let tasks = [try await bench.submit(1), try await bench.submit(2)]
        _ = bench.take()
        _ = bench.answer { $0.channelClosed("invalid message", refused: ("other", .topologyConflict)) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "unknownOutcome", 2: "unknownOutcome"])
        #expect(bench.take() == 0)
        #expect(bench.window.withLock { $0.count } == 0)
    }

    @Test func `deadlines end callers, and room is given back only by the broker`() async throws {
        let bench = Bench(messages: 2)
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        let sent = try await bench.submit(1, deadline: due)
        _ = bench.take()
        let waiting = try await bench.submit(2, deadline: due)
        #expect(try bench.admits() == false, "the window is full")
        _ = bench.answer { $0.expire(now: due.advanced(by: .seconds(-1))) }
        #expect(bench.results.withLock { $0 }.isEmpty, "nothing is due yet")
        _ = bench.answer { $0.expire(now: due) }
        await sent.value
        await waiting.value
        #expect(bench.results.withLock { $0 } == [1: "unknownOutcome", 2: "unsent"])
        // The unsent one's room is free, the sent one's is not.
        #expect(try bench.admits())
        #expect(try bench.admits() == false)
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        #expect(try bench.admits())
    }

    @Test func `the window is bounded in bytes too, and one message over it is let through`() async throws {
        let bench = Bench(messages: 10, bytes: 1_000)
        let large = try await bench.submit(1, size: 5_000)
        #expect(try bench.admits() == false)
        _ = bench.take()
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        await large.value
        #expect(try bench.admits())
    }

    @Test func `a cancelled caller is answered at once, and its tag still counts`() async throws {
        let bench = Bench()
        let tasks = [try await bench.submit(1), try await bench.submit(2)]
        _ = bench.take()
        _ = bench.answer { $0.cancel(1) }
        _ = bench.answer { $0.confirmed(tag: 1, multiple: false, isNack: false) }
        _ = bench.answer { $0.confirmed(tag: 2, multiple: false, isNack: false) }
        for task in tasks { await task.value }
        #expect(bench.results.withLock { $0 } == [1: "cancelled", 2: "confirmed"])
    }
}

/// A ledger whose steps can stand in an expectation.
private final class Ledger {
    private var ledger = SettlementLedger()
    func delivered(_ tag: UInt64) -> Bool { ledger.delivered(tag) }
    func settle(_ tag: UInt64, _ settlement: Settlement) -> Bool { ledger.settle(tag, settlement) }
    func flush() -> [SettlementLedger.Frame] { ledger.flush() }
}

@Suite struct SettlementLedgerTests {
    private func ledger(_ count: Int) -> Ledger {
        let ledger = Ledger()
        for tag in 1...UInt64(count) { #expect(ledger.delivered(tag)) }
        return ledger
    }

    @Test func `contiguous acknowledgements become one frame`() {
        let ledger = ledger(5)
        for tag in [2, 1, 3] as [UInt64] { #expect(ledger.settle(tag, .acknowledge)) }
        #expect(ledger.flush() == [.acknowledge(tag: 3, multiple: true)])
        #expect(ledger.settle(5, .acknowledge))
        #expect(ledger.flush() == [.acknowledge(tag: 5, multiple: false)])
        #expect(ledger.settle(4, .acknowledge))
        #expect(ledger.flush() == [.acknowledge(tag: 4, multiple: false)])
        #expect(ledger.flush().isEmpty)
    }

    @Test func `a rejection goes out before the acknowledgement that covers it`() {
        let ledger = ledger(4)
        #expect(ledger.settle(1, .acknowledge))
        #expect(ledger.settle(2, .reject))
        #expect(ledger.settle(3, .requeue))
        #expect(ledger.settle(4, .acknowledge))
        #expect(
            ledger.flush() == [
                .reject(tag: 2, requeue: false), .reject(tag: 3, requeue: true), .acknowledge(tag: 4, multiple: true),
            ])
    }

    @Test func `a delivery is settled once, and only if it was delivered`() {
        let ledger = ledger(2)
        #expect(!ledger.settle(3, .acknowledge))
        #expect(!ledger.settle(0, .acknowledge))
        #expect(ledger.settle(2, .acknowledge))
        #expect(!ledger.settle(2, .reject))
        _ = ledger.flush()
        #expect(!ledger.settle(2, .acknowledge))
        #expect(!ledger.delivered(5), "tags are dense")
    }
}
