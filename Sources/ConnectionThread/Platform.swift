// Everything that differs between Linux and Darwin is in this file.

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

#if os(Linux)
internal import CConnectionThread

#if canImport(Glibc)
let streamSocket = Int32(SOCK_STREAM.rawValue)
let closeOnExec = Int32(SOCK_CLOEXEC.rawValue)
#else
let streamSocket = Int32(SOCK_STREAM)
let closeOnExec = Int32(SOCK_CLOEXEC)
#endif
let noSignal = Int32(MSG_NOSIGNAL)
let tcpProtocol = Int32(IPPROTO_TCP)
#else
let streamSocket = SOCK_STREAM
/// `prepare(socket:)` sets it.
let closeOnExec: Int32 = 0
let noSignal: Int32 = 0
let tcpProtocol = IPPROTO_TCP
#endif

/// The operating system's own words for an error number.
package func describe(errno code: Int32) -> String {
    String(cString: strerror(code))
}

func setOption(_ descriptor: Int32, _ level: Int32, _ option: Int32, _ value: Int32) {
    var value = value
    // The result is ignored: these options tune a socket, none is needed for it to be right.
    _ = setsockopt(descriptor, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
}

/// Makes a fresh socket ready for a connection thread: non-blocking, closed on exec, no delay, no SIGPIPE.
package func prepare(socket descriptor: Int32) {
    _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK)
    _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
    setOption(descriptor, tcpProtocol, TCP_NODELAY, 1)
    setOption(descriptor, SOL_SOCKET, SO_KEEPALIVE, 1)
    #if canImport(Darwin)
    setOption(descriptor, SOL_SOCKET, SO_NOSIGPIPE, 1)
    #endif
}

/// A descriptor that becomes readable when another thread asks for attention: `eventfd`, or a pipe on Darwin.
package final class Wakeup: Sendable {
    package let readEnd: Int32
    private let writeEnd: Int32

    package init() throws(SocketError) {
        #if os(Linux)
        let descriptor = smap_eventfd()
        guard descriptor >= 0 else { throw SocketError(.outOfDescriptors, describe(errno: errno)) }
        readEnd = descriptor
        writeEnd = descriptor
        #else
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw SocketError(.outOfDescriptors, describe(errno: errno)) }
        for end in ends {
            _ = fcntl(end, F_SETFL, O_NONBLOCK)
            _ = fcntl(end, F_SETFD, FD_CLOEXEC)
        }
        readEnd = ends[0]
        writeEnd = ends[1]
        #endif
    }

    deinit {
        _ = close(readEnd)
        if writeEnd != readEnd { _ = close(writeEnd) }
    }

    package func signal() {
        // A full counter or pipe means that a wake-up is already under way.
        var one: UInt64 = 1
        _ = write(writeEnd, &one, MemoryLayout<UInt64>.size)
    }

    package func drain() {
        var buffer: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
        while read(readEnd, &buffer, MemoryLayout.size(ofValue: buffer)) == MemoryLayout.size(ofValue: buffer) {}
    }
}

/// Starts a detached thread with a stack of the given size, with every signal blocked: signals are for the process's
/// own threads to handle.
package func startThread(name: String, stackSize: Int, _ body: @escaping @Sendable () -> Void) throws(SocketError) {
    final class Start: Sendable {
        let name: String
        let body: @Sendable () -> Void
        init(name: String, body: @escaping @Sendable () -> Void) {
            self.name = name
            self.body = body
        }
    }
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    pthread_attr_setstacksize(&attributes, stackSize)

    // Sound: the reference is retained here once and released once, by the thread that is started, or below.
    let start = Unmanaged.passRetained(Start(name: String(name.prefix(15)), body: body))
    #if canImport(Darwin)
    var thread: pthread_t?
    let code = pthread_create(
        &thread, &attributes,
        { argument in
            let start = Unmanaged<Start>.fromOpaque(argument).takeRetainedValue()
            pthread_setname_np(start.name)
            blockSignals()
            start.body()
            return nil
        }, start.toOpaque())
    #else
    var thread = pthread_t()
    let code = pthread_create(
        &thread, &attributes,
        { argument in
            guard let argument else { return nil }
            let start = Unmanaged<Start>.fromOpaque(argument).takeRetainedValue()
            #if os(Linux)
            smap_name_this_thread(start.name)
            #endif
            blockSignals()
            start.body()
            return nil
        }, start.toOpaque())
    #endif
    guard code == 0 else {
        start.release()
        throw SocketError(.outOfThreads, describe(errno: code))
    }
}

private func blockSignals() {
    var all = sigset_t()
    sigfillset(&all)
    pthread_sigmask(SIG_BLOCK, &all, nil)
}
