internal import CRabbitMQ
internal import ConnectionThread
internal import SMAPEvents
internal import Synchronization

/// What goes to the broker: methods, settlements, messages.
extension AMQPDriver {
    /// Appends the methods of all channels whose turn has come.
    func sendSteps() throws {
        for channel in channels.values { try sendSteps(channel) }
    }

    func sendSteps(_ channel: AMQPChannel) throws {
        let steps = channel.takeSteps(
            limit: answerLimit, isPipelined: channel !== topology || !connection.topology.isTesting)
        guard !steps.isEmpty else { return }
        stream.append { output in
            for step in steps { output += step.frame }
        }
    }

    func sendSettlements() throws {
        for channel in channels.values {
            guard case .consuming(let consumer) = channel.role, channel.isOpen else { continue }
            if consumer.beginsWidening() { try widen(consumer, on: channel) }
            sendSettlements(of: consumer, on: channel)
            if !channel.flushes.isEmpty, !consumer.withholdsSettlements {
                try sendFlushes(of: consumer, on: channel)
            }
        }
    }

    /// - Parameter isLast: Whether the channel is closed behind them.
    func sendSettlements(of consumer: Consumer, on channel: AMQPChannel, isLast: Bool = false) {
        let frames = consumer.settlements(isLast: isLast)
        guard !frames.isEmpty else { return }
        stream.append { output in
            for frame in frames {
                switch frame {
                case .acknowledge(let tag, let multiple):
                    output.append(method: AMQP_BASIC_ACK_METHOD, on: channel.number, tag, flag: multiple)
                case .reject(let tag, let requeue):
                    output.append(method: AMQP_BASIC_REJECT_METHOD, on: channel.number, tag, flag: requeue)
                }
            }
        }
    }

    /// Whether messages can be written now.
    var canPublish: Bool { publishing.isOpen && !isBlocked && !restoration.isAwaited }

    /// Writes messages, until the socket is full or there are no more.
    func writePublishes(_ now: MonotonicTime) throws {
        guard canPublish else { return }
        while stream.unsentCount < Self.batchLimit {
            let budget = Self.batchLimit - stream.unsentCount
            var resumptions = PublishWindow.Resumptions()
            let batch = connection.window.withLock {
                $0.takeBatch(
                    budget: budget, position: stream.appendedCount, frameLimit: limits.frameLimit, now: now,
                    &resumptions)
            }
            if !resumptions.isEmpty { connection.resume(resumptions) }
            guard !batch.isEmpty else { return }
            stream.append { output in
                for publish in batch {
                    guard let message = publish.message else { continue }
                    output += message.head
                    output.append(body: message.body, on: publishing.number, frameLimit: limits.frameLimit)
                }
            }
            guard try stream.flush() else { return }
            lastSent = now
        }
    }

    /// Closes the publishing channel, which then is opened again: its unconfirmed messages that no caller waits for hold up
    /// the others.
    func resetPublishing(_ now: MonotonicTime) throws {
        guard publishing.isOpen, !isBlocked else { return }
        try beginClosing(publishing, .closedByUs)
        replies = .none
        connection.publishingReset(now)
    }

    func beginClosing(_ channel: AMQPChannel, _ completion: AMQPChannel.Completion) throws {
        let step = try closeStep(channel, completion)
        channel.beginClosing(step, limit: answerLimit)
        stream.append { $0 += step.frame }
    }

    func closeStep(_ channel: AMQPChannel, _ completion: AMQPChannel.Completion) throws -> AMQPChannel.Step {
        var method = amqp_channel_close_t()
        method.reply_code = UInt16(AMQP_REPLY_SUCCESS)
        method.reply_text = amqp_empty_bytes
        return AMQPChannel.Step(
            reply: AMQP_CHANNEL_CLOSE_OK_METHOD,
            frame: try MethodEncoder.frame(AMQP_CHANNEL_CLOSE_METHOD, on: channel.number, method),
            completion: completion)
    }
}

extension [UInt8] {
    /// Appends `basic.ack` or `basic.reject`: a delivery tag and one flag (AMQP 0-9-1, class basic).
    fileprivate mutating func append(
        method: amqp_method_number_t, on channel: amqp_channel_t, _ tag: UInt64, flag: Bool
    ) {
        // Always the same 21 bytes, once per message at worst: not worth a call of the library, which takes no longer
        // numbers than these.
        append(Frame.Kind.method.rawValue)
        append(bigEndian: channel)
        append(bigEndian: UInt32(13))
        append(bigEndian: method)
        append(bigEndian: tag)
        append(flag ? 1 : 0)
        append(FrameParser.end)
    }

    mutating func append<Value: FixedWidthInteger>(bigEndian value: Value) {
        Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
    }
}
