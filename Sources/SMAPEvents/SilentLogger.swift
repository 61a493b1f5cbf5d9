public import Logging

extension Logger {
    /// A logger that writes nothing: the default of everything in this package that takes one.
    public static var silent: Logger {
        Logger(label: "smap-events.silent", factory: { _ in SwiftLogNoOpLogHandler() })
    }
}
