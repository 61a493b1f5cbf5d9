public import SMAPEvents

/// What a ``SMAPEvents/ProgressStore`` must answer, worked out from the facts that it was told: which items have ended and
/// how, and what was expected. It keeps no counters; they are counted anew each time.
struct StoreModel {
    enum Operation: CustomStringConvertible {
        case start(ProgressLayout)
        case restart(from: Int)
        case expect(Int, batch: String)
        case seal(Int?)
        case advance([(item: Int, outcome: ItemOutcome)], ProgressStage?, generation: Int?)
        case abandon(isCancelled: Bool)
        case settle
        /// Publishes and clears what is pending, as a finish line does.
        case sweep

        var description: String {
            switch self {
            case .start(let layout): "start \(layout)"
            case .restart(let generation): "restart from \(generation)"
            case .expect(let count, let batch): "expect \(count) in \(batch)"
            case .seal(let total): "seal \(total.map(String.init) ?? "")"
            case .advance(let items, let stage, let generation):
                "advance \(items.map { "\($0.item) \($0.outcome)" }) \(stage?.rawValue ?? "") "
                    + (generation.map { "generation \($0)" } ?? "")
            case .abandon(let isCancelled): isCancelled ? "cancel" : "fail"
            case .settle: "settle"
            case .sweep: "sweep"
            }
        }
    }

    struct Answer: Equatable {
        var verdict: ProgressUpdate.Verdict
        var items: [ProgressUpdate.Verdict] = []
    }

    private enum End { case done, failed, cancelled }

    private(set) var generation = 0
    private(set) var layout = ProgressLayout.flat
    private var batches: [String: Int] = [:]
    private var sealed: Int?
    private var items: [[Int: ItemOutcome]] = [[:], [:]]
    private var end: End?
    /// What was to be analysed when the project finished: later corrections do not change that.
    private var frozen: Int?
    /// The generations whose finish is pending.
    private(set) var pending: Set<Int> = []
    /// How often each generation was finished.
    private(set) var finishes: [Int: Int] = [:]

    private var total: Int { sealed ?? batches.values.reduce(0, +) }
    private func successes(_ stage: Int) -> Int { items[stage].values.count { $0 == .success } }

    /// The counters that should be read.
    var counters: [ProjectProgress.Counters] {
        layout.stages.indices.map { stage in
            ProjectProgress.Counters(
                total: stage == 0 ? total : frozen ?? successes(0), done: items[stage].count,
                errors: items[stage].count - successes(stage))
        }
    }

    var status: ProjectProgress.Status {
        switch end {
        case .done: .done
        case .failed, .cancelled: .failed
        case nil where sealed != nil: .processing
        case nil where batches.isEmpty: .initializing
        case nil: layout == .stages ? .processing : .crawling
        }
    }

    mutating func apply(_ operation: Operation) -> Answer {
        if case .start(let layout) = operation {
            guard generation == 0 else { return Answer(verdict: .exists) }
            self.layout = layout
            generation = 1
            return Answer(verdict: .started)
        }
        guard generation > 0 else { return Answer(verdict: .unknownProject) }
        let over: ProgressUpdate.Verdict = pending.contains(generation) ? .finishPending : .alreadyFinished
        switch operation {
        case .start: return Answer(verdict: .exists)
        case .restart(let from): return Answer(verdict: restart(from))
        case .expect(let count, let batch):
            if batches[batch] != nil { return Answer(verdict: .duplicate) }
            if end != nil { return Answer(verdict: .alreadyFinished) }
            if sealed != nil { return Answer(verdict: .alreadySealed) }
            batches[batch] = count
            return Answer(verdict: .expected)
        case .seal(let asked):
            let final = asked ?? total
            if end == .done {
                if final != total { return Answer(verdict: .alreadyFinished) }
                return Answer(verdict: over == .finishPending ? over : .duplicate)
            }
            if end != nil { return Answer(verdict: .alreadyFinished) }
            if final < items[0].count { return Answer(verdict: .totalBelowDone) }
            sealed = final
            return Answer(verdict: finishIfQuiet() ? .finished : .sealed)
        case .advance(let reports, let stage, let asked):
            if let asked, asked != generation { return Answer(verdict: asked < generation ? .stale : .unknownProject) }
            if stage != nil, layout != .stages { return Answer(verdict: .stageMismatch) }
            var verdicts = reports.map { report($0.item, $0.outcome, stage == .analyze ? 1 : 0, over) }
            if let last = verdicts.lastIndex(of: .counted), finishIfQuiet() {
                verdicts[last] = .finished
                return Answer(verdict: .finished, items: verdicts)
            }
            return Answer(verdict: verdicts.last ?? .unchanged, items: verdicts)
        case .abandon(let isCancelled):
            let wanted = isCancelled ? End.cancelled : .failed
            guard end == nil || end == wanted else { return Answer(verdict: .alreadyFinished) }
            end = wanted
            return Answer(verdict: isCancelled ? .cancelled : .failed)
        case .settle:
            // Nothing but a sibling drives a project past its line unnoticed.
            return Answer(verdict: end == .done ? over : .unchanged)
        case .sweep:
            pending = []
            return Answer(verdict: .unchanged)
        }
    }

