/// How an event's fields stand in the payload of its envelope.
public enum EventShape: Sendable, Hashable {
    /// In `payload.data`. The platform's standard.
    case nested
    /// Directly in `payload`, as older services write.
    case flat
    /// In both places, for events that consumers of either kind read. Where names collide, the envelope's own win.
    case both
}
