internal import Synchronization

#if canImport(Glibc)
internal import Glibc
#elseif canImport(Musl)
internal import Musl
#elseif canImport(Darwin)
internal import Darwin
#endif

/// What a connection thread waits for before its next round.
package struct PollInterest: Sendable {
    /// Come round when the socket takes bytes again, not only when it has some.
    package var writable: Bool
    /// Come round at this time at the latest: a heartbeat, a timer.
    package var timer: MonotonicTime?
    /// Let so many microseconds of work pile up first, whatever happens meanwhile: on a busy connection a round for every
    /// few bytes costs more in context switches than the work itself.
    package var pause: UInt32

    package init(writable: Bool = false, timer: MonotonicTime? = nil, pause: UInt32 = 0) {
        self.writable = writable
        self.timer = timer
        self.pause = pause
    }
}

/// The protocol spoken over one connection. Created, used and dropped on its connection thread only, so it needs no
/// locks for what is its own.
package protocol ConnectionDriver: AnyObject {
    /// The socket to poll.
    var descriptor: Int32 { get }

    /// Takes what callers have left, acts on it, and reads what has come. An error ends the connection.
    ///
    /// - Parameter isReadable: Whether the socket has bytes to read, or has ended.
    func runOnce(now: MonotonicTime, isReadable: Bool) throws -> PollInterest

    /// The last call on the thread: ends the connection, orderly if `error` is nil, frees what is held, and answers the
    /// callers that wait.
    func finish(_ error: (any Error)?)
}

