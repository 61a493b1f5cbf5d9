import Dispatch
import Synchronization
import Testing

@testable import ConnectionThread

#if canImport(Glibc)
import Glibc
#elseif canImport(Darwin)
import Darwin
#endif

/// The end of a thread, for one task that waits for it.
private final class ThreadEnd: Sendable {
    private let ends = AsyncStream.makeStream(of: Void.self)
    func finish() { ends.continuation.finish() }
    func wait() async { for await _ in ends.stream {} }
}

/// Writes what is posted to its socket, and collects what it reads.
private final class EchoDriver: ConnectionDriver {
    let descriptor: Int32
    private let shared: Shared
    private var deaf = false

    final class Shared: Sendable {
        let mailbox = Mailbox<[UInt8]>(capacity: 4)
        let received = Mutex<[UInt8]>([])
        let rounds = Atomic<Int>(0)
        let ended = Mutex<(any Error)?>(nil)
        let posted = Atomic<Int>(0)
        let stalls = Atomic<Int>(0)
        let timer = Mutex<MonotonicTime?>(nil)
        let blockInRead = Atomic<Bool>(false)
        let threadEnd = ThreadEnd()
    }

    struct PeerGone: Error {}

    init(descriptor: Int32, shared: Shared) {
        self.descriptor = descriptor
        self.shared = shared
    }

    func runOnce(now: MonotonicTime, isReadable: Bool) throws -> PollInterest {
        shared.rounds.add(1, ordering: .relaxed)
        for command in shared.mailbox.takeAll() {
            _ = command.withUnsafeBytes { Socket.send(descriptor, $0) }
        }
        if shared.blockInRead.load(ordering: .relaxed) {
            // What a C library does when it believes that a receive cannot wait.
            _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~O_NONBLOCK)
        }
        var buffer = [UInt8](repeating: 0, count: 1024)
        while true {
            switch buffer.withUnsafeMutableBytes({ Socket.receive(descriptor, into: $0) }) {
            case .bytes(let count): shared.received.withLock { $0 += buffer[..<count] }
            case .wouldBlock: return PollInterest(timer: shared.timer.withLock { $0 })
            case .closed: throw PeerGone()
            }
        }
    }

    func finish(_ error: (any Error)?) {
        shared.ended.withLock { $0 = error }
    }
}

private func withPair(
    stallLimit: Duration = .seconds(5),
    checkCalls: @escaping @Sendable (MonotonicTime) -> MonotonicTime? = { _ in nil },
    _ body: (ConnectionThread, EchoDriver.Shared, Int32) async throws -> Void
) async throws {
    var ends: [Int32] = [-1, -1]
    try #require(socketpair(AF_UNIX, streamSocket, 0, &ends) == 0)
    for end in ends { prepare(socket: end) }
    let shared = EchoDriver.Shared()
    let thread = try ConnectionThread(
        stallLimit: stallLimit, checkCalls: checkCalls,
        onStall: { shared.stalls.add(1, ordering: .relaxed) })
    let mine = ends[0]
    try thread.start(name: "test", openLimit: .seconds(5)) { thread in
        try thread.registerSocket(mine)
        return EchoDriver(descriptor: mine, shared: shared)
    } failed: { _ in
    } ended: {
        shared.threadEnd.finish()
    }
    try await body(thread, shared, ends[1])
    thread.stop()
    await shared.threadEnd.wait()
    Socket.close(ends[0])
    Socket.close(ends[1])
}

private func eventually(within limit: Duration = .seconds(60), _ condition: () -> Bool) async -> Bool {
    let end = ContinuousClock.now + limit
    while ContinuousClock.now < end {
        if condition() { return true }
        await Task.yield()
    }
    return condition()
}

