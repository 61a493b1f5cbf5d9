import Logging

/// Does something at each message, on the thread that logs it.
struct HookLogHandler: LogHandler {
    let hook: @Sendable (LogEvent) -> Void
    var logLevel: Logger.Level
    var metadata: Logger.Metadata = [:]

    init(logLevel: Logger.Level = .info, hook: @escaping @Sendable (LogEvent) -> Void) {
        self.logLevel = logLevel
        self.hook = hook
    }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) { hook(event) }
}
