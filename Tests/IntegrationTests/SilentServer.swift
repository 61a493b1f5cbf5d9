import Foundation

/// Accepts connections and never says a word.
enum SilentServer {
    struct Unavailable: Error {}

    static func withServer(_ body: (Int) async throws -> Void) async throws {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(descriptor) }
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let isListening = withUnsafeMutableBytes(of: &address) { raw in
            // Sound: a sockaddr_in is what these calls take for AF_INET, and its length goes along.
            guard let base = raw.baseAddress?.assumingMemoryBound(to: sockaddr.self) else { return false }
            return bind(descriptor, base, length) == 0 && getsockname(descriptor, base, &length) == 0
                && listen(descriptor, 8) == 0
        }
        guard isListening else { throw Unavailable() }
        try await body(Int(UInt16(bigEndian: address.sin_port)))
    }
}