@Suite struct ConnectionThreadTests {
    @Test func `what is posted is written, and what arrives is read`() async throws {
        try await withPair { thread, shared, peer in
            _ = shared.mailbox.post(Array("ping".utf8))
            thread.wake()
            var buffer = [UInt8](repeating: 0, count: 16)
            var got = 0
            #expect(
                await eventually {
                    if case .bytes(let count) = buffer.withUnsafeMutableBytes({ Socket.receive(peer, into: $0) }) {
                        got = count
                    }
                    return got == 4
                })
            _ = Array("pong".utf8).withUnsafeBytes { Socket.send(peer, $0) }
            #expect(await eventually { shared.received.withLock { $0 } == Array("pong".utf8) })
        }
    }

    @Test func `an idle thread does not come round`() async throws {
        try await withPair { _, shared, _ in
            #expect(await eventually { shared.rounds.load(ordering: .relaxed) >= 1 })
            let before = shared.rounds.load(ordering: .relaxed)
            try await Task.sleep(for: .milliseconds(200))  // the subject is that nothing happens in this time
            #expect(shared.rounds.load(ordering: .relaxed) <= before + 1)
        }
    }

    @Test func `no wake-up is lost when many tasks wake it at once`() async throws {
        try await withPair { thread, shared, peer in
            for _ in 0..<200 {
                await withTaskGroup { group in
                    for _ in 0..<4 {
                        group.addTask {
                            if case .accepted = shared.mailbox.post([1]) { shared.posted.add(1, ordering: .relaxed) }
                            thread.wake()
                        }
                    }
                }
                // Every accepted command reaches the peer without another wake-up.
                var seen = 0
                let expected = shared.posted.exchange(0, ordering: .relaxed)
                var buffer = [UInt8](repeating: 0, count: 64)
                #expect(
                    await eventually {
                        if case .bytes(let n) = buffer.withUnsafeMutableBytes({ Socket.receive(peer, into: $0) }) {
                            seen += n
                        }
                        return seen == expected
                    })
            }
        }
    }

    @Test func `a wake-up that arrives after its work was taken does not keep the thread busy`() async throws {
        try await withPair { thread, shared, _ in
            for _ in 0..<50 {
                // A thread that comes round all the time sees that it is woken before the kernel does.
                shared.timer.withLock { $0 = .now }
                thread.wake()
                let busy = shared.rounds.load(ordering: .relaxed) + 100
                #expect(await eventually { shared.rounds.load(ordering: .relaxed) > busy })
                thread.wake()
                shared.timer.withLock { $0 = nil }
                var newRounds = Int.max
                let end = ContinuousClock.now + .seconds(5)
                while newRounds > 20, ContinuousClock.now < end {
                    let before = shared.rounds.load(ordering: .relaxed)
                    try await Task.sleep(for: .milliseconds(5))  // the subject is that nothing happens in this time
                    newRounds = shared.rounds.load(ordering: .relaxed) - before
                }
                try #require(newRounds <= 20)
            }
        }
    }

    @Test func `a timer brings it round without a wake-up`() async throws {
        try await withPair { thread, shared, _ in
            shared.timer.withLock { $0 = MonotonicTime.now.advanced(by: .milliseconds(50)) }
            thread.wake()
            let before = shared.rounds.load(ordering: .relaxed)
            #expect(await eventually { shared.rounds.load(ordering: .relaxed) > before + 1 })
            shared.timer.withLock { $0 = nil }
        }
    }

    @Test func `a peer that goes away ends the thread with its error`() async throws {
        try await withPair { thread, shared, peer in
            _ = shutdown(peer, Int32(SHUT_RDWR))
            await shared.threadEnd.wait()
            let error = try #require(shared.ended.withLock { $0 })
            #expect(error is EchoDriver.PeerGone)
        }
    }

    @Test func `the watchdog frees a thread that hangs in a read`() async throws {
        try await withPair(stallLimit: .milliseconds(200)) { thread, shared, _ in
            #expect(await eventually { shared.rounds.load(ordering: .relaxed) >= 1 })
            shared.blockInRead.store(true, ordering: .relaxed)
            thread.wake()
            await shared.threadEnd.wait()
            #expect(shared.stalls.load(ordering: .relaxed) >= 1)
        }
    }

    @Test func `calls are ended by the watchdog although the thread is idle`() async throws {
        let deadline = Mutex<MonotonicTime?>(nil)
        let ended = Atomic<Bool>(false)
        try await withPair(checkCalls: { now in
            deadline.withLock { time in
                guard let due = time else { return nil }
                if now < due { return due }
                ended.store(true, ordering: .relaxed)
                time = nil
                return nil
            }
        }) { _, _, _ in
            let due = MonotonicTime.now.advanced(by: .milliseconds(100))
            deadline.withLock { $0 = due }
            Watchdog.shared.schedule(at: due)
            #expect(await eventually { ended.load(ordering: .relaxed) })
        }
    }

    @Test func `a mailbox is bounded, and refuses commands once it is closed`() {
        let mailbox = Mailbox<Int>(capacity: 2)
        #expect(mailbox.post(1) == .accepted)
        #expect(mailbox.post(2) == .accepted)
        #expect(mailbox.post(3) == .full)
        #expect(mailbox.takeAll() == [1, 2])
        #expect(mailbox.post(4) == .accepted)
        #expect(mailbox.close() == [4])
        #expect(mailbox.post(5) == .closed)
    }

    @Test func `a connection is refused in time, naming host and port`() throws {
        let deadline = MonotonicTime.now.advanced(by: .seconds(5))
        let error = #expect(throws: SocketError.self) {
            try Socket.connect(host: "127.0.0.1", port: 1, deadline: deadline)
        }
        #expect(error?.description.contains("127.0.0.1:1") == true)
        #expect(throws: SocketError.self) {
            try Socket.connect(host: "no-such-host.invalid", port: 1, deadline: deadline)
        }
        #expect(MonotonicTime.now < deadline)
    }

    @Test func `a name server that is slower than the deadline delays a connection and does not prevent it`() throws {
        let lookUps = Atomic<Int>(0)
        let mayAnswer = DispatchSemaphore(value: 0)
        let resolver = Resolver { _, _ in
            lookUps.add(1, ordering: .relaxed)
            mayAnswer.wait()
            return .success([Resolver.Address(family: AF_INET, bytes: [1])])
        }
        func addresses(_ limit: Duration) throws -> [Resolver.Address] {
            try resolver.addresses(
                host: "slow.example", port: 1, deadline: .now.advanced(by: limit), interrupt: nil)
        }
        for _ in 0..<5 {
            let error = #expect(throws: SocketError.self) { try addresses(.milliseconds(10)) }
            #expect(error?.description.contains("slow.example") == true)
        }
        #expect(lookUps.load(ordering: .relaxed) == 1, "one thread, however many attempts")
        mayAnswer.signal()
        #expect(try addresses(.seconds(20)).map(\.bytes) == [[1]])
        // Once it has been used the answer is asked for again.
        mayAnswer.signal()
        #expect(try addresses(.seconds(20)).count == 1)
        #expect(lookUps.load(ordering: .relaxed) == 2)
    }

    @Test func `what a slow peer has taken does not stay in memory`() throws {
        let (listener, port) = try #require(Socket.freePort())
        defer { Socket.close(listener) }
        try #require(listen(listener, 1) == 0)
        let limit = MonotonicTime.now.advanced(by: .seconds(30))
        let stream = try SocketStream(host: "127.0.0.1", port: port, tls: nil, deadline: limit)
        defer { stream.close() }
        let peer = accept(listener, nil, nil)
        try #require(peer >= 0)
        defer { Socket.close(peer) }
        prepare(socket: peer)
        let message = [UInt8](repeating: 7, count: 100_000)
        var buffer = [UInt8](repeating: 0, count: 64 * 1024)
        var held = 0
        // Never is everything taken: as soon as the socket takes some, more is added.
        for _ in 0..<1_000 {
            while stream.unsentCount < 256 * 1024 { stream.append { $0 += message } }
            try stream.flush()
            held = max(held, stream.heldCount)
            _ = buffer.withUnsafeMutableBytes { Socket.receive(peer, into: $0) }
        }
        #expect(stream.sentCount > 10 << 20)
        #expect(held < 2 << 20, "\(held) bytes")
    }

    @Test func `opening a connection ends at once when it is interrupted`() throws {
        let interrupt = try Wakeup()
        interrupt.signal()
        let start = MonotonicTime.now
        let (listener, port) = try #require(Socket.freePort())
        defer { Socket.close(listener) }
        try #require(listen(listener, 1) == 0)
        // The peer never answers the handshake.
        let tls = TLSOptions(
            authorityFile: nil, certificateFile: nil, privateKeyFile: nil, verifiesPeer: true, verifiesHost: true)
        let error = #expect(throws: SocketError.self) {
            _ = try SocketStream(
                host: "127.0.0.1", port: port, tls: tls, deadline: start.advanced(by: .seconds(60)),
                interrupt: interrupt)
        }
        #expect(error?.kind == .interrupted)
        #expect(MonotonicTime.now < start.advanced(by: .seconds(30)))
    }
}