    private mutating func restart(_ from: Int) -> ProgressUpdate.Verdict {
        if generation == from + 1 { return .exists }
        guard generation == from else { return generation > from ? .stale : .unknownProject }
        guard end != nil else { return .notFinished }
        let old = self
        self = StoreModel()
        (layout, generation, pending, finishes) = (old.layout, from + 1, old.pending, old.finishes)
        return .restarted
    }

    private mutating func report(
        _ item: Int, _ outcome: ItemOutcome, _ stage: Int, _ over: ProgressUpdate.Verdict
    ) -> ProgressUpdate.Verdict {
        if items[stage][item] == .failure, outcome == .success {
            items[stage][item] = .success
            return .reclassified
        }
        if items[stage][item] != nil { return end == .done ? over : .duplicate }
        if let sealed {
            let isCrawled = items[0].count >= sealed
            let limit = stage == 0 || !isCrawled ? sealed : counters[1].total
            guard items[stage].count < limit, item < sealed else { return .unexpectedItem }
        }
        items[stage][item] = outcome
        return .counted
    }

    private mutating func finishIfQuiet() -> Bool {
        guard end == nil, sealed != nil, counters.allSatisfy({ $0.done >= $0.total }) else { return false }
        frozen = successes(0)
        end = .done
        pending.insert(generation)
        finishes[generation, default: 0] += 1
        return true
    }
}

