internal import CRabbitMQ
internal import SMAPEvents

/// Declarations, bindings and consumers: methods that the broker answers.
extension AMQPDriver {
    func step(
        _ channel: AMQPChannel, reply: amqp_method_number_t, isWanted: @escaping () -> Bool = { true },
        send: @escaping () throws -> Void, done: @escaping (Result<amqp_method_t, EventsError>) -> Void
    ) -> AMQPChannel.Step {
        AMQPChannel.Step(reply: reply, isWanted: isWanted, send: send, done: done)
    }

    func begin(_ call: RemoteCall) throws {
        try begin(call) { [self] result in
            if case .success = result { connection.topology.insert(call.request) }
            answer(call, result)
        }
    }

    func begin(
        _ call: RemoteCall, _ done: @escaping (Result<RemoteCall.Reply, EventsError>) -> Void
    ) throws {
        switch call.request {
        case .declareExchange(let exchange):
            try ask(call, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_exchange_declare_t()
                method.exchange = arena.bytes(exchange.name)
                method.type = arena.bytes(exchange.kind.rawValue)
                method.durable = 1
                try send(topology, AMQP_EXCHANGE_DECLARE_METHOD, &method)
            }
        case .checkExchange(let name):
            try ask(call, reply: AMQP_EXCHANGE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_exchange_declare_t()
                method.exchange = arena.bytes(name)
                method.passive = 1
                try send(topology, AMQP_EXCHANGE_DECLARE_METHOD, &method)
            }
        case .declareQueue(let queue):
            try ask(call, reply: AMQP_QUEUE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_declare_t()
                method.queue = arena.bytes(queue.name.rawValue)
                method.durable = 1
                method.arguments = arena.table(queue.arguments.map { arena.entry($0.key, $0.value) })
                try send(topology, AMQP_QUEUE_DECLARE_METHOD, &method)
            }
        case .checkQueue(let name):
            try ask(call, reply: AMQP_QUEUE_DECLARE_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_declare_t()
                method.queue = arena.bytes(name.rawValue)
                method.passive = 1
                try send(topology, AMQP_QUEUE_DECLARE_METHOD, &method)
            }
        case .bind(let binding):
            try ask(call, reply: AMQP_QUEUE_BIND_OK_METHOD, done) { [self] arena in
                var method = amqp_queue_bind_t()
                method.queue = arena.bytes(binding.queue.rawValue)
                method.exchange = arena.bytes(binding.exchange)
                method.routing_key = arena.bytes(binding.routingKey)
                try send(topology, AMQP_QUEUE_BIND_METHOD, &method)
            }
        case .consume(let consumer): try beginConsuming(consumer, call)
        case .stopConsumer(let consumer): try stop(consumer, call)
        case .closeConsumer(let consumer): try close(consumer, call)
        }
    }

    /// Sends a method on the topology channel and hands on its reply.
    func ask(
        _ call: RemoteCall, reply: amqp_method_number_t,
        _ done: @escaping (Result<RemoteCall.Reply, EventsError>) -> Void, _ method: @escaping (CArena) throws -> Void
    ) throws {
        try topology.enqueue(
            step(topology, reply: reply, isWanted: { !call.isAnswered }) {
                try method(CArena())
            } done: { result in
                done(
                    result.map { method in
                        guard method.id == AMQP_QUEUE_DECLARE_OK_METHOD,
                            let ok = method.decoded?.load(as: amqp_queue_declare_ok_t.self)
                        else { return .done }
                        return .queue(
                            QueueStatus(messages: Int(ok.message_count), consumers: Int(ok.consumer_count)))
                    })
            })
    }

    func answer(_ call: RemoteCall, _ result: Result<RemoteCall.Reply, EventsError>) {
        connection.forget(call)
        switch result {
        case .success(let reply): call.answer(.success(reply))
        case .failure(let error): call.fail(error.code, error.message)
        }
    }

    func beginConsuming(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard !call.isAnswered else { return }
        guard let number = freeChannel() else {
            answer(call, .failure(EventsError(.overloaded, "all channels are in use", operation: call.operation)))
            return
        }
        let channel = AMQPChannel(number: number, role: .consuming(consumer))
        channels[number] = channel
        connection.add(consumer)
        try open(channel)
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_QOS_OK_METHOD) { [self] in
                var method = amqp_basic_qos_t()
                method.prefetch_count = UInt16(clamping: consumer.prefetch)
                try send(channel, AMQP_BASIC_QOS_METHOD, &method)
            } done: { _ in
            })
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_CONSUME_OK_METHOD) { [self] in
                let arena = CArena()
                var method = amqp_basic_consume_t()
                method.queue = arena.bytes(consumer.queue.rawValue)
                method.consumer_tag = arena.bytes(Self.consumerTag(channel))
                try send(channel, AMQP_BASIC_CONSUME_METHOD, &method)
            } done: { [self] result in
                answer(call, result.map { _ in .done })
            })
    }

    static func consumerTag(_ channel: AMQPChannel) -> String { "smap.\(channel.number)" }

    func freeChannel() -> amqp_channel_t? {
        // The library's pools live as long as the connection, so numbers are used again; but not at once, so that a
        // late frame of the old channel is not taken for one of the new.
        for _ in Self.firstConsumerChannel...Self.lastChannel {
            let number = nextChannel
            nextChannel = number == Self.lastChannel ? Self.firstConsumerChannel : number + 1
            if nextChannel > 64, channels.count < 32 { nextChannel = Self.firstConsumerChannel }
            if channels[number] == nil { return number }
        }
        return nil
    }

    func channel(of consumer: Consumer) -> AMQPChannel? {
        channels.values.first { if case .consuming(let other) = $0.role { other === consumer } else { false } }
    }

    func stop(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(call, .success(.done))
            return
        }
        try channel.enqueue(
            step(channel, reply: AMQP_BASIC_CANCEL_OK_METHOD) { [self] in
                let arena = CArena()
                var method = amqp_basic_cancel_t()
                method.consumer_tag = arena.bytes(Self.consumerTag(channel))
                try send(channel, AMQP_BASIC_CANCEL_METHOD, &method)
            } done: { [self] result in
                answer(call, result.map { _ in .done })
            })
    }

    /// Sends what is settled, then closes the channel: the broker takes everything else back.
    func close(_ consumer: Consumer, _ call: RemoteCall) throws {
        guard let channel = channel(of: consumer), !channel.isClosing else {
            answer(call, .success(.done))
            return
        }
        if channel.isOpen { try sendSettlements(of: consumer, on: channel) }
        channel.isClosing = true
        try channel.enqueue(
            step(channel, reply: AMQP_CHANNEL_CLOSE_OK_METHOD) { [self] in
                var method = amqp_channel_close_t()
                method.reply_code = UInt16(AMQP_REPLY_SUCCESS)
                try send(channel, AMQP_CHANNEL_CLOSE_METHOD, &method)
            } done: { [self] result in
                channels[channel.number] = nil
                connection.remove(consumer)
                answer(call, result.map { _ in .done })
            })
    }
}
