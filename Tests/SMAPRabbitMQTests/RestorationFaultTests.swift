import Foundation
import Logging
import SMAPEvents
import Synchronization
import Testing

@testable import SMAPRabbitMQ

/// Declarations that a broker does not repeat after a loss, and what that must not do to everything else.
extension TransportFaultTests {
    @Test func `a declaration that was left out is declared again on the same connection`() async throws {
        let isRefusing = Mutex(false)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .milliseconds(300) }) {
            received, connection in
            guard case .declareQueue("only", _) = received.kind, isRefusing.withLock({ $0 }) else { return false }
            connection.closeConnection(code: 541, text: "INTERNAL_ERROR", classID: 50, methodID: 10)
            return true
        } body: { transport, broker in
            try await transport.declare(QueueDeclaration("only"), deadline: soon())
            #expect(await isConfirmed(over: transport))
            isRefusing.withLock { $0 = true }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            let accepted = broker.acceptedCount
            #expect(await transport.health().problems.contains { $0.contains("queue only") })
            isRefusing.withLock { $0 = false }
            try await untilHealthy(transport)
            #expect(broker.acceptedCount == accepted)
            #expect(
                broker.received.last { if case .declareQueue = $0.kind { true } else { false } }?.connection == accepted
            )
        }
    }
}
