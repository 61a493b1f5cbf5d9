/// An item of a project. A project's items are counted by index or by name, never both.
public enum ItemReference: Sendable, Hashable {
    /// By position, from 0: one bit of memory per item and outcome. At most 10,000,000 by default.
    case index(Int)
    /// By name, 1 to 512 bytes: about 90 bytes of memory per item.
    case named(String)
}

/// How an item ended.
public enum ItemOutcome: Sendable, Hashable {
    /// It was handled.
    case success
    /// It could not be handled. It counts in `done` and in `errors`.
    case failure
}
