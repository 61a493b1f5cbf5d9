import Foundation
import Testing

/// Accepts connections and never says a word.
enum SilentServer {
    static func withServer(_ body: (Int) async throws -> Void) async throws {
        let (descriptor, port) = try #require(listener())
        defer { close(descriptor) }
        try await body(port)
    }
}
