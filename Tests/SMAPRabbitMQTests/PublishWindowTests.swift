import ConnectionThread
import SMAPEvents
import Synchronization
import Testing
import Waiting

@testable import SMAPRabbitMQ

/// Drives a window as callers and the connection thread would, and collects the results.
private final class Bench {
    private var window: PublishWindow
    private var publishes: [Int: PendingPublish] = [:]
    private(set) var results: [Int: String] = [:]
    private(set) var errors: [Int: EventsError] = [:]
    private(set) var granted: [Int: PublishGrant] = [:]
    private(set) var requests: [String] = []
    private var reservations: [Int: ReservationQueue.Reservation] = [:]
    private(set) var drainedCount = 0
    private var position: UInt64 = 0
    /// The time of the connection thread.
    var now = MonotonicTime.now

    init(messages: Int = 100, bytes: Int = 1 << 20, waiting: Int = 1_000) {
        window = PublishWindow(PublishWindow.Limits(messages: messages, bytes: bytes, waiting: waiting))
    }

    static func hash(_ exchange: String, _ key: String) -> UInt64 {
        PublishDestination(exchange: exchange, routingKey: key).hash
    }

    /// Reserves and submits, as one caller for whom there is room.
    func submit(
        _ id: Int, exchange: String = "x", key: String = "a.b", size: Int = 0, header: Int = 0,
        isRequest: Bool = false, hasID: Bool = true, deadline: MonotonicTime = .distantFuture
    ) throws {
        let grant = try #require(try reserve(key: key, exchange: exchange))
        try use(
            grant, id, exchange: exchange, key: key, size: size, header: header, isRequest: isRequest, hasID: hasID,
            deadline: deadline)
    }

    /// Submits for room that was granted.
    func use(
        _ grant: PublishGrant, _ id: Int, exchange: String = "x", key: String = "a.b", size: Int = 0,
        header: Int = 0, isRequest: Bool = false, hasID: Bool = true, deadline: MonotonicTime = .distantFuture
    ) throws {
        var properties = MessageProperties(messageID: hasID ? "m\(id)" : nil, correlationID: "c\(id)")
        if isRequest { properties.replyTo = "asker" }
        if header > 0 { properties.headers["h"] = .string(String(repeating: "v", count: header)) }
        let message = try EncodedMessage(
            OutboundMessage(
                exchange: exchange, routingKey: key, properties: properties, body: Array(repeating: 0, count: size)))
        let publish = PendingPublish(
            message, deadline: deadline, caller: .task(Waiter()))
        publishes[id] = publish
        take(window.submit(publish, granted: grant))
    }

    func reserve(
        key: String = "a.b", exchange: String = "x", count: Int = 1, bytes: Int = 0
    ) throws -> PublishGrant? {
        try window.reserve(PublishGrant(count: count, bytes: bytes), for: Self.hash(exchange, key))
    }

    /// Waits for room.
    func wait(_ id: Int, key: String = "a.b", bytes: Int = 0, deadline: MonotonicTime = .distantFuture) throws {
        let reservation = ReservationQueue.Reservation(
            PublishGrant(count: 1, bytes: bytes), destination: Self.hash("x", key), deadline: deadline)
        reservations[id] = reservation
        take(try window.wait(reservation))
    }

    func cancelWaiting(_ id: Int) {
        if let reservation = reservations[id] { window.cancel(reservation) }
    }

    func release(_ grant: PublishGrant) { take(window.release(grant)) }

    func cancel(_ id: Int) {
        guard let publish = publishes[id] else { return }
        take(
            window.cancel([publish]) { isWritten in
                EventsError(isWritten ? .unknownOutcome : .unsent, "cancelled", operation: "test")
            })
    }

    /// Writes; returns the ids of what was written.
    @discardableResult
    func write(_ budget: Int = 1 << 20, frameLimit: Int = 131_072) -> [Int] {
        var resumptions = PublishWindow.Resumptions()
        let batch = window.takeBatch(
            budget: budget, position: position, frameLimit: frameLimit, now: now, &resumptions)
        take(resumptions)
        position += batch.reduce(0) { $0 + UInt64($1.message?.length(frameLimit: frameLimit) ?? 0) }
        return batch.compactMap { publish in publishes.first { $0.value === publish }?.key }
    }

    /// Applies what one read has brought. False if a confirm was for nothing.
    @discardableResult
    func read(_ events: PublishWindow.Event...) -> Bool {
        guard let resumptions = window.apply(events, now: now) else { return false }
        take(resumptions)
        return true
    }

    func confirm(_ tag: UInt64, multiple: Bool = false, isNack: Bool = false) -> Bool {
        read(.confirmed(tag: tag, multiple: multiple, isNack: isNack))
    }

    func lose(written: UInt64 = .max, _ cause: AMQPFailure.Cause = .unexplained) {
        take(
            window.connectionLost(
                EventsError(.connectionLost, "gone", operation: "test"), sentBytes: written, cause: cause))
        position = 0
    }

    func closeChannel(_ text: String, _ code: EventsError.Code = .eventRefused) {
        take(window.channelClosed(EventsError(code, text, operation: "publish", outcome: .nacked), now: now))
    }

    var needsReset: Bool { window.needsReset(now: now) }
    /// Returns the destination that is named for it.
    @discardableResult
    func reset() -> String? {
        let (resumptions, destination) = window.channelReset(now: now)
        take(resumptions)
        return destination
    }
    func step(_ step: (inout PublishWindow) -> PublishWindow.Resumptions) { take(step(&window)) }
    func look<Value>(_ look: (inout PublishWindow) -> Value) -> Value { look(&window) }

    private func take(_ resumptions: PublishWindow.Resumptions) {
        for (publish, result) in resumptions.publishes {
            guard let id = publishes.first(where: { $0.value === publish })?.key else { continue }
            #expect(results[id] == nil, "each caller is answered once")
            switch result {
            case .success(let routed): results[id] = routed ? "confirmed" : "returned"
            case .failure(let error):
                errors[id] = error
                results[id] = error.code == .unknownOutcome ? "unknown" : "\(error.code) \(error.publishOutcome)"
            }
        }
        for (waiter, result) in resumptions.reservations {
            guard let id = reservations.first(where: { $0.value.waiter === waiter })?.key else { continue }
            switch result {
            case .success(let grant): granted[id] = grant
            case .failure(let error):
                errors[id] = error
                results[id] = "\(error.code) \(error.publishOutcome)"
            }
        }
        drainedCount += resumptions.drained.count
        requests += resumptions.requests
    }
}