/// One operating system thread that owns one connection; nothing else ever touches its socket.
///
/// Its loop: round (mailbox, act, read, write, timers), then `poll(socket, eventfd)`. Callers leave work where the driver
/// finds it and call ``wake()``. The stack is 16 MiB, because librabbitmq recurses over nested header tables: about 114
/// bytes a level, of which a frame of 512 KiB has room for 87,000.
///
/// The ``Watchdog`` ends a round that takes longer than the stall limit: it shuts the socket down through a duplicate
/// of the descriptor (the C library may close the original, and the number may be used again by then), which makes
/// every system call on it return. Only the thread itself frees the connection.
package final class ConnectionThread: WatchdogTarget {
    package static let stackSize = 16 << 20

    private let wakeup: Wakeup
    /// Signalled once, by ``stop()``, and never drained: it ends whatever opening a connection waits for.
    package let interrupt: Wakeup
    private let stallLimit: Duration
    private let checkCalls: @Sendable (MonotonicTime) -> MonotonicTime?
    private let onStall: @Sendable () -> Void

    private let isSignalled = Atomic<Bool>(false)
    private let isStopping = Atomic<Bool>(false)
    private let roundEnds = Atomic<UInt64>(UInt64.max)
    private let hasComeRound = Atomic<Bool>(false)
    private let socketCopy = Mutex<Int32>(-1)

    /// - Parameters:
    ///   - stallLimit: How long the thread may stay away in one round before its socket is shut down.
    ///   - checkCalls: Ends calls past their deadline and returns the next one. Runs on the watchdog's thread.
    ///   - onStall: Answers whoever waits for a thread that hangs. Runs on the watchdog's thread, once per stall.
    package init(
        stallLimit: Duration,
        checkCalls: @escaping @Sendable (MonotonicTime) -> MonotonicTime? = { _ in nil },
        onStall: @escaping @Sendable () -> Void = {}
    ) throws {
        self.wakeup = try Wakeup()
        self.interrupt = try Wakeup()
        self.stallLimit = stallLimit
        self.checkCalls = checkCalls
        self.onStall = onStall
    }

    /// Starts the thread. `open` makes the driver on it, and may block: it is under the watchdog too.
    ///
    /// - Parameters:
    ///   - failed: Told when `open` throws.
    ///   - retryDelay: Asked after each failure, of `open` or of a round: how long to wait before opening again. Nil ends
    ///     the thread, which is the default.
    ///   - ended: Told last of all, when the thread has given up everything it had.
    package func start(
        name: String,
        openLimit: Duration,
        open: @escaping @Sendable (ConnectionThread) throws -> any ConnectionDriver,
        failed: @escaping @Sendable (any Error) -> Void,
        retryDelay: @escaping @Sendable (any Error) -> Duration? = { _ in nil },
        ended: @escaping @Sendable () -> Void
    ) throws {
        try Watchdog.shared.add(self)
        do {
            try startThread(name: name, stackSize: Self.stackSize) { [self] in
                while let failure = serve(openLimit: openLimit, open: open, failed: failed),
                    let delay = retryDelay(failure), pause(delay)
                {}
                Watchdog.shared.remove(self)
                ended()
            }
        } catch {
            Watchdog.shared.remove(self)
            throw error
        }
    }

    /// Makes the thread come round soon. Any thread; one system call at most per round.
    package func wake() {
        if !isSignalled.exchange(true, ordering: .acquiringAndReleasing) { wakeup.signal() }
    }

    /// Asks the thread to end after its current round, or at once while it opens a connection.
    package func stop() {
        isStopping.store(true, ordering: .sequentiallyConsistent)
        interrupt.signal()
        wake()
    }

    /// Lets the watchdog shut this socket down. The driver calls it as soon as it has a descriptor.
    package func registerSocket(_ descriptor: Int32) throws(SocketError) {
        let copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0 else { throw SocketError(.outOfDescriptors, describe(errno: errno)) }
        let old = socketCopy.withLock { current in
            defer { current = copy }
            return current
        }
        if old >= 0 { Socket.close(old) }
    }

    /// Shuts the socket down from any thread: whatever waits on it returns at once.
    package func shutDownSocket() {
        // Under the lock, so that the copy is not closed, and its number used again, in between.
        socketCopy.withLock { copy in
            if copy >= 0 { _ = shutdown(copy, Int32(SHUT_RDWR)) }
        }
    }

    package func check(now: MonotonicTime) -> MonotonicTime? {
        let end = roundEnds.load(ordering: .sequentiallyConsistent)
        var next = MonotonicTime(nanoseconds: end)
        // A busy thread begins rounds all the time: a watchdog that forgot it between two of them would be woken by
        // the next.
        if hasComeRound.exchange(false, ordering: .relaxed) { next = min(next, now.advanced(by: stallLimit)) }
        if now.nanoseconds >= end {
            // First the callers, with the reason; the thread itself, once it is free, would find a less telling one.
            onStall()
            shutDownSocket()
            // If that did not free it, look again; callers have been answered.
            next = now.advanced(by: .seconds(1))
        }
        if let deadline = checkCalls(now) { next = min(next, deadline) }
        return next == .distantFuture ? nil : next
    }

    private func beginRound(limit: Duration) {
        let end = MonotonicTime.now.advanced(by: limit)
        roundEnds.store(end.nanoseconds, ordering: .sequentiallyConsistent)
        hasComeRound.store(true, ordering: .relaxed)
        Watchdog.shared.schedule(at: end)
    }

    private func endRound() {
        roundEnds.store(.max, ordering: .sequentiallyConsistent)
    }

    /// One connection, from its opening to its end. Returns why it ended, nil if it was asked to.
    private func serve(
        openLimit: Duration,
        open: (ConnectionThread) throws -> any ConnectionDriver,
        failed: (any Error) -> Void
    ) -> (any Error)? {
        defer { releaseSocket() }
        beginRound(limit: openLimit)
        defer { endRound() }
        var failure: (any Error)?
        do {
            let driver = try open(self)
            endRound()
            do { try loop(driver) } catch { failure = error }
            beginRound(limit: stallLimit)
            driver.finish(failure)
        } catch {
            failure = error
            failed(error)
        }
        return failure
    }

    /// Waits between two connections. False once the thread has been asked to stop.
    private func pause(_ delay: Duration) -> Bool {
        let end = MonotonicTime.now.advanced(by: delay)
        while !isStopping.load(ordering: .acquiring), MonotonicTime.now < end {
            // Work that callers leave meanwhile waits for the connection; only a stop cuts this short.
            wakeup.drain()
            isSignalled.store(false, ordering: .sequentiallyConsistent)
            if isStopping.load(ordering: .sequentiallyConsistent) { break }
            var entry = pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0)
            _ = poll(&entry, 1, MonotonicTime.now.pollTimeout(until: end))
        }
        return !isStopping.load(ordering: .acquiring)
    }

    /// Gives up what ``registerSocket(_:)`` keeps, before the socket is closed.
    package func releaseSocket() {
        let copy = socketCopy.withLock { copy in
            defer { copy = -1 }
            return copy
        }
        if copy >= 0 { Socket.close(copy) }
    }

    private func loop(_ driver: any ConnectionDriver) throws {
        var entries = [
            pollfd(fd: driver.descriptor, events: Int16(POLLIN), revents: 0),
            pollfd(fd: wakeup.readEnd, events: Int16(POLLIN), revents: 0),
        ]
        var hasSignal = false
        // What came with the last bytes of the login has not been read yet.
        var isReadable = true
        while true {
            // Drained first, then the flag lowered, then the work taken: a caller that finds the flag up has left its
            // work before the flag is lowered, and one that finds it down signals again. A signal may come after its flag
            // was seen; left where it is, it would end every wait at once.
            if hasSignal || isSignalled.load(ordering: .acquiring) {
                wakeup.drain()
                _ = isSignalled.exchange(false, ordering: .acquiringAndReleasing)
            }
            let stopping = isStopping.load(ordering: .acquiring)
            beginRound(limit: stallLimit)
            let interest = try driver.runOnce(now: .now, isReadable: isReadable)
            endRound()
            if stopping { return }
            if interest.pause > 0 { usleep(interest.pause) }
            entries[0].events = Int16(POLLIN) | (interest.writable ? Int16(POLLOUT) : 0)
            let timeout = interest.timer.map { MonotonicTime.now.pollTimeout(until: $0) } ?? -1
            (isReadable, hasSignal) = (false, false)
            if poll(&entries, nfds_t(entries.count), timeout) > 0 {
                // An error or the end of the connection shows when it is read.
                isReadable = entries[0].revents & ~Int16(POLLOUT) != 0
                hasSignal = entries[1].revents != 0
            }
        }
    }
}
