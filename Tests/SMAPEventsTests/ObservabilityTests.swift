import InMemoryTracing
import Metrics
import MetricsTestKit
import SMAPEvents
import SMAPEventsTesting
import Testing
import Tracing

private struct Measured: SMAPEvent {
    static let routingKey: RoutingKey = "measured.once"
    var note = "personal data"
}

@Suite(.timeLimit(.minutes(5))) struct ObservabilityTests {
    private static let metrics: TestMetrics = {
        let metrics = TestMetrics()
        MetricsSystem.bootstrap(metrics)
        return metrics
    }()

    /// Publishes one event, and handles it.
    private func roundTrip(
        _ harness: EventsTestHarness, _ tracer: any Tracer, queue: QueueName,
        _ handler: @escaping @Sendable (EventDelivery<Measured>) async throws -> Void = { _ in }
    ) async throws {
        var configuration = PublisherConfiguration(service: "test")
        configuration.tracer = tracer
        let publisher = EventPublisher(transport: harness.broker, configuration: configuration)
        var router = EventRouter()
        router.on(Measured.self) { delivery in
            try await handler(delivery)
            return .acknowledge
        }
        let subscriber = EventSubscriber(
            transport: harness.broker, subscription: EventSubscription(queue: queue, bindings: ["measured.#"]),
            router: router, tracer: tracer)
        try await subscriber.declare()
        try await publisher.publish(Measured())
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await subscriber.run() }
            defer { group.cancelAll() }
            try await harness.settled(queue)
        }
    }

    @Test func `publishing and handling are spans of one trace, linked, without the data`() async throws {
        let tracer = InMemoryTracer()
        try await EventsTestHarness.withHarness { harness in
            try await tracer.withSpan("request") { _ in
                try await roundTrip(harness, tracer, queue: "traced.q") { _ in
                    #expect(ServiceContext.current != nil, "what a handler calls belongs to its span")
                }
            }
        }
        let spans = tracer.finishedSpans
        let request = try #require(spans.first { $0.operationName == "request" })
        let publish = try #require(spans.first { $0.operationName == "publish smap.events" })
        let process = try #require(spans.first { $0.operationName == "process traced.q" })
        #expect(publish.kind == .producer && process.kind == .consumer)
        #expect(publish.parentSpanID == request.spanID)
        #expect(process.parentSpanID == publish.spanID && process.traceID == request.traceID)
        #expect(process.links.count == 1)
        for span in [publish, process] {
            var attributes: [String: String] = [:]
            span.attributes.forEach { attributes[$0] = "\($1)" }
            let text = attributes.description
            #expect(text.contains("rabbitmq") && text.contains("measured.once") && text.contains("evt_"))
            #expect(!text.contains("personal data"))
        }
    }

    @Test func `what is published, handled and refused is counted and timed, by routing key`() async throws {
        let metrics = Self.metrics
        try await EventsTestHarness.withHarness { harness in
            try await roundTrip(harness, NoOpTracer(), queue: "measured.q")
            let publisher = EventPublisher(
                transport: harness.broker,
                configuration: PublisherConfiguration(service: "test", exchange: "measured.nowhere"))
            await #expect(throws: EventsError.self) { try await publisher.publish(Measured()) }
        }
        let key = ("routing_key", "measured.once")
        #expect(try metrics.expectCounter("events_published_total", [key]).totalValue >= 1)
        #expect(
            try metrics.expectCounter("event_publish_failures_total", [key, ("error_type", "exchangeNotFound")])
                .totalValue == 1)
        #expect(try !metrics.expectTimer("event_publish_duration_seconds").values.isEmpty)
        let queue = ("queue", "measured.q")
        #expect(
            try metrics.expectCounter("events_consumed_total", [queue, ("outcome", "acknowledged")]).totalValue == 1)
        #expect(try metrics.expectTimer("event_handling_duration_seconds", [queue]).values.count == 1)
        #expect(try metrics.expectGauge("events_subscription_active", [queue]).values.contains(1))
    }

    @Test func `an event that reached no queue is counted as returned, and made-up keys share one label`() async throws
    {
        let metrics = Self.metrics
        try await EventsTestHarness.withHarness { harness in
            let publisher = EventPublisher(
                transport: harness.broker, configuration: PublisherConfiguration(service: "test"))
            let nowhere = UntypedEvent(routingKey: "measured.nowhere", data: Array("{}".utf8))
            #expect(try await publisher.publish(nowhere).routed == false)
            for number in 0..<1_100 {
                let key = try RoutingKey("madeup.k\(number)")
                try await publisher.publish(UntypedEvent(routingKey: key, data: Array("{}".utf8)))
            }
        }
        let key = ("routing_key", "measured.nowhere")
        #expect(try metrics.expectCounter("events_returned_total", [key]).totalValue == 1)
        #expect(try metrics.expectCounter("events_published_total", [("routing_key", "other")]).totalValue >= 100)
        #expect(throws: (any Error).self) {
            try metrics.expectCounter("events_published_total", [("routing_key", "madeup.k1099")])
        }
    }

    @Test func `a trace context that the wire cannot carry is left out, and the event is published`() async throws {
        let tracer = ForeignTracer(
            headers: [
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b\r\nc=d",
                "baggage": String(repeating: "x", count: 70_000), "BCC": "other.queue",
            ])
        try await EventsTestHarness.withHarness { harness in
            var configuration = PublisherConfiguration(service: "test")
            configuration.tracer = tracer
            let publisher = EventPublisher(transport: harness.broker, configuration: configuration)
            try await EventSubscription(queue: "foreign.q", bindings: ["measured.#"]).topology
                .apply(to: harness.broker)
            try await publisher.publish(Measured())
            let results = await publisher.publish(contentsOf: [Measured(), Measured()])
            for result in results { #expect(try result.get().routed) }
            let messages = harness.broker.messages(in: "foreign.q")
            #expect(messages.count == 3)
            for message in messages {
                #expect(Set(message.properties.headers.keys) == ["traceparent", "x-smap-schema-version"])
            }
        }
    }

    @Test func `a request is a span and is counted, as any other event is`() async throws {
        let tracer = InMemoryTracer()
        let metrics = Self.metrics
        struct Asked: SMAPEvent { static let routingKey: RoutingKey = "measured.asked" }
        try await EventsTestHarness.withHarness { harness in
            var configuration = PublisherConfiguration(service: "test")
            configuration.tracer = tracer
            let requester = EventRequester(transport: harness.broker, configuration: configuration)
            let error = await #expect(throws: EventsError.self) {
                try await requester.request(Asked(), reply: Asked.self)
            }
            #expect(error?.code == .unroutable)
            #expect(error?.eventID != nil)
        }
        #expect(tracer.finishedSpans.contains { $0.operationName == "publish smap.events" && $0.kind == .producer })
        let dimensions = [("routing_key", "measured.asked"), ("error_type", "unroutable")]
        #expect(try metrics.expectCounter("event_publish_failures_total", dimensions).totalValue == 1)
    }

    @Test func `what became of each report of an item is counted, those of a project that is gone too`() async throws {
        let metrics = Self.metrics
        let tracker = ProgressTracker(store: InMemoryProgressStore())
        let project = try ProjectID("measured")
        func total(_ verdict: ProgressUpdate.Verdict) throws -> Int64 {
            try metrics.expectCounter("progress_reports_total", [("verdict", "\(verdict)")]).totalValue
        }
        // Other tests count too, at the same time.
        let before = try [.unknownProject, .counted, .duplicate].map(total)
        await #expect(throws: EventsError.self) {
            try await tracker.advance(project, (0..<50).map { ItemReport(.index($0), .success) })
        }
        #expect(try await tracker.progress(of: project) == nil, "no report brings a project back")
        try await tracker.start(project)
        let reports = (0..<60).map { ItemReport(.index($0 % 40), .success) }
        #expect(try await tracker.advance(project, reports).progress.done == 40)
        #expect(try total(.unknownProject) >= before[0] + 50)
        #expect(try total(.counted) >= before[1] + 40)
        #expect(try total(.duplicate) >= before[2] + 20)
    }

    @Test func `a queue that is too deep refuses publishers until it is drained, and its depth is a metric`()
        async throws
    {
        let metrics = Self.metrics
        try await EventsTestHarness.withHarness { harness in
            let queue: QueueName = "deep.q"
            let subscription = EventSubscription(queue: queue, bindings: ["measured.#"])
            try await subscription.topology.apply(to: harness.broker)
            let depth = QueueDepthWatch(
                transport: harness.broker, queues: [queue, "deep.missing"], limits: .init(warning: 2, refusal: 3))
            let publisher = EventPublisher(
                transport: harness.broker, configuration: PublisherConfiguration(service: "test"), depth: depth)
            for _ in 0..<3 { try await publisher.publish(Measured()) }
            await depth.measure()
            #expect(depth.depths == [queue: 3])
            let error = await #expect(throws: EventsError.self) { try await publisher.publish(Measured()) }
            #expect(error?.code == .queueTooDeep && error?.isRetriable == true)
            #expect(error?.publishOutcome == .unsent)
            let dual = DualPublisher(
                transport: harness.broker, configuration: PublisherConfiguration(service: "test"), phase: .dual,
                depth: depth)
            let mail = EmailVerificationRequested(recipient: "a@b.c", subject: "s", body: "b")
            await #expect(throws: EventsError.self) { try await dual.publish(mail) }
            #expect(harness.broker.messages(in: queue).count == 3)
            #expect(try metrics.expectGauge("events_queue_depth", [("queue", "deep.q")]).lastValue == 3)
            harness.broker.delete(queue)
            await depth.measure()
            try await publisher.publish(Measured())
        }
    }

    @Test func `a topology that would lose messages silently is refused with the reason, and nothing is declared`()
        async throws
    {
        let broker = InMemoryBroker()
        let cases: [(Topology, String)] = [
            (Topology(queues: [QueueDeclaration("a.b", deadLetters: true)]), "not declared"),
            (
                Topology(
                    exchanges: [.deadLetters],
                    queues: [
                        QueueDeclaration(
                            "a.b", deadLetters: true, additionalArguments: ["x-overflow": .string("drop-head")])
                    ]), "reject-publish"
            ),
            (
                Topology(
                    exchanges: [.deadLetters],
                    queues: [
                        QueueDeclaration(
                            "a.b", kind: .classic, deadLetters: true,
                            additionalArguments: ["x-dead-letter-strategy": .string("at-least-once")])
                    ]), "only quorum"
            ),
            (
                Topology(queues: [QueueDeclaration("a.b", additionalArguments: ["x-max-priority": .integer(5)])]),
                "priorities"
            ),
            (
                Topology(
                    queues: [QueueDeclaration("a.b")],
                    bindings: [QueueBinding(queue: "a.b", exchange: "gone", routingKey: "#")]), "gone"
            ),
        ]
        for (topology, reason) in cases {
            let error = await #expect(throws: EventsError.self) { try await topology.apply(to: broker) }
            #expect(error?.code == .dangerousTopology)
            #expect(error?.message.contains(reason) == true, "\(String(describing: error))")
            await #expect(throws: EventsError.self) {
                _ = try await broker.status(of: "a.b", deadline: .now + .seconds(1))
            }
        }
    }

    @Test func `a topology knows how a broker differs from it, and changes nothing to find out`() async throws {
        let broker = InMemoryBroker()
        let topology = Topology.platform(in: .dual)
        #expect(try await topology.differences(from: broker).allSatisfy(\.isMissing))
        let count = topology.exchanges.count + topology.queues.count
        #expect(try await topology.differences(from: broker).count == count, "looking has declared nothing")
        try await topology.apply(to: broker)
        #expect(try await topology.differences(from: broker).isEmpty)
        try await topology.check(against: broker)
        var other = topology
        other.insert(QueueDeclaration("smtp_send_email_v2", kind: .classic, deadLetters: true))
        let differences = try await other.differences(from: broker)
        #expect(differences.map(\.subject) == ["queue smtp_send_email_v2"])
        #expect(differences.first?.isMissing == false)
        await #expect(throws: EventsError.self) { try await other.apply(to: broker) }
    }

    @Test func `a subscription survives lost connections and a deleted queue, and its handlers are left to finish`()
        async throws
    {
        try await EventsTestHarness.withHarness { harness in
            let queue: QueueName = "survivor.q"
            var subscription = EventSubscription(queue: queue, bindings: ["measured.#"])
            subscription.retryDelay = .milliseconds(1)
            subscription.concurrency = 2
            let (entered, enter) = AsyncStream.makeStream(of: Int.self)
            let (released, release) = AsyncStream.makeStream(of: Void.self)
            var router = EventRouter()
            router.on(Measured.self) { delivery in
                enter.yield(delivery.attempt)
                if delivery.attempt == 1 { for await _ in released { break } }
                return .acknowledge
            }
            let subscriber = EventSubscriber(transport: harness.broker, subscription: subscription, router: router)
            try await subscriber.declare()
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await subscriber.run() }
                defer { group.cancelAll() }
                try await harness.publisher.publish(Measured())
                var attempts = entered.makeAsyncIterator()
                #expect(await attempts.next() == 1)
                harness.broker.interrupt()
                // The first handler still runs; the event has come again to the other one.
                #expect(await attempts.next() == 2)
                try await harness.settled(queue)
                #expect(await subscriber.health().isHealthy)
                release.yield()
                harness.broker.delete(queue)
                while true {
                    // Until the queue is bound again there is nowhere for an event to go.
                    if try await harness.publisher.publish(Measured()).routed { break }
                    await Task.yield()
                }
                #expect(await attempts.next() == 1)
                release.yield()
                try await harness.settled(queue)
            }
            #expect(await subscriber.health().isHealthy == false)
        }
    }
}

/// Puts headers of a foreign context into what is published.
private struct ForeignTracer: Tracer {
    let headers: [String: String]
    private let tracer = InMemoryTracer()

    init(headers: [String: String]) { self.headers = headers }

    func startSpan<Instant: TracerInstant>(
        _ operationName: String, context: @autoclosure () -> ServiceContext, ofKind kind: SpanKind,
        at instant: @autoclosure () -> Instant, function: String, file fileID: String, line: UInt
    ) -> InMemorySpan {
        tracer.startSpan(
            operationName, context: context(), ofKind: kind, at: instant(), function: function, file: fileID,
            line: line)
    }

    func forceFlush() {}

    func inject<Carrier, Inject: Injector>(
        _ context: ServiceContext, into carrier: inout Carrier, using injector: Inject
    )
    where Inject.Carrier == Carrier {
        for (key, value) in headers { injector.inject(value, forKey: key, into: &carrier) }
    }

    func extract<Carrier, Extract: Extractor>(
        _ carrier: Carrier, into context: inout ServiceContext, using extractor: Extract
    ) where Extract.Carrier == Carrier {}
}
