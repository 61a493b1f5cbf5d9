import Synchronization
import Testing
import Waiting

@Suite(.timeLimit(.minutes(2))) struct WaiterTests {
    private struct Refused: Error {}

    @Test func `a result that is there before the task waits is taken at once`() async throws {
        let waiter = Waiter<Int>()
        #expect(!waiter.isResolved)
        #expect(waiter.resolve(.success(1)))
        #expect(waiter.isResolved)
        #expect(try await waiter.value() == 1)
    }

    @Test func `the first result stands, and later ones are told that they came too late`() async throws {
        let waiter = Waiter<Int>()
        #expect(waiter.resolve(.success(1)))
        #expect(!waiter.resolve(.success(2)))
        #expect(!waiter.resolve(.failure(Refused())))
        #expect(try await waiter.value() == 1)
    }

    @Test func `a task that waits is resumed with the value or the error`() async {
        for isError in [false, true] {
            let waiter = Waiter<Int>()
            async let result = { () -> String in
                do { return "\(try await waiter.value())" } catch { return "\(type(of: error))" }
            }()
            waiter.resolve(isError ? .failure(Refused()) : .success(7))
            #expect(await result == (isError ? "Refused" : "7"))
        }
    }

    @Test func `cancellation ends the wait, and is told once`() async {
        let waiter = Waiter<Int>()
        let told = Atomic<Int>(0)
        let task = Task { try await waiter.value { told.add(1, ordering: .relaxed) } }
        task.cancel()
        let result = await task.result
        #expect(throws: CancellationError.self) { try result.get() }
        #expect(told.load(ordering: .relaxed) == 1)
        #expect(!waiter.resolve(.success(1)), "a value that comes later is not taken")
    }

    @Test func `a task that is cancelled before it waits takes a result that is there`() async throws {
        let waiter = Waiter<Int>()
        waiter.resolve(.success(3))
        let told = Atomic<Int>(0)
        let task = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            return try await waiter.value { told.add(1, ordering: .relaxed) }
        }
        #expect(try await task.value == 3)
        #expect(told.load(ordering: .relaxed) == 0)
    }

    @Test func `an uncancelled wait outlasts the cancellation of its task`() async throws {
        let waiter = Waiter<Int>()
        let task = Task { await waiter.uncancelledResult() }
        task.cancel()
        waiter.resolve(.success(5))
        #expect(try await task.value.get() == 5)
    }

    @Test func `of a value, a deadline and a cancellation that race, one wins, and all know which`() async {
        var outcomes: [String: Int] = [:]
        for round in 0..<3_000 {
            let waiter = Waiter<Int>()
            let isCancelled = Atomic<Bool>(false)
            let task = Task { () -> String in
                do {
                    return "\(try await waiter.value { isCancelled.store(true, ordering: .releasing) })"
                } catch { return error is CancellationError ? "cancelled" : "expired" }
            }
            async let valued = Task.detached { waiter.resolve(.success(1)) }.value
            async let expired = Task.detached { waiter.resolve(.failure(Refused())) }.value
            if round % 3 == 0 { await Task.yield() }
            task.cancel()
            let winners = (await valued, await expired)
            let outcome = await task.value
            let won = [winners.0 ? "1" : nil, winners.1 ? "expired" : nil].compactMap { $0 }
            #expect(won.count <= 1)
            #expect(outcome == (won.first ?? "cancelled"))
            #expect(isCancelled.load(ordering: .acquiring) == won.isEmpty)
            outcomes[outcome, default: 0] += 1
        }
        #expect(outcomes.values.reduce(0, +) == 3_000)
    }
}

@Suite(.timeLimit(.minutes(2))) struct LatchTests {
    @Test func `all tasks that wait go on when it opens, and those that come later do not wait`() async {
        let latch = Latch()
        let tasks = (0..<100).map { number in
            Task { () -> Int in
                await latch.wait()
                return number
            }
        }
        await Task.yield()
        latch.open()
        var passed: [Int] = []
        for task in tasks { passed.append(await task.value) }
        #expect(passed == Array(0..<100))
        await latch.wait()
    }

    @Test func `a cancelled task and one whose deadline has passed wait no longer`() async {
        let latch = Latch()
        let task = Task { await latch.wait() }
        task.cancel()
        await task.value
        await latch.wait(until: .now + .milliseconds(10))
        latch.open()
        await latch.wait(until: .now + .seconds(600))
    }
}
