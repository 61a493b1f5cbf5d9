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
}
