/// The platform's own events: what is checked when one of them is published as plain JSON.
enum EventCatalogue {
    private struct Entry: Sendable {
        let shape: EventShape
        let schemaVersion: Int
        /// Checks the data of an envelope, and returns what the event's type makes of its idempotency key.
        let check: @Sendable (EventEnvelope) throws -> String?

        init<E: SMAPEvent>(_ type: E.Type) {
            shape = E.shape
            schemaVersion = E.schemaVersion
            check = { envelope in
                let event = try envelope.decode(type)
                try event.validate()
                return event.idempotencyKey
            }
        }
    }

    private static let entries: [RoutingKey: Entry] = [
        EmailVerificationRequested.routingKey: Entry(EmailVerificationRequested.self),
        SubscriptionCreated.routingKey: Entry(SubscriptionCreated.self),
        SubscriptionCancelled.routingKey: Entry(SubscriptionCancelled.self),
        UserRegistered.routingKey: Entry(UserRegistered.self),
        UserLoggedIn.routingKey: Entry(UserLoggedIn.self),
        UserLoggedOut.routingKey: Entry(UserLoggedOut.self),
        ProjectCreated.routingKey: Entry(ProjectCreated.self),
        DataCollected.routingKey: Entry(DataCollected.self),
        AnalysisFinished.routingKey: Entry(AnalysisFinished.self),
        JobCompleted.routingKey: Entry(JobCompleted.self),
    ]

    static func shape(of key: RoutingKey) -> EventShape? { entries[key]?.shape }

    static func schemaVersion(of key: RoutingKey) -> Int? { entries[key]?.schemaVersion }

    /// Fills in what the catalogue knows of an event, after its checks. Events that it does not know pass.
    static func complete(_ envelope: inout EventEnvelope) throws {
        guard let key = envelope.routingKey, let entry = entries[key] else { return }
        do {
            let idempotencyKey = try entry.check(envelope)
            envelope.idempotencyKey = envelope.idempotencyKey ?? idempotencyKey
            envelope.schemaVersion = envelope.schemaVersion ?? entry.schemaVersion
        } catch let error as EventsError where error.code == .undecodable {
            throw EventsError(.invalidEvent, error.message, operation: "validate", eventID: envelope.eventID)
        }
    }
}
