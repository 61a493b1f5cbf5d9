public import Logging
public import SMAPEvents
public import ServiceLifecycle
internal import Synchronization

/// Carries events over RabbitMQ, with librabbitmq.
///
/// It keeps one connection for publishing (and topology) and one for consuming, each on a thread of its own, opened when
/// they are first needed: a broker that holds back publishers must not hold back acknowledgements.
///
/// When a connection is lost, whatever was under way ends with a typed error, and the next call connects again.
public final class RabbitMQTransport: EventTransport, Service {
    private enum Slot {
        case idle
        case connection(RabbitMQConnection)
        case closed
    }

    private let configuration: RabbitMQConfiguration
    private let logger: Logger
    private let publishing = Mutex(Slot.idle)
    private let consuming = Mutex(Slot.idle)

    /// Makes a transport; connections are opened when they are needed. Throws
    /// ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public init(configuration: RabbitMQConfiguration, logger: Logger = .silent) throws {
        try configuration.validate()
        self.configuration = configuration
        self.logger = logger
    }

    deinit {
        for slot in [publishing.withLock { $0 }, consuming.withLock { $0 }] {
            if case .connection(let connection) = slot { connection.abandon() }
        }
    }

    /// Runs `body` with a transport and closes it afterwards, whatever happens.
    public static func withTransport<Result: Sendable>(
        configuration: RabbitMQConfiguration, logger: Logger = .silent,
        _ body: (RabbitMQTransport) async throws -> Result
    ) async throws -> Result {
        let transport = try RabbitMQTransport(configuration: configuration, logger: logger)
        do {
            let result = try await body(transport)
            await transport.close()
            return result
        } catch {
            await transport.close()
            throw error
        }
    }

    /// Connects, so that a wrong setting is noticed at once; then waits for graceful shutdown or cancellation, and
    /// closes.
    public func run() async throws {
        do {
            try await connection(publishing, name: "publish").ready(deadline: .now + configuration.connectTimeout)
            try? await gracefulShutdown()
            await close()
        } catch {
            await close()
            throw error
        }
    }

    /// Waits up to `timeout` for what is unconfirmed, then closes both connections. Every later call throws
    /// ``SMAPEvents/EventsError/Code/closed``.
    public func close(timeout: Duration = .seconds(10)) async {
        let deadline = ContinuousClock.now + timeout
        for slot in [
            publishing.withLock({ slot in swap(&slot) }), consuming.withLock({ slot in swap(&slot) }),
        ] {
            if case .connection(let connection) = slot { await connection.close(deadline: deadline) }
        }
    }

    private func swap(_ slot: inout Slot) -> Slot {
        defer { slot = .closed }
        return slot
    }

    private func connection(_ slot: borrowing Mutex<Slot>, name: String) throws -> RabbitMQConnection {
        try slot.withLock { slot in
            switch slot {
            case .connection(let connection) where !connection.isClosed: return connection
            case .closed: throw EventsError(.closed, "the transport is closed", operation: "connect")
            case .idle, .connection:
                let connection = try RabbitMQConnection(configuration, name: name, logger: logger)
                slot = .connection(connection)
                return connection
            }
        }
    }

    // MARK: EventTransport

    /// See ``SMAPEvents/EventTransport``.
    public func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        _ = try await connection(publishing, name: "publish")
            .call(.declareExchange(exchange), "declare exchange \(exchange.name)", deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    @discardableResult
    public func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        let reply = try await connection(publishing, name: "publish")
            .call(.declareQueue(queue), "declare queue \(queue.name)", deadline: deadline)
        guard case .queue(let status) = reply else { return QueueStatus(messages: 0, consumers: 0) }
        return status
    }

    /// See ``SMAPEvents/EventTransport``.
    public func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant
    ) async throws {
        _ = try await connection(publishing, name: "publish").call(
            .bind(queue: queue, exchange: exchange, routingKey: routingKey), "bind \(queue) to \(exchange)",
            deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func publish(
        deadline: ContinuousClock.Instant, _ message: @Sendable () throws -> OutboundMessage
    ) async throws -> Bool {
        try await connection(publishing, name: "publish").publish(deadline: deadline, message)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func withConsumer<Result: Sendable>(
        on queue: QueueName, prefetch: Int, deadline: ContinuousClock.Instant,
        _ body: @Sendable (any TransportConsumer) async throws -> Result
    ) async throws -> Result {
        guard (1...65_535).contains(prefetch) else {
            throw EventsError(
                .invalidConfiguration, "prefetch is 1 to 65535", operation: "consume from \(queue)")
        }
        let connection = try connection(consuming, name: "consume")
        let consumer = Consumer(queue: queue, prefetch: prefetch, connection: connection)
        let result: Swift.Result<Result, any Error>
        do {
            _ = try await connection.call(.consume(consumer), "consume from \(queue)", deadline: deadline)
            result = .success(try await body(consumer))
        } catch {
            result = .failure(error)
        }
        await connection.finish(.closeConsumer(consumer), "close the consumer of \(queue)")
        consumer.fail(EventsError(.closed, "the consumer has ended", operation: "consume from \(queue)"))
        return try result.get()
    }
}
