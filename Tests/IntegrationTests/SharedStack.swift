import Configuration
import Logging
import SMAPEvents
import SMAPEventsTesting
import SMAPRabbitMQ
import SMAPRedis

/// One private RabbitMQ and Redis for all tests of a run that leave them standing. They end with this process.
enum SharedStack {
    private static let stack = Task {
        var options = LocalStack.Options()
        // A dozen others may be starting.
        options.deadline = .seconds(300)
        return try await LocalStack.start(options)
    }

    static var current: LocalStack {
        get async throws { try await stack.value }
    }

    static func transport(
        logger: Logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() },
        _ change: (inout RabbitMQConfiguration) -> Void = { _ in }
    ) async throws -> RabbitMQTransport {
        var configuration = try RabbitMQConfiguration(url: await current.rabbitMQURL)
        change(&configuration)
        return try RabbitMQTransport(configuration: configuration, logger: logger)
    }

    static func store() async throws -> RedisProgressStore {
        try RedisProgressStore(configuration: RedisConfiguration(host: "127.0.0.1", port: await current.redisPort))
    }

    static func inbox() async throws -> RedisInbox {
        try RedisInbox(configuration: RedisConfiguration(host: "127.0.0.1", port: await current.redisPort))
    }
}
