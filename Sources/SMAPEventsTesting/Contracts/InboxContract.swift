public import SMAPEvents

/// What every ``SMAPEvents/Inbox`` must do. Each check can be run against any of them, and uses a scope of its own.
public enum InboxContract {
    /// One promise.
    public struct Check: Sendable, CustomStringConvertible {
        /// The promise, as a sentence.
        public let description: String
        private let body: @Sendable (any Inbox, InboxEntry) async throws -> Void

        init(_ description: String, _ body: @escaping @Sendable (any Inbox, InboxEntry) async throws -> Void) {
            self.description = description
            self.body = body
        }

        /// Runs the check. Throws ``ContractViolation`` when the promise is not kept.
        public func run(_ inbox: any Inbox) async throws {
            try await body(inbox, InboxEntry(scope: "contract.\(EventID())", id: EventID().rawValue))
        }
    }

    private static var deadline: ContinuousClock.Instant { .now + .seconds(20) }

    private static func granted(_ inbox: any Inbox, _ entry: InboxEntry, lease: Duration) async throws -> String {
        let claim = try await inbox.claim(entry, lease: lease, deadline: deadline)
        guard case .granted(let token) = claim else { throw ContractViolation(description: "\(claim), not granted") }
        return token
    }

    /// All promises.
    public static let checks: [Check] = [
        Check("of many who claim an event at once one is granted it, and the others are told for how long") {
            inbox, entry in
            let claims = try await withThrowingTaskGroup(of: InboxClaim.self) { group in
                for _ in 0..<50 {
                    group.addTask { try await inbox.claim(entry, lease: .seconds(60), deadline: deadline) }
                }
                return try await group.reduce(into: []) { $0.append($1) }
            }
            var granted = 0
            for claim in claims {
                switch claim {
                case .granted: granted += 1
                case .busy(let remaining):
                    try ContractViolation.require(
                        remaining > .seconds(30) && remaining <= .seconds(60), "the lease's rest: \(remaining)")
                case .done: throw ContractViolation(description: "nobody has completed it")
                }
            }
            try ContractViolation.equal(granted, 1, "granted")
        },
        Check("what is completed stays done, for its time, and in its scope only") { inbox, entry in
            _ = try await granted(inbox, entry, lease: .seconds(60))
            try await inbox.complete(entry, timeToLive: .seconds(60), deadline: deadline)
            try ContractViolation.equal(
                try await inbox.claim(entry, lease: .seconds(60), deadline: deadline), .done, "a second claim")
            let other = InboxEntry(scope: entry.scope + ".other", id: entry.id)
            _ = try await granted(inbox, other, lease: .seconds(60))
            try await inbox.complete(other, timeToLive: .milliseconds(50), deadline: deadline)
            // The duration is what is tested.
            try await Task.sleep(for: .milliseconds(100))
            _ = try await granted(inbox, other, lease: .seconds(60))
        },
        Check("a lease that is given back, or has run out, is granted to another; a stale token gives nothing back") {
            inbox, entry in
            let first = try await granted(inbox, entry, lease: .seconds(60))
            try await inbox.release(entry, token: first, deadline: deadline)
            let second = try await granted(inbox, entry, lease: .milliseconds(100))
            // The duration is what is tested.
            try await Task.sleep(for: .milliseconds(150))
            _ = try await granted(inbox, entry, lease: .seconds(60))
            try await inbox.release(entry, token: second, deadline: deadline)
            guard case .busy = try await inbox.claim(entry, lease: .seconds(60), deadline: deadline) else {
                throw ContractViolation(description: "a stale token has given back the lease of another")
            }
        },
        Check("a tombstone is not given back") { inbox, entry in
            let token = try await granted(inbox, entry, lease: .seconds(60))
            try await inbox.complete(entry, timeToLive: .seconds(60), deadline: deadline)
            try await inbox.release(entry, token: token, deadline: deadline)
            try ContractViolation.equal(
                try await inbox.claim(entry, lease: .seconds(60), deadline: deadline), .done, "a claim after it")
        },
    ]
}
