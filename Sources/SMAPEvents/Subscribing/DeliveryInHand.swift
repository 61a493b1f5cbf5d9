internal import Synchronization

/// A delivery between being taken from its source and being settled.
///
/// Invariant (P3): one outcome. Whoever decides first settles it: its worker, or the watch, when its time is up.
final class DeliveryInHand: Sendable {
    private struct State {
        var isDecided = false
        var claim: (entry: InboxEntry, token: String)?
        var due: Duration?
        var wasGivenBack = false
        var isTrial = false
    }

    let delivery: InboundDelivery
    /// The consumer that it came from.
    let offer: ConsumerIntake.Offer
    var source: any DeliverySource { offer.source }
    /// Whether the circuit breaker was trying whether handlers work again when this was taken.
    var isTrial: Bool {
        get { state.withLock { $0.isTrial } }
        set { state.withLock { $0.isTrial = newValue } }
    }
    /// Whether no other handler of the subscription runs beside its own.
    let isAlone: Bool
    /// How often consumers died with it before it was put into its queue, and how often since, as far as is known.
    let earlierDeaths: Int
    let redeliveries: Int
    var deaths: Int { earlierDeaths + redeliveries }
    private let state = Mutex(State())

    init(
        _ delivery: InboundDelivery, _ offer: ConsumerIntake.Offer, isAlone: Bool, earlierDeaths: Int,
        redeliveries: Int
    ) {
        self.delivery = delivery
        self.offer = offer
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

    /// Whether it went back to its queue, which counts that as a delivery.
    var wasGivenBack: Bool {
        get { state.withLock { $0.wasGivenBack } }
        set { state.withLock { $0.wasGivenBack = newValue } }
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
