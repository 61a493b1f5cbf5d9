internal import Synchronization

/// Where callers leave commands for a connection thread, in order and bounded.
package final class Mailbox<Command: Sendable>: Sendable {
    private struct State {
        var commands: [Command] = []
        var isClosed = false
    }

    /// What became of a command that was posted.
    package enum Posting: Sendable {
        case accepted
        /// As many commands as the mailbox holds are waiting already.
        case full
        /// The thread has ended; nobody will read it.
        case closed
    }

    private let capacity: Int
    private let state = Mutex(State())

    package init(capacity: Int) {
        self.capacity = capacity
    }

    package func post(_ command: Command) -> Posting {
        state.withLock { state in
            if state.isClosed { return .closed }
            guard state.commands.count < capacity else { return .full }
            state.commands.append(command)
            return .accepted
        }
    }

    /// All commands that are waiting, oldest first.
    package func takeAll() -> [Command] {
        state.withLock { state in
            defer { state.commands.removeAll(keepingCapacity: state.commands.count <= 64) }
            return state.commands
        }
    }

    /// Refuses commands from now on and hands out those that nobody has read.
    package func close() -> [Command] {
        state.withLock { state in
            state.isClosed = true
            defer { state.commands = [] }
            return state.commands
        }
    }
}
