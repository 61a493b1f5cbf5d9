internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// A TCP proxy on loopback that does to connections what networks do: delay, stall, dribble, cut, half-close, refuse.
///
/// ```swift
/// try await FaultProxy.withProxy(to: stack.rabbitMQPort) { proxy in
///     let transport = try RabbitMQTransport(configuration: RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port))
///     proxy.fault = .stall
///     …
///     proxy.cut()
/// }
/// ```
///
/// Each connection takes two threads. It is meant for tests, not for traffic.
public final class FaultProxy: Sendable {
    /// What is done to the bytes of all connections, present and future.
    public struct Fault: Sendable, Hashable {
        enum Kind: Hashable {
            case none, stall, trickle, refuse
            case stallToward(Side)
            case delay(Duration)
        }

        let kind: Kind

        /// Bytes pass.
        public static let none = Fault(kind: .none)
        /// No byte passes, in either direction, and nobody is told: a cable that was pulled. What waits passes later.
        public static let stall = Fault(kind: .stall)
        /// No byte passes to that side; the other way they do. What waits passes later.
        public static func stall(toward side: Side) -> Fault { Fault(kind: .stallToward(side)) }
        /// Bytes pass one at a time.
        public static let trickle = Fault(kind: .trickle)
        /// New connections are closed at once; those that are open go on.
        public static let refuse = Fault(kind: .refuse)
        /// Bytes pass so much later.
        public static func delay(_ duration: Duration) -> Fault { Fault(kind: .delay(duration)) }
    }

    /// One side of the proxied connections.
    public enum Side: Sendable {
        /// Whoever connected to the proxy.
        case client
        /// Whom the proxy connected to.
        case server
    }

    private struct State {
        var fault = Fault.none
        var links: [Int: Link] = [:]
        var accepted = 0
        var isClosed = false
    }

    /// The port to connect to, on 127.0.0.1.
    public let port: Int
    private let target: Int
    private let listener: Int32
    private let wakeup: Wakeup
    private let state = Mutex(State())

    /// Runs `body` with a proxy to a port of 127.0.0.1, and closes all its connections afterwards.
    public static func withProxy<Result: Sendable>(
        to target: Int, _ body: (FaultProxy) async throws -> Result
    ) async throws -> Result {
        let proxy = try FaultProxy(target: target)
        defer { proxy.close() }
        return try await body(proxy)
    }

    private init(target: Int) throws {
        guard let (descriptor, port) = Socket.freePort(), listen(descriptor, 64) == 0 else {
            throw EventsError(.connectionFailed, "no port can be listened on", operation: "fault proxy")
        }
        self.listener = descriptor
        self.port = port
        self.target = target
        self.wakeup = try Wakeup()
        try startThread(name: "fault-proxy", stackSize: 1 << 20) { [self] in accept() }
    }

    /// What is done to the bytes now.
    public var fault: Fault {
        get { state.withLock { $0.fault } }
        set {
            let links = state.withLock { state in
                state.fault = newValue
                return Array(state.links.values)
            }
            for link in links { link.signal() }
        }
    }

    /// How many connections are open.
    public var connectionCount: Int { state.withLock { $0.links.count } }

    /// How many connections there have been.
    public var acceptedCount: Int { state.withLock { $0.accepted } }

    /// Ends all connections with a reset, as a crashed host does. New ones are accepted.
    public func cut() {
        for link in state.withLock({ Array($0.links.values) }) { link.reset() }
    }

    /// Tells one side of all connections that the other has nothing more to say, and lets bytes the other way pass.
    public func halfClose(toward side: Side) {
        for link in state.withLock({ Array($0.links.values) }) { link.halfClose(toward: side) }
    }

    private func close() {
        let links = state.withLock { state in
            state.isClosed = true
            return Array(state.links.values)
        }
        wakeup.signal()
        for link in links { link.reset() }
    }

    private func accept() {
        defer { Socket.close(listener) }
        while !state.withLock({ $0.isClosed }) {
            var entries = [
                pollfd(fd: listener, events: Int16(POLLIN), revents: 0),
                pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0),
            ]
            guard poll(&entries, 2, -1) > 0, entries[0].revents != 0 else { continue }
            #if canImport(Glibc)
            let client = Glibc.accept(listener, nil, nil)
            #elseif canImport(Musl)
            let client = Musl.accept(listener, nil, nil)
            #else
            let client = Darwin.accept(listener, nil, nil)
            #endif
            guard client >= 0 else { continue }
            prepare(socket: client)
            guard fault != .refuse,
                let server = try? Socket.connect(
                    host: "127.0.0.1", port: target, deadline: MonotonicTime(.now + .seconds(1)))
            else {
                Socket.close(client)
                continue
            }
            guard let link = try? Link(client: client, server: server) else {
                Socket.close(client)
                Socket.close(server)
                continue
            }
            let number = state.withLock { state in
                state.accepted += 1
                state.links[state.accepted] = link
                return state.accepted
            }
            link.start(fault: { [self] in fault }) { [self] in
                state.withLock { state in _ = state.links.removeValue(forKey: number) }
            }
            if state.withLock({ $0.isClosed }) { link.reset() }
        }
    }
}

