internal import Synchronization

/// What all events of one key and one version have in common for a publisher: checked, looked up and laid out once.
final class EventTemplate: Sendable {
    let routingKey: RoutingKey
    let destination: PublishDestination
    let message: MessageTemplate
    let metrics: PublisherMetrics.Key
    /// The fields of the payload that are the same in every envelope.
    let identity: [UInt8]
    /// The size of the last one: a guess at the size of the next.
    private let lastSize = Atomic<Int>(1_024)

    var expectedSize: Int {
        get { lastSize.load(ordering: .relaxed) }
        set { lastSize.store(newValue, ordering: .relaxed) }
    }

    init(
        _ routingKey: RoutingKey, schemaVersion: Int?, configuration: PublisherConfiguration, metrics: PublisherMetrics
    ) {
        self.routingKey = routingKey
        self.metrics = metrics.key(routingKey)
        destination = PublishDestination(exchange: configuration.exchange, routingKey: routingKey.rawValue)
        var headers: [String: MessageProperties.HeaderValue] = [:]
        if let schemaVersion { headers["x-smap-schema-version"] = .integer(Int64(schemaVersion)) }
        message = MessageTemplate(
            destination,
            properties: MessageProperties(
                contentType: "application/json", type: routingKey.rawValue, appID: configuration.service,
                headers: headers))
        identity = EventEnvelope.identity(service: configuration.service, routingKey: routingKey)
    }
}

/// The templates of one publisher.
final class EventTemplates: Sendable {
    private struct Key: Hashable {
        let routingKey: RoutingKey
        let schemaVersion: Int?
    }

    private struct State {
        var types: [ObjectIdentifier: EventTemplate] = [:]
        var keys: [Key: EventTemplate] = [:]
    }

    /// A service that makes up keys must not make memory grow; what is beyond is made for each event.
    private static let limit = 1_000

    private let configuration: PublisherConfiguration
    private let metrics = PublisherMetrics()
    private let state = Mutex(State())

    init(_ configuration: PublisherConfiguration) { self.configuration = configuration }

    func template<E: SMAPEvent>(of type: E.Type) -> EventTemplate {
        let id = ObjectIdentifier(type)
        if let known = state.withLock({ $0.types[id] }) { return known }
        let template = template(E.routingKey, schemaVersion: E.schemaVersion)
        state.withLock { if $0.types.count < Self.limit { $0.types[id] = template } }
        return template
    }

    func template(_ routingKey: RoutingKey, schemaVersion: Int?) -> EventTemplate {
        let key = Key(routingKey: routingKey, schemaVersion: schemaVersion)
        if let known = state.withLock({ $0.keys[key] }) { return known }
        let template = EventTemplate(
            routingKey, schemaVersion: schemaVersion, configuration: configuration, metrics: metrics)
        return state.withLock { state in
            if let known = state.keys[key] { return known }
            if state.keys.count < Self.limit { state.keys[key] = template }
            return template
        }
    }
}
