public import Logging
public import SMAPEvents
public import ServiceLifecycle
internal import Synchronization

/// Carries events over RabbitMQ, with librabbitmq.
///
/// It keeps one connection for publishing (and topology) and one for consuming, each on a thread of its own, opened when
/// they are first needed: a broker that holds back publishers must not hold back acknowledgements.
///
/// Each connection is supervised. When one is lost, or none can be made, it is tried again after a delay that grows, with
/// jitter, on every node in turn; ``states()`` tells. What was declared through this transport is declared again. Publishes
/// that are not confirmed are written again on the next connection, under the same message id, as long as their deadlines
/// allow: a consumer may see one twice. Consumers end with ``SMAPEvents/EventsError/Code/connectionLost``, and
/// ``SMAPEvents/EventSubscriber`` starts them again.
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
    private let topology = DeclaredTopology()
    private let observers = ConnectionObservers()

    /// Makes a transport; connections are opened when they are needed. Throws
    /// ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public init(configuration: RabbitMQConfiguration, logger: Logger = .silent) throws {
        try configuration.validateForConnecting()
        self.configuration = configuration
        self.logger = logger
        if configuration.tls?.verification == ServerTLS.Verification.none {
            logger.warning("the server's certificate is not verified")
        }
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

    /// Connects, then waits for graceful shutdown or cancellation, and closes. While the broker is away it goes on trying:
    /// ``health()`` is for probes.
    ///
    /// - Throws: ``SMAPEvents/EventsError/Code/accessRefused`` when the server refuses the credentials at start.
    public func run() async throws {
        do {
            try await cancelWhenGracefulShutdown { [self] in
                while true {
                    do {
                        return try await connection(publishing, name: "publish").ready(deadline: .now + .seconds(3600))
                    } catch let error as EventsError where error.isRetriable {}
                }
            }
            try? await gracefulShutdown()
            await close()
        } catch {
            await close()
            if error is CancellationError { return }
            throw error
        }
    }

    /// Waits up to `timeout` for confirms that somebody waits for, in a cancelled task too, then closes both connections.
    /// Every later call throws ``SMAPEvents/EventsError/Code/closed``.
    public func close(timeout: Duration = .seconds(10)) async {
        let deadline = ContinuousClock.now + timeout
        for slot in [
            publishing.withLock({ slot in swap(&slot) }), consuming.withLock({ slot in swap(&slot) }),
        ] {
            if case .connection(let connection) = slot { await connection.close(deadline: deadline) }
        }
        observers.finish()
    }

    private func swap(_ slot: inout Slot) -> Slot {
        defer { slot = .closed }
        return slot
    }

    private func connection(_ slot: borrowing Mutex<Slot>, name: String) throws -> RabbitMQConnection {
        try slot.withLock { slot in
            switch slot {
            case .connection(let connection): return connection
            case .closed: throw EventsError(.closed, "the transport is closed", operation: "connect")
            case .idle:
                let connection = try RabbitMQConnection(
                    configuration, name: name, logger: logger, topology: topology
                ) {
                    [observers] in observers.tell($0)
                }
                slot = .connection(connection)
                return connection
            }
        }
    }

    /// What becomes of this transport's connections from now on, until it is closed. Of a reader that falls behind, the
    /// oldest changes are dropped: at most 64 are kept.
    public func states() -> AsyncStream<ConnectionChange> { observers.stream() }

    /// The connection to declare on: one that is there already, but not one that the broker blocks, since it reads nothing
    /// from that. A connection that never publishes is never blocked.
    private func topologyConnection() throws -> RabbitMQConnection {
        let isConsuming = consuming.withLock { if case .idle = $0 { false } else { true } }
        let isBlocked = publishing.withLock { slot in
            if case .connection(let connection) = slot { connection.status.state == .blocked } else { false }
        }
        return isConsuming || isBlocked
            ? try connection(consuming, name: "consume") : try connection(publishing, name: "publish")
    }

    // MARK: EventTransport

    /// See ``SMAPEvents/EventTransport``.
    public func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        _ = try await topologyConnection()
            .call(.declareExchange(exchange), "declare exchange \(exchange.name)", deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    @discardableResult
    public func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        let reply = try await topologyConnection()
            .call(.declareQueue(queue), "declare queue \(queue.name)", deadline: deadline)
        guard case .queue(let status) = reply else { return QueueStatus(messages: 0, consumers: 0) }
        return status
    }

    /// See ``SMAPEvents/EventTransport``.
    public func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant
    ) async throws {
        _ = try await topologyConnection().call(
            .bind(QueueBinding(queue: queue, exchange: exchange, routingKey: routingKey)),
            "bind \(queue) to \(exchange)", deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func checkExchange(_ name: String, deadline: ContinuousClock.Instant) async throws {
        _ = try await topologyConnection()
            .call(.checkExchange(name), "check exchange \(name)", deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func status(of queue: QueueName, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        let reply = try await topologyConnection()
            .call(.checkQueue(queue), "check queue \(queue)", deadline: deadline)
        guard case .queue(let status) = reply else { return QueueStatus(messages: 0, consumers: 0) }
        return status
    }

    /// The health of the connection for publishing. It starts connecting if nobody has yet, and does not wait for it.
    public func health() async -> Health {
        do {
            let (state, reason) = try connection(publishing, name: "publish").status
            if state == .open { return Health() }
            return Health(problems: ["publishing: \(state)" + (reason.map { ": \($0)" } ?? "")])
        } catch {
            return Health(problems: ["publishing: \(error)"])
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func publish(
        deadline: ContinuousClock.Instant, _ message: @Sendable () throws -> OutboundMessage
    ) async throws -> Bool {
        try await connection(publishing, name: "publish").publish(deadline: deadline, message)
    }

    /// The queue that stands for the channel it is named on.
    static let directReplyTo = "amq.rabbitmq.reply-to"

    /// See ``SMAPEvents/EventTransport``.
    public func request(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> InboundDelivery {
        let connection = try connection(publishing, name: "publish")
        var message = message
        let correlationID = message.properties.correlationID ?? EventID().rawValue
        message.properties.correlationID = correlationID
        message.properties.replyTo = Self.directReplyTo
        return try await connection.replies.request(correlationID, deadline: deadline) { [message] in
            try await connection.publish(deadline: deadline) { message }
        }
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
        // With its channel gone, there is nothing to close.
        if consumer.isChannelOpen {
            await connection.finish(.closeConsumer(consumer), "close the consumer of \(queue)")
        }
        consumer.fail(EventsError(.closed, "the consumer has ended", operation: "consume from \(queue)"))
        return try result.get()
    }
}
