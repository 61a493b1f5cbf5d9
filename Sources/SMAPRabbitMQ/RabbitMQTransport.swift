internal import ConnectionThread
public import Logging
public import SMAPEvents
public import ServiceLifecycle
internal import Synchronization
internal import Waiting

/// Carries events over RabbitMQ.
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
    private let topology: DeclaredTopology
    private let observers = ConnectionObservers()
    private let isClosing = Atomic<Bool>(false)
    private let closed = Latch()

    /// Makes a transport; connections are opened when they are needed. Throws
    /// ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public convenience init(configuration: RabbitMQConfiguration, logger: Logger = .silent) throws {
        try self.init(configuration: configuration, logger: logger, topology: DeclaredTopology())
    }

    init(configuration: RabbitMQConfiguration, logger: Logger, topology: DeclaredTopology) throws {
        self.topology = topology
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
    /// - Throws: ``SMAPEvents/EventsError/Code/accessRefused`` when the server refuses the credentials at start,
    ///   ``SMAPEvents/EventsError/Code/tlsFailed`` when its certificate is refused, and
    ///   ``SMAPEvents/EventsError/Code/invalidConfiguration``.
    public func run() async throws {
        do {
            try await cancelWhenGracefulShutdown { [self] in
                while true {
                    do {
                        return try await publishConnection.ready(deadline: .now + .seconds(3600))
                    } catch let error as EventsError where error.isRetriable {
                        // Where so many wait already that this one may not, it must not try again at once.
                        try await Task.sleep(for: .milliseconds(100))
                    }
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

    /// Waits for confirms that callers wait for, in a cancelled task too, then closes both connections. Returns within
    /// `timeout`, whatever the broker does. Every later call throws ``SMAPEvents/EventsError/Code/closed``.
    public func close(timeout: Duration = .seconds(10)) async {
        let deadline = ContinuousClock.now + timeout
        // One caller closes; others wait for that.
        guard !isClosing.exchange(true, ordering: .relaxed) else {
            // Also in a task that is cancelled.
            return await Task { await closed.wait(until: deadline) }.value
        }
        let publishConnection = publishing.withLock { slot in swap(&slot) }
        if case .connection(let connection) = publishConnection {
            // Handlers whose copies are confirmed meanwhile can still acknowledge.
            await connection.drain(until: deadline, of: timeout)
        }
        let slots = [publishConnection, consuming.withLock { slot in swap(&slot) }]
        await withTaskGroup { group in
            for case .connection(let connection) in slots {
                group.addTask { await connection.close(by: deadline) }
            }
        }
        observers.finish()
        closed.open()
    }

    private func swap(_ slot: inout Slot) -> Slot {
        defer { slot = .closed }
        return slot
    }

    var publishConnection: RabbitMQConnection {
        get throws { try connection(publishing, name: "publish", isForPublishing: true) }
    }

    var consumeConnection: RabbitMQConnection {
        get throws {
            guard !isClosing.load(ordering: .relaxed) else {
                throw EventsError(.closed, "the transport is closed", operation: "consume")
            }
            return try connection(consuming, name: "consume", isForPublishing: false)
        }
    }

    private func connection(
        _ slot: borrowing Mutex<Slot>, name: String, isForPublishing: Bool
    ) throws -> RabbitMQConnection {
        try slot.withLock { slot in
            switch slot {
            case .connection(let connection): return connection
            case .closed: throw EventsError(.closed, "the transport is closed", operation: "connect")
            case .idle:
                let connection = try RabbitMQConnection(
                    configuration, name: name, isForPublishing: isForPublishing, logger: logger, topology: topology
                ) { [observers] in observers.tell($0) }
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
        return isConsuming || isBlocked ? try consumeConnection : try publishConnection
    }

    /// Throws `invalidName` for what an AMQP short string does not hold, before anything is sent.
    private static func check(_ name: String, _ what: String, _ operation: String) throws {
        guard name.utf8.count <= 255 else {
            throw EventsError(
                .invalidName, "\(what) has \(name.utf8.count) bytes, and the limit is 255", operation: operation)
        }
        guard name.utf8.allSatisfy({ $0 >= 0x20 && $0 != 0x7F }) else {
            throw EventsError(.invalidName, "\(what) has a control character", operation: operation)
        }
    }

    private static func check(_ exchange: ExchangeDeclaration, _ operation: String) throws {
        try check(exchange.name, "the exchange's name", operation)
    }

    private static func check(_ queue: QueueDeclaration, _ operation: String) throws {
        for (name, value) in queue.arguments {
            try check(name, "the name of an argument", operation)
            guard case .string(let text) = value else { continue }
            guard text.utf8.count <= 4_096 else {
                throw EventsError(
                    .invalidName, "the argument \(name) has \(text.utf8.count) bytes, and the limit is 4096",
                    operation: operation)
            }
        }
        let size = queue.arguments.reduce(0) { size, argument in
            guard case .string(let text) = argument.value else { return size + argument.key.utf8.count + 16 }
            return size + argument.key.utf8.count + text.utf8.count + 16
        }
        guard size <= 32 * 1024 else {
            throw EventsError(
                .invalidName, "the arguments have \(size) bytes together, and the limit is 32768", operation: operation)
        }
    }

    // MARK: EventTransport

    /// See ``SMAPEvents/EventTransport``.
    public func declare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        let name = "declare exchange \(exchange.name)"
        try Self.check(exchange, "declare exchange")
        _ = try await topologyConnection().request(.declareExchange(exchange), name: name, deadline: deadline)
        exchangeIsThere(exchange.name)
    }

    /// Publishes to an exchange that may have been missing a moment ago are refused no longer.
    private func exchangeIsThere(_ name: String) {
        publishing.withLock { slot in
            if case .connection(let connection) = slot { connection.exchangeDeclared(name) }
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    @discardableResult
    public func declare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        let name = "declare queue \(queue.name)"
        try Self.check(queue, name)
        return Self.status(
            try await topologyConnection().request(.declareQueue(queue), name: name, deadline: deadline))
    }

    /// See ``SMAPEvents/EventTransport``.
    public func bind(
        _ queue: QueueName, to exchange: String, routingKey: String, deadline: ContinuousClock.Instant
    ) async throws {
        try Self.check(exchange, "the exchange's name", "bind \(queue)")
        let name = "bind \(queue) to \(exchange)"
        try Self.check(routingKey, "the routing key", name)
        _ = try await topologyConnection().request(
            .bind(QueueBinding(queue: queue, exchange: exchange, routingKey: routingKey)), name: name,
            deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func checkExchange(_ name: String, deadline: ContinuousClock.Instant) async throws {
        try Self.check(name, "the exchange's name", "check exchange")
        _ = try await topologyConnection()
            .request(.checkExchange(name), name: "check exchange \(name)", deadline: deadline)
        exchangeIsThere(name)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func status(of queue: QueueName, deadline: ContinuousClock.Instant) async throws -> QueueStatus {
        Self.status(
            try await topologyConnection()
                .request(.checkQueue(queue), name: "check queue \(queue)", deadline: deadline))
    }

    private static func status(_ reply: BrokerRequest.Reply) -> QueueStatus {
        guard case .queue(let status) = reply else { return QueueStatus(messages: 0, consumers: 0) }
        return status
    }

    /// See ``SMAPEvents/EventTransport``.
    public func compare(_ exchange: ExchangeDeclaration, deadline: ContinuousClock.Instant) async throws {
        try Self.check(exchange, "compare exchange")
        _ = try await topologyConnection()
            .request(.compareExchange(exchange), name: "compare exchange \(exchange.name)", deadline: deadline)
        exchangeIsThere(exchange.name)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func compare(_ queue: QueueDeclaration, deadline: ContinuousClock.Instant) async throws {
        let name = "compare queue \(queue.name)"
        try Self.check(queue, name)
        _ = try await topologyConnection().request(.compareQueue(queue), name: name, deadline: deadline)
    }

    /// The health of the connection for publishing. It starts connecting if no call has yet, and does not wait for it.
    public func health() async -> Health {
        do {
            return Health(problems: try publishConnection.publishingProblems)
        } catch {
            return Health(problems: ["publishing: \(error)"])
        }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func reserve(
        _ count: Int, bytes: Int, for destination: PublishDestination, deadline: ContinuousClock.Instant
    ) async throws -> PublishReservation {
        // What is cancelled already is not written at all.
        try Task.checkCancellation()
        let connection = try publishConnection
        let wanted = PublishGrant(count: count, bytes: bytes)
        // Mostly there is room: then this costs no suspension.
        if let reservation = try connection.reserveNow(wanted, for: destination) { return reservation }
        return try await connection.waitForRoom(wanted, for: destination, deadline: deadline)
    }

    /// See ``SMAPEvents/EventTransport``.
    public func publish(
        _ message: consuming OutboundMessage, using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async throws -> Bool {
        let connection = try publishConnection
        let waiter = Waiter<Bool>()
        // From here on only the window holds the message: a caller that has its answer must not keep it until it runs.
        let publish = try connection.submit(
            consume message, using: reservation, deadline: MonotonicTime(deadline), waiter)
        return try await waiter.value { connection.cancel([publish]) }
    }

    /// See ``SMAPEvents/EventTransport``.
    public func publish(
        contentsOf messages: consuming [OutboundMessage], using reservation: consuming PublishReservation,
        deadline: ContinuousClock.Instant
    ) async -> [Result<Bool, EventsError>] {
        let connection: RabbitMQConnection
        do {
            connection = try publishConnection
        } catch {
            let error = error as? EventsError ?? EventsError(.unsent, "\(type(of: error))", operation: "publish")
            return Array(repeating: .failure(error), count: messages.count)
        }
        return await connection.publish(contentsOf: messages, using: reservation, deadline: deadline)
    }

    /// The queue that stands for the channel it is named on.
    static let directReplyTo = "amq.rabbitmq.reply-to"

    /// See ``SMAPEvents/EventTransport``.
    public func request(_ message: OutboundMessage, deadline: ContinuousClock.Instant) async throws -> InboundDelivery {
        let connection = try publishConnection
        try await connection.consumeReplies(deadline: deadline)
        var message = message
        let correlationID = message.properties.correlationID ?? EventID().rawValue
        message.properties.correlationID = correlationID
        message.properties.replyTo = Self.directReplyTo
        return try await connection.replies.request(correlationID, deadline: deadline) { [message] in
            try await self.publish(message, deadline: deadline)
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
        let connection = try consumeConnection
        let consumer = Consumer(queue: queue, prefetch: prefetch, connection: connection)
        let result: Swift.Result<Result, any Error>
        do {
            _ = try await connection.request(.consume(consumer), name: "consume from \(queue)", deadline: deadline)
            result = .success(try await body(consumer))
        } catch {
            result = .failure(error)
        }
        // With its channel gone, there is nothing to close.
        if consumer.isChannelOpen {
            await connection.finish(.closeConsumer(consumer), name: "close the consumer of \(queue)")
        }
        consumer.fail(EventsError(.closed, "the consumer has ended", operation: "consume from \(queue)"))
        return try result.get()
    }
}
