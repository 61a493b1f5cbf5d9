import Foundation
import SMAPEvents
import SMAPRedis

/// Whether a report costs the same however large the project is, what an item costs in memory, and how long those wait who
/// only ask.
extension RedisBench {
    private struct Growth: Encodable {
        let items: String
        /// Redis's own time for a report, in projects of 1,000 items and in one of a million.
        let redis_us_small: Double
        let redis_us_large: Double
        /// The whole time of a report in the large one, as a multiple of that in the small ones.
        let ratio: Double
    }

    private struct Summary: Encodable {
        let items: String
        let bytes_per_item: Double
        let median_ratio: Double
        let median_redis_ratio: Double
    }

    private static let small = 1_000
    private static let large = 1_000_000

    func growth() async throws {
        try await growth("index") { .index($0) }
        // As long as a UUID, and like one in that neighbours have nothing in common.
        try await growth("name") { number in
            let hash = String(UInt64(number) &* 0x9E37_79B9_7F4A_7C15, radix: 16)
            return .named(String(repeating: "0", count: 16 - hash.count) + hash + "-8d3c-4f6a-b2e1-90ab")
        }
    }

    private func growth(_ what: String, _ item: @escaping @Sendable (Int) -> ItemReference) async throws {
        let rounds = 5
        let count = max(Self.small, options.messages / rounds / Self.small * Self.small)
        let large = try await freshProject(Self.large + rounds * count)
        try await withThrowingTaskGroup(of: Void.self) { group in
            for task in 0..<4 {
                group.addTask { [tracker] in
                    for start in stride(from: task * 1_000, to: Self.large, by: 4_000) {
                        try await tracker.advance(
                            large, (start..<start + 1_000).map { ItemReport(item($0), .success) })
                    }
                }
            }
            try await group.waitForAll()
        }
        let raw = try await blocking { [configuration] in try RawRedis(configuration) }
        let bytes = try await blocking {
            try RedisProgressStore.keys(large).reduce(0) {
                try $0 + (Int(raw.command(["MEMORY", "USAGE", $1, "SAMPLES", "0"])) ?? 0)
            }
        }

        var all: [Growth] = []
        for round in 0..<rounds {
            var projects: [ProjectID] = []
            for _ in 0..<count / Self.small { projects.append(try await freshProject(Self.small)) }
            let (small, smallCost) = try await measured(raw) { [projects] in
                try await report(count) { (projects[$0 / Self.small], item($0 % Self.small)) }
            }
            let first = Self.large + round * count
            let (big, bigCost) = try await measured(raw) { try await report(count) { (large, item(first + $0)) } }
            let growth = Growth(
                items: what, redis_us_small: smallCost, redis_us_large: bigCost,
                ratio: (small.rate / big.rate * 1000).rounded() / 1000)
            all.append(growth)
            try options.emit(
                growth,
                "by \(what): Redis \(smallCost) µs a report of 1,000 items, \(bigCost) µs of a million; in all "
                    + "\(growth.ratio) times as long")
        }
        _ = try await blocking { try raw.command(["UNLINK"] + RedisProgressStore.keys(large)) }
        func median(_ values: [Double]) -> Double {
            (values.sorted()[values.count / 2] * 1000).rounded() / 1000
        }
        let summary = Summary(
            items: what, bytes_per_item: (Double(bytes) / Double(Self.large) * 100).rounded() / 100,
            median_ratio: median(all.map(\.ratio)),
            median_redis_ratio: median(all.map { $0.redis_us_large / $0.redis_us_small }))
        try options.emit(
            summary,
            "by \(what): \(summary.bytes_per_item) bytes an item; median \(summary.median_ratio) times as long, for Redis "
                + "\(summary.median_redis_ratio) times")
    }

    /// Redis's own time for each script, in microseconds, beside what `body` measures.
    private func measured(
        _ raw: RawRedis, _ body: () async throws -> Measurement
    ) async throws -> (Measurement, Double) {
        _ = try await blocking { try raw.command(["CONFIG", "RESETSTAT"]) }
        let measurement = try await body()
        let info = try await blocking { try raw.command(["INFO", "commandstats"]) }
        let fields = info.split(whereSeparator: \.isNewline).first { $0.hasPrefix("cmdstat_evalsha:") }?
            .split(separator: ",").first { $0.hasPrefix("usec_per_call=") }
        return (measurement, fields.flatMap { Double($0.dropFirst("usec_per_call=".count)) } ?? 0)
    }

    func poll(_ pollers: Int) async throws {
        let (interval, times) = (Duration.seconds(2), 10)
        let project = try await freshProject(options.messages)
        let measurement = try await Measurement.of(pollers * times) {
            try await withThrowingTaskGroup(of: [UInt64].self) { group in
                for _ in 0..<pollers {
                    group.addTask { [tracker] in
                        var latencies: [UInt64] = []
                        var next = ContinuousClock.now + interval * Double.random(in: 0...1)
                        for _ in 0..<times {
                            try await Task.sleep(until: next)
                            let start = ContinuousClock.now
                            _ = try await tracker.progress(of: project)
                            latencies.append(nanoseconds(since: start))
                            next += interval
                        }
                        return latencies
                    }
                }
                return try await group.reduce(into: []) { $0 += $1 }
            }
        }
        let report = Report("\(pollers) pollers", measurement)
        try options.emit(report, report.text)
    }
}
