internal import Synchronization

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// Name resolution with a deadline. `getaddrinfo` cannot be interrupted, so it runs on a thread of its own.
///
/// A name is looked up once at a time: an attempt whose deadline passes first leaves the look-up to the next attempt. So a
/// name server that is slower than the deadline delays a connection and does not prevent it, and there are never more
/// threads than names.
final class Resolver: Sendable {
    struct Address: Sendable {
        let family: Int32
        let bytes: [UInt8]
    }

    typealias LookUp = @Sendable (_ host: String, _ port: Int) -> Result<[Address], SocketError>

    private final class Answer: Sendable {
        /// Signalled once, and never drained: it ends the wait of each attempt.
        let ready: Wakeup
        let result = Mutex<(result: Result<[Address], SocketError>, at: MonotonicTime)?>(nil)
        init() throws(SocketError) { ready = try Wakeup() }
    }

    static let shared = Resolver { host, port in
        do throws(SocketError) {
            return .success(try lookUp(host: host, port: port, flags: 0))
        } catch {
            return .failure(error)
        }
    }

    /// So long an answer that came too late for its attempt is good for the next one.
    private static let shelfLife = Duration.seconds(30)

    private let lookUp: LookUp
    /// The look-ups that are under way, or have ended without an attempt that waited.
    private let answers = Mutex<[String: Answer]>([:])

    init(_ lookUp: @escaping LookUp) { self.lookUp = lookUp }

    /// The addresses of a host. Throws by the deadline, or at once when `interrupt` is signalled.
    func addresses(
        host: String, port: Int, deadline: MonotonicTime, interrupt: Wakeup?
    ) throws(SocketError) -> [Address] {
        // Addresses in figures never ask a name server.
        if let direct = try? Self.lookUp(host: host, port: port, flags: AI_NUMERICHOST) { return direct }
        let answer = try answer(host: host, port: port)
        while true {
            if let (result, _) = answer.result.withLock({ $0 }) {
                answers.withLock { answers in
                    if answers[Self.key(host, port)] === answer { answers[Self.key(host, port)] = nil }
                }
                return try result.get()
            }
            try Socket.wait(answer.ready.readEnd, toWrite: false, until: deadline, interrupt: interrupt) {
                "\(host) was not resolved in time"
            }
        }
    }

    /// Begins a look-up whose answer will be asked for. Errors show then.
    func begin(host: String, port: Int) {
        guard (try? Self.lookUp(host: host, port: port, flags: AI_NUMERICHOST)) == nil else { return }
        _ = try? answer(host: host, port: port)
    }

    private static func key(_ host: String, _ port: Int) -> String { "\(host):\(port)" }

    /// The look-up that is under way, or has ended a moment ago; otherwise a new one.
    private func answer(host: String, port: Int) throws(SocketError) -> Answer {
        try answers.withLock { answers throws(SocketError) -> Answer in
            if let known = answers[Self.key(host, port)] {
                guard let (result, time) = known.result.withLock({ $0 }) else { return known }
                // A failure may be over.
                let shelfLife = if case .success = result { Self.shelfLife } else { Duration.seconds(1) }
                if time.advanced(by: shelfLife) > .now { return known }
            }
            let answer = try Answer()
            try startThread(name: "smap-resolve", stackSize: 1 << 20) { [lookUp] in
                let result = lookUp(host, port)
                answer.result.withLock { $0 = (result, .now) }
                answer.ready.signal()
            }
            answers[Self.key(host, port)] = answer
            return answer
        }
    }

    private static func lookUp(host: String, port: Int, flags: Int32) throws(SocketError) -> [Address] {
        var hints = addrinfo()
        hints.ai_family = AF_UNSPEC
        hints.ai_socktype = streamSocket
        hints.ai_flags = flags
        var list: UnsafeMutablePointer<addrinfo>?
        let code = getaddrinfo(host, String(port), &hints, &list)
        guard code == 0 else { throw SocketError(.unresolved, "\(host): \(String(cString: gai_strerror(code)))") }
        defer { freeaddrinfo(list) }
        var addresses: [Address] = []
        var next = list
        while let entry = next?.pointee {
            if let address = entry.ai_addr {
                let raw = UnsafeRawBufferPointer(start: address, count: Int(entry.ai_addrlen))
                addresses.append(Address(family: entry.ai_family, bytes: Array(raw)))
            }
            next = entry.ai_next
        }
        return addresses
    }
}
