internal import SMAPEvents
internal import Subprocess

/// A server process that cannot outlive this one.
///
/// A shell holds it on a leash: it starts the server, and stops it by its process id as soon as its own standard input
/// ends. That happens when ``stop()`` closes the pipe, and just as well when this process dies in whatever way, `kill -9`
/// included. Then it removes the server's folder, unless there is a file `.keep` in it.
final class LeashedProcess: Sendable {
    /// Arguments: tenths of a second between SIGTERM and SIGKILL, the folder to log to and to remove, the command. The
    /// folder above goes with the last server in it.
    private static let script = """
        patience=$1 folder=$2; shift 2
        trap '' INT HUP TERM
        "$@" >>"$folder/output.log" 2>&1 </dev/null &
        pid=$!
        echo "$pid"
        cat >/dev/null
        kill -TERM "$pid" 2>/dev/null
        kill -CONT "$pid" 2>/dev/null
        while [ "$patience" -gt 0 ] && kill -0 "$pid" 2>/dev/null; do sleep 0.1; patience=$((patience - 1)); done
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
        [ -e "$folder/.keep" ] && exit
        rm -rf "$folder"
        rmdir "$(dirname "$folder")" 2>/dev/null
        """

    /// The server's own process id.
    let processID: Int32
    private let letGo: AsyncStream<Never>.Continuation
    private let ended: Task<Void, Never>

    /// Starts `command` and returns once its process id is known.
    ///
    /// - Parameters:
    ///   - patience: Tenths of a second between SIGTERM and SIGKILL.
    init(_ command: [String], environment: [String: String], folder: String, patience: Int) async throws {
        let (gate, letGo) = AsyncStream.makeStream(of: Never.self, bufferingPolicy: .bufferingOldest(1))
        let (identifiers, report) = AsyncStream.makeStream(of: Int32.self, bufferingPolicy: .bufferingOldest(1))
        let arguments = ["-c", Self.script, "leash", String(patience), folder] + command
        let changes = environment.reduce(into: [Environment.Key: String?]()) { changes, variable in
            if let key = Environment.Key(rawValue: variable.key) { changes[key] = variable.value }
        }
        var options = PlatformOptions()
        // A Ctrl-C at the terminal is for the caller, who then stops its servers.
        options.createSession = true
        self.letGo = letGo
        // Not a child of the caller's task on purpose: cancelling it would kill the shell and not the server. stop()
        // waits for it.
        ended = Task { [options] in
            defer { report.finish() }
            _ = try? await Subprocess.run(
                .name("sh"), arguments: Arguments(arguments), environment: .inherit.updating(changes),
                platformOptions: options, input: .inputWriter, output: .sequence, error: .discarded
            ) { execution in
                for try await line in execution.standardOutput.strings() {
                    if let identifier = Int32(line.filter(\.isNumber)) { report.yield(identifier) }
                    break
                }
                for await _ in gate {}
                try await execution.standardInputWriter.finish()
            }
        }
        guard let identifier = await identifiers.first(where: { _ in true }) else {
            // It may start all the same, when it is our task that has ended.
            letGo.finish()
            await ended.value
            try Task.checkCancellation()
            throw EventsError(
                .connectionFailed, "\(command.first ?? "") could not be started by a shell (sh)",
                operation: "local stack")
        }
        processID = identifier
    }

    /// Stops the server and waits until it is gone.
    func stop() async {
        letGo.finish()
        await ended.value
    }
}
