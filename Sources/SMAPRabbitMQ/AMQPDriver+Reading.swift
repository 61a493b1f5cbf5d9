internal import CRabbitMQ
internal import ConnectionThread
internal import Logging
internal import SMAPEvents
internal import Synchronization

/// Frames from the broker: methods, and messages put together from method, header and body.
extension AMQPDriver {
    /// So many reads a round: then settlements, publishes and heartbeats have their turn.
    private static let readLimit = 16

    /// Reads what has come. True if there may be more.
    func read(_ now: MonotonicTime) throws -> Bool {
        var mayHaveMore = true
        var reads = 0
        while mayHaveMore, reads < Self.readLimit {
            reads += 1
            let reading = Result { try stream.receive { parser.append($0) } }
            if case .success(.bytes) = reading { lastReceived = now }
            // Also what came with the login, or before the end: it may say why.
            try takeFrames()
            switch try reading.get() {
            case .silent: mayHaveMore = false
            case .bytes(let isFull): mayHaveMore = isFull
            }
        }
        return mayHaveMore
    }

    /// Takes in the frames that are complete, and hands on what they bring, also when a later one ends the connection.
    func takeFrames() throws {
        var failure: (any Error)?
        do {
            try parser.forEachFrame { frame in
                try take(frame)
                return true
            }
        } catch {
            failure = error
        }
        do {
            try handDeliveriesOn()
            try applyPublishEvents()
        } catch {
            failure = failure ?? error
        }
        if let failure { throw failure }
    }

    private func take(_ frame: Frame) throws {
        switch frame.kind {
        case .heartbeat: break
        case .method:
            let method = try decoder.method(frame)
            if frame.channel == 0 {
                try takeConnectionMethod(method)
            } else if let channel = channels[frame.channel], let decoded = method.decoded {
                try take(method, decoded, on: channel)
            }
        case .header:
            guard let channel = channels[frame.channel], channel.assembly != nil else { return }
            let (size, properties) = try decoder.header(frame)
            channel.assembly?.expected = size
            channel.assembly?.take(Self.properties(properties))
            if case .delivery = channel.assembly?.kind { channel.assembly?.headers = Self.headerTable(frame.payload) }
            if size > UInt64(connection.configuration.maximumBodySize) { channel.assembly?.dropsBody = true }
            if channel.assembly?.dropsBody == false { channel.assembly?.body.reserveCapacity(Int(size)) }
            try completeMessage(channel)
        case .body:
            guard let channel = channels[frame.channel], let assembly = channel.assembly else { return }
            guard let expected = assembly.expected, assembly.received + UInt64(frame.payload.count) <= expected else {
                throw AMQPFailure.unexpected("a body that is longer than its header says, or has none")
            }
            channel.assembly?.received += UInt64(frame.payload.count)
            if channel.assembly?.dropsBody == false { channel.assembly?.body.append(contentsOf: frame.payload) }
            try completeMessage(channel)
        }
    }

    private func takeConnectionMethod(_ method: amqp_method_t) throws {
        switch method.id {
        case AMQP_CONNECTION_BLOCKED_METHOD:
            guard !isBlocked else { return }
            isBlocked = true
            let blocked = method.decoded?.load(as: amqp_connection_blocked_t.self)
            connection.blocked(blocked.map { Self.text($0.reason) } ?? "")
        case AMQP_CONNECTION_UNBLOCKED_METHOD:
            guard isBlocked else { return }
            isBlocked = false
            // It has read nothing meanwhile: what it was asked before it can answer only now.
            for channel in channels.values { channel.renewLimit(answerLimit) }
            connection.blocked(nil)
        case AMQP_CONNECTION_CLOSE_METHOD:
            let close = method.decoded?.load(as: amqp_connection_close_t.self)
            let frame = try MethodEncoder.frame(AMQP_CONNECTION_CLOSE_OK_METHOD, on: 0, amqp_connection_close_ok_t())
            stream.append { $0 += frame }
            _ = try? stream.flush()
            throw AMQPFailure.closedByBroker(
                code: Int(close?.reply_code ?? 0), text: close.map { Self.text($0.reply_text) } ?? "",
                method: close.map { UInt32($0.class_id) << 16 | UInt32($0.method_id) } ?? 0)
        default: break
        }
    }

