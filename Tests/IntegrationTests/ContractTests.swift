import Foundation
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis
import Testing

@Suite struct RabbitMQContractTests {
    @Test(arguments: TransportContract.checks)
    func `RabbitMQ keeps the transport contract`(check: TransportContract.Check) async throws {
        let transport = try await SharedStack.transport()
        try await check.run(transport)
        await transport.close()
    }
}

@Suite struct RedisContractTests {
    @Test(arguments: StoreContract.checks)
    func `Redis keeps the store contract`(check: StoreContract.Check) async throws {
        let store = try await SharedStack.store()
        try await check.run(store)
        await store.close()
    }

    /// The seed of a failure is in its message; `TRACKER_SEED` runs that sequence alone.
    @Test(.timeLimit(.minutes(10)))
    func `ten thousand random sequences of operations end as the model says, in Redis`() async throws {
        let store = try await SharedStack.store()
        let steps = 15
        if let seed = ProcessInfo.processInfo.environment["TRACKER_SEED"].flatMap(UInt64.init) {
            try await StoreContract.walk(store, seed: seed, steps: steps)
        } else {
            let first = UInt64.random(in: 0...(.max / 2))
            let tasks: UInt64 = 64
            try await withThrowingTaskGroup { group in
                for task in 0..<tasks {
                    group.addTask {
                        for seed in stride(from: first + task, to: first + 10_000, by: Int(tasks)) {
                            try await StoreContract.walk(store, seed: seed, steps: steps)
                        }
                    }
                }
                try await group.waitForAll()
            }
        }
        await store.close()
    }

    @Test(arguments: InboxContract.checks)
    func `Redis keeps the inbox contract`(check: InboxContract.Check) async throws {
        let inbox = try await SharedStack.inbox()
        try await check.run(inbox)
        await inbox.close()
    }
}
