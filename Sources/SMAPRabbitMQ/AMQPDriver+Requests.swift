internal import CRabbitMQ
internal import ConnectionThread
internal import Logging
internal import SMAPEvents

/// Declarations, bindings and consumers: methods that the broker answers.
extension AMQPDriver {
    /// Sends a request. What cannot be encoded fails by itself.
    func begin(_ request: BrokerRequest) throws {
        guard !request.isAnswered || request.isClose else { return connection.forget(request) }
        do {
            switch request.operation {
            case .consume(let consumer): try beginConsuming(consumer, request)
            case .flushSettlements(let consumer):
                guard let channel = channel(of: consumer), !channel.isClosing else {
                    return answer(request, .failure(consumerEnded(request)))
                }
                channel.flushes.append(request)
            case .stopConsumer(let consumer): try stop(consumer, request)
            case .closeConsumer(let consumer): try close(consumer, request)
            case .consumeReplies: try beginConsumingReplies(request)
            default:
                let step = try step(for: request.operation, .request(request))
                guard step.frame.count <= limits.frameLimit else {
                    return answer(request, .failure(tooLarge(step)))
                }
                topology.enqueue(step)
                if case .closed = topology.state { try open(topology) }
            }
        } catch let failure as AMQPFailure {
            // Names are checked before; this is what no check has foreseen.
            connection.forget(request)
            request.fail(
                .invalidConfiguration, AMQPFailure.error(from: failure, server: "", connecting: false).message)
        }
    }

    func tooLarge(_ step: AMQPChannel.Step) -> EventsError {
        EventsError(
            .invalidConfiguration,
            "it has \(step.frame.count) bytes, and the broker takes \(limits.frameLimit) (frame_max)",
            operation: "declare")
    }

    /// The method of a declaration on the topology channel.
    func step(
        for operation: BrokerRequest.Operation, _ completion: AMQPChannel.Completion
    ) throws -> AMQPChannel.Step {
        try CArena.with { try step(for: operation, completion, $0) }
    }

    private func step(
        for operation: BrokerRequest.Operation, _ completion: AMQPChannel.Completion, _ arena: CArena
    ) throws -> AMQPChannel.Step {
        func step<Method: BitwiseCopyable>(
            _ id: amqp_method_number_t, reply: amqp_method_number_t, _ method: Method
        ) throws -> AMQPChannel.Step {
            AMQPChannel.Step(
                reply: reply, frame: try MethodEncoder.frame(id, on: topology.number, method), completion: completion)
        }
        switch operation {
        case .declareExchange(let exchange), .compareExchange(let exchange):
            var method = amqp_exchange_declare_t()
            method.exchange = arena.bytes(exchange.name)
            method.type = arena.bytes(exchange.kind.rawValue)
            method.durable = 1
            return try step(AMQP_EXCHANGE_DECLARE_METHOD, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, method)
        case .checkExchange(let name):
            var method = amqp_exchange_declare_t()
            method.exchange = arena.bytes(name)
            method.type = arena.bytes("")
            method.passive = 1
            return try step(AMQP_EXCHANGE_DECLARE_METHOD, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, method)
        case .declareQueue(let queue), .compareQueue(let queue):
            var method = amqp_queue_declare_t()
            method.queue = arena.bytes(queue.name.rawValue)
            method.durable = 1
            method.arguments = arena.table(queue.arguments.map { arena.entry($0.key, $0.value) })
            return try step(AMQP_QUEUE_DECLARE_METHOD, reply: AMQP_QUEUE_DECLARE_OK_METHOD, method)
        case .checkQueue(let name):
            var method = amqp_queue_declare_t()
            method.queue = arena.bytes(name.rawValue)
            method.passive = 1
            return try step(AMQP_QUEUE_DECLARE_METHOD, reply: AMQP_QUEUE_DECLARE_OK_METHOD, method)
        case .bind(let binding):
            var method = amqp_queue_bind_t()
            method.queue = arena.bytes(binding.queue.rawValue)
            method.exchange = arena.bytes(binding.exchange)
            method.routing_key = arena.bytes(binding.routingKey)
            return try step(AMQP_QUEUE_BIND_METHOD, reply: AMQP_QUEUE_BIND_OK_METHOD, method)
        case .consume, .flushSettlements, .stopConsumer, .closeConsumer, .consumeReplies:
            throw AMQPFailure.unexpected("no method of the topology channel")
        }
    }

