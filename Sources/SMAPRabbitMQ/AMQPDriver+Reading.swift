internal import CRabbitMQ
internal import Logging
internal import SMAPEvents

/// Frames from the broker: methods, and messages put together from method, header and body.
extension AMQPDriver {
    /// Reads until the socket is silent. True if there may be more, after so many frames that others must have a turn.
    func readFrames() throws -> Bool {
        for _ in 0..<4096 {
            var frame = amqp_frame_t()
            var immediately = Self.noTime
            let status = amqp_simple_wait_frame_noblock(handle, &frame, &immediately)
            if status == AMQP_STATUS_TIMEOUT.rawValue { return false }
            try Self.check(status, "reading")
            try take(frame)
            // Everything that is kept has been copied.
            amqp_maybe_release_buffers_on_channel(handle, frame.channel)
        }
        return true
    }

    func take(_ frame: amqp_frame_t) throws {
        switch Int32(frame.frame_type) {
        case AMQP_FRAME_METHOD:
            if frame.channel == 0 {
                try takeConnectionMethod(frame.payload.method)
            } else {
                try takeMethod(frame.payload.method, on: frame.channel)
            }
        case AMQP_FRAME_HEADER:
            guard let channel = channels[frame.channel], channel.assembly != nil else { return }
            let header = frame.payload.properties
            channel.assembly?.expected = header.body_size
            if header.body_size > UInt64(connection.configuration.maximumBodySize) {
                channel.assembly?.isTooLarge = true
            } else {
                channel.assembly?.body.reserveCapacity(Int(header.body_size))
            }
            if let decoded = header.decoded {
                channel.assembly?.properties = Self.properties(decoded.load(as: amqp_basic_properties_t.self))
            }
            try completeMessage(channel)
        case AMQP_FRAME_BODY:
            guard let channel = channels[frame.channel], channel.assembly != nil else { return }
            let fragment = frame.payload.body_fragment
            channel.assembly?.received += UInt64(fragment.len)
            if channel.assembly?.isTooLarge == false {
                // Sound: the fragment is valid until the channel's buffers are released.
                channel.assembly?.body.append(
                    contentsOf: UnsafeRawBufferPointer(start: fragment.bytes, count: fragment.len))
            }
            try completeMessage(channel)
        default: break
        }
    }

    func takeConnectionMethod(_ method: amqp_method_t) throws {
        switch method.id {
        case AMQP_CONNECTION_BLOCKED_METHOD:
            isBlocked = true
            let blocked = method.decoded?.load(as: amqp_connection_blocked_t.self)
            connection.blocked(blocked.map { Self.string($0.reason) } ?? "")
        case AMQP_CONNECTION_UNBLOCKED_METHOD:
            isBlocked = false
            connection.blocked(nil)
        case AMQP_CONNECTION_CLOSE_METHOD:
            let close = method.decoded?.load(as: amqp_connection_close_t.self)
            var ok = amqp_connection_close_ok_t()
            _ = amqp_send_method(handle, 0, AMQP_CONNECTION_CLOSE_OK_METHOD, &ok)
            throw AMQPFailure.closedByBroker(
                code: Int(close?.reply_code ?? 0), text: close.map { Self.string($0.reply_text) } ?? "")
        default: break
        }
    }

    func takeMethod(_ method: amqp_method_t, on number: amqp_channel_t) throws {
        guard let channel = channels[number], let decoded = method.decoded else { return }
        switch method.id {
        case AMQP_BASIC_DELIVER_METHOD:
            let deliver = decoded.load(as: amqp_basic_deliver_t.self)
            channel.assembly = AMQPChannel.Assembly(
                kind: .delivery(tag: deliver.delivery_tag, isRedelivered: deliver.redelivered != 0),
                exchange: Self.string(deliver.exchange), routingKey: Self.string(deliver.routing_key))
        case AMQP_BASIC_RETURN_METHOD:
            let returned = decoded.load(as: amqp_basic_return_t.self)
            channel.assembly = AMQPChannel.Assembly(
                kind: .returned, exchange: Self.string(returned.exchange),
                routingKey: Self.string(returned.routing_key))
        case AMQP_BASIC_ACK_METHOD:
            let ack = decoded.load(as: amqp_basic_ack_t.self)
            try confirm(ack.delivery_tag, multiple: ack.multiple != 0, isNack: false)
        case AMQP_BASIC_NACK_METHOD:
            let nack = decoded.load(as: amqp_basic_nack_t.self)
            try confirm(nack.delivery_tag, multiple: nack.multiple != 0, isNack: true)
        case AMQP_BASIC_CANCEL_METHOD:
            guard case .consuming(let consumer) = channel.role else { return }
            consumer.fail(
                EventsError(
                    .subscriptionCancelled, "the broker has cancelled the consumer: its queue is gone",
                    operation: "consume from \(consumer.queue)"), isChannelOpen: true)
        case AMQP_CHANNEL_CLOSE_METHOD:
            let close = decoded.load(as: amqp_channel_close_t.self)
            try channelClosed(channel, code: Int(close.reply_code), text: Self.string(close.reply_text))
        default:
            _ = try channel.reply(method)
        }
    }

