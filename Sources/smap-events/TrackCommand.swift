import ArgumentParser
import Foundation
import SMAPEvents
import SMAPRedis

struct TrackCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "track",
        abstract: "Read and move the progress of a project.",
        discussion: """
            Every command prints the project's progress as a JSON object, but for reconcile, which prints what it \
            found. "done" counts failed items too, whatever the layout.

            Nothing is published from here: job.completed comes from a FinishLine that runs in some service.
            """,
        subcommands: [
            Start.self, Restart.self, Expect.self, Seal.self, Advance.self, Fail.self, Cancel.self, Show.self,
            Watch.self, Reconcile.self,
        ])

    struct Project: ParsableArguments {
        @Argument(help: "The project's id.")
        var id: String
    }

    /// The state as it is printed.
    struct State: Encodable {
        var project_id: String
        var status: String
        var sealed: Bool
        var total: Int
        var done: Int
        var errors: Int
        var percent: Double
        var generation: Int
        var layout: String
        /// By stage, in order; only where there are several.
        var stages: [Stage]?
        var cancelled: Bool?
        var reason: String?
        var verdict: String?
        /// How many replicas have the update; only where it waited for some.
        var replicas: Int?
        var finish_event_id: String?

        struct Stage: Encodable {
            var stage: String
            var total: Int
            var done: Int
            var errors: Int
        }

        init(_ update: ProgressUpdate) {
            self.init(update.progress)
            verdict = update.verdict.description
            replicas = update.replicas
        }

        init(_ progress: ProjectProgress) {
            project_id = progress.project.rawValue
            status = progress.status.rawValue
            sealed = progress.isSealed
            total = progress.total
            done = progress.done
            errors = progress.errors
            percent = (progress.percent * 100).rounded() / 100
            generation = progress.generation
            layout = progress.layout.rawValue
            if progress.layout == .stages {
                stages = zip(ProgressStage.allCases, progress.stages).map {
                    Stage(stage: $0.rawValue, total: $1.total, done: $1.done, errors: $1.errors)
                }
            }
            cancelled = progress.isCancelled ? true : nil
            reason = progress.reason
            finish_event_id = progress.finishEventID?.rawValue
        }
    }

    /// Of an item that was not counted, and had not been before.
    private static let refusals: Set<ProgressUpdate.Verdict> = [.unexpectedItem, .memoryLost, .stale]

    /// Runs one operation and prints the state after it.
    static func update(
        _ project: Project, _ operation: @Sendable (ProgressTracker, ProjectID) async throws -> ProgressUpdate
    ) async throws {
        try await Console.reporting {
            let id = try ProjectID(project.id)
            let update = try await RedisProgressStore.withStore(configuration: Settings.redis()) { store in
                try await operation(ProgressTracker(store: store), id)
            }
            Console.line(try Console.json(State(update)))
            if refusals.contains(update.verdict) { throw ExitCode(1) }
        }
    }

    struct Start: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Start a project; on one that exists, change nothing.")
        @OptionGroup var project: Project
        @Option(help: "How its hash counts: flat, apart (errors not in done) or stages.") var layout = "flat"

        func validate() throws {
            guard ["flat", "apart", "stages"].contains(layout) else {
                throw ValidationError("--layout is flat, apart or stages.")
            }
        }

        func run() async throws {
            try await update(project) { try await $0.start($1, layout: ProgressLayout(layout)) }
        }
    }

    struct Restart: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Start a project again that is done, failed or cancelled.",
            discussion: "Nothing is counted then, and its next finish is an event of its own.")
        @OptionGroup var project: Project
        @Option(help: "The generation that is over, as show prints it.") var from: Int

        func run() async throws {
            try await update(project) { try await $0.restart($1, from: from) }
        }
    }

    struct Expect: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Add items to a project's total, once per batch.")
        @OptionGroup var project: Project
        @Argument(help: "How many items.") var count: Int
        @Option(help: "The batch's key; repeated, it changes nothing.") var batch: String

        func run() async throws {
            try await update(project) { try await $0.expect(count, of: $1, batch: batch) }
        }
    }

    struct Seal: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Make a project's total final; with everything settled, finish it.")
        @OptionGroup var project: Project
        @Option(help: "The final total; without it, what was expected.") var total: Int?

        func run() async throws {
            try await update(project) { try await $0.seal($1, total: total) }
        }
    }

    struct Advance: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Report how an item ended. It counts once.",
            discussion: """
                The verdict tells what the report did. Exits with 1 when the item was not counted, and had not been before: \
                unexpectedItem, memoryLost, stale.
                """)
        @OptionGroup var project: Project
        @Option(help: "The item, by position from 0.") var index: Int?
        @Option(help: "The item, by name.") var item: String?
        @Flag(help: "The item failed.") var failed = false
        @Option(
            help: "The stage, crawl or analyze, of a project that has stages.",
            transform: { text in
                guard let stage = ProgressStage(rawValue: text) else {
                    throw ValidationError("--stage is crawl or analyze.")
                }
                return stage
            })
        var stage: ProgressStage?
        @Option(help: "The project's generation that the item belongs to.") var generation: Int?

        func validate() throws {
            guard (index == nil) != (item == nil) else { throw ValidationError("Give either --index or --item.") }
        }

        func run() async throws {
            let reference = index.map { ItemReference.index($0) } ?? .named(item ?? "")
            try await update(project) {
                try await $0.advance(
                    $1, item: reference, outcome: failed ? .failure : .success, stage: stage, generation: generation)
            }
        }
    }

    struct Fail: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Mark a project as failed.")
        @OptionGroup var project: Project
        @Option(help: "Why, for whoever asks.") var reason = ""

        func run() async throws {
            try await update(project) { try await $0.fail($1, reason: reason) }
        }
    }

    struct Cancel: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Cancel a project. Sibling services see it as failed.")
        @OptionGroup var project: Project
        @Option(help: "Why, for whoever asks.") var reason = ""

        func run() async throws {
            try await update(project) { try await $0.cancel($1, reason: reason) }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Print a project's progress.")
        @OptionGroup var project: Project

        func run() async throws {
            try await Console.reporting {
                let id = try ProjectID(project.id)
                let progress = try await RedisProgressStore.withStore(configuration: Settings.redis()) { store in
                    try await ProgressTracker(store: store).progress(of: id)
                }
                guard let progress else { throw TrackCommand.unknown(id, "show") }
                Console.line(try Console.json(State(progress)))
            }
        }
    }

    struct Watch: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Follow a project until it is done or failed.",
            discussion: "Exits with 0 when it is done, and with 1 when it has failed or the time is up.")
        @OptionGroup var project: Project
        @Option(help: "Give up after so many seconds.") var timeout: Double?
        @Flag(help: "Print a JSON line at each change instead of a bar.") var json = false

        func validate() throws {
            guard timeout.map({ $0 > 0 && $0 <= 31_536_000 }) ?? true else {
                throw ValidationError("--timeout is above 0, up to a year.")
            }
        }

        func run() async throws {
            try await Console.reporting {
                let id = try ProjectID(project.id)
                let last = try await RedisProgressStore.withStore(configuration: Settings.redis()) { store in
                    try await follow(id, ProgressTracker(store: store))
                }
                if last.status != .done { throw ExitCode(1) }
            }
        }

        private func follow(_ id: ProjectID, _ tracker: ProgressTracker) async throws -> ProjectProgress {
            try await withThrowingTaskGroup(of: ProjectProgress.self) { group in
                group.addTask { try await show(id, tracker) }
                if let timeout {
                    group.addTask {
                        try await Task.sleep(for: seconds(timeout))
                        throw EventsError(
                            .deadlineExceeded, "not over after \(timeout) s", operation: "watch \(id)")
                    }
                }
                defer { group.cancelAll() }
                guard let last = try await group.next() else { throw TrackCommand.unknown(id, "watch") }
                return last
            }
        }

        private func show(_ id: ProjectID, _ tracker: ProgressTracker) async throws -> ProjectProgress {
            let isBar = !json && Console.isErrorTerminal
            var last: ProjectProgress?
            for try await progress in tracker.watch(id) {
                if isBar {
                    let bar = ProgressBar(label: progress.status.rawValue, done: progress.done, total: progress.total)
                    ProgressBar.draw([bar], over: last == nil ? 0 : 1)
                    if progress.isOver { Console.line(try Console.json(State(progress))) }
                } else {
                    Console.line(try Console.json(State(progress)))
                }
                last = progress
            }
            guard let last, last.isOver else { throw CancellationError() }
            return last
        }
    }

    struct Reconcile: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Find what is wrong with a project or with all, and mend what is safe.",
            discussion: """
                Prints a JSON line for the project, or with --all for each where something was found: its findings, and \
                which of them were mended (with --dry-run: would be). pastTheLine (sealed, settled and not finished) is \
                finished, noTimeToLive and itemsWithoutProject get a time to live; finishPending is for a running finish \
                line to publish; memoryLost, corrupt and stuck are for people. Exits with 1 if anything is left for people.
                """)
        @Argument(help: "The project's id.") var id: String?
        @Flag(help: "All projects.") var all = false
        @Flag(help: "Mend nothing.") var dryRun = false
        @Option(help: "After how many hours without an update a project is stuck.") var stuckAfter: Double = 24

        struct Line: Encodable {
            var project_id: String
            var findings: [String]
            var mended: [String]
            var status: String?
            var idle_seconds: Int64?
        }

        func validate() throws {
            guard (id == nil) == all else { throw ValidationError("Give either a project or --all.") }
            guard stuckAfter > 0, stuckAfter <= 100_000 else { throw ValidationError("--stuck-after is above 0.") }
        }

        func run() async throws {
            try await Console.reporting {
                let isClean = try await RedisProgressStore.withStore(configuration: Settings.redis()) { store in
                    let tracker = ProgressTracker(store: store)
                    var isClean = true
                    func tell(_ project: ProjectID, _ found: ProjectFindings) throws {
                        let unmended: Set<ProjectFindings.Finding> = [.memoryLost, .corrupt, .stuck]
                        if !unmended.isDisjoint(with: found.findings) { isClean = false }
                        Console.line(
                            try Console.json(
                                Line(
                                    project_id: project.rawValue, findings: found.findings.map(\.description),
                                    mended: found.mended.map(\.description), status: found.progress?.status.rawValue,
                                    idle_seconds: found.idle?.components.seconds)))
                    }
                    if let id {
                        let project = try ProjectID(id)
                        let found = try await tracker.reconcile(
                            project, stuckAfter: seconds(stuckAfter * 3600), isDryRun: dryRun)
                        if found.progress == nil, found.findings.isEmpty {
                            throw TrackCommand.unknown(project, "reconcile")
                        }
                        try tell(project, found)
                    } else {
                        try await tracker.reconcileAll(
                            stuckAfter: seconds(stuckAfter * 3600), isDryRun: dryRun, tell)
                    }
                    return isClean
                }
                if !isClean { throw ExitCode(1) }
            }
        }
    }

    static func unknown(_ project: ProjectID, _ operation: String) -> EventsError {
        EventsError(.unknownProject, "no progress is kept for this project", operation: "\(operation) \(project)")
    }
}
