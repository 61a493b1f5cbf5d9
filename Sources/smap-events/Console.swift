import ArgumentParser
import Configuration
import Foundation
import Logging
import SMAPEvents
import SMAPRabbitMQ
import SMAPRedis
import Synchronization

/// Standard output, standard error, and whether people look at them.
enum Console {
    static let isOutputTerminal = isatty(STDOUT_FILENO) == 1
    static let isErrorTerminal = isatty(STDERR_FILENO) == 1

    private static let output = Mutex(FileHandle.standardOutput)

    /// Writes a result. At once: a reader in a pipe may wait for this line. Whole, whichever tasks write at a time.
    static func line(_ text: String) {
        output.withLock { $0.write(Data((text + "\n").utf8)) }
    }

    static func error(_ text: String) {
        FileHandle.standardError.write(Data(("smap-events: " + text + "\n").utf8))
    }

    /// Tells on standard error what goes wrong meanwhile, and when it works again.
    static let logger: Logger = {
        var logger = Logger(label: "smap-events") { _ in ConsoleLogHandler() }
        logger.logLevel = .notice
        return logger
    }()

    static func json<Value: Encodable>(_ value: Value) throws -> String {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        return String(decoding: try encoder.encode(value), as: UTF8.self)
    }

    /// Runs a command's body; what it throws is told on standard error, and ends the command with exit code 1.
    static func reporting(_ body: () async throws -> Void) async throws {
        do {
            try await body()
        } catch let error as EventsError {
            Console.error(error.description)
            throw ExitCode(1)
        }
    }
}

/// Warnings and errors as lines for people.
private struct ConsoleLogHandler: LogHandler {
    var logLevel = Logger.Level.warning
    var metadata: Logger.Metadata = [:]

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        let details = (event.metadata ?? [:]).sorted { $0.key < $1.key }.map { " \($0.key)=\($0.value)" }.joined()
        Console.error("\(event.message)\(details)")
    }
}

/// The settings that all commands share, from the environment.
enum Settings {
    static let reader = ConfigReader(provider: EnvironmentVariablesProvider())

    static func rabbitMQ() throws -> RabbitMQConfiguration { try RabbitMQConfiguration(reader: reader) }

    static func redis() throws -> RedisConfiguration { try RedisConfiguration(reader: reader) }

    static func publisher(deadline: Duration) -> PublisherConfiguration {
        var configuration =
            (try? PublisherConfiguration(reader: reader)) ?? PublisherConfiguration(service: "smap-events")
        configuration.deadline = deadline
        return configuration
    }
}

/// A bar that is drawn over itself on standard error, for people only.
struct ProgressBar {
    var label: String
    var done = 0
    var total = 0

    var text: String {
        let width = 32
        let filled = total > 0 ? min(width, done * width / total) : 0
        let percent = total > 0 ? min(100, done * 100 / total) : 0
        let bar = String(repeating: "█", count: filled) + String(repeating: "░", count: width - filled)
        let name = label.padding(toLength: 12, withPad: " ", startingAt: 0)
        return "\(name) \(bar) \(percent)%  \(done)/\(total)"
    }

    /// Draws bars in place of those drawn before.
    static func draw(_ bars: [ProgressBar], over drawn: Int) {
        guard Console.isErrorTerminal else { return }
        var text = drawn > 0 ? "\u{1B}[\(drawn)A" : ""
        for bar in bars { text += "\r\u{1B}[2K\(bar.text)\n" }
        FileHandle.standardError.write(Data(text.utf8))
    }
}

func seconds(_ value: Double) -> Duration { .milliseconds(Int64(value * 1000)) }
