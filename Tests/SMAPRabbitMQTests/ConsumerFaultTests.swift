import Foundation
import SMAPEvents
import Synchronization
import Testing

@testable import SMAPRabbitMQ

/// Consumers whose channels are cancelled, widened and closed at awkward moments.
extension TransportFaultTests {
    private static func isCancel(_ received: FakeBroker.Received) -> Bool {
        if case .cancel = received.kind { true } else { false }
    }

    private static func isAck(_ received: FakeBroker.Received) -> Bool {
        if case .ack = received.kind { true } else { false }
    }

    private static func isConsume(_ received: FakeBroker.Received) -> Bool {
        if case .consume = received.kind { true } else { false }
    }

    /// Answers the cancel that was held back.
    private func answerCancel(_ broker: FakeBroker) throws {
        let received = try #require(broker.received.last(where: Self.isCancel))
        guard case .cancel(let tag) = received.kind else { return }
        broker.connections[received.connection - 1].send(
            classID: 60, methodID: 31, arguments: [UInt8(tag.utf8.count)] + Array(tag.utf8), channel: received.channel)
    }

    @Test func `a channel that is closed before its cancel was answered is free again`() async throws {
        var options = FakeBroker.Options()
        // One for declarations, and one for consumers.
        options.channelMax = 2
        try await withTransport(options) { received, _ in
            Self.isCancel(received)
        } body: { transport, broker in
            for number in 1...3 {
                try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                    Task { await consumer.stop() }
                    try await broker.waitUntil { $0.received.count(where: Self.isCancel) == number }
                    // The channel is closed while that is in flight.
                }
            }
            #expect(broker.received.count(where: Self.isConsume) == 3)
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a consumer that is stopped while it is widened does not consume again`() async throws {
        try await withTransport { received, _ in
            Self.isCancel(received)
        } body: { transport, broker in
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                consumer.widen(to: 10)
                try await broker.waitUntil { $0.received.contains(where: Self.isCancel) }
                let stopping = Task { await consumer.stop() }
                let connection = try transport.consumeConnection
                while connection.shared.withLock({ $0.requests.isEmpty }) {
                    try await Task.sleep(for: .milliseconds(1))
                }
                // Requests are taken in their order: the thread knows of the stop by now.
                _ = try await transport.status(of: "q", deadline: soon())
                try answerCancel(broker)
                await stopping.value
                _ = try await transport.status(of: "q", deadline: soon())
                #expect(broker.received.count(where: Self.isConsume) == 1)
                #expect(broker.received.count(where: Self.isCancel) == 1)
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `settlements wait until the broker has cancelled a consumer that is widened`() async throws {
        try await withTransport { received, connection in
            if case .consume(_, let tag) = received.kind, connection.consumers(channel: received.channel).count == 1 {
                connection.replyConsumeOK(channel: received.channel, tag: tag)
                if tag.hasSuffix(".0") {
                    connection.deliver(channel: received.channel, consumerTag: tag, tag: 1, key: "a.b", body: [1])
                }
                return true
            }
            return Self.isCancel(received)
        } body: { transport, broker in
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                let delivery = try #require(try await consumer.next())
                consumer.widen(to: 10)
                try await broker.waitUntil { $0.received.contains(where: Self.isCancel) }
                try consumer.settle(delivery, .acknowledge)
                // The thread sends what is settled in each of its rounds, behind what is declared.
                for _ in 1...3 { _ = try await transport.status(of: "q", deadline: soon()) }
                #expect(!broker.received.contains(where: Self.isAck))
                try answerCancel(broker)
                try await broker.waitUntil { $0.received.contains(where: Self.isAck) }
                try await broker.waitUntil { $0.received.count(where: Self.isConsume) == 2 }
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `what was settled while a consumer was widened is sent before the transport closes`() async throws {
        try await withTransport { received, connection in
            if case .consume(_, let tag) = received.kind {
                connection.replyConsumeOK(channel: received.channel, tag: tag)
                connection.deliver(channel: received.channel, consumerTag: tag, tag: 1, key: "a.b", body: [1])
                return true
            }
            return Self.isCancel(received)
        } body: { transport, broker in
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                let delivery = try #require(try await consumer.next())
                consumer.widen(to: 10)
                try await broker.waitUntil { $0.received.contains(where: Self.isCancel) }
                try consumer.settle(delivery, .acknowledge)
                await transport.close(timeout: .seconds(10))
            }
            let isClose = { @Sendable (received: FakeBroker.Received) in
                if case .connectionClose = received.kind { true } else { false }
            }
            try await broker.waitUntil { $0.received.contains(where: isClose) }
            let received = broker.received
            let ack = try #require(received.firstIndex(where: Self.isAck))
            let close = try #require(received.firstIndex(where: isClose))
            #expect(ack < close)
        }
    }

    private final class Flag: Sendable {
        private let value = Mutex(false)
        var isSet: Bool { value.withLock { $0 } }
        func set() { value.withLock { $0 = true } }
    }

    @Test func `settlements are flushed when the broker has answered what stands behind them`() async throws {
        let (isHeld, isFlushed) = (Flag(), Flag())
        try await withTransport { received, connection in
            if case .consume(_, let tag) = received.kind {
                connection.replyConsumeOK(channel: received.channel, tag: tag)
                connection.deliver(channel: received.channel, consumerTag: tag, tag: 1, key: "a.b", body: [1])
                return true
            }
            guard case .qos = received.kind else { return false }
            return isHeld.isSet
        } body: { transport, broker in
            let isQoS = { @Sendable (received: FakeBroker.Received) in
                if case .qos = received.kind { true } else { false }
            }
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                let delivery = try #require(try await consumer.next())
                isHeld.set()
                try consumer.settle(delivery, .acknowledge)
                let deadline = soon()
                let flush = Task {
                    try await consumer.flushSettlements(deadline: deadline)
                    isFlushed.set()
                }
                try await broker.waitUntil {
                    $0.received.count(where: isQoS) == 2 && $0.received.contains(where: Self.isAck)
                }
                let received = broker.received
                let qos = try #require(received.lastIndex(where: isQoS))
                let ack = try #require(received.firstIndex(where: Self.isAck))
                #expect(ack < qos && received[ack].channel == received[qos].channel)
                for _ in 1...3 { _ = try await transport.status(of: "q", deadline: soon()) }
                #expect(!isFlushed.isSet)
                broker.connections[0].send(classID: 60, methodID: 11, channel: received[qos].channel)
                try await flush.value
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `settlements are not flushed where the channel is gone`() async throws {
        let isHeld = Flag()
        try await withTransport { received, _ in
            guard case .qos = received.kind else { return false }
            return isHeld.isSet
        } body: { transport, broker in
            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { consumer in
                isHeld.set()
                let deadline = soon()
                let flush = Task { try await consumer.flushSettlements(deadline: deadline) }
                try await broker.waitUntil { broker in
                    broker.received.count { if case .qos = $0.kind { true } else { false } } == 2
                }
                let channel = broker.received.last { if case .qos = $0.kind { true } else { false } }?.channel
                broker.connections[0].closeChannel(try #require(channel), code: 541, text: "INTERNAL_ERROR")
                let first = await #expect(throws: EventsError.self) { try await flush.value }
                #expect(first?.code == .connectionLost)
                let error = await #expect(throws: EventsError.self) {
                    try await consumer.flushSettlements(deadline: soon())
                }
                #expect(error?.code == .connectionLost)
            }
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `a channel that was given up is closed once, however often the broker closes it`() async throws {
        let isMute = Mutex(true)
        try await withTransport(FakeBroker.Options(), Settings { $0.stallLimit = .seconds(1) }) { received, _ in
            if case .declareQueue("bad", _) = received.kind { return isMute.withLock { $0 } }
            if case .channelClose = received.kind { return received.channel == 1 }
            return false
        } body: { transport, broker in
            await #expect(throws: EventsError.self) {
                try await transport.declare(QueueDeclaration("bad"), deadline: soon())
            }
            isMute.withLock { $0 = false }
            for _ in 0..<100 { broker.connections[0].closeChannel(1, code: 541, text: "INTERNAL_ERROR") }
            #expect(await isConfirmed(over: transport))
            let answers = broker.received.count { if case .channelCloseOK = $0.kind { $0.channel == 1 } else { false } }
            #expect(answers == 1)
            #expect(broker.acceptedCount == 1)
        }
    }

    @Test func `of two consumers that are begun when the broker closes the connection neither is blamed`() async throws
    {
        try await withTransport { received, connection in
            guard Self.isConsume(received) else { return false }
            let isSecond = connection.consumers(channel: 2).count + connection.consumers(channel: 3).count == 2
            if isSecond { connection.closeConnection(code: 530, text: "NOT_ALLOWED", classID: 60, methodID: 20) }
            return true
        } body: { transport, broker in
            // The channels are opened one after the other.
            _ = try await transport.status(of: "q", deadline: soon())
            let codes = await withTaskGroup(of: EventsError.Code?.self) { group in
                for _ in 0..<2 {
                    group.addTask {
                        do {
                            try await transport.withConsumer(on: "q", prefetch: 1, deadline: soon()) { _ in }
                            return nil
                        } catch { return (error as? EventsError)?.code }
                    }
                }
                return await group.reduce(into: []) { $0.append($1) }
            }
            #expect(codes == [.connectionLost, .connectionLost])
        }
    }

}
