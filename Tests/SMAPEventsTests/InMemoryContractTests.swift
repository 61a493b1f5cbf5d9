import Foundation
import SMAPEventsTesting
import Testing

@Suite struct InMemoryContractTests {
    @Test(arguments: TransportContract.checks)
    func `the in-memory broker keeps the transport contract`(check: TransportContract.Check) async throws {
        try await check.run(InMemoryBroker())
    }

    @Test(arguments: StoreContract.checks)
    func `the in-memory store keeps the store contract`(check: StoreContract.Check) async throws {
        try await check.run(InMemoryProgressStore())
    }

    /// The seed of a failure is in its message; `TRACKER_SEED` runs that sequence alone.
    @Test(.timeLimit(.minutes(2)))
    func `ten thousand random sequences of operations end as the model says, in memory`() async throws {
        let store = InMemoryProgressStore()
        if let seed = ProcessInfo.processInfo.environment["TRACKER_SEED"].flatMap(UInt64.init) {
            return try await StoreContract.walk(store, seed: seed)
        }
        let first = UInt64.random(in: 0...(.max / 2))
        for seed in first..<first + 10_000 { try await StoreContract.walk(store, seed: seed) }
    }

    @Test(arguments: InboxContract.checks)
    func `the in-memory inbox keeps the inbox contract`(check: InboxContract.Check) async throws {
        try await check.run(InMemoryInbox())
    }
}
