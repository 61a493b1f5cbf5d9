import Foundation
import Glibc
import Synchronization

/// An AMQP 0-9-1 broker for tests: it keeps no queues, notes everything that clients send, and can misbehave.
final class FakeBroker: Sendable {
    /// What the broker offers to its clients.
    struct Options: Sendable {
        var channelMax: UInt16 = 2047
        var frameMax: UInt32 = 131_072
        /// What connections after the first are offered, as by another node of a cluster.
        var laterFrameMax: UInt32?
        var heartbeat: UInt16 = 0
        var mechanisms = "PLAIN EXTERNAL"
        /// Whether the broker sends the heartbeats that it agreed to; it never asks for the client's.
        var sendsHeartbeats = true
    }

    /// A message that a client published.
    struct Publish: Sendable {
        /// Counted from 1 on each channel after confirm.select; 0 without it.
        let tag: UInt64
        let exchange: String
        let routingKey: String
        let isMandatory: Bool
        let messageID: String?
        /// The whole payload of the content header frame.
        let header: [UInt8]
        let body: [UInt8]
        /// The sizes of the payloads of all of the message's frames, method and header included.
        let frameSizes: [Int]
    }

    /// One thing that a client sent or did.
    struct Received: Sendable {
        /// What it was.
        enum Kind: Sendable {
            case startOK(mechanism: String, response: [UInt8])
            case tuneOK(channelMax: UInt16, frameMax: UInt32, heartbeat: UInt16)
            case open(virtualHost: String)
            case channelOpen
            case channelClose
            case channelCloseOK
            case connectionClose
            case connectionCloseOK
            case declareExchange(name: String, passive: Bool)
            /// The name is the broker's where the client gave none.
            case declareQueue(name: String, passive: Bool)
            case bind(queue: String, exchange: String, key: String)
            case confirmSelect
            case qos(UInt16)
            /// The tag is the broker's where the client gave none.
            case consume(queue: String, tag: String)
            case cancel(tag: String)
            case publish(Publish)
            case ack(tag: UInt64, multiple: Bool)
            /// A basic.reject, or a basic.nack.
            case reject(tag: UInt64, requeue: Bool)
            case heartbeat
            /// Any other method; 0 and 0 for frames that are broken or out of place.
            case other(classID: UInt16, methodID: UInt16)
            /// The connection's end, whichever side ended it.
            case disconnected
        }

        /// The ``FakeConnection/index`` of the connection.
        let connection: Int
        let channel: UInt16
        let kind: Kind
    }

    /// The end of ``FakeBroker/waitUntil(_:_:)``'s patience.
    struct TimedOut: Error, CustomStringConvertible {
        let description: String
    }

    /// A system call that failed while the broker was being set up.
    struct SetupFailed: Error {
        let call: String
        let code: Int32
    }

    private struct State {
        /// `nil` once closed.
        var listener: Int32?
        var isClosing = false
        var refusesConnections = false
        var acceptedCount = 0
        var connections: [FakeConnection] = []
        var received: [Received] = []
        var publishes: [Publish] = []
        var signals: [Int: AsyncStream<Void>.Continuation] = [:]
        var lastSignal = 0
        /// How many threads have not come to their end.
        var threadCount = 0
        /// All threads that were started, for joining them.
        var threads: [pthread_t] = []
        var allEnded: CheckedContinuation<Void, Never>?
    }

    /// Where clients connect to, on 127.0.0.1.
    let port: Int
    private let options: Options
    private let react: @Sendable (Received, FakeConnection) -> Bool
    private let state: Mutex<State>

    private init(_ options: Options, _ react: @escaping @Sendable (Received, FakeConnection) -> Bool) throws {
        let (listener, port) = try Self.listen()
        self.port = port
        self.options = options
        self.react = react
        state = Mutex(State(listener: listener, threadCount: 1))
        guard startThread("fake-amqp", { $0.acceptAll(listener) }) else {
            Glibc.close(listener)
            throw SetupFailed(call: "pthread_create", code: EAGAIN)
        }
    }

