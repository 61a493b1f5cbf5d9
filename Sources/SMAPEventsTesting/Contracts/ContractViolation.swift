internal import SMAPEvents

/// A transport or store does not keep one of its promises.
public struct ContractViolation: Error, CustomStringConvertible {
    /// What was expected and did not hold, and where.
    public let description: String

    static func require(_ condition: Bool, _ what: @autoclosure () -> String, line: Int = #line) throws {
        if !condition { throw ContractViolation(description: "\(what()) (line \(line))") }
    }

    static func equal<Value: Equatable>(_ actual: Value, _ expected: Value, _ what: String, line: Int = #line) throws {
        try require(actual == expected, "\(what): expected \(expected), got \(actual)", line: line)
    }

    /// Runs `body`, which must throw an `EventsError` of this kind, and returns it.
    @discardableResult
    static func error(
        _ code: EventsError.Code, line: Int = #line, _ body: () async throws -> Void
    ) async throws -> EventsError {
        do {
            try await body()
        } catch let error as EventsError {
            try require(error.code == code, "expected \(code), got \(error)", line: line)
            return error
        }
        throw ContractViolation(description: "expected \(code), but nothing was thrown (line \(line))")
    }
}
