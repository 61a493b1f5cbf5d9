internal import Metrics

/// `progress_reports_total{verdict}`: what became of each report of an item.
struct ProgressMetrics: Sendable {
    private static let verdicts: [ProgressUpdate.Verdict] = [
        .counted, .duplicate, .reclassified, .finished, .finishPending, .alreadyFinished, .unexpectedItem, .memoryLost,
        .stale, .unknownProject, .stageMismatch, .itemKindMismatch, .corrupt,
    ]

    private let counters = Dictionary(
        uniqueKeysWithValues: Self.verdicts.map {
            ($0, Counter(label: "progress_reports_total", dimensions: [("verdict", $0.description)]))
        })

    /// - Parameter count: How many items there were: an update that was refused as a whole does not list them.
    func reported(_ count: Int, _ update: ProgressUpdate) {
        guard !update.items.isEmpty else {
            counters[update.verdict]?.increment(by: count)
            return
        }
        for verdict in update.items { counters[verdict]?.increment() }
    }
}
