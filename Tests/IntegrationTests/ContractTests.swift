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

    @Test(arguments: InboxContract.checks)
    func `Redis keeps the inbox contract`(check: InboxContract.Check) async throws {
        let inbox = try await SharedStack.inbox()
        try await check.run(inbox)
        await inbox.close()
    }
}
