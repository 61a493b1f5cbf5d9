import Foundation
import SMAPEvents
import Synchronization

/// The demo's services and observers, and what they have seen.
struct Choreography: Sendable {
    struct Summary: Encodable, Sendable {
        var published: Int
        var confirmed: Int
        var legacy_delivered: Int
        var topic_delivered: Int
        var observed: Int
        var duplicates_injected: Int
        var total: Int
        var done: Int
        var errors: Int
        var finish_events: Int
        var finish_event_id: String?
        var elapsed_seconds: Double

        /// Not part of the summary: what the numbers must be.
        var expectedItems = 0
        var expectedErrors = 0
        var expectedMails = 0
        var status = ""

        enum CodingKeys: String, CodingKey {
            case published, confirmed, legacy_delivered, topic_delivered, observed, duplicates_injected, total, done
            case errors, finish_events, finish_event_id, elapsed_seconds
        }

        var brokenInvariants: [String] {
            [
                (confirmed == published, "confirmed \(confirmed) == published \(published)"),
                (observed == published, "observed on smap.events \(observed) == published \(published)"),
                (legacy_delivered == expectedMails, "legacy_delivered \(legacy_delivered) == mails \(expectedMails)"),
                (topic_delivered == expectedMails, "topic_delivered \(topic_delivered) == mails \(expectedMails)"),
                (total == expectedItems, "total \(total) == items \(expectedItems)"),
                (done == total, "done \(done) == total \(total)"),
                (errors == expectedErrors, "errors \(errors) == items made to fail \(expectedErrors)"),
                (finish_events == 1, "finish_events \(finish_events) == 1"),
                (status == "DONE", "status \(status) == DONE"),
            ].filter { !$0.0 }.map(\.1)
        }

        var table: String {
            let rows: [(String, String)] = [
                ("events published", "\(published)"), ("  confirmed", "\(confirmed)"),
                ("  seen on smap.events", "\(observed)"), ("mails by smap.events", "\(topic_delivered)"),
                ("mails by the old fanout", "\(legacy_delivered)"),
                ("messages doubled on purpose", "\(duplicates_injected)"), ("items", "\(total)"),
                ("  done", "\(done)"), ("  of them failed", "\(errors)"), ("job.completed", "\(finish_events)"),
                ("  event id", finish_event_id ?? "none"),
                ("seconds", String(format: "%.1f", elapsed_seconds)),
            ]
            return rows.map { $0.0.padding(toLength: 30, withPad: " ", startingAt: 0) + $0.1 }.joined(separator: "\n")
        }
    }

    /// Counts events as they go out: what was asked for, and what the broker confirmed.
    private struct CountingPublisher: EventPublishing {
        let publisher: any EventPublishing
        let counts: Counts

        func declareExchanges() async throws { try await publisher.declareExchanges() }

        func publish<E: SMAPEvent>(_ event: E, options: PublishOptions) async throws -> PublishReceipt {
            counts.published.add(1, ordering: .relaxed)
            let receipt = try await publisher.publish(event, options: options)
            counts.confirmed.add(1, ordering: .relaxed)
            return receipt
        }

        func publish(_ event: UntypedEvent, options: PublishOptions) async throws -> PublishReceipt {
            counts.published.add(1, ordering: .relaxed)
            let receipt = try await publisher.publish(event, options: options)
            counts.confirmed.add(1, ordering: .relaxed)
            return receipt
        }
    }

    final class Counts: Sendable {
        let published = Atomic<Int>(0)
        let confirmed = Atomic<Int>(0)
        let collected = Atomic<Int>(0)
        let handled = Atomic<Int>(0)
        let observed = Atomic<Int>(0)
        let legacyMails = Atomic<Int>(0)
        let topicMails = Atomic<Int>(0)
        let notified = Atomic<Int>(0)
        let finishes = Mutex<[EventID]>([])
    }

    private let services: any EventTransport
    private let observers: any EventTransport
    private let store: any ProgressStore
    private let items: Int
    private let workers: Int
    private let mails: Int
    private let project: ProjectID
    private let run: String
    private let counts = Counts()

    init(
        services: any EventTransport, observers: any EventTransport, store: any ProgressStore, items: Int, workers: Int
    ) throws {
        self.services = services
        self.observers = observers
        self.store = store
        self.items = items
        self.workers = workers
        mails = max(10, items / 100)
        run = String(EventID().rawValue.suffix(8))
        project = try ProjectID("proj_demo_\(run)")
    }

    private static func fails(_ index: Int) -> Bool { index % 50 == 0 }
    private static func isDoubled(_ index: Int) -> Bool { index % 20 == 7 }
    private var doubled: Int { (0..<items).count(where: Self.isDoubled) }

