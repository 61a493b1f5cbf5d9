/// Which fields of a project's hash hold its counters. Chosen when a project starts, and remembered there.
///
/// Whatever the layout, ``ProjectProgress/done`` and `job.completed` count what is settled, failed items included.
public struct ProgressLayout: Sendable, Hashable, CustomStringConvertible {
    /// The text in the hash's `_layout`.
    public let rawValue: String

    /// Wraps the text in the hash.
    public init(_ rawValue: String) { self.rawValue = rawValue }

    /// `total`, `done`, `errors`: a failed item counts in `done` and in `errors`. The standard, and the default.
    public static let flat = ProgressLayout("flat")
    /// The same fields, but a failed item counts in `errors` alone; the end is `done + errors ≥ total`.
    public static let errorsApart = ProgressLayout("apart")
    /// `crawl_…` and `analyze_…`, errors apart: an item that was crawled is expected to be analysed.
    public static let stages = ProgressLayout("stages")

    /// The text in the hash.
    public var description: String { rawValue }

    /// The stages that a layout counts; one without a name where there is but one.
    package var stages: [ProgressStage?] { self == .stages ? ProgressStage.allCases : [nil] }
}

/// A stage of a project whose layout is ``ProgressLayout/stages``.
public enum ProgressStage: String, Sendable, Hashable, CaseIterable {
    /// The first: its total is what is expected and sealed. Each success adds one to the total of ``analyze``.
    case crawl
    /// The second.
    case analyze
}
