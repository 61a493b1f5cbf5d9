/// By how much a call ended later than its deadline, `limit` from now; zero if it did not. What the machine itself is late by
/// does not count: a task that sleeps to the same moment is the measure.
func overrun(_ limit: Duration, _ call: () async throws -> Void) async rethrows -> Duration {
    let deadline = ContinuousClock.now + limit
    async let awake = {
        try? await Task.sleep(until: deadline)
        return ContinuousClock.now
    }()
    try await call()
    let end = ContinuousClock.now
    return end > deadline ? end - max(deadline, await awake) : .zero
}
