/// A strict JSON reader (RFC 8259) that finds where values are and copies none of them.
///
/// The envelope around an event is read with it, so that `data` goes through byte for byte: fields that we do not know,
/// and numbers that no Swift type could hold, arrive as they were sent. It checks the whole text, without recursion.
enum JSONText {
    struct Failure: Error, Equatable {
        let reason: String
        let offset: Int
    }

    /// Deeper nesting is refused: no event needs it, and decoders further on recurse.
    static let depthLimit = 256

    /// A string's content between its quotes, as written.
    struct StringToken {
        let range: Range<Int>
        let hasEscapes: Bool
    }

    /// One member of an object: its name and where its value is.
    struct Member {
        let name: StringToken
        let value: Range<Int>
    }

    /// Checks that `bytes` is one JSON object in valid UTF-8, and calls `body` with each of its members.
    static func readObject(_ bytes: Span<UInt8>, _ body: (Member) throws -> Void) throws {
        var index = 0
        try checkUTF8(bytes)
        // Windows programs put a byte order mark before UTF-8 (RFC 8259, 8.1: it may be ignored).
        if bytes.count >= 3, bytes[0] == 0xEF, bytes[1] == 0xBB, bytes[2] == 0xBF { index = 3 }
        skipSpace(bytes, &index)
        guard index < bytes.count, bytes[index] == UInt8(ascii: "{") else {
            throw Failure(reason: "not a JSON object", offset: index)
        }
        try members(bytes, at: &index, depth: 1, body)
        skipSpace(bytes, &index)
        guard index == bytes.count else { throw Failure(reason: "text after the JSON value", offset: index) }
    }

    /// Calls `body` with each member of the object at `index`, and leaves `index` after it.
    static func members(_ bytes: Span<UInt8>, at index: inout Int, depth: Int, _ body: (Member) throws -> Void) throws {
        index += 1
        skipSpace(bytes, &index)
        if index < bytes.count, bytes[index] == UInt8(ascii: "}") {
            index += 1
            return
        }
        while true {
            skipSpace(bytes, &index)
            let name = try string(bytes, &index)
            skipSpace(bytes, &index)
            try expect(UInt8(ascii: ":"), bytes, &index)
            skipSpace(bytes, &index)
            let start = index
            try skipValue(bytes, &index, depth: depth)
            try body(Member(name: name, value: start..<index))
            skipSpace(bytes, &index)
            guard index < bytes.count else { throw Failure(reason: "unfinished object", offset: index) }
            if bytes[index] == UInt8(ascii: "}") {
                index += 1
                return
            }
            try expect(UInt8(ascii: ","), bytes, &index)
        }
    }

    /// Whether a string is written as `name`. Escapes are resolved only where there are any.
    static func token(_ token: StringToken, in bytes: Span<UInt8>, is name: StaticString) -> Bool {
        if token.hasEscapes {
            return (try? text(of: token, in: bytes)) == name.description
        }
        guard token.range.count == name.utf8CodeUnitCount else { return false }
        return name.withUTF8Buffer { buffer in
            for offset in 0..<buffer.count where bytes[token.range.lowerBound + offset] != buffer[offset] {
                return false
            }
            return true
        }
    }

    /// The string at `range` (quotes included), or nil for `null`. Throws for any other value.
    static func optionalString(_ range: Range<Int>, in bytes: Span<UInt8>, field: String) throws -> String? {
        if bytes[range.lowerBound] == UInt8(ascii: "n") { return nil }
        guard bytes[range.lowerBound] == UInt8(ascii: "\"") else {
            throw Failure(reason: "\(field) is not a string", offset: range.lowerBound)
        }
        var index = range.lowerBound
        return try text(of: string(bytes, &index), in: bytes)
    }

    /// The same, for an id that some write as a number: then the number's text.
    static func optionalID(_ range: Range<Int>, in bytes: Span<UInt8>, field: String) throws -> String? {
        isNumber(range, in: bytes) ? copy(range, of: bytes) : try optionalString(range, in: bytes, field: field)
    }

    /// Whether the value at `range` is a number.
    static func isNumber(_ range: Range<Int>, in bytes: Span<UInt8>) -> Bool {
        bytes[range.lowerBound] == UInt8(ascii: "-") || (0x30...0x39).contains(bytes[range.lowerBound])
    }