extension StoreContract {
    /// Takes a project through a random sequence of operations, repeated ones and lost replies included, and compares each
    /// answer, and the progress after it, with what a reference model says; then brings it to its end.
    ///
    /// - Parameters:
    ///   - seed: Gives the same sequence again, whatever the store.
    ///   - steps: How many operations.
    /// - Throws: ``ContractViolation``, with the seed and the operations up to the difference.
    public static func walk(_ store: any ProgressStore, seed: UInt64, steps: Int = 30) async throws {
        var random = SplitMix(state: seed)
        let project = try ProjectID("proj_walk_\(EventID().rawValue)")
        var model = StoreModel()
        var trace: [String] = []
        /// The events published, by generation.
        var published: [Int: Set<EventID>] = [:]
        func deadline() -> ContinuousClock.Instant { .now + .seconds(20) }

        func perform(_ operation: StoreModel.Operation) async throws -> ProgressUpdate? {
            switch operation {
            case .start(let layout):
                return try await store.start(project, layout: layout, finishEventID: EventID(), deadline: deadline())
            case .restart(let from):
                return try await store.restart(project, from: from, finishEventID: EventID(), deadline: deadline())
            case .expect(let count, let batch):
                return try await store.expect(count, of: project, batch: batch, deadline: deadline())
            case .seal(let total):
                return try await store.seal(project, total: total, finishEventID: EventID(), deadline: deadline())
            case .advance(let items, let stage, let generation):
                let reports = items.map { ItemReport(.index($0.item), $0.outcome) }
                return try await store.advance(
                    project, AdvanceRequest(reports, stage: stage, generation: generation), finishEventID: EventID(),
                    deadline: deadline())
            case .abandon(let isCancelled):
                return try await store.abandon(
                    project, isCancelled: isCancelled, reason: "why", deadline: deadline())
            case .settle: return try await store.settle(project, finishEventID: EventID(), deadline: deadline())
            case .sweep:
                for finish in try await store.pendingFinishes(of: project, deadline: deadline()) {
                    published[finish.generation, default: []].insert(finish.eventID)
                    _ = try await store.clear(finish, deadline: deadline())
                }
                return nil
            }
        }
        func step(_ operation: StoreModel.Operation) async throws {
            trace.append(operation.description)
            let expected = model.apply(operation)
            let update = try await perform(operation)
            if let update {
                try ContractViolation.equal(
                    StoreModel.Answer(verdict: update.verdict, items: update.items), expected, "the answer")
            }
            if update == nil || [.finished, .restarted, .cancelled].contains(expected.verdict) {
                let pending = try await store.pendingFinishes(of: project, deadline: deadline())
                try ContractViolation.equal(Set(pending.map(\.generation)), model.pending, "pending finishes")
            }
            guard model.generation > 0 else { return }
            var known = update?.progress
            // What is read must be what was answered.
            if known == nil || random.next(4) == 0 {
                known = try await store.progress(of: project, deadline: deadline())
            }
            guard let progress = known else { throw ContractViolation(description: "the project is gone") }
            try ContractViolation.equal(progress.stages, model.counters, "counters")
            try ContractViolation.equal(progress.status, model.status, "status")
            try ContractViolation.equal(progress.generation, model.generation, "generation")
            for stage in progress.stages {
                try ContractViolation.require(0 <= stage.errors && stage.errors <= stage.done, "0 ≤ errors ≤ done")
            }
            if progress.isSealed {
                try ContractViolation.require(progress.stages[0].done <= progress.stages[0].total, "done ≤ total")
            }
        }
        do {
            for _ in 0..<steps {
                let operation = StoreModel.Operation.random(&random, generation: model.generation)
                try await step(operation)
                // Its reply was lost, and it is done again.
                if random.next(5) == 0 { try await step(operation) }
            }
            // To the end: everything sealed and settled.
            try await step(.start(.flat))
            if model.status == .failed { try await step(.restart(from: model.generation)) }
            if model.status != .done {
                try await step(.seal(model.counters[0].done + 1))
                let stages: [ProgressStage?] = model.layout.stages
                for stage in stages {
                    for item in 0..<StoreModel.Operation.itemCount {
                        try await step(.advance([(item, .success)], stage, generation: nil))
                    }
                }
                if model.status != .done { try await step(.seal(model.counters[0].done)) }
            }
            try ContractViolation.equal(model.status, .done, "the end")
            try await step(.sweep)
            try ContractViolation.require(model.finishes.values.allSatisfy { $0 == 1 }, "one finish in each generation")
            try ContractViolation.equal(Set(published.keys), Set(model.finishes.keys), "finishes published")
            try ContractViolation.require(
                published.values.allSatisfy { $0.count == 1 }, "one event in each generation")
            try ContractViolation.equal(
                published.values.reduce(into: Set()) { $0.formUnion($1) }.count, published.count, "events differ")
        } catch let violation as ContractViolation {
            throw ContractViolation(
                description: "seed \(seed): \(violation.description), after \(trace.joined(separator: "; "))")
        }
    }
}

extension StoreModel.Operation {
    static let itemCount = 5

    static func random(_ random: inout SplitMix, generation: Int) -> Self {
        switch random.next(20) {
        case 0, 1: return .start([.flat, .errorsApart, .stages][random.next(3)])
        case 2: return .restart(from: max(0, generation + random.next(3) - 1))
        case 3, 4: return .expect(random.next(4), batch: "b\(random.next(3))")
        case 5, 6: return .seal(random.next(3) == 0 ? nil : random.next(itemCount + 1))
        case 7: return .abandon(isCancelled: random.next(2) == 0)
        case 8: return .settle
        case 9: return .sweep
        default:
            let items = (0...(random.next(3) == 0 ? random.next(4) : 0)).map { _ in
                (item: random.next(itemCount), outcome: random.next(3) == 0 ? ItemOutcome.failure : .success)
            }
            let stage: ProgressStage? = [nil, nil, .crawl, .analyze][random.next(4)]
            let asked: Int? = random.next(5) == 0 ? max(1, generation + random.next(3) - 1) : nil
            return .advance(items, stage, generation: asked)
        }
    }
}

/// A small generator of random numbers that a seed repeats (SplitMix64).
struct SplitMix: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// From 0 to below `bound`.
    mutating func next(_ bound: Int) -> Int { Int(next(upperBound: UInt64(bound))) }
}
