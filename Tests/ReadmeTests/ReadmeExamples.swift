// The README's examples, compiled. A test compares them with the README, letter by letter.

// begin publisher
import SMAPEvents
import SMAPRabbitMQ

func publishVerification() async throws {
    let configuration = try RabbitMQConfiguration(url: "amqp://guest:guest@localhost:5672")
    try await RabbitMQTransport.withTransport(configuration: configuration) { transport in
        let publisher = EventPublisher(
            transport: transport, configuration: PublisherConfiguration(service: "identity"))
        try await publisher.declareExchanges()
        let receipt = try await publisher.publish(
            EmailVerificationRequested(recipient: "user@example.com", subject: "Verify", body: "<p>123456</p>"))
        print(receipt.eventID, receipt.routed)
    }
}
// end publisher

// begin subscriber
func handleMails(_ transport: RabbitMQTransport, send: @escaping @Sendable (String) async throws -> Void) async throws {
    var router = EventRouter()
    router.on(EmailVerificationRequested.self, matching: "email.#") { delivery in
        guard delivery.attempt < 5 else { return .deadLetter(reason: "the mail server refuses it") }
        try await send(delivery.event.recipient)  // what it throws means: try again
        return .acknowledge
    }
    let subscription = EventSubscription(queue: "smtp_send_email_v2", bindings: ["email.#"])
    let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router)
    try await subscriber.run()  // a Service: until graceful shutdown
}
// end subscriber

// begin tracker
import SMAPRedis

func analyse(_ project: ProjectID, items: Int, publisher: some EventPublishing) async throws {
    let store = try RedisProgressStore(configuration: RedisConfiguration(host: "localhost"))
    let finishLine = FinishLine(store: store, publisher: publisher)  // a Service: publishes job.completed
    let tracker = ProgressTracker(store: store, finishLine: finishLine)
    try await tracker.start(project)
    try await tracker.expect(items, of: project, batch: "page-1")  // once per batch, however often it is called
    try await tracker.seal(project)
    for index in 0..<items {
        let update = try await tracker.advance(project, item: .index(index), outcome: .success)
        if update.didFinish { print("done:", update.progress.done, "of", update.progress.total) }
    }
}
// end tracker
