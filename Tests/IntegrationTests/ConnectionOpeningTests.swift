import Dispatch
import Logging
import SMAPEvents
import SMAPRabbitMQ
import Synchronization
import Testing

@Suite struct ConnectionOpeningTests {
    /// Whoever finds the connection not yet open is told when it is. A call that comes between the two, on whichever
    /// thread, would otherwise wait for its deadline beside an open connection.
    @Test(.timeLimit(.minutes(10)))
    func `a call that comes in the very moment in which the connection opens goes through`() async throws {
        let executor = SteppingExecutor()
        let late = Locked<Task<QueueStatus, any Error>?>(nil)
        let opening = Locked<(@Sendable () -> Void)?>(nil)
        let transport = try await SharedStack.transport(
            logger: Logger(label: "test") { _ in
                HookLogHandler { if "\($0.message)" == "connected" { opening.withLock { $0 }?() } }
            })
        opening.withLock {
            $0 = {
                // On the connection's thread, which is busy opening: the call runs here up to where it waits.
                late.withLock { late in
                    if late != nil { return }
                    late = Task(executorPreference: executor) {
                        try await transport.declare(QueueDeclaration("test.opening"), deadline: .now + .seconds(10))
                    }
                }
                executor.runUntilAllWait()
            }
        }
        try await transport.declare(QueueDeclaration("test.opening"), deadline: .now + .seconds(30))
        let call = try #require(late.withLock { $0 })
        let status = try await call.value
        #expect(status.messages == 0)
        await transport.close()
    }
}

/// Runs tasks step by step: up to where they wait, when it is told to, and on other threads afterwards.
private final class SteppingExecutor: TaskExecutor {
    private let held = Mutex<[UnownedJob]?>([])

    func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        let isHeld = held.withLock { held in
            held?.append(job)
            return held != nil
        }
        if !isHeld { DispatchQueue.global().async { job.runSynchronously(on: self.asUnownedTaskExecutor()) } }
    }

    func runUntilAllWait() {
        while let job = held.withLock({ held in held?.isEmpty == false ? held?.removeFirst() : nil }) {
            job.runSynchronously(on: asUnownedTaskExecutor())
        }
        for job in held.withLock({ held in
            defer { held = nil }
            return held ?? []
        }) {
            DispatchQueue.global().async { job.runSynchronously(on: self.asUnownedTaskExecutor()) }
        }
    }
}
