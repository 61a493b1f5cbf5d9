/// The exchanges that this platform knows by name.
public enum ExchangeName {
    /// The topic exchange that every event is published to.
    public static let events = "smap.events"
    /// The fanout exchange of the mail service that `smap.events` replaces.
    public static let legacyEmail = "smtp_send_email_exc"
    /// The direct exchange that brings dead letters to their queues.
    public static let deadLetters = "smap.dlx"
    /// The direct exchange that brings a message back to the queue that its key names, after a delay or from the dead
    /// letters.
    public static let requeue = "smap.requeue"
}