    func confirm(_ tag: UInt64, multiple: Bool, isNack: Bool) throws {
        let answers = connection.withWindow { $0.confirmed(tag: tag, multiple: multiple, isNack: isNack) }
        guard let answers else {
            throw AMQPFailure.unexpected("a confirm for a message that was not sent")
        }
        // Before anything else that this thread may read.
        for id in answers.requests { connection.replies.sent(id) }
        answers.give()
    }

    func completeMessage(_ channel: AMQPChannel) throws {
        guard let assembly = channel.assembly, let expected = assembly.expected, assembly.received >= expected else {
            return
        }
        channel.assembly = nil
        switch (assembly.kind, channel.role) {
        case (.returned, .publishing):
            connection.withWindow {
                $0.returned(
                    exchange: assembly.exchange, routingKey: assembly.routingKey,
                    messageID: assembly.properties.messageID)
            }
        case (.delivery(let tag, let isRedelivered), .consuming(let consumer)):
            if assembly.isTooLarge {
                connection.logger.warning(
                    "a message is larger than the limit",
                    metadata: ["queue": "\(consumer.queue)", "bytes": "\(expected)"])
            }
            let isOrdered = consumer.deliver(delivery(assembly, tag, isRedelivered))
            if !isOrdered { throw AMQPFailure.unexpected("a delivery out of order") }
        case (.delivery(let tag, let isRedelivered), .publishing):
            connection.replies.deliver(delivery(assembly, tag, isRedelivered))
        default: break
        }
    }

    func delivery(
        _ assembly: AMQPChannel.Assembly, _ tag: UInt64, _ isRedelivered: Bool
    ) -> InboundDelivery {
        InboundDelivery(
            tag: tag, exchange: assembly.exchange, routingKey: assembly.routingKey, isRedelivered: isRedelivered,
            properties: assembly.properties, body: assembly.body, isTruncated: assembly.isTooLarge)
    }

    func channelClosed(_ channel: AMQPChannel, code: Int, text: String) throws {
        var ok = amqp_channel_close_ok_t()
        try send(channel, AMQP_CHANNEL_CLOSE_OK_METHOD, &ok)
        let error = EventsError(
            AMQPFailure.brokerCode(code) ?? .connectionLost, text, operation: "channel \(channel.number)")
        switch channel.role {
        case .topology:
            channel.closed(error, keepSteps: true)
            try open(channel)
        case .publishing:
            channel.closed(error, keepSteps: false)
            // "NOT_FOUND - no exchange 'x' in vhost '/'", "ACCESS_REFUSED - access to exchange 'x' in vhost …".
            let exchange = text.split(separator: "'", omittingEmptySubsequences: false).dropFirst().first.map(
                String.init)
            connection.answer { $0.channelClosed(text, refused: exchange.map { ($0, error.code) }) }
            // Replies come to the channel that has asked.
            connection.replies.connectionLost(
                EventsError(.connectionLost, "the channel was closed: \(text)", operation: "request"))
            try open(channel)
        case .consuming(let consumer):
            channel.closed(error, keepSteps: false)
            channels[channel.number] = nil
            connection.remove(consumer)
            // Once it consumes, 406 means that something was unsettled for too long (`consumer_timeout`): it comes again.
            let code = error.code == .topologyConflict ? EventsError.Code.connectionLost : error.code
            consumer.fail(EventsError(code, text, operation: "consume from \(consumer.queue)"))
        }
    }
}
