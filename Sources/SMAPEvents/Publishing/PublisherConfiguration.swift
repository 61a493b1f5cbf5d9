public import Configuration
public import Tracing

/// How a publisher publishes.
public struct PublisherConfiguration: Sendable {
    /// The publishing service, as it stands in envelopes and `app_id`. 1 to 255 bytes. `SMAP_SERVICE_NAME`.
    public var service: String
    /// The exchange, ``ExchangeName/events`` by default.
    public var exchange: String
    /// How long a publish may take, 30 s by default.
    public var deadline: Duration
    /// Makes spans and puts their context into headers; the bootstrapped tracer by default.
    public var tracer: any Tracer = InstrumentationSystem.tracer

    /// Describes a publisher.
    public init(service: String, exchange: String = ExchangeName.events, deadline: Duration = .seconds(30)) {
        self.service = service
        self.exchange = exchange
        self.deadline = deadline
    }

    /// Reads `SMAP_SERVICE_NAME` (required). Throws ``EventsError/Code/invalidConfiguration`` when it is missing.
    public init(reader: ConfigReader) throws {
        guard let service = reader.string(forKey: "smap.service.name"), !service.isEmpty else {
            throw EventsError(.invalidConfiguration, "SMAP_SERVICE_NAME is not set", operation: "configuration")
        }
        self.init(service: service)
    }
}
