import Testing

@testable import SMAPEvents

@Suite struct ReplyAddressTests {
    @Test(arguments: [
        ("amq.rabbitmq.reply-to.g1h2AA5yZXBseUA=.bm9k/ZQ+a_b-c==", true),
        ("amq.rabbitmq.reply-to.%%%%.abc", false), ("amq.rabbitmq.reply-to.abc", false),
        ("amq.rabbitmq.reply-to..abc", false), ("amq.rabbitmq.reply-to.abc.", false),
        ("amq.rabbitmq.reply-to", false), ("amq.rabbitmq.reply-to.", false), ("amq.rabbitmq.reply-toX.a.b", false),
        ("amq.rabbitmq.reply-to.a.\u{E9}", false), ("some.queue", false),
    ])
    func `only what RabbitMQ can read as an address for replies is replied to`(address: String, isAddress: Bool) {
        #expect(DeliveryProcessor.isReplyAddress(address) == isAddress)
    }
}
