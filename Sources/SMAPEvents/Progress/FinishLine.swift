public import Logging
public import ServiceLifecycle
internal import Synchronization

#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// Publishes `job.completed` for finished projects: the outbox of the tracker.
///
/// Invariant (P5): the decision is in the store before anyone publishes it, and is cleared only after the broker's
/// confirm. So the event is published at least once, always under the id that was stored, whoever dies in between.
///
/// It publishes finishes that are announced by a ``ProgressTracker`` of this process at once, and finds all others by
/// sweeping the store at start and every few seconds: what a dead process left, and projects that a sibling has moved past
/// their line. While the broker or the store is away the sweeps become rarer. Any number of instances may run.
public final class FinishLine: Service {
    /// How a finish line works.
    public struct Configuration: Sendable {
        /// How often the store is swept, 5 s by default, give or take a fifth so that instances spread.
        public var interval: Duration
        /// How many finishes one sweep handles at most, 100 by default.
        public var batch: Int
        /// How long each publish and store operation may take, 10 s by default.
        public var deadline: Duration
        /// How far apart sweeps are at most while they fail, a minute by default; they double up to that.
        public var longestInterval: Duration
        /// Whether a finish stays pending until some queue receives it. On by default.
        public var requireRoute: Bool

        /// Describes a finish line.
        public init(
            interval: Duration = .seconds(5), longestInterval: Duration = .seconds(60), batch: Int = 100,
            deadline: Duration = .seconds(10), requireRoute: Bool = true
        ) {
            self.longestInterval = longestInterval
            self.interval = interval
            self.batch = batch
            self.deadline = deadline
            self.requireRoute = requireRoute
        }
    }

    private let store: any ProgressStore
    private let publisher: any EventPublishing
    private let configuration: Configuration
    private let logger: Logger
    private let onPublished: (@Sendable (PendingFinish) async -> Void)?
    /// Where the look at all projects goes on.
    private let cursor = Mutex<String?>(nil)

    /// Projects announced and not published yet. Bounded: what does not fit, the sweep finds.
    private let announced = Mutex<Set<ProjectID>>([])
    private let wakeups: AsyncStream<Void>
    private let wake: AsyncStream<Void>.Continuation

