/// Something that happened, as a Swift type. Its `Codable` form is the `data` of the envelope.
///
/// ```swift
/// struct OrderShipped: SMAPEvent {
///     static let routingKey: RoutingKey = "order.shipped"
///     var orderID: String
/// }
/// ```
///
/// `Date` properties are written as RFC 3339 with milliseconds, and `Data` as base64.
public protocol SMAPEvent: Codable, Sendable {
    /// The key that events of this type are published under.
    static var routingKey: RoutingKey { get }
    /// The version of the data's schema, 1 by default.
    static var schemaVersion: Int { get }
    /// Where the fields stand in the payload, ``EventShape/nested`` by default.
    static var shape: EventShape { get }
    /// The project that the event belongs to, none by default. Travels in the payload, beside `data`.
    var projectID: ProjectID? { get }
    /// What recognises a repeated cause, none by default.
    var idempotencyKey: String? { get }

    /// Throws if the event must not be published; the error should name the field. By default there is nothing to check.
    func validate() throws

    /// Called after decoding with the envelope that the event came in, to take over what is not part of the data, such
    /// as the project. Does nothing by default.
    mutating func restore(from envelope: EventEnvelope)
}

extension SMAPEvent {
    /// 1.
    public static var schemaVersion: Int { 1 }
    /// ``EventShape/nested``.
    public static var shape: EventShape { .nested }
    /// None.
    public var projectID: ProjectID? { nil }
    /// None.
    public var idempotencyKey: String? { nil }
    /// Nothing to check.
    public func validate() throws {}
    /// Nothing to take over.
    public mutating func restore(from envelope: EventEnvelope) {}
}

extension SMAPEvent {
    /// Throws ``EventsError/Code/invalidEvent`` naming `field`, unless the condition holds.
    static func require(_ condition: Bool, _ field: String, _ rule: String) throws {
        guard condition else {
            throw EventsError(.invalidEvent, "\(routingKey): \(field) \(rule)", operation: "validate")
        }
    }
}
