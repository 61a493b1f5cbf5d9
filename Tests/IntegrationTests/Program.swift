import Foundation
import SMAPEventsTesting
import Subprocess
import Testing

/// Runs programs for tests: our own command, as a user would, and Python.
enum Program {
    struct Output: Sendable {
        let status: Int32
        let output: String
        let error: String

        /// The JSON lines of the output.
        var lines: [[String: Any]] {
            output.split(separator: "\n").compactMap {
                try? JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any]
            }
        }
    }

    static let repository = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent().path

    /// `smap-events`, as it was built together with the tests.
    static var command: String {
        get throws { try built("smap-events") }
    }

    /// A program of this package, as it was built together with the tests.
    static func built(_ name: String) throws -> String {
        let folder = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
        return try #require(
            [folder, URL(filePath: CommandLine.arguments[0]).deletingLastPathComponent()].map {
                $0.appending(path: name).path
            }.first { FileManager.default.isExecutableFile(atPath: $0) })
    }

    static var python: String {
        // Debian's Python has Debian's packages; another one on the PATH may not.
        FileManager.default.isExecutableFile(atPath: "/usr/bin/python3") ? "/usr/bin/python3" : "python3"
    }

    static func script(_ name: String) throws -> String {
        try #require(Bundle.module.url(forResource: "Python/\(name)", withExtension: "py")).path
    }

    static func events(
        _ arguments: [String], input: String = "", environment: [String: String] = [:],
        processFile: String = "/dev/null"
    ) async throws -> Output {
        try await run(command, arguments, input: input, environment: environment, processFile: processFile)
    }

    /// Runs a program to its end. Its process id goes to `processFile` first, for tests that send it a signal.
    static func run(
        _ program: String, _ arguments: [String], input: String = "", environment: [String: String] = [:],
        processFile: String = "/dev/null"
    ) async throws -> Output {
        let result = try await Subprocess.run(
            .name("sh"),
            arguments: Arguments(["-c", "echo $$ >\"$0\"; exec \"$@\"", processFile, program] + arguments),
            environment: .inherit.updating(changes(environment)), input: .string(input),
            output: .string(limit: 64 << 20), error: .string(limit: 1 << 20))
        let status: Int32 =
            switch result.terminationStatus {
            case .exited(let code): Int32(code)
            case .signaled(let signal): 128 + Int32(signal)
            }
        return Output(status: status, output: result.standardOutput, error: result.standardError)
    }

    /// Sends a signal to the program whose process id is in a file.
    static func signal(_ signal: Int32, processFile: String) throws {
        let text = try String(contentsOfFile: processFile, encoding: .utf8)
        let process = try #require(pid_t(text.trimmingCharacters(in: .whitespacesAndNewlines)))
        #expect(kill(process, signal) == 0)
    }

    static func changes(_ environment: [String: String]) -> [Environment.Key: String?] {
        environment.reduce(into: [:]) { changes, variable in
            if let key = Environment.Key(rawValue: variable.key) { changes[key] = variable.value }
        }
    }
}
