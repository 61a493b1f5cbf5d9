#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// The AMQP properties of a message (AMQP 0-9-1, class basic). Short strings hold at most 255 bytes each.
public struct MessageProperties: Sendable, Hashable {
    /// A header's value. Types that the wire knows and this does not are left out when reading; copies of a message, to be
    /// retried, as a dead letter or to be replayed, carry them all the same.
    public enum HeaderValue: Sendable, Hashable, CustomStringConvertible {
        /// Text of any length.
        case string(String)
        /// Any of the wire's integers.
        case integer(Int64)
        /// A truth value.
        case boolean(Bool)

        /// The value alone, as text.
        public var description: String {
            switch self {
            case .string(let text): text
            case .integer(let number): String(number)
            case .boolean(let flag): String(flag)
            }
        }
    }

    /// `content_type`.
    public var contentType: String?
    /// `message_id`: the event's id.
    public var messageID: String?
    /// `type`: the event's routing key.
    public var type: String?
    /// `app_id`: the publishing service.
    public var appID: String?
    /// `correlation_id`.
    public var correlationID: String?
    /// `reply_to`: the queue that a reply goes to.
    public var replyTo: String?
    /// `timestamp`, in whole seconds on the wire.
    public var timestamp: Date?
    /// `content_encoding`, such as `gzip`.
    public var contentEncoding: String?
    /// `priority`, for queues with priorities.
    public var priority: UInt8?
    /// `expiration`: how long the message may wait in a queue, in milliseconds.
    public var expiration: String?
    /// `user_id`: the broker takes only the name of the connection's own user.
    public var userID: String?
    /// Headers by name. Names hold at most 128 bytes.
    public var headers: [String: HeaderValue]

    /// Makes properties; everything is optional.
    public init(
        contentType: String? = nil, messageID: String? = nil, type: String? = nil, appID: String? = nil,
        correlationID: String? = nil, replyTo: String? = nil, timestamp: Date? = nil,
        headers: [String: HeaderValue] = [:], contentEncoding: String? = nil, priority: UInt8? = nil,
        expiration: String? = nil, userID: String? = nil
    ) {
        self.contentType = contentType
        self.messageID = messageID
        self.type = type
        self.appID = appID
        self.correlationID = correlationID
        self.replyTo = replyTo
        self.timestamp = timestamp
        self.headers = headers
        self.contentEncoding = contentEncoding
        self.priority = priority
        self.expiration = expiration
        self.userID = userID
    }
}