    /// Runs a broker for as long as `body` takes, and returns when all of its threads have ended.
    ///
    /// - Parameters:
    ///   - options: What the broker offers.
    ///   - react: Called on the connection's thread for everything received, before the default reaction; `true` means
    ///     that there shall be none. For ``Received/Kind/disconnected`` and acknowledgements there is none anyway.
    ///   - body: What to do meanwhile.
    static func withBroker<R: Sendable>(
        _ options: Options = Options(),
        _ react: @escaping @Sendable (Received, FakeConnection) -> Bool = { _, _ in false },
        body: (FakeBroker) async throws -> R
    ) async throws -> R {
        let broker = try FakeBroker(options, react)
        do {
            let result = try await body(broker)
            await broker.close()
            return result
        } catch {
            await broker.close()
            throw error
        }
    }
}

// MARK: - What a test can see

extension FakeBroker {
    /// Everything received so far, in order, across connections.
    ///
    /// A thing shows up only after `react` and the default reaction, so a test that sees it here can count on the answer
    /// being on its way before anything sent from now on.
    var received: [Received] { state.withLock { $0.received } }

    /// Every message published so far, in the same order as in ``received``.
    func publishes() -> [Publish] { state.withLock { $0.publishes } }

    /// The connections served so far, ended ones included: number 1 is at index 0.
    var connections: [FakeConnection] { state.withLock { $0.connections } }

    /// How many connections were accepted, including those closed at once because of ``refusesConnections``.
    var acceptedCount: Int { state.withLock { $0.acceptedCount } }

    /// Whether new connections are closed as soon as they are accepted.
    var refusesConnections: Bool {
        get { state.withLock { $0.refusesConnections } }
        set { state.withLock { $0.refusesConnections = newValue } }
    }

    /// Waits for a condition, which is looked at whenever something happens at the broker, and now and then besides.
    ///
    /// - Throws: ``TimedOut``, with the last things received, when the limit passes; `CancellationError`.
    func waitUntil(
        _ limit: Duration = .seconds(20), _ condition: @escaping @Sendable (FakeBroker) -> Bool
    ) async throws {
        let (changes, signal) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
        signal.yield()
        let key = state.withLock { state in
            state.lastSignal += 1
            state.signals[state.lastSignal] = signal
            return state.lastSignal
        }
        // For conditions that look at more than the broker, and for the limit.
        let ticker = Task {
            while !Task.isCancelled {
                try? await Task.sleep(for: .milliseconds(20))
                signal.yield()
            }
        }
        defer {
            ticker.cancel()
            state.withLock { state in _ = state.signals.removeValue(forKey: key) }
        }
        let deadline = ContinuousClock.now + limit
        for await _ in changes {
            if condition(self) { return }
            if ContinuousClock.now >= deadline { throw TimedOut(description: log(limit)) }
        }
        throw CancellationError()
    }

    private func log(_ limit: Duration) -> String {
        let (received, accepted) = state.withLock { ($0.received, $0.acceptedCount) }
        let shown = received.suffix(40)
        let lines = shown.enumerated().map { "  \(received.count - shown.count + $0.offset + 1). \($0.element)" }
        return """
            The condition did not become true within \(limit). The broker accepted \(accepted) connections and \
            received \(received.count) things, of which these are the last \(shown.count):
            \(lines.joined(separator: "\n"))
            """
    }
}

extension FakeBroker.Received: CustomStringConvertible {
    var description: String {
        let text =
            switch kind {
            case .startOK(let mechanism, let response):
                "startOK(mechanism: \(mechanism), response: \(response.count) bytes)"
            case .publish(let publish): "publish(\(publish))"
            default: "\(kind)"
            }
        return "connection \(connection), channel \(channel): \(text)"
    }

    /// The message, if one was published.
    var publish: FakeBroker.Publish? {
        if case .publish(let publish) = kind { publish } else { nil }
    }
}

extension FakeBroker.Publish: CustomStringConvertible {
    var description: String {
        "tag: \(tag), exchange: \(exchange), key: \(routingKey), mandatory: \(isMandatory), "
            + "id: \(messageID ?? "none"), body: \(body.count) bytes"
    }
}

// MARK: - The threads

