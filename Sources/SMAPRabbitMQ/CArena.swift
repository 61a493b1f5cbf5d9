internal import CRabbitMQ
internal import SMAPEvents

/// Memory for the strings and tables of one method, freed with it. The library reads them while it encodes.
final class CArena {
    private var blocks: [UnsafeMutableRawPointer] = []

    private init() {}

    /// Runs `body` with an arena that lives until it returns: what it hands out are bare pointers.
    static func with<Result>(_ body: (CArena) throws -> Result) rethrows -> Result {
        let arena = CArena()
        return try withExtendedLifetime(arena) { try body(arena) }
    }

    deinit {
        for block in blocks { block.deallocate() }
    }

    func bytes(_ text: String) -> amqp_bytes_t {
        var text = text
        return text.withUTF8 { utf8 in
            let block = UnsafeMutableRawBufferPointer.allocate(byteCount: max(1, utf8.count), alignment: 1)
            block.copyBytes(from: utf8)
            if let base = block.baseAddress { blocks.append(base) }
            return amqp_bytes_t(len: utf8.count, bytes: block.baseAddress)
        }
    }

    func entry(_ key: String, _ value: MessageProperties.HeaderValue) -> amqp_table_entry_t {
        var field = amqp_field_value_t()
        switch value {
        case .string(let text):
            field.kind = UInt8(AMQP_FIELD_KIND_UTF8.rawValue)
            field.value.bytes = bytes(text)
        case .boolean(let flag):
            field.kind = UInt8(AMQP_FIELD_KIND_BOOLEAN.rawValue)
            field.value.boolean = flag ? 1 : 0
        case .integer(let number):
            field.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
            field.value.i64 = number
        }
        return amqp_table_entry_t(key: bytes(key), value: field)
    }

    func entry(_ key: String, _ table: amqp_table_t) -> amqp_table_entry_t {
        var field = amqp_field_value_t()
        field.kind = UInt8(AMQP_FIELD_KIND_TABLE.rawValue)
        field.value.table = table
        return amqp_table_entry_t(key: bytes(key), value: field)
    }

    func table(_ entries: [amqp_table_entry_t]) -> amqp_table_t {
        let block = UnsafeMutableBufferPointer<amqp_table_entry_t>.allocate(capacity: max(1, entries.count))
        _ = block.initialize(from: entries)
        if let base = block.baseAddress { blocks.append(UnsafeMutableRawPointer(base)) }
        return amqp_table_t(num_entries: Int32(entries.count), entries: block.baseAddress)
    }
}