/// One proxied connection: two threads, one a direction.
private final class Link: Sendable {
    private struct State {
        var isReset = false
        var running = 2
    }

    private let client: Int32
    private let server: Int32
    private let wakeups: [Wakeup]
    private let state = Mutex(State())

    init(client: Int32, server: Int32) throws {
        self.client = client
        self.server = server
        wakeups = [try Wakeup(), try Wakeup()]
    }

    func start(fault: @escaping @Sendable () -> FaultProxy.Fault, ended: @escaping @Sendable () -> Void) {
        let directions: [(Int32, Int32, FaultProxy.Side)] = [(client, server, .server), (server, client, .client)]
        for (index, (source, sink, side)) in directions.enumerated() {
            let run: @Sendable () -> Void = { [self] in
                pump(from: source, to: sink, wakeups[index]) {
                    let fault = fault()
                    return fault == .stall(toward: side) ? .stall : fault
                }
                finish(ended)
            }
            do throws(SocketError) {
                try startThread(name: "fault-link", stackSize: 1 << 20, run)
            } catch {
                reset()
                finish(ended)
            }
        }
    }

    private func finish(_ ended: () -> Void) {
        let isLast = state.withLock { state in
            state.running -= 1
            return state.running == 0
        }
        guard isLast else { return }
        Socket.close(client)
        Socket.close(server)
        ended()
    }

    func signal() { for wakeup in wakeups { wakeup.signal() } }

    func reset() {
        state.withLock { state in
            guard state.running > 0 else { return }
            state.isReset = true
            // Closing with bytes to be sent and no time to do so is a reset on the wire (RFC 1122, 4.2.2.13).
            var linger = linger(l_onoff: 1, l_linger: 0)
            for descriptor in [client, server] {
                setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &linger, socklen_t(MemoryLayout.size(ofValue: linger)))
            }
        }
        signal()
    }

    func halfClose(toward side: FaultProxy.Side) {
        state.withLock { state in
            // Under the lock: the descriptors are open while a thread runs.
            if state.running > 0 { _ = shutdown(side == .client ? client : server, Int32(SHUT_WR)) }
        }
    }

    /// Moves bytes until one side closes, or the link is reset.
    private func pump(
        from source: Int32, to sink: Int32, _ wakeup: Wakeup, _ fault: () -> FaultProxy.Fault
    ) {
        var buffer = [UInt8](repeating: 0, count: 64 * 1024)
        while !state.withLock({ $0.isReset }) {
            let current = fault()
            var entries = [
                pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0),
                pollfd(fd: source, events: Int16(POLLIN), revents: 0),
            ]
            // A stalled link does not even look at its socket.
            guard poll(&entries, current == .stall ? 1 : 2, -1) > 0 else { continue }
            if entries[0].revents != 0 { wakeup.drain() }
            guard current != .stall, entries[1].revents != 0, fault() == current else { continue }
            let limit = current == .trickle ? 1 : buffer.count
            let received = buffer.withUnsafeMutableBytes {
                Socket.receive(source, into: UnsafeMutableRawBufferPointer(rebasing: $0[..<limit]))
            }
            switch received {
            case .wouldBlock: continue
            case .closed:
                _ = shutdown(sink, Int32(SHUT_WR))
                // The other direction may still have something to say; when it has not, both are closed.
                return
            case .bytes(let count):
                if case .delay(let duration) = current.kind { wait(duration, wakeup) }
                guard send(buffer[..<count], to: sink) else {
                    reset()
                    return
                }
            }
        }
    }

    private func wait(_ duration: Duration, _ wakeup: Wakeup) {
        let end = MonotonicTime.now.advanced(by: duration)
        while MonotonicTime.now < end, !state.withLock({ $0.isReset }) {
            var entry = pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0)
            if poll(&entry, 1, MonotonicTime.now.pollTimeout(until: end)) > 0 { wakeup.drain() }
        }
    }

    private func send(_ bytes: ArraySlice<UInt8>, to sink: Int32) -> Bool {
        var rest = bytes
        while !rest.isEmpty, !state.withLock({ $0.isReset }) {
            switch rest.withUnsafeBytes({ Socket.send(sink, $0) }) {
            case .bytes(let count): rest = rest.dropFirst(count)
            case .wouldBlock: try? Socket.wait(sink, toWrite: true, until: .now.advanced(by: .milliseconds(100))) { "" }
            case .closed: return false
            }
        }
        return rest.isEmpty
    }
}