    /// Takes in the reply to a method, or the error that the broker has closed its channel with.
    func complete(
        _ step: AMQPChannel.Step, on channel: AMQPChannel, _ result: Result<amqp_method_t, EventsError>
    ) throws {
        switch step.completion {
        case .opening(let isLast):
            guard isLast, case .success = result else { return }
            channel.opened()
            if channel === publishing {
                connection.publishingOpened()
                // Requests that came while it was opened.
                if !repliesRequests.isEmpty { try consumeReplies() }
            }
            if channel === topology { connection.topologyOpened() }
        case .prefetchSet: break
        case .consumedAgain: break
        case .cancelled(let consumer):
            channel.isWidening = false
            consumer.widened()
            answerStops(channel)
            guard case .success = result, !channel.isStopped, !channel.isClosing else { return }
            channel.consumers += 1
            for step in try consumeSteps(consumer, on: channel, .consumedAgain) { channel.enqueue(step) }
        case .restored(let operation):
            channel.failures = 0
            try restored(operation, result)
        case .closedByUs:
            _ = channel.closed(isFaultOfStep: false)
            try open(channel)
        case .repliesConsumed where channel.isClosing: break
        case .repliesConsumed:
            let requests = repliesRequests
            repliesRequests = []
            switch result {
            case .success:
                replies = .consumed
                connection.repliesConsumed(nil)
                for request in requests { answer(request, .success(.done)) }
            case .failure(let error):
                replies = .none
                connection.repliesConsumed(error)
                for request in requests { answer(request, .failure(error)) }
            }
        case .request(let request):
            channel.failures = 0
            try complete(request, on: channel, result)
        }
    }

    private func complete(
        _ request: BrokerRequest, on channel: AMQPChannel, _ result: Result<amqp_method_t, EventsError>
    ) throws {
        switch (request.operation, result) {
        case (_, .failure(let error)): answer(request, .failure(error))
        case (.closeConsumer(let consumer), .success):
            channels[channel.number] = nil
            // A cancel that came at the same time: the channel was closed before it was sent.
            for step in channel.takeAll() {
                if case .request(let other) = step.completion { answer(other, .success(.done)) }
            }
            answerStops(channel)
            connection.remove(consumer)
            answer(request, .success(.done))
        case (let operation, .success(let method)):
            connection.declared(operation)
            guard method.id == AMQP_QUEUE_DECLARE_OK_METHOD,
                let ok = method.decoded?.load(as: amqp_queue_declare_ok_t.self)
            else { return answer(request, .success(.done)) }
            answer(
                request,
                .success(.queue(QueueStatus(messages: Int(ok.message_count), consumers: Int(ok.consumer_count)))))
        }
    }

    func answer(_ request: BrokerRequest, _ result: Result<BrokerRequest.Reply, EventsError>) {
        connection.forget(request)
        switch result {
        case .success(let reply): request.succeed(reply)
        case .failure(let error): request.fail(error.code, error.message)
        }
    }

    // MARK: Replies

    /// Replies to requests come on the channel that asks, from a queue that is none (RabbitMQ guide, "Direct Reply-to"): it
    /// must be consumed before the first request, without acknowledgements.
    /// A channel takes one consumer of replies, so this is asked once.
    func consumeReplies() throws {
        guard replies == .none else { return }
        let frame = try CArena.with { arena in
            var method = amqp_basic_consume_t()
            method.queue = arena.bytes(RabbitMQTransport.directReplyTo)
            method.consumer_tag = arena.bytes("smap.replies")
            method.no_ack = 1
            return try MethodEncoder.frame(AMQP_BASIC_CONSUME_METHOD, on: publishing.number, method)
        }
        replies = .asked
        publishing.enqueue(
            AMQPChannel.Step(reply: AMQP_BASIC_CONSUME_OK_METHOD, frame: frame, completion: .repliesConsumed))
    }

    private func beginConsumingReplies(_ request: BrokerRequest) throws {
        guard replies != .consumed else { return answer(request, .success(.done)) }
        repliesRequests.removeAll(where: \.isAnswered)
        repliesRequests.append(request)
        // One that is being opened or closed asks by itself once it is open.
        if publishing.isOpen { try consumeReplies() }
    }

    // MARK: Consumers

    private func beginConsuming(_ consumer: Consumer, _ request: BrokerRequest) throws {
        // As for the topology's channel: a broker that leaves so many unanswered may answer on another connection.
        guard retiredCount < Self.retiredLimit else {
            throw EventsError(
                .connectionLost, "the broker does not answer on \(retiredCount) channels", operation: "connection")
        }
        guard let number = freeChannel() else {
            answer(
                request,
                .failure(
                    EventsError(
                        .overloaded, "all \(limits.channelLimit) channels of the connection are in use (channel_max)",
                        operation: request.name)))
            return
        }
        let channel = AMQPChannel(number: number, role: .consuming(consumer))
        for step in try consumeSteps(consumer, on: channel, .request(request)) { channel.enqueue(step) }
        try open(channel)
        connection.add(consumer)
    }

