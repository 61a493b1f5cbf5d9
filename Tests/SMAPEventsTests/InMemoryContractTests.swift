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

    @Test(arguments: InboxContract.checks)
    func `the in-memory inbox keeps the inbox contract`(check: InboxContract.Check) async throws {
        try await check.run(InMemoryInbox())
    }
}
