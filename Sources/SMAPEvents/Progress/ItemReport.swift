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

/// That an item has ended.
public struct ItemReport: Sendable, Hashable {
    /// Which item.
    public let item: ItemReference
    /// How it ended.
    public let outcome: ItemOutcome

    /// Reports an item.
    public init(_ item: ItemReference, _ outcome: ItemOutcome) {
        self.item = item
        self.outcome = outcome
    }
}

/// What a store is asked when items have ended.
public struct AdvanceRequest: Sendable {
    /// The items, all by index or all by name; one or more.
    public let reports: [ItemReport]
    /// The stage that they ended in; nil for the only one, or the first.
    public let stage: ProgressStage?
    /// The life of the project that they belong to; nil for whichever there is.
    public let generation: Int?

    /// Puts reports together.
    public init(_ reports: [ItemReport], stage: ProgressStage? = nil, generation: Int? = nil) {
        self.reports = reports
        self.stage = stage
        self.generation = generation
    }
}
