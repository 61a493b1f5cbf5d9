#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// Plain TCP sockets as connection threads need them: bounded in time, non-blocking.
package enum Socket {
    /// What a non-blocking read or write came to.
    package enum Transfer: Sendable {
        case bytes(Int)
        case wouldBlock
        case closed(reason: String)
    }

    /// Opens a connected, non-blocking socket, or throws by the deadline. Every address of the host is tried in turn.
    /// The caller owns the descriptor.
    ///
    /// - Parameter interrupt: Ends the attempt at once when it is signalled. It is not drained.
    package static func connect(
        host: String, port: Int, deadline: MonotonicTime, interrupt: Wakeup? = nil
    ) throws(SocketError) -> Int32 {
        let addresses = try Resolver.shared.addresses(host: host, port: port, deadline: deadline, interrupt: interrupt)
        var last = SocketError(.unresolved, "\(host) has no address")
        for (index, address) in addresses.enumerated() {
            // An address that swallows packets must leave time for the next one.
            let share = MonotonicTime.now.advanced(share: addresses.count - index, until: deadline)
            do throws(SocketError) {
                return try connect(to: address, name: "\(host):\(port)", deadline: share, interrupt: interrupt)
            } catch {
                if error.kind == .interrupted { throw error }
                last = error
            }
        }
        throw last
    }

    /// Begins to resolve a name that ``connect(host:port:deadline:interrupt:)`` will ask for.
    package static func resolve(host: String, port: Int) { Resolver.shared.begin(host: host, port: port) }

    package static func close(_ descriptor: Int32) {
        #if canImport(Glibc)
        _ = Glibc.close(descriptor)
        #elseif canImport(Musl)
        _ = Musl.close(descriptor)
        #else
        _ = Darwin.close(descriptor)
        #endif
    }

    package static func send(_ descriptor: Int32, _ bytes: UnsafeRawBufferPointer) -> Transfer {
        while true {
            #if canImport(Glibc)
            let count = Glibc.send(descriptor, bytes.baseAddress, bytes.count, noSignal)
            #elseif canImport(Musl)
            let count = Musl.send(descriptor, bytes.baseAddress, bytes.count, noSignal)
            #else
            let count = Darwin.send(descriptor, bytes.baseAddress, bytes.count, noSignal)
            #endif
            if count >= 0 { return .bytes(count) }
            if errno == EINTR { continue }
            if errno == EAGAIN || errno == EWOULDBLOCK { return .wouldBlock }
            return .closed(reason: describe(errno: errno))
        }
    }

    package static func receive(_ descriptor: Int32, into buffer: UnsafeMutableRawBufferPointer) -> Transfer {
        while true {
            let count = recv(descriptor, buffer.baseAddress, buffer.count, 0)
            if count > 0 { return .bytes(count) }
            if count == 0 { return .closed(reason: "the server closed the connection") }
            if errno == EINTR { continue }
            if errno == EAGAIN || errno == EWOULDBLOCK { return .wouldBlock }
            return .closed(reason: describe(errno: errno))
        }
    }

    private static func connect(
        to address: Resolver.Address, name: String, deadline: MonotonicTime, interrupt: Wakeup?
    ) throws(SocketError) -> Int32 {
        let descriptor = socket(address.family, streamSocket | closeOnExec, 0)
        guard descriptor >= 0 else { throw SocketError(.outOfDescriptors, "\(name): \(describe(errno: errno))") }
        prepare(socket: descriptor)
        let result = address.bytes.withUnsafeBytes { raw -> Int32 in
            guard let base = raw.baseAddress else { return -1 }
            // Sound: the bytes are a sockaddr of just this length, as getaddrinfo gave them.
            #if canImport(Glibc)
            return Glibc.connect(descriptor, base.assumingMemoryBound(to: sockaddr.self), socklen_t(raw.count))
            #elseif canImport(Musl)
            return Musl.connect(descriptor, base.assumingMemoryBound(to: sockaddr.self), socklen_t(raw.count))
            #else
            return Darwin.connect(descriptor, base.assumingMemoryBound(to: sockaddr.self), socklen_t(raw.count))
            #endif
        }
        if result == 0 { return descriptor }
        var code = errno
        if code == EINPROGRESS || code == EINTR {
            do throws(SocketError) {
                try wait(descriptor, toWrite: true, toRead: false, until: deadline, interrupt: interrupt) {
                    "\(name) did not answer in time"
                }
            } catch {
                close(descriptor)
                throw error
            }
            var length = socklen_t(MemoryLayout<Int32>.size)
            _ = getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &code, &length)
        }
        guard code == 0 else {
            close(descriptor)
            throw SocketError(.refused, "\(name): \(describe(errno: code))")
        }
        return descriptor
    }
}

extension Socket {
    /// A port on 127.0.0.1 that is free as long as the descriptor, which the caller owns, stays open.
    /// - Parameter wanted: The port, if it is free; by default any that the system gives.
    package static func freePort(_ wanted: UInt16 = 0) -> (descriptor: Int32, port: Int)? {
        let descriptor = socket(AF_INET, streamSocket, 0)
        guard descriptor >= 0 else { return nil }
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        address.sin_port = wanted.bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let isBound = withUnsafeMutableBytes(of: &address) { raw in
            // Sound: a sockaddr_in is what these calls take for AF_INET, and its length goes along.
            guard let base = raw.baseAddress?.assumingMemoryBound(to: sockaddr.self) else { return false }
            return bind(descriptor, base, length) == 0 && getsockname(descriptor, base, &length) == 0
        }
        guard isBound else {
            close(descriptor)
            return nil
        }
        return (descriptor, Int(UInt16(bigEndian: address.sin_port)))
    }
}

extension Socket {
    /// Waits until a descriptor has bytes, or takes some.
    ///
    /// - Parameters:
    ///   - interrupt: Ends the wait when it is signalled. It is not drained.
    ///   - what: The text of the error when the deadline has passed.
    /// - Throws: ``SocketError`` with `timedOut` or `interrupted`.
    package static func wait(
        _ descriptor: Int32, toWrite: Bool, toRead: Bool = true, until deadline: MonotonicTime,
        interrupt: Wakeup? = nil, _ what: () -> String
    ) throws(SocketError) {
        let events = (toRead ? Int16(POLLIN) : 0) | (toWrite ? Int16(POLLOUT) : 0)
        while true {
            let now = MonotonicTime.now
            guard now < deadline else { throw SocketError(.timedOut, what()) }
            // poll(2) leaves out entries with a negative descriptor.
            var entries = (
                pollfd(fd: descriptor, events: events, revents: 0),
                pollfd(fd: interrupt?.readEnd ?? -1, events: Int16(POLLIN), revents: 0)
            )
            let count = withUnsafeMutablePointer(to: &entries) { pair in
                // Sound: a homogeneous tuple is laid out like an array of its elements.
                pair.withMemoryRebound(to: pollfd.self, capacity: 2) { poll($0, 2, now.pollTimeout(until: deadline)) }
            }
            guard count > 0 else { continue }
            if entries.1.revents != 0 {
                throw SocketError(.interrupted, "the connection was closed while it was being opened")
            }
            return
        }
    }
}