    func run() async throws -> Summary {
        let start = ContinuousClock.now
        let configuration = PublisherConfiguration(service: "demo")
        let publisher = CountingPublisher(
            publisher: DualPublisher(transport: services, configuration: configuration, phase: .dual), counts: counts)
        try await publisher.declareExchanges()
        let finishLine = FinishLine(
            store: store, publisher: publisher, configuration: FinishLine.Configuration(interval: .seconds(1)))
        let tracker = ProgressTracker(store: store, finishLine: finishLine)

        let everything = try await observerQueue("observer", bindings: ["#"])
        let mailbox = try await observerQueue("smtp_send_email_v2", bindings: ["email.#"])
        let legacy = try await legacyQueue()
        let subscribers = [
            try subscriber("collector", ["project.created"], concurrency: 1, collector(publisher, tracker)),
            try subscriber("analytics", ["data.collected"], concurrency: workers, analytics(publisher, tracker)),
            try subscriber("notification", ["job.completed"], concurrency: 1, notification()),
        ]
        for subscriber in subscribers { try await subscriber.declare() }

        // True from the task that tells the story; the others run until they are cancelled, or fail.
        try await withThrowingTaskGroup(of: Bool.self) { group in
            defer { group.cancelAll() }
            func alongside(_ body: @escaping @Sendable () async throws -> Void) {
                group.addTask {
                    try await body()
                    return false
                }
            }
            for subscriber in subscribers { alongside { try await subscriber.run() } }
            alongside { await finishLine.run() }
            alongside { try await observe(everything, observed) }
            alongside { try await observe(mailbox) { _ in counts.topicMails.add(1, ordering: .relaxed) } }
            alongside { try await observe(legacy, legacyMail) }
            group.addTask {
                try await identity(publisher)
                try await tracker.start(project)
                try await publisher.publish(
                    ProjectCreated(projectID: project, brandName: "VinFast", keywords: ["VF3", "VF8"]))
                try await untilQuiet()
                return true
            }
            while let isOver = try await group.next(), !isOver {}
        }
        return try await summary(tracker, start)
    }

    // MARK: Services

    private func identity(_ publisher: some EventPublishing) async throws {
        for number in 0..<mails {
            try await publisher.publish(
                EmailVerificationRequested(
                    recipient: "user\(number)@example.com", subject: "Mã xác nhận", body: "<p>\(100_000 + number)</p>"))
            if number % 5 == 0 {
                try await publisher.publish(
                    SubscriptionCreated(subscriptionID: UUID().uuidString.lowercased(), userID: "user-\(number)"))
            }
        }
    }

    private func collector(_ publisher: some EventPublishing, _ tracker: ProgressTracker) -> EventRouter {
        var router = EventRouter()
        router.on(ProjectCreated.self) { delivery in
            guard let project = delivery.event.projectID else { return .deadLetter(reason: "no project") }
            try await tracker.expect(items, of: project, batch: "all")
            try await withThrowingTaskGroup(of: Void.self) { group in
                for index in 0..<items {
                    if index >= 256 { try await group.next() }
                    group.addTask {
                        let event = DataCollected(
                            projectID: project, jobID: "\(project)-\(index)", platform: "TIKTOK",
                            minioPath: "crawl-results/\(project)/\(index).json", contentCount: 1, batchIndex: index,
                            totalBatches: items)
                        let receipt = try await publisher.publish(event, options: PublishOptions())
                        if Self.isDoubled(index) {
                            try await publisher.publish(event, options: PublishOptions(eventID: receipt.eventID))
                        }
                        counts.collected.add(1, ordering: .relaxed)
                    }
                }
                try await group.waitForAll()
            }
            try await tracker.seal(project)
            return .acknowledge
        }
        return router
    }

    private func analytics(_ publisher: some EventPublishing, _ tracker: ProgressTracker) -> EventRouter {
        var router = EventRouter()
        router.on(DataCollected.self) { delivery in
            guard let project = delivery.event.projectID, let index = delivery.event.batchIndex else {
                return .deadLetter(reason: "no batch")
            }
            let isFailure = Self.fails(index)
            try await publisher.publish(
                AnalysisFinished(
                    projectID: project, itemID: delivery.event.jobID, status: isFailure ? .error : .success))
            try await tracker.advance(project, item: .index(index), outcome: isFailure ? .failure : .success)
            counts.handled.add(1, ordering: .relaxed)
            return .acknowledge
        }
        return router
    }

    private func notification() -> EventRouter {
        var router = EventRouter()
        router.on(JobCompleted.self) { delivery in
            if delivery.event.projectID == project { counts.notified.add(1, ordering: .relaxed) }
            return .acknowledge
        }
        return router
    }

