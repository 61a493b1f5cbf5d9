internal import CHiredis
internal import ConnectionThread
internal import SMAPEvents

/// A reply of RESP2.
enum RedisReply: Sendable, Equatable {
    case integer(Int64)
    case string(String)
    case array([RedisReply])
    case error(String)
    case null

    /// Copies a reply of hiredis.
    init(_ reply: UnsafePointer<redisReply>) {
        // Sound: hiredis gives a reply of each type just the fields read here, valid until it is freed.
        switch reply.pointee.type {
        case REDIS_REPLY_INTEGER: self = .integer(reply.pointee.integer)
        case REDIS_REPLY_STRING, REDIS_REPLY_STATUS: self = .string(Self.text(reply))
        case REDIS_REPLY_ERROR: self = .error(Self.text(reply))
        case REDIS_REPLY_ARRAY:
            let elements = UnsafeBufferPointer(start: reply.pointee.element, count: Int(reply.pointee.elements))
            self = .array(elements.map { $0.map { RedisReply($0) } ?? .null })
        default: self = .null
        }
    }

    private static func text(_ reply: UnsafePointer<redisReply>) -> String {
        let bytes = UnsafeRawBufferPointer(start: reply.pointee.str, count: Int(reply.pointee.len))
        return String(decoding: bytes, as: UTF8.self)
    }

    var text: String? { if case .string(let text) = self { text } else { nil } }

    var number: Int? {
        switch self {
        case .integer(let value): Int(value)
        case .string(let text): Int(text)
        default: nil
        }
    }
}

/// What a class of error replies means to a caller (TRAPS: the first word tells).
enum RedisFailure {
    /// Whether the server has done nothing and may be able to, soon, or another one in its place.
    static func isPassing(_ text: String) -> Bool {
        error(text, operation: "").code == .storeUnavailable
    }

    static func error(_ failure: TLSError, _ server: String = "", operation: String) -> EventsError {
        EventsError(
            failure.kind == .invalidOptions ? .invalidConfiguration : .tlsFailed, server + failure.description,
            operation: operation)
    }

    static func error(_ text: String, operation: String) -> EventsError {
        let word = text.prefix { $0 != " " }
        // What a script may not call is told as any error of a script is.
        if text.contains("user executing the script can't") {
            return EventsError(.accessRefused, "Redis refuses a command or key of a script", operation: operation)
        }
        switch word {
        case "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN", "CLUSTERDOWN":
            return EventsError(.storeUnavailable, "Redis cannot work now: \(word)", operation: operation)
        case "READONLY":
            return EventsError(.storeUnavailable, "this Redis is a replica: READONLY", operation: operation)
        case "OOM", "MISCONF":
            return EventsError(.storeFull, "Redis refuses writes: \(word)", operation: operation)
        case "NOPERM":
            // It names a command or a kind of key, and never what a caller has sent.
            return EventsError(.accessRefused, "Redis refuses it to the user: \(text)", operation: operation)
        case "NOAUTH", "WRONGPASS":
            return EventsError(
                .accessRefused, "Redis refuses the user or its permissions: \(word)", operation: operation)
        case "WRONGTYPE":
            return EventsError(.corruptProgress, "a key holds another type: WRONGTYPE", operation: operation)
        case "MOVED", "ASK":
            return EventsError(
                .invalidConfiguration, "this is a Redis Cluster, which is not supported: \(word)", operation: operation)
        default:
            return EventsError(.protocolViolation, "Redis: \(text)", operation: operation)
        }
    }
}
