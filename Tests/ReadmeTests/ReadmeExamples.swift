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
