#if canImport(FoundationEssentials)
public import FoundationEssentials
#else
public import Foundation
#endif

/// A finish that is decided, and whose `job.completed` is not confirmed yet.
public struct PendingFinish: Sendable, Hashable {
    /// The project.
    public let project: ProjectID
    /// Which life of the project has finished, from 1.
    public let generation: Int
    /// The id of its event, the same however often it is published.
    public let eventID: EventID
    /// The event's data as it was at the decision: later corrections do not change what is announced.
    public let data: [UInt8]
    /// When it was decided.
    public let decidedAt: Date

    /// Reports a pending finish.
    public init(project: ProjectID, generation: Int = 1, eventID: EventID, data: [UInt8], decidedAt: Date) {
        self.project = project
        self.generation = generation
        self.eventID = eventID
        self.data = data
        self.decidedAt = decidedAt
    }
}
