internal import Synchronization

/// A delivery between being taken from its source and being settled.
///
/// Invariant (P3): one outcome. Whoever decides first settles it: its worker, or the watch, when its time is up.
final class DeliveryInHand: Sendable {
    private struct State {
        var isDecided = false
        var claim: (entry: InboxEntry, token: String)?
        var due: Duration?
    }

    let delivery: InboundDelivery
    let source: any DeliverySource
    /// Whether the circuit breaker was trying whether handlers work again when this was taken.
    let isTrial: Bool
    /// Whether no other handler of the subscription runs beside its own.
    let isAlone: Bool
    /// How often consumers died with it before it was put into its queue, and how often since, as far as is known.
    let earlierDeaths: Int
    let redeliveries: Int
    var deaths: Int { earlierDeaths + redeliveries }
    private let state = Mutex(State())

    init(
        _ delivery: InboundDelivery, _ source: any DeliverySource, isTrial: Bool, isAlone: Bool, earlierDeaths: Int,
        redeliveries: Int
    ) {
        self.delivery = delivery
        self.source = source
        self.isTrial = isTrial
        self.isAlone = isAlone
        self.earlierDeaths = earlierDeaths
        self.redeliveries = redeliveries
    }

    /// Takes the decision. False if somebody has taken it before.
    func decide() -> Bool {
        state.withLock { state in
            defer { state.isDecided = true }
            return !state.isDecided
        }
    }

    /// The lease on its event, if it has one.
    var claim: (entry: InboxEntry, token: String)? {
        get { state.withLock { $0.claim } }
        set { state.withLock { $0.claim = newValue } }
    }

    /// When its handler is out of time, as the subscription's stopwatch counts. Nil while no handler runs.
    var due: Duration? {
        get { state.withLock { $0.isDecided ? nil : $0.due } }
        set { state.withLock { $0.due = newValue } }
    }
}
