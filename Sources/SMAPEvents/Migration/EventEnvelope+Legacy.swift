#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

extension EventEnvelope {
    /// Reads a message of the legacy exchange as the event that it stands for, so that one handler takes both forms.
    ///
    /// The event's id is the one that the bridge gave it, by which an inbox recognises the other leg. A message of a service
    /// that knows no ids gets a new one.
    init(legacy delivery: InboundDelivery) throws {
        let mail = try LegacyEmailMessage(parsing: delivery.body)
        let event = EmailVerificationRequested(
            recipient: mail.recipient, subject: mail.subject, body: mail.body,
            replyTo: mail.replyTo.isEmpty ? nil : mail.replyTo, ccAddresses: mail.ccAddresses,
            attachments: try mail.attachments.enumerated().map { index, file in
                guard let data = Data(base64Encoded: file.data) else {
                    throw EventsError(.undecodable, "Attachments[\(index)].Data is not base64", operation: "decode")
                }
                return EmailAttachment(filename: file.filename, contentType: file.contentType, data: data)
            })
        let id = delivery.text("x-smap-event-id") ?? delivery.properties.messageID
        self.init(
            eventID: try id.map { try EventID($0) } ?? EventID(),
            timestamp: delivery.properties.timestamp ?? delivery.receivedAt,
            routingKey: EmailVerificationRequested.routingKey, service: delivery.properties.appID,
            data: try EventJSON.encode(event))
    }
}
