/// A mail that asks a user to confirm an address is to be sent.
///
/// It has a legacy form, ``LegacyEmailMessage``, which ``DualPublisher`` sends beside it.
public struct EmailVerificationRequested: SMAPEvent, Hashable {
    /// `email.verification.requested`.
    public static let routingKey: RoutingKey = "email.verification.requested"

    /// The address to send to.
    public var recipient: String
    /// The subject line. Not empty.
    public var subject: String
    /// The body, usually HTML. Not empty.
    public var body: String
    /// Where answers go.
    public var replyTo: String?
    /// Who else receives it.
    public var ccAddresses: [String]?
    /// Files that go along.
    public var attachments: [EmailAttachment]?

    /// Makes the event.
    public init(
        recipient: String, subject: String, body: String, replyTo: String? = nil, ccAddresses: [String]? = nil,
        attachments: [EmailAttachment]? = nil
    ) {
        self.recipient = recipient
        self.subject = subject
        self.body = body
        self.replyTo = replyTo
        self.ccAddresses = ccAddresses
        self.attachments = attachments
    }

    private enum CodingKeys: String, CodingKey {
        case recipient, subject, body, attachments
        case replyTo = "reply_to"
        case ccAddresses = "cc_addresses"
    }

    /// Checks addresses, subject, body and attachments. Throws ``EventsError/Code/invalidEvent`` naming the field.
    public func validate() throws {
        try Self.require(Self.isAddress(recipient), "recipient", "is not an e-mail address")
        try Self.require(!subject.isEmpty, "subject", "is empty")
        try Self.require(!subject.contains(where: \.isNewline), "subject", "has a line break")
        try Self.require(!body.isEmpty, "body", "is empty")
        if let replyTo, !replyTo.isEmpty {
            try Self.require(Self.isAddress(replyTo), "reply_to", "is not an e-mail address")
        }
        for (index, address) in (ccAddresses ?? []).enumerated() {
            try Self.require(Self.isAddress(address), "cc_addresses[\(index)]", "is not an e-mail address")
        }
        for (index, attachment) in (attachments ?? []).enumerated() {
            try Self.require(!attachment.filename.isEmpty, "attachments[\(index)].filename", "is empty")
            try Self.require(
                (attachment.data == nil) != (attachment.storageKey == nil), "attachments[\(index)]",
                "has not just one of data and storage_key")
        }
    }

    /// One `@` between two parts, no white space or control characters, at most 254 bytes (RFC 5321, 4.5.3.1.3).
    /// Whether mail arrives there, only the mail server can tell.
    private static func isAddress(_ text: String) -> Bool {
        let parts = text.split(separator: "@", omittingEmptySubsequences: false)
        return parts.count == 2 && parts.allSatisfy { !$0.isEmpty } && text.utf8.count <= 254
            && text.unicodeScalars.allSatisfy {
                !$0.properties.isWhitespace && $0.properties.generalCategory != .control && $0 != "," && $0 != "<"
                    && $0 != ">"
            }
    }
}