@Suite(.timeLimit(.minutes(1))) struct PublishWindowTests {
    // MARK: Confirms

    @Test func `confirms settle by tag, with multiple, and out of order`() throws {
        let bench = Bench()
        for id in 1...5 { try bench.submit(id) }
        #expect(bench.write() == [1, 2, 3, 4, 5])
        #expect(bench.confirm(4))
        #expect(bench.confirm(2, isNack: true))
        #expect(bench.confirm(3, multiple: true))
        #expect(bench.confirm(0, multiple: true))
        #expect(
            bench.results == [
                1: "confirmed", 2: "nacked nacked", 3: "confirmed", 4: "confirmed", 5: "confirmed",
            ])
        #expect(bench.look { $0.count == 0 && $0.byteCount == 0 })
        #expect(!bench.confirm(6), "a tag that was never given")
    }

    @Test func `a return is matched by exchange, key and id`() throws {
        let bench = Bench()
        try bench.submit(1)
        try bench.submit(2, exchange: "y")
        try bench.submit(3)
        bench.write()
        // Both legs of a dual publish share an id.
        bench.read(
            .returned(exchange: "x", routingKey: "a.b", messageID: "m3"),
            .returned(exchange: "x", routingKey: "a.b", messageID: "m2"),
            .confirmed(tag: 3, multiple: true, isNack: false))
        #expect(bench.results == [1: "confirmed", 2: "confirmed", 3: "returned"])
    }

    @Test func `a return that several messages match is taken for all of them`() throws {
        let bench = Bench()
        // Messages of others may have no id.
        for id in 1...3 { try bench.submit(id, key: id == 3 ? "c.d" : "a.b", hasID: false) }
        bench.write()
        // The second has lost its queue: taken for the first alone, it would count as routed.
        bench.read(
            .returned(exchange: "x", routingKey: "a.b", messageID: nil),
            .confirmed(tag: 3, multiple: true, isNack: false))
        #expect(bench.results == [1: "returned", 2: "returned", 3: "confirmed"])
    }

    @Test func `of what is confirmed, the requests that reached a queue are named`() throws {
        let bench = Bench()
        for id in 1...4 { try bench.submit(id, isRequest: id > 1) }
        bench.write()
        bench.read(
            .returned(exchange: "x", routingKey: "a.b", messageID: "m3"),
            .confirmed(tag: 3, multiple: true, isNack: false), .confirmed(tag: 4, multiple: false, isNack: true))
        #expect(bench.requests == ["c2"])
    }

    @Test func `a closing window waits for callers, not for messages whose callers are gone`() throws {
        let bench = Bench()
        try bench.submit(1)
        try bench.submit(2)
        bench.write()
        bench.cancel(1)
        bench.step { $0.whenDrained {} }
        #expect(bench.drainedCount == 0)
        #expect(bench.confirm(2))
        #expect(bench.drainedCount == 1)
        #expect(bench.results == [1: "unknown", 2: "confirmed"])
        #expect(bench.look { $0.count } == 1, "its place is kept until the broker answers")
    }

    // MARK: Losses

    @Test func `when the window closes, what may have been written is unknown and the rest is unsent`() throws {
        let bench = Bench()
        for id in 1...4 { try bench.submit(id) }
        #expect(bench.write(1) == [1])
        #expect(bench.write(1) == [2])
        bench.step { $0.close(EventsError(.connectionLost, "gone", operation: "test")) }
        #expect(bench.results == [1: "unknown", 2: "unknown", 3: "unsent unsent", 4: "unsent unsent"])
        #expect(throws: EventsError.self) { try bench.reserve() }
    }

    private func message(_ id: Int) -> OutboundMessage {
        OutboundMessage(
            exchange: "x", routingKey: "a.b",
            properties: MessageProperties(messageID: "m\(id)", correlationID: "c\(id)"), body: [])
    }

    @Test func `after a lost connection the unconfirmed is written again, in order, and the confirmed is not`() throws {
        let bench = Bench(messages: 4)
        for id in 1...4 { try bench.submit(id) }
        bench.write()
        #expect(bench.confirm(1))
        // Settled before an earlier one.
        #expect(bench.confirm(3))
        bench.read(.returned(exchange: "x", routingKey: "a.b", messageID: "m4"))
        bench.lose()
        #expect(bench.results == [1: "confirmed", 3: "confirmed"], "no caller is told of the loss")
        #expect(bench.write() == [2, 4])
        // Tags count from 1 again, and what was returned on the old channel may be routed on the new one.
        #expect(bench.confirm(2, multiple: true))
        #expect(bench.results[2] == "confirmed" && bench.results[4] == "confirmed")
        #expect(bench.look { !$0.hasUnsent && $0.count == 0 && $0.byteCount == 0 }, "all room is given back, once")
    }

    @Test func `what may have been written is unknown at its deadline, although it waits to be written again`() throws {
        let bench = Bench()
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        for id in 1...3 { try bench.submit(id, deadline: due) }
        #expect(bench.write(1) == [1])
        #expect(bench.write(1) == [2])
        // Of the second, not one byte has left.
        bench.lose(written: 10)
        bench.step { $0.expire(now: due) }
        #expect(bench.results == [1: "unknown", 2: "unsent unsent", 3: "unsent unsent"])
        #expect(bench.look { !$0.hasUnsent && $0.count == 0 })
    }

    @Test func `a caller that was cancelled or is late is not published again`() throws {
        let bench = Bench()
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        try bench.submit(1)
        try bench.submit(2, deadline: due)
        try bench.submit(3)
        bench.write()
        bench.cancel(1)
        bench.step { $0.expire(now: due) }
        bench.lose()
        #expect(bench.write() == [3])
        #expect(bench.confirm(1))
        #expect(bench.results == [1: "unknown", 2: "unknown", 3: "confirmed"])
        #expect(bench.look { $0.count } == 0)
    }

    @Test func `a negative answer to what the broker may have taken before is unknown`() throws {
        let bench = Bench()
        for id in 1...3 { try bench.submit(id, exchange: id == 3 ? "gone" : "x") }
        bench.write()
        bench.lose()
        #expect(bench.write() == [1, 2, 3])
        bench.read(
            .confirmed(tag: 1, multiple: false, isNack: true),
            .returned(exchange: "x", routingKey: "a.b", messageID: "m2"),
            .confirmed(tag: 2, multiple: false, isNack: false))
        bench.closeChannel("NOT_FOUND - no exchange 'gone' in vhost '/'", .exchangeNotFound)
        #expect(
            bench.results == [1: "unknown", 2: "unknown", 3: "exchangeNotFound unknown"])
    }

    @Test func `a server that refuses us refuses callers at once, until a connection opens`() throws {
        let bench = Bench()
        try bench.submit(1)
        bench.step { $0.refuse(EventsError(.accessRefused, "no", operation: "test")) }
        #expect(bench.results == [1: "accessRefused unsent"])
        #expect(throws: EventsError.self) { try bench.reserve() }
        bench.look { $0.connected() }
        #expect(try bench.reserve() != nil)
    }

    @Test func `after a refusal callers wait as soon as the server is away, or has let us in`() throws {
        let bench = Bench()
        bench.step { $0.refuse(EventsError(.accessRefused, "no", operation: "test")) }
        bench.look { $0.blocked(EventsError(.connectionFailed, "away", operation: "test")) }
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        try bench.submit(1, deadline: due)
        bench.step { $0.expire(now: due) }
        #expect(bench.results == [1: "unsent unsent"])
        #expect(bench.errors[1]?.message == "not written by the deadline: away")
    }

    // MARK: Refusals

    @Test func `a closed channel fails the message that the broker names, and the others are written again`() throws {
        for (text, guilty) in [
            ("NOT_FOUND - no exchange 'missing' in vhost '/'", 2),
            ("ACCESS_REFUSED - access to exchange 'missing' in vhost '/' refused for user 'u'", 2),
            ("ACCESS_REFUSED - write access to topic 'secret.x' in exchange 'x' in vhost '/' refused for user 'u'", 3),
            ("ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'", 4),
        ] {
            let bench = Bench()
            try bench.submit(1)
            try bench.submit(2, exchange: "missing")
            try bench.submit(3, key: "secret.x")
            try bench.submit(4, exchange: "", key: "queue")
            bench.write()
            bench.closeChannel(text, .accessRefused)
            #expect(bench.results == [guilty: "accessRefused nacked"], "\(text)")
            let again = bench.write()
            #expect(again == [1, 2, 3, 4].filter { $0 != guilty }, "they go out on the new channel")
            #expect(bench.confirm(3, multiple: true))
            #expect(again.allSatisfy { bench.results[$0] == "confirmed" })
        }
    }

    @Test func `of several messages to what the broker names, an earlier one may have been taken`() throws {
        let bench = Bench()
        try bench.submit(1, exchange: "missing")
        try bench.submit(2, exchange: "missing")
        bench.write()
        bench.closeChannel("NOT_FOUND - no exchange 'missing' in vhost '/'", .exchangeNotFound)
        #expect(bench.results == [1: "exchangeNotFound unknown", 2: "exchangeNotFound unknown"])
    }

    @Test(arguments: ["behind", "mixed", "before"], [false, true])
    func `however many topics the broker refuses by name, the other messages are written a few times`(
        refused: String, confirmsSome: Bool
    ) throws {
        let bench = Bench(messages: 1_000)
        let ids = 1...360
        func isRefused(_ id: Int) -> Bool {
            switch refused {
            case "behind": id > 300
            case "before": id <= 60
            default: id % 6 == 0
            }
        }
        for id in ids { try bench.submit(id, key: isRefused(id) ? "secret.k\(id)" : "a.b") }
        var copies: [Int: Int] = [:]
        var rounds = 0
        while bench.look({ $0.count }) > 0, rounds < 1_000 {
            rounds += 1
            let batch = bench.write()
            for id in batch { copies[id, default: 0] += 1 }
            // The broker closes the channel before it has confirmed anything, or but the first.
            if let first = batch.first(where: isRefused) {
                if confirmsSome, batch[0] != first { #expect(bench.confirm(1)) }
                bench.closeChannel(
                    "ACCESS_REFUSED - access to topic 'secret.k\(first)' in exchange 'x' in vhost '/' refused for user 'u'",
                    .accessRefused)
            } else {
                #expect(bench.confirm(0, multiple: true))
            }
        }
        #expect(ids.allSatisfy { bench.results[$0] == (isRefused($0) ? "accessRefused nacked" : "confirmed") })
        // Twice with all others (five times if some are confirmed), and in halves of 360: at most log2(360) + 2.
        #expect(
            copies.values.max() ?? 0 <= (confirmsSome ? 13 : 10),
            "\(copies.values.max() ?? 0) copies in \(rounds) rounds")
    }

    @Test func `where the broker does not say which message it was, halves are written until it is alone`() throws {
        for guilty in [[1], [100], [57], [3, 4], [1, 50, 100]] {
            let bench = Bench(messages: 200)
            for id in 1...100 { try bench.submit(id) }
            var rounds = 0
            while bench.look({ $0.count }) > 0, rounds < 100 {
                rounds += 1
                let batch = bench.write()
                if let first = batch.firstIndex(where: { guilty.contains($0) }) {
                    // The broker confirms some of what came before the guilty one, and never what comes behind it.
                    if first > 1 { #expect(bench.confirm(1)) }
                    bench.closeChannel("PRECONDITION_FAILED - message is too large")
                } else {
                    #expect(bench.confirm(0, multiple: true))
                }
            }
            for id in 1...100 {
                let expected = guilty.contains(id) ? "eventRefused unknown" : "confirmed"
                #expect(bench.results[id] == expected, "\(id) of \(guilty)")
            }
            #expect(rounds < 12 * (guilty.count + 1))
        }
    }

    @Test func `one message alone that the broker closes the channel for is refused for certain`() throws {
        let bench = Bench()
        try bench.submit(1)
        bench.write()
        try bench.submit(2)
        bench.closeChannel("PRECONDITION_FAILED - message is too large")
        #expect(bench.results == [1: "eventRefused nacked"])
        #expect(bench.write() == [2])
    }

    @Test func `what the broker closes the connection for is found in the same way`() throws {
        let bench = Bench()
        for id in 1...3 { try bench.submit(id) }
        bench.write()
        bench.lose(.message)
        #expect(bench.write() == [1], "suspects go out in groups, and nothing else with them")
        #expect(bench.write().isEmpty)
        #expect(bench.confirm(1))
        #expect(bench.write() == [2])
        bench.lose(.message)
        #expect(bench.errors[2]?.publishOutcome == .unknown)
        #expect(bench.write() == [3])
        #expect(bench.confirm(1))
        #expect(bench.results[1] == "confirmed" && bench.results[3] == "confirmed")
    }

    @Test func `connections that end for something else than a message cost no message`() throws {
        let bench = Bench()
        for id in 1...3 { try bench.submit(id) }
        for _ in 0..<10 {
            #expect(bench.write() == [1, 2, 3])
            bench.lose(.other)
            #expect(bench.look { !$0.retriesSoon })
        }
        #expect(bench.results.isEmpty)
    }

    @Test(arguments: [1, 2, 100]) func `a broker that ends every connection costs no message`(count: Int) throws {
        let bench = Bench(messages: 200)
        for id in 1...count { try bench.submit(id) }
        var quickCount = 0
        for _ in 0..<200 {
            bench.write()
            bench.lose()
            if bench.look({ $0.retriesSoon }) { quickCount += 1 }
        }
        #expect(bench.results.isEmpty, "no message is known to be the cause")
        #expect(quickCount <= 12, "from then on with growing pauses")
        var rounds = 0
        while bench.look({ $0.count }) > 0, rounds < 200 {
            rounds += 1
            bench.write()
            #expect(bench.confirm(0, multiple: true))
        }
        #expect(bench.results.values.count { $0 == "confirmed" } == count)
    }

    @Test func `a broker that blames every message is believed twice in a row`() throws {
        let bench = Bench()
        for id in 1...20 { try bench.submit(id) }
        for _ in 0..<100 {
            bench.write()
            bench.lose(.message)
        }
        #expect(bench.results.count == 2)
        var rounds = 0
        while bench.results.count < 20, rounds < 100 {
            rounds += 1
            bench.write()
            #expect(bench.confirm(0, multiple: true))
        }
        #expect(bench.results.values.count { $0 == "confirmed" } == 18)
    }

    @Test func `a message is given up when it has ended three connections alone, and others came through`() throws {
        let bench = Bench()
        for id in 1...3 { try bench.submit(id) }
        // Three losses together make suspects of them.
        for _ in 0..<3 {
            #expect(bench.write() == [1, 2, 3])
            bench.lose()
        }
        #expect(bench.write() == [1])
        bench.lose()
        #expect(bench.look { $0.retriesSoon })
        #expect(bench.write() == [2], "the others have their turn first")
        #expect(bench.confirm(1))
        try bench.submit(4)
        #expect(bench.write() == [3])
        #expect(bench.confirm(2))
        #expect(bench.write() == [1])
        bench.lose()
        #expect(bench.write() == [4])
        #expect(bench.write().isEmpty, "a suspect is written alone")
        #expect(bench.confirm(1))
        #expect(bench.write() == [1])
        #expect(bench.results == [2: "confirmed", 3: "confirmed", 4: "confirmed"])
        bench.lose()
        #expect(bench.results[1] == "unknown")
        #expect(bench.look { $0.count } == 0)
    }

    @Test func `a connection that ends before a suspect is written is not opened again at once`() throws {
        let bench = Bench()
        for id in 1...2 { try bench.submit(id) }
        bench.write()
        bench.lose(.message)
        #expect(bench.write() == [1])
        bench.lose(.message)
        #expect(bench.look { $0.retriesSoon })
        bench.lose()
        #expect(bench.look { !$0.retriesSoon })
    }

    @Test func `what has ended a connection alone is tested although another destination does not confirm`() throws {
        let bench = Bench()
        try bench.submit(1)
        for _ in 0..<3 {
            #expect(bench.write() == [1])
            bench.lose()
        }
        try bench.submit(2, key: "stuck.a")
        #expect(bench.write() == [2])
        #expect(bench.write().isEmpty)
        bench.now = bench.now.advanced(by: .seconds(60))
        let now = bench.now
        bench.look { $0.unblocked(now: now) }
        #expect(!bench.needsReset, "a broker that blocks answers nothing")
        bench.now = bench.now.advanced(by: .seconds(2))
        #expect(bench.needsReset)
        bench.reset()
        #expect(bench.write() == [1])
        #expect(bench.confirm(1))
        #expect(bench.write() == [2])
    }

    @Test(arguments: [
        (AMQPFailure.closedByBroker(code: 320, text: "", method: 0), AMQPFailure.Cause.other),
        (.closedByBroker(code: 541, text: "", method: 0), .unexplained),
        (.closedByBroker(code: 541, text: "", method: 0x0032_000A), .other),
        (.closedByBroker(code: 313, text: "", method: 0), .other),
        (.closedByBroker(code: 506, text: "", method: 0), .other),
        (.closedByBroker(code: 403, text: "", method: 0x0032_000A), .other),
        (.closedByBroker(code: 501, text: "", method: 0x003C_0028), .message),
        (.closedByBroker(code: 501, text: "", method: 0), .message),
        (.closedByBroker(code: 530, text: "", method: 0), .unexplained),
        (.silent("no heartbeat"), .other), (.unexpected("a confirm"), .other),
    ])
    func `only some ends of a connection can be a message's doing`(
        failure: AMQPFailure, cause: AMQPFailure.Cause
    ) {
        #expect(AMQPFailure.cause(of: failure, hasRequests: false) == cause)
        #expect(AMQPFailure.cause(of: SocketError(.lost, "reset"), hasRequests: false) == .unexplained)
        #expect(AMQPFailure.cause(of: SocketError(.interrupted, "closed"), hasRequests: false) == .other)
    }

    @Test func `what stands before a suspect may take its time as long as the broker answers`() throws {
        let bench = Bench()
        try bench.submit(1)
        for _ in 0..<3 {
            #expect(bench.write() == [1])
            bench.lose()
        }
        for id in 2...6 { try bench.submit(id) }
        #expect(bench.write() == [2, 3, 4, 5, 6])
        #expect(bench.write().isEmpty, "the suspect waits for them")
        for tag in 1...5 {
            bench.now = bench.now.advanced(by: .milliseconds(1_500))
            #expect(!bench.needsReset)
            #expect(bench.confirm(UInt64(tag)))
        }
        #expect(bench.write() == [1])
    }

    @Test func `a message whose header is larger than the broker's frames fails alone`() throws {
        let bench = Bench()
        try bench.submit(1)
        try bench.submit(2, header: 5_000)
        try bench.submit(3)
        #expect(bench.write(frameLimit: 4_096) == [1, 3])
        #expect(bench.results == [2: "eventTooLarge rejected"])
        #expect(bench.confirm(2, multiple: true))
        #expect(bench.look { $0.count == 0 && $0.byteCount == 0 })
    }

    @Test func `a suspect that leaves before it is written causes no reset`() throws {
        let bench = Bench()
        try bench.submit(1)
        for _ in 0..<3 {
            #expect(bench.write() == [1])
            bench.lose()
        }
        try bench.submit(2, key: "slow.a")
        #expect(bench.write() == [2])
        #expect(bench.write().isEmpty, "the suspect waits")
        bench.cancel(1)
        #expect(bench.look { $0.resetTime } == .distantFuture)
    }

    @Test func `a suspect that goes where nothing is confirmed does not stop the others`() throws {
        let bench = Bench()
        let due = bench.now.advanced(by: .seconds(30))
        try bench.submit(1, key: "stuck.a", deadline: due)
        try bench.submit(2, key: "guilty.a")
        for id in 3...8 { try bench.submit(id) }
        bench.write()
        bench.closeChannel("PRECONDITION_FAILED - something")
        var rounds = 0
        while bench.results.count < 7, rounds < 50 {
            rounds += 1
            let batch = bench.write()
            if batch.contains(2) {
                bench.closeChannel("PRECONDITION_FAILED - something")
            } else if batch == [1] || batch.contains(1) {
                // Everything but the stuck one is confirmed, and time passes.
                for (index, id) in batch.enumerated() where id != 1 { #expect(bench.confirm(UInt64(index + 1))) }
                bench.now = bench.now.advanced(by: .seconds(3))
                #expect(bench.needsReset)
                bench.reset()
            } else if !batch.isEmpty {
                #expect(bench.confirm(0, multiple: true))
            }
        }
        #expect((3...8).allSatisfy { bench.results[$0] == "confirmed" }, "\(bench.results)")
        #expect(bench.results[2] == "eventRefused unknown")
    }

    @Test func `a group of suspects is written whole, although the socket takes it in parts`() throws {
        let bench = Bench(bytes: 16 << 20)
        for id in 1...8 { try bench.submit(id, size: 200_000) }
        bench.write(16 << 20)
        bench.closeChannel("PRECONDITION_FAILED - something")
        let budget = 256 * 1024
        #expect((1...4).map { _ in bench.write(budget) } == [[1], [2], [3], [4]])
        #expect(bench.write(budget).isEmpty)
        #expect(bench.confirm(3, multiple: true))
        #expect(bench.write(budget).isEmpty, "the fourth is not answered yet")
        #expect(bench.confirm(4))
        #expect(bench.write(budget) == [5])
    }

    /// If the guilty message goes there itself, each search tries others of that destination: halves of 20 are five.
    @Test(arguments: [(41, 100, 1), (41, 200_000, 1), (40, 100, 5), (20, 100, 5)])
    func `a destination that does not confirm holds up the search for a guilty message once`(
        guilty: Int, size: Int, limit: Int
    ) throws {
        let bench = Bench(messages: 200, bytes: 64 << 20)
        // One of two goes where nothing is confirmed.
        for id in 1...40 { try bench.submit(id, key: id % 2 == 0 ? "stuck.a" : "a.b", size: size) }
        if guilty == 41 { try bench.submit(41, key: "guilty.a") }
        while !bench.write(256 * 1024).isEmpty {}
        bench.closeChannel("PRECONDITION_FAILED - something")
        var resets = 0
        var rounds = 0
        var lastTag = 0
        while bench.results.count < 21, rounds < 200 {
            rounds += 1
            var group: [Int] = []
            while true {
                let batch = bench.write(256 * 1024)
                if batch.isEmpty { break }
                group += batch
            }
            if group.contains(guilty) {
                bench.closeChannel("PRECONDITION_FAILED - something")
                lastTag = 0
                continue
            }
            for id in group {
                lastTag += 1
                if id % 2 != 0 { #expect(bench.confirm(UInt64(lastTag))) }
            }
            guard group.contains(where: { $0 % 2 == 0 }), bench.results.count < 21 else { continue }
            bench.now = bench.now.advanced(by: .seconds(2))
            #expect(bench.needsReset)
            bench.reset()
            (lastTag, resets) = (0, resets + 1)
        }
        #expect(bench.results[guilty] == "eventRefused unknown")
        #expect(bench.results.values.count { $0 == "confirmed" } == 20)
        #expect(resets <= limit)
    }

    /// Runs a broker that confirms each message some time after it was written, and of which one message ends the connection
    /// at once. Time is the bench's own. Returns how many copies there were of each message.
    private func run(
        _ bench: Bench, guilty: Int, count: Int, confirming delay: (Int) -> Duration?
    ) -> [Int: Int] {
        var copies: [Int: Int] = [:]
        var due: [(time: MonotonicTime, tag: UInt64)] = []
        var lastTag: UInt64 = 0
        let end = bench.now.advanced(by: .seconds(600))
        while bench.results.count < count, bench.now < end {
            let batch = bench.write()
            for id in batch {
                lastTag += 1
                copies[id, default: 0] += 1
                if let delay = delay(id) { due.append((bench.now.advanced(by: delay), lastTag)) }
            }
            if batch.contains(guilty) {
                bench.lose()
                (due, lastTag) = ([], 0)
                continue
            }
            due.sort { $0.time < $1.time }
            let resetTime = bench.look { $0.resetTime }
            if let first = due.first, first.time < resetTime {
                due.removeFirst()
                bench.now = max(bench.now, first.time)
                #expect(bench.confirm(first.tag))
                continue
            }
            guard batch.isEmpty else { continue }
            guard resetTime < .distantFuture else { break }
            bench.now = max(bench.now, resetTime)
            guard bench.needsReset else { continue }
            bench.reset()
            (due, lastTag) = ([], 0)
        }
        return copies
    }

    @Test(arguments: [1, 3, 5, 7])
    func `a message that ends connections is found although the broker confirms only after seconds`(
        seconds: Int
    ) throws {
        // Not the last one: it is given up only once others come through after it.
        for guilty in [1, 51] {
            let bench = Bench(messages: 200)
            for id in 1...101 { try bench.submit(id, key: id % 3 == 0 ? "a.c" : "a.b") }
            let copies = run(bench, guilty: guilty, count: 101) { _ in .seconds(seconds) }
            #expect(bench.results.values.count { $0 == "confirmed" } == 100)
            #expect(bench.results[guilty] == "unknown")
            #expect(copies.values.allSatisfy { $0 <= 16 }, "\(copies)")
        }
    }

    @Test func `suspects are not written with more others after a reset than before`() throws {
        let bench = Bench()
        for id in 1...12 { try bench.submit(id, key: "slow.a") }
        for _ in 0..<3 {
            bench.write()
            bench.lose()
        }
        #expect(bench.write() == [1, 2, 3, 4, 5, 6])
        for _ in 0..<2 {
            bench.now = bench.now.advanced(by: .seconds(20))
            #expect(bench.needsReset)
            bench.reset()
            #expect(bench.write().count == 6)
        }
        // Each answer clears its own mark.
        #expect(bench.confirm(0, multiple: true))
        #expect(bench.write().count == 6)
        #expect(bench.confirm(0, multiple: true))
        for id in 13...24 { try bench.submit(id) }
        #expect(bench.write().count == 12)
    }

    @Test func `suspects that go where nothing is confirmed let the others pass in the end`() throws {
        let bench = Bench(messages: 400)
        for id in 1...20 { try bench.submit(id, key: "stuck.a") }
        for _ in 0..<3 {
            bench.write()
            bench.lose()
        }
        var (lastTag, resets, id) = (UInt64(0), 0, 1_000)
        var longest = Duration.zero
        var submitted: [Int: MonotonicTime] = [:]
        // Ten minutes, in which a message to another destination comes every half a second.
        for _ in 0..<1_200 {
            id += 1
            try bench.submit(id, key: "healthy.a")
            submitted[id] = bench.now
            while true {
                let batch = bench.write()
                if batch.isEmpty { break }
                for id in batch {
                    lastTag += 1
                    guard let time = submitted[id] else { continue }
                    #expect(bench.confirm(lastTag))
                    longest = max(longest, time.duration(to: bench.now))
                }
            }
            bench.now = bench.now.advanced(by: .milliseconds(500))
            guard bench.needsReset else { continue }
            bench.reset()
            (lastTag, resets) = (0, resets + 1)
        }
        #expect(resets <= 3)
        #expect(longest <= .seconds(4))
        #expect(bench.results.values.count { $0 == "confirmed" } >= 1_199)
    }

    @Test func `a destination is known to be silent although the caller of what was tried is gone`() throws {
        let bench = Bench()
        for id in 1...4 { try bench.submit(id, key: id % 2 == 1 ? "stuck.a" : "a.b") }
        bench.write()
        bench.closeChannel("PRECONDITION_FAILED - something")
        #expect(bench.write() == [1, 2])
        bench.cancel(1)
        #expect(bench.confirm(2))
        bench.now = bench.now.advanced(by: .seconds(2))
        #expect(bench.needsReset)
        bench.reset()
        #expect(bench.write() == [4], "the other suspect to the same destination waits")
        #expect(bench.confirm(1))
        #expect(bench.write() == [3])
    }

    @Test func `a reset for suspects names the destination until something of it is confirmed`() throws {
        let bench = Bench()
        try bench.submit(1, key: "stuck.a")
        for id in 2...4 { try bench.submit(id) }
        bench.write()
        bench.closeChannel("PRECONDITION_FAILED - something")
        #expect(bench.write() == [1, 2])
        #expect(bench.confirm(2))
        bench.now = bench.now.advanced(by: .seconds(2))
        #expect(bench.needsReset)
        #expect(bench.reset() == "x stuck.a")
        let now = bench.now
        #expect(bench.look { $0.unconfirmedDestination(now: now) } == "x stuck.a")
        #expect(bench.write() == [3, 4])
        #expect(bench.confirm(0, multiple: true))
        #expect(bench.look { $0.unconfirmedDestination(now: now) } == "x stuck.a")
        #expect(bench.write() == [1])
        #expect(bench.confirm(3))
        #expect(bench.look { $0.unconfirmedDestination(now: now) } == nil)
    }

    @Test func `a destination that was refused is refused here for a while, and not by closing the channel each time`()
        throws
    {
        let bench = Bench()
        try bench.submit(1, exchange: "gone")
        bench.write()
        bench.closeChannel("NOT_FOUND - no exchange 'gone' in vhost '/'", .exchangeNotFound)
        try bench.submit(2, exchange: "gone", key: "c.d")
        try bench.submit(3)
        #expect(bench.results == [1: "exchangeNotFound nacked", 2: "exchangeNotFound unsent"])
        #expect(bench.write() == [3])
        bench.look { $0.exchangeDeclared("gone") }
        try bench.submit(4, exchange: "gone")
        #expect(bench.write() == [4])
        #expect(bench.confirm(2, multiple: true))
        #expect(bench.results[4] == "confirmed")
    }

    @Test func `the message that is too large for the broker is known by its size, and later ones are not sent`() throws
    {
        let bench = Bench()
        for id in 1...20 { try bench.submit(id, size: id == 11 ? 5_000 : 100) }
        bench.write()
        bench.closeChannel("PRECONDITION_FAILED - message size 5000 is larger than configured max size 4000")
        #expect(bench.results == [11: "eventRefused nacked"])
        #expect(bench.write().count == 19)
        #expect(bench.confirm(0, multiple: true))
        try bench.submit(21, size: 4_001)
        #expect(bench.results[21] == "eventTooLarge rejected")
        bench.lose()
        try bench.submit(22, size: 4_001)
        #expect(bench.write() == [22], "a new connection may lead to a broker with another limit")
    }

    // MARK: Room

    @Test func `behind a message that is never confirmed no others pile up`() throws {
        let bench = Bench(messages: 100, bytes: 1 << 20)
        try bench.submit(1, key: "stuck.a")
        bench.write()
        for id in 2...5_000 {
            try bench.submit(id, size: 1_000)
            #expect(bench.write() == [id])
            #expect(bench.look { $0.sentCount } == 2)
            #expect(bench.confirm(UInt64(id)))
            #expect(!bench.needsReset, "its caller still waits")
            #expect(bench.look { $0.sentPlaces } <= 67)
            #expect(bench.look { $0.needsWake && $0.patience == nil }, "so few are in flight")
        }
        #expect(bench.results.values.allSatisfy { $0 == "confirmed" } && bench.results.count == 4_999)
        // Late and repeated confirms of those that are gone change nothing.
        #expect(bench.confirm(2_500))
        #expect(bench.confirm(1))
        #expect(bench.results[1] == "confirmed")
        #expect(!bench.confirm(5_001), "never sent")
        #expect(bench.look { $0.count } == 0)
    }

    @Test func `deadlines end callers, and room is given back only by the broker`() throws {
        let bench = Bench(messages: 2)
        let now = MonotonicTime.now
        let due = now.advanced(by: .seconds(10))
        try bench.submit(1, deadline: due)
        bench.write()
        try bench.submit(2, deadline: due)
        #expect(try bench.reserve() == nil, "the window is full")
        bench.step { $0.expire(now: now.advanced(by: .seconds(9))) }
        #expect(bench.results.isEmpty, "nothing is due yet")
        bench.step { $0.expire(now: due) }
        #expect(bench.results == [1: "unknown", 2: "unsent unsent"])
        // The unsent one's room is free, the sent one's is not.
        #expect(try bench.reserve() != nil)
        #expect(try bench.reserve() == nil)
        #expect(bench.confirm(1))
        #expect(try bench.reserve() != nil)
    }

    @Test func `the window is bounded in bytes too, and one message over it is let through`() throws {
        let bench = Bench(messages: 10, bytes: 1_000)
        try bench.submit(1, size: 5_000)
        #expect(try bench.reserve() == nil)
        bench.write()
        #expect(bench.confirm(1))
        #expect(try bench.reserve() != nil)
    }

    @Test func `bytes are bounded with any number of callers waiting, whose sizes are not known`() throws {
        let (limit, size, callers) = (1 << 20, 10_000, 5_000)
        let bench = Bench(messages: 10_000, bytes: limit, waiting: callers)
        var id = 0
        while let grant = try bench.reserve() {
            id += 1
            try bench.use(grant, id, size: size)
        }
        for caller in 0..<callers { try bench.wait(100_000 + caller) }
        var tag: UInt64 = 0
        var used: Set<Int> = []
        // The broker confirms one by one; whatever room that gives is used at once.
        for _ in 0..<200 {
            bench.write()
            tag += 1
            #expect(bench.confirm(tag))
            while let next = bench.granted.first(where: { !used.contains($0.key) }) {
                used.insert(next.key)
                id += 1
                try bench.use(next.value, id, size: size)
            }
            // One message over the limit, and those that were being encoded.
            #expect(bench.look { $0.byteCount } <= limit + (1 + PublishWindow.encodingLimit) * (size + 200))
        }
        #expect(used.count >= 200, "callers get their turn")
    }

    @Test func `a destination that does not confirm does not hold up another`() throws {
        let bench = Bench(messages: 160)
        var id = 0
        while let grant = try bench.reserve(key: "stuck.a") {
            id += 1
            try bench.use(grant, id, key: "stuck.a")
        }
        #expect(id == 160)
        for caller in 0..<500 { try bench.wait(10_000 + caller, key: "stuck.a") }
        let grant = try #require(try bench.reserve(key: "healthy.a"), "there is room in spare")
        try bench.use(grant, 1_000, key: "healthy.a")
        // Of one destination only a few; and of all that have confirmed nothing no more than an eighth of the window.
        var others = 1
        for key in 0..<200 {
            while let grant = try bench.reserve(key: "other.k\(key)") {
                others += 1
                try bench.use(grant, 2_000 + others, key: "other.k\(key)")
            }
        }
        #expect(others == 20)
    }

    @Test func `many destinations that do not confirm leave room for those that do`() throws {
        let bench = Bench(messages: 1_000)
        try bench.submit(1, key: "healthy.a")
        bench.write()
        #expect(bench.confirm(1))
        var id = 1
        for key in 0..<25 {
            while let grant = try bench.reserve(key: "stuck.k\(key)") {
                id += 1
                try bench.use(grant, id, key: "stuck.k\(key)")
            }
        }
        #expect(id > 1_000, "they have all that is not kept for others")
        bench.write()
        let grant = try #require(try bench.reserve(key: "healthy.a"))
        bench.release(grant)
        // Its room stays, also when the channel is opened again.
        bench.reset()
        #expect(try bench.reserve(key: "healthy.a") != nil)
        #expect(try bench.reserve(key: "stuck.k24") == nil)
    }

    @Test func `callers for a destination that confirms are admitted past those for one that does not`() throws {
        let bench = Bench(messages: 16)
        for id in 1...16 { try bench.submit(id, key: "stuck.a") }
        var id = 16
        for key in 0..<20 {
            if let grant = try bench.reserve(key: "other.k\(key)") {
                id += 1
                try bench.use(grant, id, key: "other.k\(key)")
            }
        }
        #expect(id == 18, "the spare room for those that have confirmed nothing is used up")
        bench.write()
        for caller in 0..<100 { try bench.wait(1_000 + caller, key: "stuck.a") }
        try bench.wait(5_000, key: "healthy.a")
        #expect(bench.granted.isEmpty)
        #expect(bench.confirm(17))
        #expect(bench.granted.keys.sorted() == [5_000])
    }

    @Test func `callers that give up before a slow broker has answered are no reason to reset the channel`() throws {
        let bench = Bench(messages: 4)
        for id in 1...4 { try bench.submit(id) }
        bench.write()
        for id in 1...3 { bench.cancel(id) }
        bench.now = bench.now.advanced(by: .seconds(4))
        #expect(!bench.needsReset)
        #expect(bench.confirm(1))
        bench.now = bench.now.advanced(by: .seconds(4))
        #expect(!bench.needsReset, "the broker has answered meanwhile")
        bench.now = bench.now.advanced(by: .seconds(1))
        #expect(bench.needsReset)
        #expect(bench.confirm(0, multiple: true))
        #expect(bench.look { $0.resetTime == .distantFuture && $0.count == 0 })
    }

    @Test func `a message whose time has passed is not written`() throws {
        let bench = Bench()
        try bench.submit(1, deadline: bench.now.advanced(by: .seconds(1)))
        try bench.submit(2)
        bench.now = bench.now.advanced(by: .seconds(1))
        #expect(bench.write() == [2])
        #expect(bench.results == [1: "unsent unsent"])
        #expect(bench.confirm(1))
        #expect(bench.look { $0.count == 0 && $0.byteCount == 0 })
    }

    @Test func `when half of the room is held by messages that no caller waits for, the channel is reset`() throws {
        let bench = Bench(messages: 4)
        let due = MonotonicTime.now.advanced(by: .seconds(10))
        for id in 1...3 { try bench.submit(id, key: "stuck.a", deadline: due) }
        try bench.submit(4)
        bench.write()
        #expect(bench.look { !$0.needsReset(now: due) })
        bench.step { $0.expire(now: due) }
        #expect(bench.look { $0.needsReset(now: due) })
        bench.step { $0.channelReset(now: due).0 }
        #expect(bench.look { !$0.needsReset(now: due) && $0.count == 1 })
        #expect(bench.look { $0.unconfirmedDestination(now: due) } == "x stuck.a")
        #expect(bench.write() == [4], "what a caller waits for is written again")
        #expect(bench.confirm(1))
    }

    @Test func `callers that wait are bounded, and those that leave make room for others`() throws {
        let bench = Bench(messages: 1, waiting: 3)
        try bench.submit(1)
        for id in 1...3 { try bench.wait(10 + id) }
        #expect(throws: EventsError.self) { try bench.wait(14) }
        bench.cancelWaiting(12)
        try bench.wait(15)
        bench.write()
        #expect(bench.confirm(1))
        #expect(bench.granted.keys.sorted() == [11])
    }

    @Test func `many callers that leave leave nothing behind`() throws {
        let bench = Bench(messages: 1, waiting: 1_000_000)
        try bench.submit(1)
        for id in 0..<20_000 {
            try bench.wait(10 + id)
            bench.cancelWaiting(10 + id)
        }
        try bench.wait(5)
        bench.write()
        #expect(bench.confirm(1))
        #expect(bench.granted.keys.sorted() == [5])
        #expect(bench.look { $0.waitingCount } == 0)
    }

    @Test func `whatever deadlines there are, the window is looked at a hundred times a second`() throws {
        let bench = Bench(messages: 1_000)
        let now = MonotonicTime.now
        for id in 1...500 { try bench.submit(id, deadline: now.advanced(by: .milliseconds(id))) }
        bench.step { $0.expire(now: now.advanced(by: .milliseconds(1))) }
        #expect(bench.results.count == 1)
        let next = bench.look { $0.nextDeadline }
        #expect(next >= now.advanced(by: .milliseconds(11)))
        bench.step { $0.expire(now: next) }
        #expect(bench.results.count >= 10)
    }

    @Test func `room that is not used is given back to those that wait`() throws {
        let bench = Bench(messages: 1)
        let grant = try #require(try bench.reserve())
        try bench.wait(2)
        #expect(bench.granted.isEmpty)
        bench.release(grant)
        #expect(bench.granted.keys.sorted() == [2])
        #expect(bench.look { $0.count } == 1)
    }

    @Test func `a list gets no more than there is room for, and leaves what is in spare`() throws {
        let bench = Bench(messages: 100, bytes: 10_000)
        for id in 1...98 { try bench.submit(id, key: "stuck.a") }
        let grant = try #require(try bench.reserve(key: "stuck.a", count: 50, bytes: 500))
        #expect(grant.count == 2)
        #expect(try bench.reserve(key: "stuck.a", count: 50, bytes: 500) == nil)
        let spare = try #require(try bench.reserve(key: "healthy.a", count: 50, bytes: 500))
        #expect(spare.count == 6)
        let large = Bench(messages: 100, bytes: 10_000)
        try large.submit(1, size: 9_000)
        let rest = try #require(try large.reserve(count: 50, bytes: 50_000))
        #expect(rest.count == 1, "one may be over the limit")
        let other = try #require(try large.reserve(key: "healthy.a", count: 4, bytes: 1_000))
        #expect(other.bytes <= 10_000 / 16)
    }

    @Test func `a destination is silent only as long as something of it is on the wire`() throws {
        let bench = Bench(messages: 16)
        try bench.submit(1, key: "a.a")
        bench.write()
        try bench.submit(2, key: "a.a")
        #expect(bench.confirm(1))
        bench.cancel(2)
        // What is written minutes later has only just been written.
        bench.now = bench.now.advanced(by: .seconds(300))
        try bench.submit(3, key: "a.a")
        #expect(bench.write() == [3])
        let now = bench.now
        #expect(bench.look { $0.unconfirmedDestination(now: now) } == nil)
    }

    @Test func `a list gets room for half of the window at most`() throws {
        let bench = Bench(messages: 100, bytes: 10_000)
        #expect(try bench.reserve(count: 1_000, bytes: 10_000)?.count == 50)
        let large = Bench(messages: 100, bytes: 10_000)
        #expect(try large.reserve(count: 1_000, bytes: 1_000_000)?.count == 5)
        #expect(try Bench().reserve(count: 3, bytes: 300)?.count == 3)
    }

    @Test func `a cancelled caller is answered at once, and its tag still counts`() throws {
        let bench = Bench()
        try bench.submit(1)
        try bench.submit(2)
        bench.write()
        bench.cancel(1)
        #expect(bench.confirm(1))
        #expect(bench.confirm(2))
        #expect(bench.results == [1: "unknown", 2: "confirmed"])
    }
}
