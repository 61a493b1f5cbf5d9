#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A file that goes along with a mail: its bytes, or the key under which they are stored.
public struct EmailAttachment: Codable, Sendable, Hashable {
    /// The file's name, as the recipient sees it.
    public var filename: String
    /// Its media type.
    public var contentType: String
    /// Its bytes, written as base64. An envelope holds 256 KiB in all.
    public var data: Data?
    /// Where the bytes are stored, for files too large for an envelope. Has no legacy form.
    public var storageKey: String?

    /// A file whose bytes travel with the event.
    public init(filename: String, contentType: String, data: Data) {
        self.filename = filename
        self.contentType = contentType
        self.data = data
    }

    /// A file that the mail service fetches itself.
    public init(filename: String, contentType: String, storageKey: String) {
        self.filename = filename
        self.contentType = contentType
        self.storageKey = storageKey
    }

    private enum CodingKeys: String, CodingKey {
        case filename, data
        case contentType = "content_type"
        case storageKey = "storage_key"
    }
}
