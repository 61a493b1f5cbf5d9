/// Whether a part of a service can do its job now, and if not, why.
public struct Health: Sendable, Hashable, CustomStringConvertible {
    /// What is wrong, a sentence each, without secrets. Empty when all is well.
    public var problems: [String]

    /// What works now and may cost data one day, a sentence each. It makes nothing unhealthy.
    public var warnings: [String]

    /// Reports what is wrong; nothing by default.
    public init(problems: [String] = [], warnings: [String] = []) {
        self.problems = problems
        self.warnings = warnings
    }

    /// Whether nothing is wrong: what a readiness probe asks.
    public var isHealthy: Bool { problems.isEmpty }

    /// `healthy`, or the problems.
    public var description: String { isHealthy ? "healthy" : problems.joined(separator: "; ") }

    /// The health of several parts together.
    public static func + (left: Health, right: Health) -> Health {
        Health(problems: left.problems + right.problems, warnings: left.warnings + right.warnings)
    }
}
