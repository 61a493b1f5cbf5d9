import SMAPEventsTesting
import ServiceLifecycle
import ServiceLifecycleTestKit
import Synchronization
import Testing

@testable import SMAPEvents

private let queue: QueueName = "test.ending"

/// How subscriptions and watches end when their end comes at a bad moment.
@Suite(.timeLimit(.minutes(5))) struct EndingTests {
    /// Opened once; until then whoever comes waits, cancelled or not.
    private final class Gate: Sendable {
        private let state = Mutex<(isOpen: Bool, waiting: [CheckedContinuation<Void, Never>])>((false, []))

        func pass() async {
            await withCheckedContinuation { continuation in
                let isOpen = state.withLock { state in
                    if !state.isOpen { state.waiting.append(continuation) }
                    return state.isOpen
                }
                if isOpen { continuation.resume() }
            }
        }

        func open() {
            let waiting = state.withLock { state in
                state.isOpen = true
                defer { state.waiting = [] }
                return state.waiting
            }
            for continuation in waiting { continuation.resume() }
        }
    }

    private func subscriber(
        _ transport: any EventTransport, inbox: (any Inbox)? = nil,
        _ handler: @escaping @Sendable () async throws -> HandlerOutcome
    ) -> EventSubscriber {
        var router = EventRouter()
        router.on(UserRegistered.self) { _ in try await handler() }
        return EventSubscriber(
            transport: transport, subscription: EventSubscription(queue: queue, bindings: ["#"]), router: router,
            inbox: inbox)
    }

    @Test func `at shutdown while the broker is away the handlers at work may finish`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let (started, mayEnd) = (Gate(), Gate())
            let isAway = Atomic<Bool>(false)
            let wasCancelled = Atomic<Bool>(false)
            let transport = InterceptedTransport(
                broker: harness.broker,
                consuming: {
                    if isAway.load(ordering: .relaxed) {
                        throw EventsError(.connectionFailed, "the broker is away", operation: "test")
                    }
                })
            let subscriber = subscriber(transport) {
                started.open()
                await mayEnd.pass()
                wasCancelled.store(Task.isCancelled, ordering: .relaxed)
                return .acknowledge
            }
            try await subscriber.declare()
            try await harness.publisher.publish(UserRegistered(userID: "1"))
            try await testGracefulShutdown { trigger in
                try await withThrowingTaskGroup(of: Void.self) { group in
                    group.addTask { try await subscriber.run() }
                    await started.pass()
                    isAway.store(true, ordering: .relaxed)
                    harness.broker.interrupt()
                    while await subscriber.health().problems.first?.contains("the broker is away") != true {
                        await Task.yield()
                    }
                    trigger.triggerGracefulShutdown()
                    while await subscriber.health().problems.first?.contains("shutting down") != true {
                        await Task.yield()
                    }
                    mayEnd.open()
                    try await group.waitForAll()
                }
            }
            let isCutShort = wasCancelled.load(ordering: .relaxed)
            #expect(!isCutShort)
        }
    }

    @Test func `a run that is cancelled waits until its handlers have noticed`() async throws {
        try await EventsTestHarness.withHarness { harness in
            let started = Gate()
            let hasEnded = Atomic<Bool>(false)
            let subscriber = subscriber(harness.broker) {
                started.open()
                do { try await Task.sleep(for: .seconds(600)) } catch {
                    // It tidies up first.
                    for _ in 0..<1_000 { await Task.yield() }
                    hasEnded.store(true, ordering: .relaxed)
                    throw error
                }
                return .acknowledge
            }
            try await subscriber.declare()
            try await harness.publisher.publish(UserRegistered(userID: "1"))
            let run = Task { try await subscriber.run() }
            await started.pass()
            let start = ContinuousClock.now
            run.cancel()
            _ = await run.result
            // A second is what they have to notice; on a busy machine that may be too little.
            let isOver = hasEnded.load(ordering: .relaxed)
            #expect(isOver || .now - start >= .seconds(1))
        }
    }

    enum Step: CaseIterable, Sendable {
        case claim, complete, release
    }

    /// Does one of its steps slowly, and has its caller's task not know of that step if it is cancelled meanwhile, as a
    /// store across a network does.
    private struct SlowInbox: Inbox {
        let inbox: InMemoryInbox
        let slow: Step
        let asked: Gate
        let mayAnswer: Gate

        private func take(_ step: Step) async throws {
            guard step == slow else { return }
            asked.open()
            await mayAnswer.pass()
            try Task.checkCancellation()
        }
        func claim(
            _ entry: InboxEntry, lease: Duration, deadline: ContinuousClock.Instant
        ) async throws -> InboxClaim {
            let claim = try await inbox.claim(entry, lease: lease, deadline: deadline)
            try await take(.claim)
            return claim
        }
        func complete(_ entry: InboxEntry, timeToLive: Duration, deadline: ContinuousClock.Instant) async throws {
            try await take(.complete)
            try await inbox.complete(entry, timeToLive: timeToLive, deadline: deadline)
        }
        func release(_ entry: InboxEntry, token: String, deadline: ContinuousClock.Instant) async throws {
            try await take(.release)
            try await inbox.release(entry, token: token, deadline: deadline)
        }
    }

    @Test(arguments: Step.allCases)
    func `a cancellation while the inbox is asked or told leaves no lease behind, and no event without its mark`(
        slow: Step
    ) async throws {
        try await EventsTestHarness.withHarness { harness in
            let (asked, mayAnswer) = (Gate(), Gate())
            let inbox = SlowInbox(inbox: harness.inbox, slow: slow, asked: asked, mayAnswer: mayAnswer)
            let subscriber = subscriber(harness.broker, inbox: inbox) {
                slow == .release ? .deadLetter(reason: "test") : .acknowledge
            }
            try await subscriber.declare()
            let event = try await harness.publisher.publish(UserRegistered(userID: "1")).eventID
            let run = Task { try await subscriber.run() }
            await asked.pass()
            run.cancel()
            mayAnswer.open()
            _ = await run.result
            // On a busy machine a second is not enough for the handler's task to end.
            let entry = InboxEntry(scope: queue.rawValue, eventID: event, body: [])
            var claim: InboxClaim
            repeat {
                claim = try await harness.inbox.claim(entry, lease: .seconds(60), deadline: .now + .seconds(60))
                if case .busy = claim { try await Task.sleep(for: .milliseconds(1)) } else { break }
            } while true
            if case .granted = claim { #expect(slow != .complete) } else { #expect(slow == .complete) }
        }
    }

    @Test func `a request that is lost between its confirm and the news of it ends, as what it is`() async throws {
        let lost = EventsError(.connectionLost, "lost", operation: "test")
        let closed = EventsError(.closed, "closed", operation: "test")
        let unknown = EventsError(.unknownOutcome, "not confirmed", operation: "test")
        func ending(_ publish: @escaping @Sendable (ReplyRegistry) throws -> Bool) async -> EventsError.Code? {
            let registry = ReplyRegistry()
            do {
                _ = try await registry.request("id", deadline: .now + .seconds(3600)) { try publish(registry) }
                return nil
            } catch {
                return (error as? EventsError)?.code
            }
        }
        let afterConfirm = await ending { registry in
            registry.sent("id")
            registry.connectionLost(lost)
            return true
        }
        #expect(afterConfirm == .connectionLost)
        let atTheEnd = await ending { registry in
            registry.connectionLost(closed, isFinal: true)
            return true
        }
        #expect(atTheEnd == .closed)
        // What became of the request is known to whoever publishes it.
        let unconfirmed = await ending { registry in
            registry.connectionLost(closed, isFinal: true)
            throw unknown
        }
        #expect(unconfirmed == .unknownOutcome)
    }

    @Test func `while one delivery is tried, what was in hand before says nothing`() {
        let breaker = CircuitBreaker(CircuitBreakerPolicy(window: 1), Stopwatch(ContinuousClock()))
        breaker.record(failure: true, isTrial: false)
        #expect(breaker.phase == .open)
        breaker.beginTrial()
        for failure in [false, true] {
            breaker.record(failure: failure, isTrial: false)
            #expect(breaker.phase == .trial)
        }
        breaker.record(failure: false, isTrial: true)
        #expect(breaker.phase == .closed)
    }

    @Test func `a delivery is not taken by a task that is cancelled`() async throws {
        let buffer = DeliveryBuffer()
        buffer.deliver(
            InboundDelivery(
                tag: 1, exchange: "", routingKey: "", isRedelivered: false, properties: MessageProperties(), body: []))
        let mayAsk = Gate()
        let asker = Task {
            await mayAsk.pass()
            return try await buffer.next()
        }
        asker.cancel()
        mayAsk.open()
        await #expect(throws: CancellationError.self) { try await asker.value }
        #expect(try await buffer.next()?.tag == 1)
    }

    @Test func `a watch is not ended by the last look of the one before it`() async throws {
        let project = try ProjectID("proj_watched")
        let (asked, mayAnswer) = (Gate(), Gate())
        let looks = Atomic<Int>(0)
        let hub = ProgressHub(interval: .milliseconds(1)) { project in
            let look = looks.add(1, ordering: .relaxed).newValue
            if look == 1 {
                asked.open()
                await mayAnswer.pass()
            }
            return ProjectProgress(
                project: project, status: look == 1 ? .done : .processing,
                stages: [.init(total: 9, done: look, errors: 0)], isSealed: true)
        }
        let first = Task { for try await _ in hub.watch(project) {} }
        await asked.pass()
        first.cancel()
        _ = await first.result
        var updates = hub.watch(project).makeAsyncIterator()
        #expect(try await updates.next()?.status == .processing)
        mayAnswer.open()
        // However often it looks from now on, it is its own looks that it sees.
        for _ in 0..<20 { #expect(try await updates.next()?.status == .processing) }
    }
}
