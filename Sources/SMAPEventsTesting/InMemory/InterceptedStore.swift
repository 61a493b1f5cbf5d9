package import SMAPEvents

/// A store that tells of its operations before and after they are carried out, so that a test can have one fail, or die.
package struct InterceptedStore: ProgressStore {
    /// The operations that a test may want to come between.
    package enum Operation: Sendable {
        case advance
        case clear
    }

    package typealias Instant = ContinuousClock.Instant

    private let store: any ProgressStore
    private let before: @Sendable (Operation) async throws -> Void
    private let after: @Sendable (ProgressUpdate) async throws -> Void

    /// - Parameters:
    ///   - before: Called before an operation; what it throws is thrown instead of carrying that out.
    ///   - after: Called with what an advance has answered, before the caller learns of it.
    package init(
        _ store: any ProgressStore, before: @escaping @Sendable (Operation) async throws -> Void,
        after: @escaping @Sendable (ProgressUpdate) async throws -> Void = { _ in }
    ) {
        self.store = store
        self.before = before
        self.after = after
    }

    package func advance(
        _ project: ProjectID, _ request: AdvanceRequest, finishEventID: EventID, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await before(.advance)
        let update = try await store.advance(project, request, finishEventID: finishEventID, deadline: deadline)
        try await after(update)
        return update
    }

    package func clear(_ finish: PendingFinish, deadline: Instant) async throws -> Bool {
        try await before(.clear)
        return try await store.clear(finish, deadline: deadline)
    }

    // MARK: Passed on

    package func health(deadline: Instant) async -> Health { await store.health(deadline: deadline) }

    package func start(
        _ project: ProjectID, layout: ProgressLayout, finishEventID: EventID, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.start(project, layout: layout, finishEventID: finishEventID, deadline: deadline)
    }

    package func restart(
        _ project: ProjectID, from generation: Int, finishEventID: EventID, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.restart(project, from: generation, finishEventID: finishEventID, deadline: deadline)
    }

    package func expect(
        _ count: Int, of project: ProjectID, batch: String, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.expect(count, of: project, batch: batch, deadline: deadline)
    }

    package func seal(
        _ project: ProjectID, total: Int?, finishEventID: EventID, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.seal(project, total: total, finishEventID: finishEventID, deadline: deadline)
    }

    package func abandon(
        _ project: ProjectID, isCancelled: Bool, reason: String, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.abandon(project, isCancelled: isCancelled, reason: reason, deadline: deadline)
    }

    package func settle(
        _ project: ProjectID, finishEventID: EventID, deadline: Instant
    ) async throws -> ProgressUpdate {
        try await store.settle(project, finishEventID: finishEventID, deadline: deadline)
    }

    package func progress(of project: ProjectID, deadline: Instant) async throws -> ProjectProgress? {
        try await store.progress(of: project, deadline: deadline)
    }

    package func updates(of project: ProjectID) -> AsyncThrowingStream<ProjectProgress, any Error> {
        store.updates(of: project)
    }

    package func pendingFinishes(limit: Int, deadline: Instant) async throws -> [ProjectID] {
        try await store.pendingFinishes(limit: limit, deadline: deadline)
    }

    package func pendingFinishes(of project: ProjectID, deadline: Instant) async throws -> [PendingFinish] {
        try await store.pendingFinishes(of: project, deadline: deadline)
    }

    package func projects(after cursor: String?, deadline: Instant) async throws -> ProjectPage {
        try await store.projects(after: cursor, deadline: deadline)
    }

    package func inspect(
        _ project: ProjectID, finishEventID: EventID, isDryRun: Bool, deadline: Instant
    ) async throws -> ProjectFindings {
        try await store.inspect(project, finishEventID: finishEventID, isDryRun: isDryRun, deadline: deadline)
    }
}
