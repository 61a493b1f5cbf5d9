import Foundation
import SMAPEventsTesting
import Subprocess
import Testing

@Suite struct ObserverTests {
    @Test(.timeLimit(.minutes(10)))
    func `an observer in Python sees what the demo says`() async throws {
        // Servers of their own: the observer counts everything on the exchange.
        try await LocalStack.withStack { stack in
            let environment = stack.environment
            let result = try await Subprocess.run(
                .name("sh"),
                arguments: Arguments(["-c", "exec \"$@\"", "test", Program.python, Program.script("observer")]),
                environment: .inherit.updating(Program.changes(environment)), input: .inputWriter, output: .sequence,
                error: .discarded
            ) { observer in
                var said: [String] = []
                for try await line in observer.standardOutput.strings() {
                    let line = line.trimmingCharacters(in: .newlines)
                    guard line == "ready" else {
                        said.append(line)
                        continue
                    }
                    let demo = try await Program.events(
                        ["demo", "--external", "--items", "500", "--json"], environment: environment)
                    #expect(demo.status == 0, "\(demo.error)")
                    _ = try await observer.standardInputWriter.write(demo.output)
                    try await observer.standardInputWriter.finish()
                }
                return said
            }
            #expect(result.terminationStatus.isSuccess, "\(result.closureResult.joined(separator: "\n"))")
            #expect(result.closureResult.last?.hasSuffix("10 legacy, 0 problems") == true, "\(result.closureResult)")
        }
    }
}
