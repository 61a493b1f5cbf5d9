// The README's example of a subscriber, in a file of its own for its imports.

// begin subscriber
import SMAPEvents
import SMAPRabbitMQ
import SMAPRedis

func handleMails(_ transport: RabbitMQTransport, send: @escaping @Sendable (String) async throws -> Void) async throws {
    var router = EventRouter()
    router.on(EmailVerificationRequested.self, matching: "email.#") { delivery in
        try await send(delivery.event.recipient)  // what it throws means: try again later
        return .acknowledge
    }
    var subscription = EventSubscription(queue: "smtp_send_email_v2", bindings: ["email.#"])
    subscription.retry.maximumAttempts = 5  // then it is dead-lettered
    let inbox = try RedisInbox(configuration: RedisConfiguration(host: "localhost"))  // handles an event once
    let subscriber = EventSubscriber(transport: transport, subscription: subscription, router: router, inbox: inbox)
    try await subscriber.run()  // a Service: until graceful shutdown
}
// end subscriber
