/// A clock of any kind, as the time since it was first looked at: so that tests pass time by hand.
package struct Stopwatch: Sendable {
    /// How much time has passed.
    package let elapsed: @Sendable () -> Duration
    /// Waits until so much time has passed; throws `CancellationError` when the task is cancelled.
    package let sleepUntil: @Sendable (_ elapsed: Duration) async throws -> Void

    package init(_ clock: some Clock<Duration>) {
        let start = clock.now
        elapsed = { start.duration(to: clock.now) }
        sleepUntil = { try await clock.sleep(until: start.advanced(by: $0), tolerance: nil) }
    }
}
