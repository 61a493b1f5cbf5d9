import ArgumentParser

@main
struct SMAPEventsCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "smap-events",
        abstract: "Publish, watch and count the events of SMAP's services.",
        discussion: """
            Servers are found through RABBITMQ_URL (or RABBITMQ_HOST, _PORT, _USERNAME, _PASSWORD, _VHOST) and REDIS_URL \
            (or REDIS_HOST, _PORT, _USERNAME, _PASSWORD, _STATE_DB); the README has a table of these and those for \
            certificates, sentinels and replicas. 'smap-events local' starts private ones.

            Results go to standard output: text on a terminal, JSON lines with --json or into a pipe. Everything else \
            goes to standard error. The exit code is 0 only if everything that was asked for was done.
            """,
        subcommands: [
            PublishCommand.self, ListenCommand.self, TrackCommand.self, TopologyCommand.self, DeadLetterCommand.self,
            HealthCommand.self,
            LocalCommand.self, DemoCommand.self,
        ])
}
