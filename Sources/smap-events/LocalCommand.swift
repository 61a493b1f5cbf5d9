import ArgumentParser
import Foundation
import SMAPEvents
import SMAPEventsTesting
import Subprocess
import UnixSignals

struct LocalCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "local",
        abstract: "Start a private RabbitMQ and Redis, for a command or until you stop it.",
        discussion: """
            Without a command, it prints the environment variables with which services find the servers, and waits for \
            Ctrl-C. With one, it runs it with these variables and exits with its exit code:
              smap-events local -- smap-events track start p1

            The servers listen on free ports of 127.0.0.1, keep their data in a temporary folder, and are stopped at the \
            end, whatever happens. Ctrl-C goes to the command too; a signal to this process alone stops the servers and \
            leaves the command to itself.
            """)

    @Argument(parsing: .postTerminator, help: "The command to run, after --.")
    var command: [String] = []

    func run() async throws {
        var status: Int32 = 0
        try await Console.reporting {
            status = try await LocalStack.withStack { stack in
                guard let program = command.first else {
                    for (name, value) in stack.environment.sorted(by: { $0.key < $1.key }) {
                        Console.line("export \(name)=\(value)")
                    }
                    Console.error("RabbitMQ and Redis are up; Ctrl-C stops them")
                    for await _ in await UnixSignalsSequence(trapping: .sigint, .sigterm) { break }
                    return 0
                }
                return try await Self.run(program, Array(command.dropFirst()), stack.environment)
            }
        }
        if status != 0 { throw ExitCode(status) }
    }

    private static func run(
        _ program: String, _ arguments: [String], _ environment: [String: String]
    ) async throws
        -> Int32
    {
        let changes = environment.reduce(into: [Environment.Key: String?]()) { changes, variable in
            if let key = Environment.Key(rawValue: variable.key) { changes[key] = variable.value }
        }
        // The shell finds the program, and says so where it cannot (127).
        let result = try await Subprocess.run(
            .name("sh"), arguments: Arguments(["-c", "exec \"$@\"", "smap-events", program] + arguments),
            environment: .inherit.updating(changes), input: .currentStandardInput, output: .currentStandardOutput,
            error: .currentStandardError)
        switch result.terminationStatus {
        case .exited(let code): return Int32(code)
        case .signaled(let signal): return 128 + Int32(signal)
        }
    }
}
