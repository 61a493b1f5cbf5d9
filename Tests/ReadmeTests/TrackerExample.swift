// As ReadmeExamples.swift.

// begin tracker
import SMAPEvents
import SMAPRedis

func analyse(_ project: ProjectID, items: Int, publisher: some EventPublishing) async throws {
    let store = try RedisProgressStore(configuration: RedisConfiguration(host: "localhost"))
    // Publishes job.completed. A Service: nothing is published unless it, or that of another process, runs.
    let finishLine = FinishLine(store: store, publisher: publisher)
    let tracker = ProgressTracker(store: store, finishLine: finishLine)
    try await tracker.start(project)
    try await tracker.expect(items, of: project, batch: "page-1")  // once per batch, however often it is called
    try await tracker.seal(project)
    for index in 0..<items {
        let update = try await tracker.advance(project, item: .index(index), outcome: .success)
        if update.didFinish { print("done:", update.progress.done, "of", update.progress.total) }
    }
}
// end tracker
