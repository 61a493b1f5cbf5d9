/// An exchange to be declared. Durable, not auto-delete, not internal.
public struct ExchangeDeclaration: Sendable, Hashable {
    /// How an exchange routes.
    public enum Kind: String, Sendable {
        /// By pattern.
        case topic
        /// To every queue.
        case fanout
        /// By equal key.
        case direct
    }

    /// The exchange's name.
    public var name: String
    /// How it routes.
    public var kind: Kind

    /// Describes an exchange.
    public init(name: String, kind: Kind) {
        self.name = name
        self.kind = kind
    }

    /// `smap.events`: topic.
    public static let events = ExchangeDeclaration(name: ExchangeName.events, kind: .topic)
    /// `smtp_send_email_exc`: fanout.
    public static let legacyEmail = ExchangeDeclaration(name: ExchangeName.legacyEmail, kind: .fanout)
    /// `smap.dlx`: direct.
    public static let deadLetters = ExchangeDeclaration(name: ExchangeName.deadLetters, kind: .direct)
    /// `smap.requeue`: direct.
    public static let requeue = ExchangeDeclaration(name: ExchangeName.requeue, kind: .direct)
}
