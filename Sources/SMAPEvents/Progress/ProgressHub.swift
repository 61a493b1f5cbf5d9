internal import Synchronization

/// Shares one look at a project among all who watch it in this process.
///
/// Whoever writes is never waited for by it nor waits for it: it is nudged, reads the project once, and hands the newest
/// state to each watcher; one that is slow misses what has been overtaken.
package final class ProgressHub: Sendable {
    package typealias Updates = AsyncThrowingStream<ProjectProgress, any Error>

    private struct Watched {
        /// Whose look it is: the task of an earlier one may still be at its end.
        let id: UInt64
        var watchers: [UInt64: Updates.Continuation] = [:]
        var last: ProjectProgress?
        let nudge: AsyncStream<Void>.Continuation
        var task: Task<Void, Never>?
    }

    private struct State {
        var lastID: UInt64 = 0
        var projects: [ProjectID: Watched] = [:]
    }

    private let read: @Sendable (ProjectID) async throws -> ProjectProgress?
    private let subscribe: @Sendable (ProjectID) async -> Void
    private let unsubscribe: @Sendable (ProjectID) async -> Void
    private let interval: Duration
    private let state = Mutex(State())

    /// Makes a hub.
    ///
    /// - Parameters:
    ///   - interval: How often a project is looked at although nobody nudges: a nudge may be lost.
    ///   - subscribe: Asks for nudges; called at each of those looks, since a subscription may have been lost too.
    package init(
        interval: Duration, read: @escaping @Sendable (ProjectID) async throws -> ProjectProgress?,
        subscribe: @escaping @Sendable (ProjectID) async -> Void = { _ in },
        unsubscribe: @escaping @Sendable (ProjectID) async -> Void = { _ in }
    ) {
        self.interval = interval
        self.read = read
        self.subscribe = subscribe
        self.unsubscribe = unsubscribe
    }

    /// Follows a project: its state now, then each newer one, until it is over.
    package func watch(_ project: ProjectID) -> Updates {
        let (updates, continuation) = Updates.makeStream(bufferingPolicy: .bufferingNewest(1))
        let id = state.withLock { state in
            state.lastID += 1
            let id = state.lastID
            if let last = state.projects[project]?.last { continuation.yield(last) }
            if state.projects[project] == nil {
                let (nudges, nudge) = AsyncStream.makeStream(of: Void.self, bufferingPolicy: .bufferingNewest(1))
                state.projects[project] = Watched(id: id, nudge: nudge)
                state.projects[project]?.task = Task { await self.follow(project, id, nudges, nudge) }
            }
            state.projects[project]?.watchers[id] = continuation
            return id
        }
        continuation.onTermination = { [weak self] _ in self?.leave(project, id) }
        return updates
    }

    /// Something has happened to a project.
    package func nudge(_ project: ProjectID) {
        state.withLock { $0.projects[project]?.nudge }?.yield()
    }

    private func leave(_ project: ProjectID, _ id: UInt64) {
        let task = state.withLock { state -> Task<Void, Never>? in
            state.projects[project]?.watchers[id] = nil
            guard let watched = state.projects[project], watched.watchers.isEmpty else { return nil }
            state.projects[project] = nil
            return watched.task
        }
        task?.cancel()
    }

    private func follow(
        _ project: ProjectID, _ id: UInt64, _ nudges: AsyncStream<Void>, _ nudge: AsyncStream<Void>.Continuation
    ) async {
        await withDiscardingTaskGroup { group in
            group.addTask { [interval, subscribe] in
                // First of all, so that nothing is missed between the look and the subscription.
                while !Task.isCancelled {
                    await subscribe(project)
                    nudge.yield()
                    try? await Task.sleep(for: interval)
                }
            }
            for await _ in nudges {
                do {
                    guard let progress = try await read(project) else {
                        throw EventsError(
                            .unknownProject, "no progress is kept for this project", operation: "watch \(project)")
                    }
                    tell(project, id, progress)
                    if progress.isOver {
                        end(project, id, nil)
                        break
                    }
                } catch is CancellationError {
                    break
                } catch let error as EventsError where error.isRetriable && error.code != .unknownProject {
                    // The store is away; the next look tells.
                } catch {
                    end(project, id, error)
                    break
                }
            }
            group.cancelAll()
        }
        // Somebody may watch anew.
        guard state.withLock({ $0.projects[project] == nil }) else { return }
        // Also when this task is cancelled, as it is when the last watcher leaves.
        await Task { [unsubscribe] in await unsubscribe(project) }.value
    }

    private func tell(_ project: ProjectID, _ id: UInt64, _ progress: ProjectProgress) {
        let watchers = state.withLock { state -> [Updates.Continuation] in
            guard state.projects[project]?.id == id, state.projects[project]?.last != progress else { return [] }
            state.projects[project]?.last = progress
            return Array(state.projects[project]?.watchers.values ?? [:].values)
        }
        for watcher in watchers { watcher.yield(progress) }
    }

    private func end(_ project: ProjectID, _ id: UInt64, _ error: (any Error)?) {
        // Those who come now begin anew.
        let watched = state.withLock { state in
            state.projects[project]?.id == id ? state.projects.removeValue(forKey: project) : nil
        }
        for watcher in watched?.watchers.values ?? [:].values { watcher.finish(throwing: error) }
    }
}