    /// Makes a finish line; ``run()`` starts it.
    ///
    /// - Parameter onPublished: Told of each finish whose event this instance has published and cleared; the next one waits
    ///   until it returns. For what must happen although this process dies, subscribe to `job.completed` instead.
    public init(
        store: any ProgressStore, publisher: any EventPublishing, configuration: Configuration = Configuration(),
        logger: Logger = .silent, onPublished: (@Sendable (PendingFinish) async -> Void)? = nil
    ) {
        self.onPublished = onPublished
        self.store = store
        self.publisher = publisher
        self.configuration = configuration
        self.logger = logger
        (wakeups, wake) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(1))
    }

    /// Publishes finishes until graceful shutdown or cancellation. Errors are logged, and tried again by a later sweep.
    ///
    /// On graceful shutdown the finish in hand is still confirmed and cleared, which takes up to twice
    /// ``Configuration/deadline``; the others stay pending for whoever sweeps next.
    public func run() async {
        await withGracefulShutdownHandler {
            await withDiscardingTaskGroup { group in
                group.addTask { await self.tick() }
                await self.publishUntilStopped()
                group.cancelAll()
            }
        } onGracefulShutdown: {
            self.wake.finish()
        }
    }

    private func tick() async {
        while !Task.isCancelled {
            // The interval is the point here; an announcement does not wait for it.
            try? await Task.sleep(for: configuration.interval * Double.random(in: 0.8...1.2))
            wake.yield()
        }
    }

    private func publishUntilStopped() async {
        var failures = await attempt { try await sweep() } ? 0 : 1
        var lastSweep = ContinuousClock.now
        for await _ in wakeups {
            let projects = announced.withLock { projects in
                defer { projects = [] }
                return projects
            }
            // While it fails, one sweep is enough to find out when that is over.
            if failures == 0 {
                for project in projects where !isStopping {
                    guard await attempt({ _ = try await publishPending(of: project) }) else {
                        failures = 1
                        break
                    }
                }
            }
            let pause = min(configuration.interval * (1 << min(failures, 16)), configuration.longestInterval)
            let next = failures == 0 ? configuration.interval * 0.75 : max(pause, configuration.interval) * 0.75
            if !isStopping, ContinuousClock.now - lastSweep >= next {
                failures = await attempt { try await sweep() } ? 0 : failures + 1
                lastSweep = .now
            }
        }
    }

    /// Publishes the finishes that are pending now, of at most ``Configuration/batch`` projects, and returns how many; and
    /// looks at some of all projects for those that a sibling has moved past their line.
    ///
    /// Throws the first error. Errors of one project do not keep it from the others; when the broker or the store cannot be
    /// reached it ends at once.
    @discardableResult
    public func sweep() async throws -> Int {
        var failure: (any Error)?
        var published = 0
        func publishAll(_ projects: [ProjectID]) async throws {
            for project in projects where !isStopping {
                do {
                    published += try await publishPending(of: project)
                } catch let error as EventsError where Self.isAboutOne.contains(error.code) {
                    failure = failure ?? error
                }
            }
        }
        try await publishAll(
            store.pendingFinishes(limit: configuration.batch, deadline: .now + configuration.deadline))
        // After them: where nothing can be written any more, what is pending can still be published and cleared.
        try await publishAll(settlePages())
        if let failure { throw failure }
        return published
    }

    /// Errors of one project, that say nothing of the others.
    private static let isAboutOne: Set<EventsError.Code> = [
        .unroutable, .nacked, .corruptProgress, .invalidEvent, .invalidName, .eventTooLarge, .protocolViolation,
        .storeFull,
    ]

    /// The projects that have been finished by it.
    private func settlePages() async throws -> [ProjectID] {
        // Several pages, where the database holds much else.
        let end = ContinuousClock.now + min(configuration.interval / 10, .milliseconds(500))
        var finished: [ProjectID] = []
        repeat {
            finished += try await settle(try await nextPage())
        } while cursor.withLock { $0 } != nil && ContinuousClock.now < end && !isStopping
        return finished
    }

    private func nextPage() async throws -> ProjectPage {
        let page = try await store.projects(
            after: cursor.withLock { $0 }, deadline: .now + configuration.deadline)
        cursor.withLock { $0 = page.next }
        return page
    }

    private func settle(_ page: ProjectPage) async throws -> [ProjectID] {
        var finished: [ProjectID] = []
        for project in page.projects where !isStopping {
            do {
                let update = try await store.settle(
                    project, finishEventID: EventID(), deadline: .now + configuration.deadline)
                if update.didFinish { finished.append(project) }
            } catch let error as EventsError where Self.isAboutOne.contains(error.code) {
                // Not ours, or damaged: `track reconcile` tells.
                logger.debug("a project cannot be looked at", metadata: ["project": "\(project)"])
            }
        }
        return finished
    }

    /// Called by a tracker whose operation finished a project.
    func announce(_ project: ProjectID) {
        announced.withLock { if $0.count < 1000 { $0.insert(project) } }
        wake.yield()
    }

    private var isStopping: Bool { Task.isShuttingDownGracefully }

    @discardableResult
    private func publishPending(of project: ProjectID) async throws -> Int {
        let finishes = try await store.pendingFinishes(of: project, deadline: .now + configuration.deadline)
        for finish in finishes { try await publish(finish) }
        return finishes.count
    }

    private func publish(_ finish: PendingFinish) async throws {
        let options = PublishOptions(
            eventID: finish.eventID, timestamp: finish.decidedAt, deadline: configuration.deadline,
            requireRoute: configuration.requireRoute)
        let event = UntypedEvent(routingKey: JobCompleted.routingKey, data: finish.data, projectID: finish.project)
        try await publisher.publish(event, options: options)
        if try await store.clear(finish, deadline: .now + configuration.deadline) { await onPublished?(finish) }
    }

    /// Whether it went well.
    private func attempt(_ body: () async throws -> Void) async -> Bool {
        do {
            try await body()
            return true
        } catch is CancellationError {
            return true
        } catch {
            let reason = (error as? EventsError)?.description ?? "\(type(of: error))"
            logger.warning("a finish stays pending", metadata: ["reason": "\(reason)"])
            return (error as? EventsError).map { Self.isAboutOne.contains($0.code) } ?? false
        }
    }
}
