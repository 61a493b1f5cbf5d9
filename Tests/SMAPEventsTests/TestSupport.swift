import Synchronization
import Testing

/// What handlers have done, in its order.
final class Log: Sendable {
    private let values = Mutex<[String]>([])
    func add(_ value: String) { values.withLock { $0.append(value) } }
    var all: [String] { values.withLock { $0 } }
}

/// Waits until something is so that only other tasks bring about; time on the manual clock stands still meanwhile.
func until(_ condition: @Sendable () async -> Bool) async throws {
    let end = ContinuousClock.now + .seconds(120)
    while !(await condition()) {
        try #require(ContinuousClock.now < end, "it never happened")
        await Task.yield()
    }
}
