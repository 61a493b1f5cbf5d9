/// Pauses between attempts: exponential, with full jitter ("Exponential Backoff And Jitter", AWS Architecture Blog), so
/// that a fleet of services does not return as one.
package struct Backoff: Sendable {
    package var first: Duration
    package var longest: Duration

    package init(first: Duration, longest: Duration) {
        self.first = first
        self.longest = longest
    }

    /// How long to wait after so many failures in a row, the first being 1.
    package func delay(after failures: Int) -> Duration {
        var limit = first
        for _ in 1..<max(1, min(failures, 32)) where limit < longest { limit = limit * 2 }
        // Not quite nothing: who refuses at once must not be asked without a pause.
        return max(.milliseconds(10), min(limit, longest) * Double.random(in: 0...1))
    }
}
