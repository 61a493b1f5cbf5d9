import ConnectionThread
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

    @Test(arguments: ["INTERNAL_ERROR", "loss"])
    func `a declaration that ends each connection without a name is found, and the others are declared`(
        kind: String
    ) async throws {
        let isPoisoned = Mutex(false)
        try await withTransport { received, connection in
            guard case .declareQueue("q.4", _) = received.kind, isPoisoned.withLock({ $0 }) else { return false }
            if kind == "loss" { connection.drop() } else { connection.closeConnection(code: 541, text: kind) }
            return true
        } body: { transport, broker in
            for number in 0..<10 {
                try await transport.declare(QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
            }
            #expect(await isConfirmed(over: transport))
            isPoisoned.withLock { $0 = true }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            #expect(await transport.health().problems.contains { $0.contains("queue q.4 could not be declared again") })
            // Three times with others, once as the last one of all, and then no more.
            try await broker.waitUntil { $0.acceptedCount == 6 }
            try await broker.waitUntil { broker in
                let declared = broker.received.compactMap { one -> String? in
                    if one.connection == 6, case .declareQueue(let name, _) = one.kind { name } else { nil }
                }
                return declared == (0..<10).filter { $0 != 4 }.map { "q.\($0)" }
            }
            #expect(await isConfirmed(over: transport))
            let alone = broker.received.filter { $0.connection == 5 }.compactMap { one -> String? in
                if case .declareQueue(let name, _) = one.kind { name } else { nil }
            }
            #expect(alone.count == 10 && alone.last == "q.4")
            #expect(broker.acceptedCount == 6)
        }
    }

    @Test func `a new declaration that ends each connection without a name fails after three`() async throws {
        try await withTransport { received, connection in
            guard case .declareQueue("bad", _) = received.kind else { return false }
            connection.closeConnection(code: 541, text: "INTERNAL_ERROR")
            return true
        } body: { transport, broker in
            #expect(await isConfirmed(over: transport))
            let error = await #expect(throws: EventsError.self) {
                try await transport.declare(QueueDeclaration("bad"), deadline: soon())
            }
            #expect(error?.code == .connectionLost && error?.message.contains("INTERNAL_ERROR") == true)
            let count = broker.received.count { if case .declareQueue("bad", _) = $0.kind { true } else { false } }
            #expect(count == 3)
            #expect(await isConfirmed(over: transport))
            #expect(broker.acceptedCount == 4)
        }
    }

    @Test func `a new declaration is not blamed for what the broker does for its own reasons`() async throws {
        try await withTransport { received, connection in
            guard case .declareQueue("q", _) = received.kind, received.connection <= 5 else { return false }
            connection.closeConnection(code: 320, text: "CONNECTION_FORCED - broker forced connection closure")
            return true
        } body: { transport, broker in
            try await transport.declare(QueueDeclaration("q"), deadline: soon())
            #expect(broker.acceptedCount == 6)
        }
    }

    @Test func `what is declared again is not blamed for what the broker does for its own reasons`() async throws {
        try await withTransport { received, connection in
            guard case .declareQueue("q.0", _) = received.kind, 2...6 ~= received.connection else { return false }
            connection.closeConnection(code: 320, text: "CONNECTION_FORCED - broker forced connection closure")
            return true
        } body: { transport, broker in
            for number in 0..<3 {
                try await transport.declare(QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
            }
            broker.connections[0].drop()
            #expect(await isConfirmed(over: transport))
            let declared = broker.received.compactMap { one -> String? in
                if one.connection == 7, case .declareQueue(let name, _) = one.kind { name } else { nil }
            }
            #expect(declared == ["q.0", "q.1", "q.2"])
        }
    }

    @Test func `an outage that ends both connections counts once against a declaration`() {
        let topology = DeclaredTopology()
        let operation = BrokerRequest.Operation.declareQueue(QueueDeclaration("q"))
        #expect(!topology.insert(operation))
        let error = EventsError(.connectionLost, "gone", operation: "connection")
        func lost(_ connection: String) -> Bool {
            topology.lost(operation, error, on: connection, now: .now, limit: .seconds(15))
        }
        for _ in 1...2 { #expect(!lost("publish") && !lost("consume")) }
        #expect(!topology.hasFailures)
        #expect(lost("publish"), "three on one connection")
        #expect(topology.hasFailures)
    }

    @Test func `a declaration that is only silent does not have the others declared one by one`() {
        let topology = DeclaredTopology()
        let operation = BrokerRequest.Operation.declareQueue(QueueDeclaration("q"))
        #expect(!topology.insert(operation))
        let gone = EventsError(.connectionLost, "gone", operation: "connection")
        _ = topology.lost(operation, gone, on: "publish", now: .now, limit: .seconds(15))
        #expect(topology.isTesting)
        let silent = EventsError(.deadlineExceeded, "no answer", operation: "connection")
        _ = topology.failed(operation, silent, now: .now, limit: .seconds(15), endedConnection: false)
        #expect(!topology.isTesting)
    }

    @Test func `the time in which everything waits does not begin again with each connection that is of no use`()
        async throws
    {
        try await withTransport { _, _ in
            false
        } body: { transport, _ in
            #expect(await isConfirmed(over: transport))
            let connection = try transport.publishConnection
            let limit = connection.restoring(1)
            connection.set(.openingChannel, EventsError(.connectionLost, "not open yet", operation: "test"))
            connection.restored()
            #expect(connection.restoring(1) == limit)
            connection.restored()
            connection.publishingOpened()
            #expect(connection.restoring(1) > limit)
            connection.restored()
        }
    }

    /// Notes warnings.
    private struct Recorder: LogHandler {
        let warnings: LogRecord
        var logLevel = Logger.Level.warning
        var metadata: Logger.Metadata = [:]

        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }

        func log(event: LogEvent) {
            warnings.texts.withLock { $0.append("\(event.message) \(event.metadata ?? [:])") }
        }
    }

    private final class LogRecord: Sendable {
        let texts = Mutex<[String]>([])
    }

    @Test func `a log says once that there are more declarations than are kept`() async throws {
        try await FakeBroker.withBroker { broker in
            let record = LogRecord()
            let transport = try RabbitMQTransport(
                configuration: RabbitMQConfiguration(host: "127.0.0.1", port: broker.port),
                logger: Logger(label: "test") { _ in Recorder(warnings: record) }, topology: DeclaredTopology(limit: 3))
            // The first ones are kept, and declared again without a word.
            for number in [0, 1, 2, 0, 1, 2] {
                try await transport.declare(QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
            }
            #expect(record.texts.withLock { $0 }.isEmpty)
            for number in 3...5 {
                try await transport.declare(QueueDeclaration(try QueueName("q.\(number)")), deadline: soon())
            }
            let texts = record.texts.withLock { $0 }
            #expect(texts.count == 1 && texts.first?.contains("queue q.3") == true, "\(texts)")
            await transport.close(timeout: .milliseconds(200))
        }
    }

    @Test func `a new declaration waits for one that the broker does not answer, and not for each`() async throws {
        let isMute = Mutex(false)
        let silent = SilentChannels()
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) { received, _ in
            silent.contains(received) {
                if case .declareQueue(let name, _) = received.kind {
                    name.hasPrefix("bad") && isMute.withLock { $0 }
                } else {
                    false
                }
            }
        } body: { transport, broker in
            for number in 0..<5 {
                try await transport.declare(QueueDeclaration(try QueueName("bad.\(number)")), deadline: soon())
            }
            #expect(await isConfirmed(over: transport))
            isMute.withLock { $0 = true }
            broker.connections[0].drop()
            try await broker.waitUntil { broker in
                broker.received.contains {
                    if $0.connection == 2, case .declareQueue("bad.0", _) = $0.kind { true } else { false }
                }
            }
            try await transport.declare(QueueDeclaration("new"), deadline: soon())
            let channels = broker.received.compactMap { one -> UInt16? in
                if case .declareQueue("new", _) = one.kind { one.channel } else { nil }
            }
            // Behind the first that is not answered, and on the next channel.
            #expect(channels.count <= 2, "\(channels)")
        }
    }

}
