/// Why a socket could not be opened or a thread not be started. Holds no credentials.
package struct SocketError: Error, Sendable, CustomStringConvertible {
    package enum Kind: Sendable {
        case unresolved, refused, timedOut, outOfDescriptors, outOfThreads
        /// A connection that had been open has ended.
        case lost
        /// The owner has closed the connection while it was being opened.
        case interrupted
    }

    package let kind: Kind
    package let description: String

    package init(_ kind: Kind, _ description: String) {
        self.kind = kind
        self.description = description
    }
}