    private func take(_ method: amqp_method_t, _ decoded: UnsafeMutableRawPointer, on channel: AMQPChannel) throws {
        if case .retired = channel.role { return try takeRetired(method, channel) }
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
            channel.assembly?.dropsBody = true
        case AMQP_BASIC_ACK_METHOD:
            let ack = decoded.load(as: amqp_basic_ack_t.self)
            confirm(channel, ack.delivery_tag, multiple: ack.multiple != 0, isNack: false)
        case AMQP_BASIC_NACK_METHOD:
            let nack = decoded.load(as: amqp_basic_nack_t.self)
            confirm(channel, nack.delivery_tag, multiple: nack.multiple != 0, isNack: true)
        case AMQP_BASIC_CANCEL_METHOD:
            guard case .consuming(let consumer) = channel.role else { return }
            try handDeliveriesOn()
            consumer.fail(
                EventsError(
                    .subscriptionCancelled, "the broker has cancelled the consumer: its queue is gone",
                    operation: "consume from \(consumer.queue)"), isChannelOpen: true)
        case AMQP_CHANNEL_CLOSE_METHOD:
            let close = decoded.load(as: amqp_channel_close_t.self)
            try channelClosed(
                channel, code: Int(close.reply_code), text: Self.text(close.reply_text),
                method: UInt32(close.class_id) << 16 | UInt32(close.method_id))
        default:
            if method.id == AMQP_CHANNEL_CLOSE_OK_METHOD {
                let error = EventsError(
                    .connectionLost, "the channel was closed before it was answered", operation: "channel")
                for step in channel.takeStepsBeforeClosing() { try complete(step, on: channel, .failure(error)) }
            }
            guard let step = channel.takeStep(for: method, limit: answerLimit) else {
                // Our close and the broker's have crossed: the channel is opened again already.
                if method.id == AMQP_CHANNEL_CLOSE_OK_METHOD { return }
                throw AMQPFailure.unexpected("a reply \(method.id >> 16).\(method.id & 0xFFFF) that was not asked for")
            }
            try complete(step, on: channel, .success(method))
            try sendSteps(channel)
        }
    }

    /// Of a channel that we have given up only its end is of interest.
    private func takeRetired(_ method: amqp_method_t, _ channel: AMQPChannel) throws {
        switch method.id {
        case AMQP_CHANNEL_CLOSE_METHOD:
            let ok = try MethodEncoder.frame(
                AMQP_CHANNEL_CLOSE_OK_METHOD, on: channel.number, amqp_channel_close_ok_t())
            stream.append { $0 += ok }
            // Once: what comes on this number from here on is ignored, until it is opened again.
            channels[channel.number] = nil
            silenceEnded()
        case AMQP_CHANNEL_CLOSE_OK_METHOD:
            channels[channel.number] = nil
            silenceEnded()
        default: break
        }
    }

    private func confirm(_ channel: AMQPChannel, _ tag: UInt64, multiple: Bool, isNack: Bool) {
        // What was sent on a channel that is being closed has been taken back.
        guard channel === publishing, channel.isOpen else { return }
        channel.failures = 0
        publishEvents.append(.confirmed(tag: tag, multiple: multiple, isNack: isNack))
    }

    /// Takes in the confirms and returns that have come so far.
    func applyPublishEvents() throws {
        guard !publishEvents.isEmpty else { return }
        defer { publishEvents.removeAll(keepingCapacity: true) }
        let resumptions = connection.window.withLock { $0.apply(publishEvents, now: lastReceived) }
        guard let resumptions else { throw AMQPFailure.unexpected("a confirm for a message that was not sent") }
        connection.resume(resumptions)
    }

    private func completeMessage(_ channel: AMQPChannel) throws {
        guard let assembly = channel.assembly, let expected = assembly.expected, assembly.received >= expected else {
            return
        }
        channel.assembly = nil
        switch (assembly.kind, channel.role) {
        case (.returned, .publishing):
            publishEvents.append(
                .returned(
                    exchange: assembly.exchange, routingKey: assembly.routingKey,
                    messageID: assembly.properties.messageID))
        case (.delivery(let tag, let isRedelivered), .consuming(let consumer)):
            if assembly.dropsBody {
                connection.logger.warning(
                    "a message is larger than the limit",
                    metadata: ["queue": "\(consumer.queue)", "bytes": "\(expected)"])
            }
            let delivery = delivery(assembly, tag, isRedelivered)
            if let index = deliveries.firstIndex(where: { $0.consumer === consumer }) {
                deliveries[index].deliveries.append(delivery)
            } else {
                deliveries.append((consumer, [delivery]))
            }
        case (.delivery(let tag, let isRedelivered), .publishing):
            // The request was confirmed before its reply came.
            try applyPublishEvents()
            connection.replies.deliver(delivery(assembly, tag, isRedelivered))
        default: break
        }
    }

    private func delivery(_ assembly: AMQPChannel.Assembly, _ tag: UInt64, _ isRedelivered: Bool) -> InboundDelivery {
        InboundDelivery(
            tag: tag, exchange: assembly.exchange, routingKey: assembly.routingKey, isRedelivered: isRedelivered,
            properties: assembly.properties, body: assembly.body, isTruncated: assembly.dropsBody,
            headerTable: assembly.headers, rawTexts: assembly.rawTexts)
    }

    /// Gives consumers what one read has brought them, under one lock each.
    private func handDeliveriesOn() throws {
        guard !deliveries.isEmpty else { return }
        defer { deliveries.removeAll(keepingCapacity: true) }
        for (consumer, deliveries) in deliveries where !consumer.deliver(deliveries) {
            throw AMQPFailure.unexpected("a delivery out of order, or beyond the prefetch")
        }
    }

    /// The broker has closed a channel: for a method of ours, or for a message.
    private func channelClosed(_ channel: AMQPChannel, code: Int, text: String, method: UInt32) throws {
        switch channel.state {
        case .opening, .open, .closing: break
        case .closed, .waiting: throw AMQPFailure.unexpected("the close of a channel that is closed")
        }
        let ok = try MethodEncoder.frame(
            AMQP_CHANNEL_CLOSE_OK_METHOD, on: channel.number, amqp_channel_close_ok_t())
        stream.append { $0 += ok }
        // What came before is settled before.
        try applyPublishEvents()
        let error = EventsError(
            AMQPFailure.brokerCode(code) ?? .connectionLost, text, operation: "channel \(channel.number)")
        switch channel.role {
        case .retired: break
        case .topology:
            let (failed, _) = channel.closed(isFaultOfStep: true)
            if let failed, !failed.isPartOfOpening {
                try complete(failed, on: channel, .failure(error))
                try open(channel)
            } else {
                try reopenLater(channel, error)
            }
        case .publishing:
            let wasOpen = channel.isOpen
            // A method that is not in flight is as good as none.
            let isNamed = channel.oldestStep(answeredBy: method &+ 1) != nil
            let isFaultOfMessage = method == AMQP_BASIC_PUBLISH_METHOD || (!isNamed && wasOpen)
            let (failed, closing) = channel.closed(isFaultOfStep: !isFaultOfMessage)
            let isPassing = AMQPFailure.isStateOfServer(code)
            let wasInUse = connection.publishingChannelClosed(
                code, text, isFaultOfMessage: isFaultOfMessage && !isPassing)
            if let failed, case .repliesConsumed = failed.completion {
                try complete(failed, on: channel, .failure(error))
                try open(channel)
            } else if closing != nil || (isFaultOfMessage && wasInUse && !isPassing) {
                try open(channel)
            } else {
                // A channel that is closed although nothing was done on it would be closed again.
                try reopenLater(channel, error)
            }
        case .consuming(let consumer):
            try handDeliveriesOn()
            let (failed, closing) = channel.closed(isFaultOfStep: true)
            channels[channel.number] = nil
            connection.remove(consumer)
            // Once it consumes, 406 means that something was unsettled for too long (`consumer_timeout`): it comes again.
            let code = error.code == .topologyConflict ? EventsError.Code.connectionLost : error.code
            for step in [failed].compactMap({ $0 }) + channel.takeAll() {
                try complete(step, on: channel, .failure(error))
            }
            answerStops(channel)
            failFlushes(channel)
            if case .request(let request) = closing?.completion { answer(request, .success(.done)) }
            consumer.fail(EventsError(code, text, operation: "consume from \(consumer.queue)"))
        }
    }

    /// Opens a channel again after a pause that grows.
    private func reopenLater(_ channel: AMQPChannel, _ error: EventsError) throws {
        channel.failures += 1
        let delay = connection.configuration.backoff.delay(after: channel.failures)
        channel.wait(until: MonotonicTime.now.advanced(by: delay))
        connection.channelBlocked(isForPublishing: channel === publishing, error, retryIn: delay)
    }
}