    private func consumeSteps(
        _ consumer: Consumer, on channel: AMQPChannel, _ completion: AMQPChannel.Completion
    ) throws -> [AMQPChannel.Step] {
        let number = channel.number
        var qos = amqp_basic_qos_t()
        qos.prefetch_count = UInt16(clamping: consumer.prefetch)
        let consume = try CArena.with { arena in
            var method = amqp_basic_consume_t()
            method.queue = arena.bytes(consumer.queue.rawValue)
            method.consumer_tag = arena.bytes(Self.consumerTag(channel))
            return try MethodEncoder.frame(AMQP_BASIC_CONSUME_METHOD, on: number, method)
        }
        return [
            AMQPChannel.Step(
                reply: AMQP_BASIC_QOS_OK_METHOD,
                frame: try MethodEncoder.frame(AMQP_BASIC_QOS_METHOD, on: number, qos), completion: .prefetchSet),
            AMQPChannel.Step(reply: AMQP_BASIC_CONSUME_OK_METHOD, frame: consume, completion: completion),
        ]
    }

    /// A prefetch holds for consumers that begin after it (RabbitMQ guide, "Consumer Prefetch"): so this one begins again, on
    /// its channel, where what it has in hand can still be settled.
    func widen(_ consumer: Consumer, on channel: AMQPChannel) throws {
        guard !channel.isStopped, !channel.isWidening else { return consumer.widened() }
        channel.isWidening = true
        // One after the other: RabbitMQ answers a cancel later than what comes behind it.
        channel.enqueue(try cancelStep(channel, .cancelled(consumer)))
        try sendSteps(channel)
    }

    /// The consumer of a channel has been cancelled, or the channel is gone.
    func answerStops(_ channel: AMQPChannel) {
        for request in channel.stops { answer(request, .success(.done)) }
        channel.stops = []
    }

    /// The settlements of a channel are out: a method behind them is answered after the broker has taken them in. The prefetch
    /// concerns only consumers that begin later.
    func sendFlushes(of consumer: Consumer, on channel: AMQPChannel) throws {
        guard !channel.flushes.isEmpty else { return }
        var qos = amqp_basic_qos_t()
        qos.prefetch_count = UInt16(clamping: consumer.prefetch)
        let frame = try MethodEncoder.frame(AMQP_BASIC_QOS_METHOD, on: channel.number, qos)
        for request in channel.flushes {
            channel.enqueue(
                AMQPChannel.Step(reply: AMQP_BASIC_QOS_OK_METHOD, frame: frame, completion: .request(request)))
        }
        channel.flushes = []
        try sendSteps(channel)
    }

    /// The channel is gone, or closed from here on.
    func failFlushes(_ channel: AMQPChannel) {
        for request in channel.flushes { answer(request, .failure(consumerEnded(request))) }
        channel.flushes = []
    }

    private func consumerEnded(_ request: BrokerRequest) -> EventsError {
        EventsError(.connectionLost, "the consumer has ended", operation: request.name)
    }

    private func cancelStep(
        _ channel: AMQPChannel, _ completion: AMQPChannel.Completion
    ) throws -> AMQPChannel.Step {
        let frame = try CArena.with { arena in
            var method = amqp_basic_cancel_t()
            method.consumer_tag = arena.bytes(Self.consumerTag(channel))
            return try MethodEncoder.frame(AMQP_BASIC_CANCEL_METHOD, on: channel.number, method)
        }
        return AMQPChannel.Step(reply: AMQP_BASIC_CANCEL_OK_METHOD, frame: frame, completion: completion)
    }

    /// Another one each time: a quorum queue keeps what an old consumer of the same tag has in hand.
    private static func consumerTag(_ channel: AMQPChannel) -> String { "smap.\(channel.number).\(channel.consumers)" }

    /// A channel number that is not in use, of those that the broker allows.
    func freeChannel() -> amqp_channel_t? {
        let first = connection.isForPublishing ? Self.publishingChannel + 1 : Self.publishingChannel
        guard first <= limits.channelLimit else { return nil }
        // Not the last one at once, so that a late frame of the old channel is not taken for one of the new.
        for _ in first...limits.channelLimit {
            let number = nextChannel
            nextChannel = number >= limits.channelLimit ? first : number + 1
            if channels[number] == nil { return number }
        }
        return nil
    }

    private func channel(of consumer: Consumer) -> AMQPChannel? {
        channels.values.first { if case .consuming(let other) = $0.role { other === consumer } else { false } }
    }

    private func stop(_ consumer: Consumer, _ request: BrokerRequest) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(request, .success(.done))
            return
        }
        channel.isStopped = true
        // It is being cancelled already, and then does not consume again.
        guard !channel.isWidening else { return channel.stops.append(request) }
        channel.enqueue(try cancelStep(channel, .request(request)))
    }

    /// Sends what is settled, then closes the channel: the broker takes everything else back.
    private func close(_ consumer: Consumer, _ request: BrokerRequest) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(request, .success(.done))
            return
        }
        if channel.isOpen { sendSettlements(of: consumer, on: channel, isLast: true) }
        failFlushes(channel)
        try beginClosing(channel, .request(request))
    }
}
