public import Configuration

/// Where the platform stands on its way from the fanout exchange to the topic exchange.
public enum MigrationPhase: Int, Sendable, CaseIterable {
    /// Publish to the legacy exchange only; the new exchange and queues are declared.
    case prepare = 1
    /// Publish to both; legacy consumers act, new ones shadow.
    case dual = 2
    /// Publish to both; new consumers act, legacy ones retire one by one. Not supported yet: see `Migration/README.md`.
    case consumers = 3
    /// Publish to the topic exchange only. Not supported yet for mails: see `Migration/README.md`.
    case cleanup = 4

    /// Whether events go to `smap.events`.
    public var publishesTopic: Bool { self != .prepare }
    /// Whether events that have a legacy form go to the legacy exchange.
    public var publishesLegacy: Bool { self != .cleanup }

    /// Reads `SMAP_MIGRATION_PHASE` (1 to 4), else `ENABLE_DUAL_PUBLISH` (`true` is phase 2, `false` phase 4); phase 2
    /// when neither is set. Throws ``EventsError/Code/invalidConfiguration`` for anything else.
    public init(reader: ConfigReader) throws {
        if let text = reader.string(forKey: "smap.migration.phase"), !text.isEmpty {
            guard let number = Int(text), let phase = MigrationPhase(rawValue: number) else {
                throw EventsError(
                    .invalidConfiguration, "SMAP_MIGRATION_PHASE is 1, 2, 3 or 4", operation: "configuration")
            }
            self = phase
        } else if let text = reader.string(forKey: "enable.dual.publish"), !text.isEmpty {
            switch text.lowercased() {
            case "true", "1", "yes", "on": self = .dual
            case "false", "0", "no", "off": self = .cleanup
            default:
                throw EventsError(
                    .invalidConfiguration, "ENABLE_DUAL_PUBLISH is true or false", operation: "configuration")
            }
        } else {
            self = .dual
        }
    }
}
