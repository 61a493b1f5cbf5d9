/// The parts of a server's URL, percent-decoded. For the transports and stores of this package.
package struct ServerURL {
    package var scheme: String
    package var username: String?
    package var password: String?
    package var host: String?
    package var port: Int?
    /// Without the leading slash.
    package var path: String
    /// Whether a query or a fragment follows, which is not read.
    package var hasQuery = false

    /// Reads `scheme://user:password@host:port/path` (RFC 3986), IPv6 addresses in brackets. A query is ignored.
    ///
    /// Throws ``EventsError/Code/invalidConfiguration`` that names the part and never quotes the URL: it may hold a
    /// password wherever a character is out of place.
    package init(parsing url: String, setting: String) throws {
        guard let colon = url.firstRange(of: "://"), !url.unicodeScalars.contains(where: { $0.value < 0x21 }) else {
            throw Self.failure(setting, "it is not scheme://host:port/…")
        }
        scheme = url[..<colon.lowerBound].lowercased()
        var rest = url[colon.upperBound...]
        if let query = rest.firstIndex(where: { $0 == "?" || $0 == "#" }) {
            rest = rest[..<query]
            hasQuery = true
        }
        let slash = rest.firstIndex(of: "/") ?? rest.endIndex
        path = try Self.decode(rest[slash...].dropFirst(), "path", setting)
        var authority = rest[..<slash]
        if let at = authority.lastIndex(of: "@") {
            let user = authority[..<at]
            let separator = user.firstIndex(of: ":") ?? user.endIndex
            username = try Self.decode(user[..<separator], "user", setting)
            if separator < user.endIndex {
                password = try Self.decode(user[user.index(after: separator)...], "password", setting)
            }
            authority = authority[authority.index(after: at)...]
        }
        if authority.first == "[" {
            guard let end = authority.firstIndex(of: "]") else {
                throw Self.failure(setting, "the address lacks a ']'")
            }
            host = String(authority[authority.index(after: authority.startIndex)..<end])
            authority = authority[authority.index(after: end)...]
            guard authority.isEmpty || authority.first == ":" else {
                throw Self.failure(setting, "the host is malformed")
            }
        } else {
            let separator = authority.firstIndex(of: ":") ?? authority.endIndex
            let name = try Self.decode(authority[..<separator], "host", setting)
            host = name.isEmpty ? nil : name
            authority = authority[separator...]
        }
        let number = authority.dropFirst()
        if !number.isEmpty {
            guard number.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let port = Int(number),
                (1...65_535).contains(port)
            else { throw Self.failure(setting, "the port is not a number from 1 to 65535") }
            self.port = port
        }
    }

    package static func failure(_ setting: String, _ problem: String) -> EventsError {
        EventsError(.invalidConfiguration, "\(setting): \(problem)", operation: "configuration")
    }

    private static func decode(_ text: Substring, _ part: String, _ setting: String) throws -> String {
        var bytes: [UInt8] = []
        var rest = text.utf8[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            guard let high = rest.popFirst(), let low = rest.popFirst(),
                let value = UInt8(String(decoding: [high, low], as: UTF8.self), radix: 16)
            else { throw failure(setting, "the \(part) is wrongly percent-encoded") }
            bytes.append(value)
        }
        guard let decoded = String(validating: bytes, as: UTF8.self) else {
            throw failure(setting, "the \(part) is not UTF-8")
        }
        return decoded
    }
}
