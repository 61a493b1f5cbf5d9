import Foundation
import Histogram

/// What one run cost.
struct Measurement: Sendable {
    let messages: Int
    let seconds: Double
    let cpuSeconds: Double
    /// Nanoseconds each message took, where they were measured.
    let latencies: [UInt64]

    var rate: Double { Double(messages) / seconds }
    var cpuPerMessage: Double { cpuSeconds * 1e6 / Double(messages) }

    /// Measures `body` with this process's CPU time, all threads and the kernel's share included.
    static func of(_ messages: Int, _ body: () async throws -> [UInt64]) async rethrows -> Measurement {
        let cpu = cpuTime()
        let start = ContinuousClock.now
        let latencies = try await body()
        let elapsed = (ContinuousClock.now - start).components
        return Measurement(
            messages: messages, seconds: Double(elapsed.seconds) + Double(elapsed.attoseconds) / 1e18,
            cpuSeconds: cpuTime() - cpu, latencies: latencies)
    }

    private static func ownUsage() -> rusage {
        var usage = rusage()
        #if canImport(Glibc)
        getrusage(RUSAGE_SELF.rawValue, &usage)
        #else
        getrusage(RUSAGE_SELF, &usage)
        #endif
        return usage
    }

    private static func cpuTime() -> Double {
        let usage = ownUsage()
        return Double(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
            + Double(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6
    }

    /// The most memory this process has had, in MiB.
    static var peakMemory: Double {
        #if os(Linux)
        return Double(ownUsage().ru_maxrss) / 1024
        #else
        return Double(ownUsage().ru_maxrss) / 1_048_576
        #endif
    }
}

struct Report: Encodable {
    var what: String
    var messages: Int
    var rate: Double
    var cpu_us_per_message: Double
    var p50_us: Double?
    var p95_us: Double?
    var p99_us: Double?
    var max_us: Double?
    var peak_memory_mib: Double

    init(_ what: String, _ measurement: Measurement) {
        self.what = what
        messages = measurement.messages
        rate = measurement.rate.rounded()
        cpu_us_per_message = (measurement.cpuPerMessage * 100).rounded() / 100
        peak_memory_mib = (Measurement.peakMemory * 10).rounded() / 10
        guard !measurement.latencies.isEmpty else { return }
        var histogram = Histogram<UInt64>(numberOfSignificantValueDigits: .three)
        for latency in measurement.latencies { histogram.record(latency) }
        func microseconds(_ percentile: Double) -> Double {
            (Double(histogram.valueAtPercentile(percentile)) / 100).rounded() / 10
        }
        p50_us = microseconds(50)
        p95_us = microseconds(95)
        p99_us = microseconds(99)
        max_us = microseconds(100)
    }

    var text: String {
        var text = "\(what.padding(toLength: 20, withPad: " ", startingAt: 0)) \(Int(rate)) /s  "
        text += "\(cpu_us_per_message) µs CPU each"
        if let p50_us, let p95_us, let p99_us, let max_us {
            text += "  p50 \(p50_us)  p95 \(p95_us)  p99 \(p99_us)  max \(max_us) µs"
        }
        return text + "  peak \(peak_memory_mib) MiB"
    }
}

struct Comparison: Encodable {
    var what: String
    var peer: String
    var ratios: [Double]
    var median_ratio: Double
}

/// Measures once; or peers, typed, peers, five times, and prints the median of typed over the mean of each peer around it.
func compare(
    _ options: BenchCommand.Options, _ what: String, typed: () async throws -> Measurement,
    raw peers: [(name: String, run: () async throws -> Measurement)]
) async throws {
    func show(_ name: String, _ measurement: Measurement) throws -> Measurement {
        let report = Report(name, measurement)
        try options.emit(report, report.text)
        return measurement
    }
    func measurePeers() async throws -> [Measurement] {
        var all: [Measurement] = []
        for peer in peers { all.append(try show("\(what) \(peer.name)", try await peer.run())) }
        return all
    }
    guard options.raw else {
        _ = try show(what, try await typed())
        return
    }
    var ratios = [[Double]](repeating: [], count: peers.count)
    for _ in 0..<5 {
        let before = try await measurePeers()
        let middle = try show("\(what) typed", try await typed())
        let after = try await measurePeers()
        for index in peers.indices {
            ratios[index].append(middle.rate / ((before[index].rate + after[index].rate) / 2))
        }
    }
    for (peer, ratios) in zip(peers, ratios) {
        let ratios = ratios.map { ($0 * 1000).rounded() / 1000 }
        let median = ratios.sorted()[ratios.count / 2]
        try options.emit(
            Comparison(what: what, peer: peer.name, ratios: ratios, median_ratio: median),
            "\(what): median ratio of typed to \(peer.name) \(median)")
    }
}

/// Runs blocking code on a thread of its own, not on the cooperative pool.
func blocking<Value: Sendable>(_ body: @escaping @Sendable () throws -> Value) async throws -> Value {
    try await withCheckedThrowingContinuation { continuation in
        Thread.detachNewThread { continuation.resume(with: Result { try body() }) }
    }
}
