#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// The mail service's message from before the standard envelope.
///
/// It is what Go's `encoding/json` makes of a struct without tags, so it is written in Pascal case. It is read in any
/// letter case and in snake case, as the services' documents show it.
public struct LegacyEmailMessage: Sendable, Hashable {
    /// A file that goes along.
    public struct Attachment: Sendable, Hashable {
        /// The file's name.
        public var filename: String
        /// Its media type.
        public var contentType: String
        /// Its bytes, in base64.
        public var data: String

        /// Describes a file.
        public init(filename: String, contentType: String, data: String) {
            self.filename = filename
            self.contentType = contentType
            self.data = data
        }
    }

    /// The subject line.
    public var subject: String
    /// The address to send to.
    public var recipient: String
    /// The body.
    public var body: String
    /// Where answers go; empty if nowhere.
    public var replyTo: String
    /// Who else receives it.
    public var ccAddresses: [String]
    /// Files that go along.
    public var attachments: [Attachment]

    /// Makes a message.
    public init(
        subject: String, recipient: String, body: String, replyTo: String = "", ccAddresses: [String] = [],
        attachments: [Attachment] = []
    ) {
        self.subject = subject
        self.recipient = recipient
        self.body = body
        self.replyTo = replyTo
        self.ccAddresses = ccAddresses
        self.attachments = attachments
    }

    /// The legacy form of an event. Throws ``EventsError/Code/invalidEvent`` for an attachment by `storage_key`, which
    /// legacy consumers cannot fetch.
    public init(_ event: EmailVerificationRequested) throws {
        self.init(
            subject: event.subject, recipient: event.recipient, body: event.body, replyTo: event.replyTo ?? "",
            ccAddresses: event.ccAddresses ?? [],
            attachments: try (event.attachments ?? []).enumerated().map { index, attachment in
                guard let data = attachment.data else {
                    throw EventsError(
                        .invalidEvent, "attachments[\(index)].storage_key has no legacy form", operation: "publish")
                }
                return Attachment(
                    filename: attachment.filename, contentType: attachment.contentType,
                    data: data.base64EncodedString())
            })
    }

    /// The message as the Go service writes it.
    public func serialized() -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(128 + body.utf8.count)
        func field(_ name: StaticString, _ value: String) {
            bytes.append(literal: name)
            bytes.append(json: value)
        }
        field("{\"Subject\":", subject)
        field(",\"Recipient\":", recipient)
        field(",\"Body\":", body)
        field(",\"ReplyTo\":", replyTo)
        bytes.append(literal: ",\"CcAddresses\":")
        // Go writes a nil slice as null, and the services' slices are nil when nothing was added.
        if ccAddresses.isEmpty {
            bytes.append(literal: "null")
        } else {
            for (index, address) in ccAddresses.enumerated() {
                bytes.append(literal: index == 0 ? "[" : ",")
                bytes.append(json: address)
            }
            bytes.append(literal: "]")
        }
        bytes.append(literal: ",\"Attachments\":[")
        for (index, attachment) in attachments.enumerated() {
            field(index == 0 ? "{\"Filename\":" : ",{\"Filename\":", attachment.filename)
            field(",\"ContentType\":", attachment.contentType)
            field(",\"Data\":", attachment.data)
            bytes.append(literal: "}")
        }
        bytes.append(literal: "]}")
        return bytes
    }

    /// Reads a message in Pascal case, camel case or snake case; missing and null fields are empty. Throws
    /// ``EventsError/Code/undecodable`` when it is no such message, or names no recipient.
    public init(parsing body: [UInt8]) throws {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .custom { path in
            let name = path.last?.stringValue ?? ""
            return AnyKey(stringValue: name.lowercased().filter { $0 != "_" })
        }
        let wire: Wire
        do {
            // A byte order mark before it is ignored.
            wire = try decoder.decode(
                Wire.self, from: Data(body.starts(with: [0xEF, 0xBB, 0xBF]) ? body[3...] : body[...]))
        } catch {
            throw EventsError(.undecodable, "not a legacy mail message", operation: "decode")
        }
        guard let recipient = wire.recipient, !recipient.isEmpty else {
            throw EventsError(.undecodable, "a legacy mail message without recipient", operation: "decode")
        }
        self.init(
            subject: wire.subject ?? "", recipient: recipient, body: wire.body ?? "", replyTo: wire.replyto ?? "",
            ccAddresses: wire.ccaddresses ?? [],
            attachments: (wire.attachments ?? []).map {
                Attachment(filename: $0.filename ?? "", contentType: $0.contenttype ?? "", data: $0.data ?? "")
            })
    }

    /// The message with every name in lower case and without underscores.
    private struct Wire: Decodable {
        struct File: Decodable {
            let filename: String?
            let contenttype: String?
            let data: String?
        }

        let subject: String?
        let recipient: String?
        let body: String?
        let replyto: String?
        let ccaddresses: [String]?
        let attachments: [File]?
    }

    private struct AnyKey: CodingKey {
        let stringValue: String
        var intValue: Int? { nil }
        init(stringValue: String) { self.stringValue = stringValue }
        init?(intValue: Int) { nil }
    }
}