    /// A string with its escapes resolved.
    static func text(of token: StringToken, in bytes: Span<UInt8>) throws -> String {
        guard token.hasEscapes else { return copy(token.range, of: bytes) }
        var result: [UInt8] = []
        var index = token.range.lowerBound
        while index < token.range.upperBound {
            let byte = bytes[index]
            guard byte == UInt8(ascii: "\\") else {
                result.append(byte)
                index += 1
                continue
            }
            let escape = bytes[index + 1]
            index += 2
            switch escape {
            case UInt8(ascii: "n"): result.append(0x0A)
            case UInt8(ascii: "t"): result.append(0x09)
            case UInt8(ascii: "r"): result.append(0x0D)
            case UInt8(ascii: "b"): result.append(0x08)
            case UInt8(ascii: "f"): result.append(0x0C)
            case UInt8(ascii: "u"):
                var unit = hexadecimal(bytes, index)
                index += 4
                if (0xD800..<0xDC00).contains(unit) {
                    guard index + 6 <= token.range.upperBound, bytes[index] == UInt8(ascii: "\\"),
                        bytes[index + 1] == UInt8(ascii: "u"),
                        case let low = hexadecimal(bytes, index + 2), (0xDC00..<0xE000).contains(low)
                    else { throw Failure(reason: "half a surrogate pair", offset: index) }
                    unit = 0x10000 + (unit - 0xD800) << 10 + (low - 0xDC00)
                    index += 6
                }
                guard let scalar = Unicode.Scalar(unit) else {
                    throw Failure(reason: "half a surrogate pair", offset: index)
                }
                result.append(contentsOf: String(Character(scalar)).utf8)
            default: result.append(escape)
            }
        }
        return String(decoding: result, as: UTF8.self)
    }

    static func copy(_ range: Range<Int>, of bytes: Span<UInt8>) -> String {
        bytes.extracting(range).withUnsafeBufferPointer { String(decoding: $0, as: UTF8.self) }
    }

    static func copyBytes(_ range: Range<Int>, of bytes: Span<UInt8>) -> [UInt8] {
        bytes.extracting(range).withUnsafeBufferPointer { Array($0) }
    }

    // MARK: Grammar

    private static func checkUTF8(_ bytes: Span<UInt8>) throws {
        // Sound: the buffer is only read inside this closure.
        let isValid = bytes.withUnsafeBufferPointer { buffer in
            // Most events are ASCII: eight bytes at a time, then the standard library's own check for the rest.
            let raw = UnsafeRawBufferPointer(buffer)
            var offset = 0
            while offset + 8 <= raw.count {
                if raw.loadUnaligned(fromByteOffset: offset, as: UInt64.self) & 0x8080_8080_8080_8080 != 0 { break }
                offset += 8
            }
            let rest = UnsafeBufferPointer(rebasing: buffer[offset...])
            return rest.allSatisfy({ $0 < 0x80 }) || String(validating: rest, as: UTF8.self) != nil
        }
        guard isValid else { throw Failure(reason: "invalid UTF-8", offset: 0) }
    }

    private static func skipSpace(_ bytes: Span<UInt8>, _ index: inout Int) {
        while index < bytes.count {
            switch bytes[index] {
            case 0x20, 0x0A, 0x0D, 0x09: index += 1
            default: return
            }
        }
    }

    private static func expect(_ byte: UInt8, _ bytes: Span<UInt8>, _ index: inout Int) throws {
        guard index < bytes.count, bytes[index] == byte else {
            throw Failure(reason: "expected '\(Character(Unicode.Scalar(byte)))'", offset: index)
        }
        index += 1
    }

    private static func string(_ bytes: Span<UInt8>, _ index: inout Int) throws -> StringToken {
        try expect(UInt8(ascii: "\""), bytes, &index)
        let start = index
        var hasEscapes = false
        while index < bytes.count {
            let byte = bytes[index]
            if byte == UInt8(ascii: "\"") {
                defer { index += 1 }
                return StringToken(range: start..<index, hasEscapes: hasEscapes)
            }
            if byte < 0x20 { throw Failure(reason: "control character in a string", offset: index) }
            if byte == UInt8(ascii: "\\") {
                hasEscapes = true
                guard index + 1 < bytes.count else { break }
                switch bytes[index + 1] {
                case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"), UInt8(ascii: "b"), UInt8(ascii: "f"),
                    UInt8(ascii: "n"), UInt8(ascii: "r"), UInt8(ascii: "t"):
                    index += 2
                case UInt8(ascii: "u"):
                    guard index + 6 <= bytes.count, hexadecimal(bytes, index + 2) != .max else {
                        throw Failure(reason: "malformed escape", offset: index)
                    }
                    index += 6
                default: throw Failure(reason: "malformed escape", offset: index)
                }
            } else {
                index += 1
            }
        }
        throw Failure(reason: "unfinished string", offset: index)
    }

    private static func hexadecimal(_ bytes: Span<UInt8>, _ index: Int) -> UInt32 {
        var value: UInt32 = 0
        for offset in 0..<4 {
            let digit: UInt32
            switch bytes[index + offset] {
            case let byte where (0x30...0x39).contains(byte): digit = UInt32(byte - 0x30)
            case let byte where (0x41...0x46).contains(byte): digit = UInt32(byte - 0x37)
            case let byte where (0x61...0x66).contains(byte): digit = UInt32(byte - 0x57)
            default: return .max
            }
            value = value << 4 | digit
        }
        return value
    }

