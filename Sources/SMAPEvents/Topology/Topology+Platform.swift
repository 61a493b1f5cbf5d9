extension Topology {
    /// What the whole platform shares in a phase of the migration: `smap.events`, `smap.dlx`, the mail queue that replaces
    /// the legacy one, with its dead letters, and the legacy exchange while it is published to.
    public static func platform(in phase: MigrationPhase) -> Topology {
        var topology = Topology(exchanges: [.events])
        if phase.publishesLegacy { topology.insert(.legacyEmail) }
        topology.insert(EventSubscription(queue: "smtp_send_email_v2", bindings: ["email.#"]))
        return topology
    }
}
