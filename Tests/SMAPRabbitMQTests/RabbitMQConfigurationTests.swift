import Configuration
import SMAPEvents
import SMAPRabbitMQ
import Testing

@Suite struct RabbitMQConfigurationTests {
    @Test func `a URL is read with its parts percent-decoded`() throws {
        let full = try RabbitMQConfiguration(url: "amqp://us%40er:p%3Aw%2Fd@rabbit.example:5673/my%2Fhost?heartbeat=5")
        #expect(full.host == "rabbit.example")
        #expect(full.port == 5673)
        #expect(full.username == "us@er")
        #expect(full.password == "p:w/d")
        #expect(full.virtualHost == "my/host")
        let short = try RabbitMQConfiguration(url: "amqp://localhost/")
        #expect(short.port == 5672)
        #expect(short.virtualHost == "/")
        #expect(try RabbitMQConfiguration(url: "amqp://[::1]:1").host == "::1")
    }

    @Test(arguments: [
        "", "localhost", "http://h", "amqpx://u:s3cret@h", "amqp://u:s3cret@h:port", "amqp://u:s3cret@h:70000",
        "amqp://u:s3cret%zz@h", "amqp://u:s3 cret@h", "amqp://u:s3cret%ff@h", "amqp://u:s3cret@[::1",
    ])
    func `a malformed URL is refused, and never quoted`(url: String) {
        let error = #expect(throws: EventsError.self) { try RabbitMQConfiguration(url: url) }
        #expect(error?.code == .invalidConfiguration)
        #expect(error?.description.contains("s3") == false)
        #expect(error?.description.contains("RABBITMQ_URL") == true)
    }

    @Test func `settings come from the environment, and a description holds no password`() throws {
        let reader = ConfigReader(
            provider: EnvironmentVariablesProvider(environmentVariables: [
                "RABBITMQ_HOST": "h", "RABBITMQ_PORT": "1234", "RABBITMQ_USERNAME": "u", "RABBITMQ_PASSWORD": "s3cret",
                "RABBITMQ_VHOST": "v",
            ]))
        let configuration = try RabbitMQConfiguration(reader: reader)
        #expect(configuration.port == 1234)
        #expect(configuration.password == "s3cret")
        #expect("\(configuration)" == "h:1234/v")
    }

    @Test(arguments: [["RABBITMQ_PORT": "x"], ["RABBITMQ_PORT": "0"], ["RABBITMQ_USERNAME": "a\u{0}b"]])
    func `a wrong setting is refused by its name`(variables: [String: String]) {
        let reader = ConfigReader(provider: EnvironmentVariablesProvider(environmentVariables: variables))
        let error = #expect(throws: EventsError.self) { try RabbitMQConfiguration(reader: reader) }
        #expect(error?.message.contains(variables.keys.first ?? "?") == true)
    }
}
