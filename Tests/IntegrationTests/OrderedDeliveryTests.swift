import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import Synchronization
import Testing

/// Deliveries that are ordered by a key, on a real broker.
@Suite(.serialized, .timeLimit(.minutes(10))) struct OrderedDeliveryTests {
    struct Numbered: SMAPEvent {
        static let routingKey: RoutingKey = "ordered.numbered"
        var projectID: ProjectID?
        var number: Int
    }

    /// What the handlers of each key have done.
    private struct Record {
        /// In the order of their first handling.
        var first: [String: [Int]] = [:]
        var running: [String: Int] = [:]
        var overlaps = 0
        var handled = 0
    }

    @Test func `fifty reconnects under load keep the order of each key, and never run two of its handlers`()
        async throws
    {
        let queue: QueueName = "ordered.reconnects"
        let stack = try await SharedStack.current
        try await FaultProxy.withProxy(to: stack.rabbitMQPort) { proxy in
            var proxied = RabbitMQConfiguration(host: "127.0.0.1", port: proxy.port)
            // Connections that do not last would be tried more and more seldom.
            proxied.maximumReconnectDelay = .milliseconds(100)
            try await RabbitMQTransport.withTransport(
                configuration: RabbitMQConfiguration(host: "127.0.0.1", port: stack.rabbitMQPort)
            ) { direct in
                try await RabbitMQTransport.withTransport(configuration: proxied) { transport in
                    let record = Locked(Record())
                    var router = EventRouter()
                    router.on(Numbered.self) { delivery in
                        let key = delivery.projectID?.rawValue ?? ""
                        record.withLock { record in
                            record.running[key, default: 0] += 1
                            if record.running[key] != 1 { record.overlaps += 1 }
                            if record.first[key]?.contains(delivery.event.number) != true {
                                record.first[key, default: []].append(delivery.event.number)
                            }
                        }
                        // Long enough for a reconnect to fall into it.
                        try? await Task.sleep(for: .milliseconds(2))
                        record.withLock { record in
                            record.running[key, default: 0] -= 1
                            record.handled += 1
                        }
                        return .acknowledge
                    }
                    var subscription = EventSubscription(queue: queue, bindings: ["ordered.numbered"])
                    subscription.orderingKey = .project
                    // Otherwise the next consumer may come before the broker has seen the last one go, and take what is behind.
                    subscription.isSingleActive = true
                    subscription.retryDelay = .milliseconds(1)
                    subscription.maximumRetryDelay = .milliseconds(10)
                    let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
                    try await subscriber.declare()
                    let publisher = EventPublisher(
                        transport: direct, configuration: PublisherConfiguration(service: "test"))
                    let keys = 20
                    let numbers = 400
                    for number in 1...numbers {
                        _ = try await publisher.publish(
                            contentsOf: (1...keys).map {
                                Numbered(projectID: try ProjectID("key-\($0)"), number: number)
                            })
                    }
                    try await withThrowingTaskGroup(of: Void.self) { group in
                        group.addTask { try await subscriber.run() }
                        defer { group.cancelAll() }
                        for _ in 1...50 {
                            let before = record.withLock { $0.handled }
                            try await eventually("some more are handled") {
                                record.withLock { $0.handled } >= before + 40
                            }
                            proxy.cut()
                        }
                        try await eventually("the queue is empty") {
                            try await direct.status(of: queue, deadline: .now + .seconds(30)).messages == 0
                                && record.withLock { $0.first.values.allSatisfy { $0.count == numbers } }
                        }
                    }
                    let result = record.withLock { $0 }
                    #expect(result.overlaps == 0, "two handlers of one key at a time")
                    for (key, seen) in result.first { #expect(seen == Array(1...numbers), "\(key)") }
                    #expect(result.first.count == keys)
                    #expect(
                        try await direct.status(of: queue.deadLetterQueue, deadline: .now + .seconds(30)).messages == 0)
                    await transport.close(timeout: .seconds(2))
                    await direct.close(timeout: .seconds(2))
                }
            }
        }
    }
}