extension FakeBroker {
    /// Opens a socket on a free port.
    private static func listen() throws -> (descriptor: Int32, port: Int) {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw SetupFailed(call: "socket", code: errno) }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        var size = socklen_t(MemoryLayout<sockaddr_in>.size)
        // Sound: a sockaddr_in is a sockaddr of the size that is passed along.
        let failed = withUnsafeMutableBytes(of: &address) { bytes -> String? in
            guard let pointer = bytes.baseAddress?.assumingMemoryBound(to: sockaddr.self) else { return "bind" }
            if bind(descriptor, pointer, size) != 0 { return "bind" }
            if Glibc.listen(descriptor, 128) != 0 { return "listen" }
            return getsockname(descriptor, pointer, &size) != 0 ? "getsockname" : nil
        }
        if let failed {
            let code = errno
            Glibc.close(descriptor)
            throw SetupFailed(call: failed, code: code)
        }
        return (descriptor, Int(UInt16(bigEndian: address.sin_port)))
    }

    /// What a new thread is given.
    private final class ThreadStart {
        let name: String
        let body: @Sendable () -> Void

        init(name: String, body: @escaping @Sendable () -> Void) {
            self.name = name
            self.body = body
        }
    }

    /// Starts a thread that is in the state's count already; `false` if the system does not let it.
    private func startThread(_ name: String, _ body: @escaping @Sendable (FakeBroker) -> Void) -> Bool {
        let start = ThreadStart(name: name) { [self] in
            body(self)
            endThread()
        }
        var thread = pthread_t()
        let argument = Unmanaged.passRetained(start)
        let status = pthread_create(
            &thread, nil,
            { argument in
                guard let argument else { return nil }
                // Sound: the argument is the object retained for this thread alone.
                let start = Unmanaged<ThreadStart>.fromOpaque(argument).takeRetainedValue()
                Thread.current.name = start.name
                start.body()
                return nil
            }, argument.toOpaque())
        guard status == 0 else {
            argument.release()
            return false
        }
        state.withLock { $0.threads.append(thread) }
        return true
    }

    /// Takes a thread out of the count, and wakes up who waits for the last one.
    private func endThread() {
        let waiting = state.withLock { state in
            state.threadCount -= 1
            return state.threadCount == 0 ? state.allEnded.take() : nil
        }
        waiting?.resume()
    }

    private func acceptAll(_ listener: Int32) {
        while true {
            let descriptor = accept(listener, nil, nil)
            let isClosing = state.withLock { $0.isClosing }
            guard descriptor >= 0 else {
                if isClosing { break }
                // Out of descriptors, or a client that went away again.
                usleep(1000)
                continue
            }
            _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
            var yes: Int32 = 1
            setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_NODELAY, &yes, socklen_t(MemoryLayout<Int32>.size))
            begin(descriptor)
        }
        state.withLock { $0.listener = nil }
        Glibc.close(listener)
    }

    /// Serves a connection on a thread of its own, or closes it.
    private func begin(_ descriptor: Int32) {
        let connection = state.withLock { state -> FakeConnection? in
            state.acceptedCount += 1
            var options = options
            if let later = options.laterFrameMax, !state.connections.isEmpty { options.frameMax = later }
            guard !state.isClosing, !state.refusesConnections,
                let connection = FakeConnection(
                    descriptor: descriptor, index: state.connections.count + 1, options: options)
            else { return nil }
            state.connections.append(connection)
            state.threadCount += 1
            return connection
        }
        if let connection {
            let isServed = startThread("fake-amqp-\(connection.index)") { broker in
                connection.serve(react: broker.react, record: broker.record)
            }
            if !isServed {
                connection.finish()
                endThread()
            }
        } else {
            Glibc.close(descriptor)
        }
        signalAll()
    }

    private func record(_ received: Received) {
        state.withLock { state in
            state.received.append(received)
            if case .publish(let publish) = received.kind { state.publishes.append(publish) }
        }
        signalAll()
    }

    private func signalAll() {
        for signal in state.withLock({ Array($0.signals.values) }) { signal.yield() }
    }

    /// Closes all sockets, and waits until the threads have ended.
    private func close() async {
        let connections = state.withLock { state in
            state.isClosing = true
            // Ends the accept call; the thread then closes the descriptor.
            if let listener = state.listener { shutdown(listener, Int32(SHUT_RDWR)) }
            return state.connections
        }
        for connection in connections { connection.shut() }
        await withCheckedContinuation { continuation in
            let isOver = state.withLock { state in
                if state.threadCount > 0 { state.allEnded = continuation }
                return state.threadCount == 0
            }
            if isOver { continuation.resume() }
        }
        for thread in state.withLock({ $0.threads }) { pthread_join(thread, nil) }
    }
}
