internal import CRabbitMQ
internal import ConnectionThread

/// What goes to the broker: settlements, publishes, methods.
extension AMQPDriver {
    func sendSettlements() throws {
        for channel in channels.values {
            guard case .consuming(let consumer) = channel.role, channel.isOpen, !channel.isClosing else { continue }
            try sendSettlements(of: consumer, on: channel)
        }
    }

    func sendSettlements(of consumer: Consumer, on channel: AMQPChannel) throws {
        let frames = consumer.settlements()
        if frames.count > 1 { Socket.cork(descriptor, true) }
        for frame in frames {
            switch frame {
            case .acknowledge(let tag, let multiple):
                try Self.check(amqp_basic_ack(handle, channel.number, tag, multiple ? 1 : 0), "acknowledging")
            case .reject(let tag, let requeue):
                try Self.check(amqp_basic_reject(handle, channel.number, tag, requeue ? 1 : 0), "rejecting")
            }
        }
        if frames.count > 1 { Socket.cork(descriptor, false) }
    }

    /// Writes what the socket takes. Returns when to look again at the latest, nil if there is no need.
    func writePublishes() throws -> Duration? {
        guard publishing.isOpen, !isBlocked, restoring == 0 else { return nil }
        // The kernel counts its own bookkeeping in the buffer too, hence the half.
        let budget = min(Socket.freeSendBuffer(descriptor) / 2, Self.batchLimit)
        let batch = connection.withWindow { window -> [PackedMessage] in
            guard let size = window.nextSize else { return [] }
            // A message larger than the buffer goes out alone, once the buffer is empty.
            if size > budget, Socket.unsentBytes(descriptor) > 0 { return [] }
            return window.takeBatch(budget: budget)
        }
        guard !batch.isEmpty else { return connection.withWindow { $0.patience } }
        // A body that is a multiple of the frame's size would lie 200 ms in the kernel (the library sets MSG_MORE on
        // its last frame); uncorking sends it.
        Socket.cork(descriptor, true)
        unwritten = batch.count
        for message in batch {
            unwritten -= 1
            try write(message)
        }
        Socket.cork(descriptor, false)
        return .zero
    }

    func write(_ message: PackedMessage) throws {
        let status = message.bytes.withUnsafeBytes { raw -> Int32 in
            // Sound: the library only reads through these pointers, and only during the call.
            let base = UnsafeMutableRawPointer(mutating: raw.baseAddress)
            func bytes(_ range: Range<Int>) -> amqp_bytes_t {
                amqp_bytes_t(len: range.count, bytes: base.map { $0 + range.lowerBound })
            }
            var properties = amqp_basic_properties_t()
            properties._flags = amqp_flags_t(AMQP_BASIC_DELIVERY_MODE_FLAG)
            properties.delivery_mode = 2
            if let range = message.contentType {
                properties.content_type = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_CONTENT_TYPE_FLAG)
            }
            if let range = message.messageID {
                properties.message_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_MESSAGE_ID_FLAG)
            }
            if let range = message.type {
                properties.type = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_TYPE_FLAG)
            }
            if let range = message.appID {
                properties.app_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_APP_ID_FLAG)
            }
            if let range = message.correlationID {
                properties.correlation_id = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_CORRELATION_ID_FLAG)
            }
            if let range = message.replyTo {
                properties.reply_to = bytes(range)
                properties._flags |= amqp_flags_t(AMQP_BASIC_REPLY_TO_FLAG)
            }
            if let timestamp = message.timestamp {
                properties.timestamp = timestamp
                properties._flags |= amqp_flags_t(AMQP_BASIC_TIMESTAMP_FLAG)
            }
            return withUnsafeTemporaryAllocation(of: amqp_table_entry_t.self, capacity: message.headers.count) {
                entries in
                for (index, header) in message.headers.enumerated() {
                    var value = amqp_field_value_t()
                    switch header.value {
                    case .string(let range):
                        value.kind = UInt8(AMQP_FIELD_KIND_UTF8.rawValue)
                        value.value.bytes = bytes(range)
                    case .integer(let number):
                        value.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
                        value.value.i64 = number
                    case .boolean(let flag):
                        value.kind = UInt8(AMQP_FIELD_KIND_BOOLEAN.rawValue)
                        value.value.boolean = flag ? 1 : 0
                    }
                    entries.initializeElement(at: index, to: amqp_table_entry_t(key: bytes(header.name), value: value))
                }
                if !message.headers.isEmpty {
                    properties.headers = amqp_table_t(
                        num_entries: Int32(message.headers.count), entries: entries.baseAddress)
                    properties._flags |= amqp_flags_t(AMQP_BASIC_HEADERS_FLAG)
                }
                return amqp_basic_publish(
                    handle, publishing.number, bytes(message.exchange), bytes(message.routingKey), 1, 0, &properties,
                    bytes(message.body))
            }
        }
        try Self.check(status, "publishing")
    }

    func send<Method: BitwiseCopyable>(
        _ channel: AMQPChannel, _ id: amqp_method_number_t, _ method: inout Method
    ) throws {
        try Self.check(amqp_send_method(handle, channel.number, id, &method), "sending")
    }
}