    /// Steps over one value of any kind, and checks it. `depth` levels are open around it.
    private static func skipValue(_ bytes: Span<UInt8>, _ index: inout Int, depth: Int) throws {
        // The containers that are open: true for an object. Lives on the heap only when there are any.
        var open: [Bool] = []
        while true {
            skipSpace(bytes, &index)
            guard index < bytes.count else { throw Failure(reason: "unfinished JSON", offset: index) }
            switch bytes[index] {
            case UInt8(ascii: "{"):
                index += 1
                skipSpace(bytes, &index)
                if index < bytes.count, bytes[index] == UInt8(ascii: "}") {
                    index += 1
                } else {
                    try enter(true, &open, depth, index)
                    try name(bytes, &index)
                    continue
                }
            case UInt8(ascii: "["):
                index += 1
                skipSpace(bytes, &index)
                if index < bytes.count, bytes[index] == UInt8(ascii: "]") {
                    index += 1
                } else {
                    try enter(false, &open, depth, index)
                    continue
                }
            case UInt8(ascii: "\""): _ = try string(bytes, &index)
            case UInt8(ascii: "t"): try literal("true", bytes, &index)
            case UInt8(ascii: "f"): try literal("false", bytes, &index)
            case UInt8(ascii: "n"): try literal("null", bytes, &index)
            default: try number(bytes, &index)
            }
            // A value has ended; close what ends with it.
            while true {
                guard let isObject = open.last else { return }
                skipSpace(bytes, &index)
                guard index < bytes.count else { throw Failure(reason: "unfinished JSON", offset: index) }
                if bytes[index] == UInt8(ascii: ",") {
                    index += 1
                    if isObject { try name(bytes, &index) }
                    break
                }
                try expect(UInt8(ascii: isObject ? "}" : "]"), bytes, &index)
                open.removeLast()
            }
        }
    }

    private static func enter(_ isObject: Bool, _ open: inout [Bool], _ depth: Int, _ index: Int) throws {
        open.append(isObject)
        if open.count + depth > depthLimit {
            throw Failure(reason: "nested deeper than \(depthLimit) levels", offset: index)
        }
    }

    private static func name(_ bytes: Span<UInt8>, _ index: inout Int) throws {
        skipSpace(bytes, &index)
        _ = try string(bytes, &index)
        skipSpace(bytes, &index)
        try expect(UInt8(ascii: ":"), bytes, &index)
    }

    private static func literal(_ text: StaticString, _ bytes: Span<UInt8>, _ index: inout Int) throws {
        let end = index + text.utf8CodeUnitCount
        guard end <= bytes.count, token(StringToken(range: index..<end, hasEscapes: false), in: bytes, is: text) else {
            throw Failure(reason: "not a JSON value", offset: index)
        }
        index = end
    }

    private static func number(_ bytes: Span<UInt8>, _ index: inout Int) throws {
        func digits() -> Int {
            let start = index
            while index < bytes.count, (0x30...0x39).contains(bytes[index]) { index += 1 }
            return index - start
        }
        let start = index
        if bytes[index] == UInt8(ascii: "-") { index += 1 }
        let leadingZero = index < bytes.count && bytes[index] == UInt8(ascii: "0")
        let whole = digits()
        guard whole > 0, whole == 1 || !leadingZero else { throw Failure(reason: "not a JSON value", offset: start) }
        if index < bytes.count, bytes[index] == UInt8(ascii: ".") {
            index += 1
            guard digits() > 0 else { throw Failure(reason: "not a JSON number", offset: start) }
        }
        if index < bytes.count, bytes[index] | 0x20 == UInt8(ascii: "e") {
            index += 1
            if index < bytes.count, bytes[index] == UInt8(ascii: "+") || bytes[index] == UInt8(ascii: "-") {
                index += 1
            }
            guard digits() > 0 else { throw Failure(reason: "not a JSON number", offset: start) }
        }
    }
}

extension [UInt8] {
    /// Appends a string as a JSON string, quotes included.
    mutating func append(json text: String) {
        append(UInt8(ascii: "\""))
        defer { append(UInt8(ascii: "\"")) }
        // Ids and names need no escapes: one look, one copy.
        if text.utf8.allBytes({ $0 >= 0x20 && $0 != UInt8(ascii: "\"") && $0 != UInt8(ascii: "\\") }) {
            append(contentsOf: text.utf8)
            return
        }
        for byte in text.utf8 {
            switch byte {
            case UInt8(ascii: "\""), UInt8(ascii: "\\"):
                append(UInt8(ascii: "\\"))
                append(byte)
            case 0x0A: append(contentsOf: "\\n".utf8)
            case 0x0D: append(contentsOf: "\\r".utf8)
            case 0x09: append(contentsOf: "\\t".utf8)
            case 0..<0x20:
                append(contentsOf: "\\u00".utf8)
                for nibble in [byte >> 4, byte & 0xF] { append(nibble < 10 ? 0x30 + nibble : 0x57 + nibble) }
            default: append(byte)
            }
        }
    }

    mutating func append(literal: StaticString) {
        literal.withUTF8Buffer { append(contentsOf: $0) }
    }
}

extension String.UTF8View {
    /// As `allSatisfy`, over the contiguous bytes where there are any: several times as fast.
    func allBytes(_ condition: (UInt8) -> Bool) -> Bool {
        let contiguous = withContiguousStorageIfAvailable { bytes in
            for byte in bytes where !condition(byte) { return false }
            return true
        }
        return contiguous ?? allSatisfy(condition)
    }
}
