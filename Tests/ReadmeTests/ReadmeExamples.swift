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