    private func subscriber(
        _ name: String, _ bindings: [TopicPattern], concurrency: Int, _ router: EventRouter
    ) throws -> EventSubscriber {
        EventSubscriber(
            transport: services,
            subscription: EventSubscription(
                queue: try queue(name), bindings: bindings, prefetch: max(64, concurrency * 4), concurrency: concurrency
            ),
            router: router)
    }

    // MARK: Observers

    private func queue(_ name: String) throws -> QueueName { try QueueName("demo.\(run).\(name)") }

    private func observerQueue(_ name: String, bindings: [String]) async throws -> QueueName {
        let queue = try queue(name)
        let deadline = ContinuousClock.now + .seconds(30)
        try await observers.declare(QueueDeclaration(queue), deadline: deadline)
        for pattern in bindings {
            try await observers.bind(queue, to: ExchangeName.events, routingKey: pattern, deadline: deadline)
        }
        return queue
    }

    private func legacyQueue() async throws -> QueueName {
        let queue = try queue("smtp_send_email")
        let deadline = ContinuousClock.now + .seconds(30)
        try await observers.declare(QueueDeclaration(queue, kind: .classic), deadline: deadline)
        try await observers.bind(queue, to: ExchangeName.legacyEmail, routingKey: "", deadline: deadline)
        return queue
    }

    private func observe(_ queue: QueueName, _ body: @escaping @Sendable (InboundDelivery) throws -> Void) async throws
    {
        try await observers.withConsumer(on: queue, prefetch: 500, deadline: .now + .seconds(30)) { consumer in
            while let delivery = try await consumer.next() {
                try body(delivery)
                try consumer.settle(delivery, .acknowledge)
            }
        }
    }

    private func observed(_ delivery: InboundDelivery) throws {
        let envelope = try EventEnvelope(parsing: delivery.body, routingKey: delivery.routingKey)
        if delivery.routingKey == JobCompleted.routingKey.rawValue, envelope.projectID == project {
            counts.finishes.withLock { $0.append(envelope.eventID) }
        }
        counts.observed.add(1, ordering: .relaxed)
    }

    private func legacyMail(_ delivery: InboundDelivery) throws {
        _ = try LegacyEmailMessage(parsing: delivery.body)
        counts.legacyMails.add(1, ordering: .relaxed)
    }

    // MARK: The end

    /// Returns when the project is announced, every copy is handled, and the observers have seen everything.
    private func untilQuiet() async throws {
        var drawn = 0
        var last = -1
        var lastChange = ContinuousClock.now
        while true {
            let handled = counts.handled.load(ordering: .relaxed)
            let observed = counts.observed.load(ordering: .relaxed)
            let published = counts.published.load(ordering: .relaxed)
            let seen = counts.legacyMails.load(ordering: .relaxed) + counts.topicMails.load(ordering: .relaxed)
            ProgressBar.draw(
                [
                    ProgressBar(label: "collected", done: counts.collected.load(ordering: .relaxed), total: items),
                    ProgressBar(label: "analysed", done: handled, total: items + doubled),
                    ProgressBar(label: "observed", done: observed, total: published),
                ], over: drawn)
            drawn = 3
            if counts.notified.load(ordering: .relaxed) > 0, handled >= items + doubled, observed >= published,
                seen >= 2 * mails,
                // The event may be seen before its publisher has cleared the finish: let it.
                try await store.pendingFinishes(of: project, deadline: .now + .seconds(10)).isEmpty
            {
                return
            }
            let sum = handled + observed + seen
            if sum != last {
                last = sum
                lastChange = .now
            } else if .now - lastChange > .seconds(60) {
                Console.error("nothing has moved for a minute")
                return
            }
            // Bars are drawn ten times a second; the wait is for people's eyes.
            try await Task.sleep(for: .milliseconds(100))
        }
    }

    private func summary(_ tracker: ProgressTracker, _ start: ContinuousClock.Instant) async throws -> Summary {
        let progress = try await tracker.progress(of: project)
        let finishes = counts.finishes.withLock { $0 }
        let elapsed = (ContinuousClock.now - start).components
        return Summary(
            published: counts.published.load(ordering: .relaxed),
            confirmed: counts.confirmed.load(ordering: .relaxed),
            legacy_delivered: counts.legacyMails.load(ordering: .relaxed),
            topic_delivered: counts.topicMails.load(ordering: .relaxed),
            observed: counts.observed.load(ordering: .relaxed), duplicates_injected: doubled,
            total: progress?.total ?? 0, done: progress?.done ?? 0, errors: progress?.errors ?? 0,
            finish_events: finishes.count, finish_event_id: finishes.first?.rawValue,
            elapsed_seconds: (Double(elapsed.seconds) * 100 + Double(elapsed.attoseconds / 10_000_000_000_000_000))
                .rounded()
                / 100,
            expectedItems: items, expectedErrors: (0..<items).count(where: Self.fails), expectedMails: mails,
            status: progress?.status.rawValue ?? "")
    }
}
