src=open('/work/main/Tests/ReadmeTests/ReadmeExamples.swift').read()
def ex(n):
    a=src.index(f"// begin {n}\n")+len(f"// begin {n}\n"); b=src.index(f"// end {n}\n")
    return "```swift\n"+src[a:b]+"```"
demo=open('/tmp/demo.out').read().rstrip()
open('/work/main/README.md','w').write(f'''# SMAP Events

The Swift SDK with which a service takes part in SMAP's choreography: it publishes events and reacts to those of others.
Events go in one standard envelope, with broker confirms, to RabbitMQ's topic exchange `smap.events` (over librabbitmq).
Consumers bind queues by routing-key pattern. Each project's progress is kept in a Redis hash `smap:proj:<id>` (over
hiredis), item by item, and its finish line is found once and announced as `job.completed`. While services move off the old
fanout exchange `smtp_send_email_exc`, a bridge publishes to both. Swift 6.2 or newer, Linux; RabbitMQ 3.10+, Redis 7+.

## Try it

Two commands do all the set-up, on Debian or Ubuntu with Swift installed (elsewhere they say what is missing, with
Homebrew's names). Both start a RabbitMQ and a Redis of their own on free loopback ports, and stop them at the end. Root is
needed only where a package is missing.

```console
$ ./Scripts/demo
smap-events: starting RabbitMQ and Redis…
{demo}
```

The demo runs the whole path: mails to both exchanges; a project from `project.created` over `data.collected` and
`analysis.finished` to `job.completed`, with 2 % of the items failing and 5 % of the messages published twice on purpose.
Consumers beside the workers count what arrives, and it exits with 1 if anything was lost or doubled. `./Scripts/demo
--items 50000 --workers 32 --json` runs it larger, for programs.

```console
$ ./Scripts/test
== formatting
== build without warnings
Build complete! (TESTBUILD)
== tests
…
TESTLINE
nothing is left running
```

## Use it

```swift
.package(url: "https://github.com/smap-platform/smap-events-swift", branch: "main")
```

with the products `SMAPEvents`, `SMAPRabbitMQ` and `SMAPRedis`, and `SMAPEventsTesting` for tests. On the machine that builds:
`apt-get install librabbitmq-dev libhiredis-dev`, or `brew install rabbitmq-c hiredis`.

A publisher:

{ex("publisher")}

`publish` returns once the broker has confirmed the event. Otherwise it throws an `EventsError` whose `publishOutcome` is one
of `returned`, `nacked`, `rejected` (invalid, never sent), `unsent` (not one byte was written: repeat it) and `unknown` (the
answer was lost: repeat it under `error.eventID`). Services that publish mails use `DualPublisher` instead while the migration
lasts: same protocol, see [Migration](Migration/README.md).

A subscriber:

{ex("subscriber")}

A message that is no event, or that no handler takes, goes to the dead letter queue `<queue>.dlq` at once.

A tracker:

{ex("tracker")}

An own event is a type:

```swift
struct OrderShipped: SMAPEvent {{
    static let routingKey: RoutingKey = "order.shipped"
    var orderID: String
}}
```

Tests need no server: `EventsTestHarness` has a broker, a store, a publisher and a tracker in memory; they keep the same
contract as the live ones (`TransportContract`, `StoreContract`). `LocalStack` starts real servers for a test run.

## The command line

| Command | Does |
|---|---|
| `smap-events publish KEY --data JSON`, `publish --stdin` | publishes, and reports each event's outcome |
| `smap-events listen --queue Q --bind PATTERN` | prints events, and acknowledges what it has printed |
| `smap-events track start\\|expect\\|seal\\|advance\\|fail\\|show\\|watch ID` | reads and moves a project's progress |
| `smap-events local [-- COMMAND …]` | starts private servers, for a command or until Ctrl-C |
| `smap-events demo` | the demo above |

Results go to standard output (text on a terminal, JSON lines with `--json` or into a pipe), all else to standard error; the
exit code is 0 only if everything asked for was done. `--help` tells the rest.

## Configuration

The structs have documented defaults; each also has an initialiser from swift-configuration's `ConfigReader`, which reads
these variables ([template.env](template.env)). `docker compose up` with [compose.yaml](compose.yaml) gives servers that fit.

| Variable | Default | Meaning |
|---|---|---|
| `SMAP_SERVICE_NAME` | – | the service, in envelopes and as `app_id` |
| `RABBITMQ_URL` | – | `amqp://user:password@host:port/vhost`, parts percent-encoded; overrides the five below |
| `RABBITMQ_HOST` | `localhost` | |
| `RABBITMQ_PORT` | `5672` | |
| `RABBITMQ_USERNAME` | `guest` | |
| `RABBITMQ_PASSWORD` | `guest` | never logged |
| `RABBITMQ_VHOST` | `/` | |
| `REDIS_HOST` | `localhost` | |
| `REDIS_PORT` | `6379` | |
| `REDIS_PASSWORD` | – | never logged |
| `REDIS_STATE_DB` | `1` | the database for state; 0 is a cache that may evict |
| `ENABLE_DUAL_PUBLISH` | `true` | `true` is migration phase 2, `false` phase 4 |
| `SMAP_MIGRATION_PHASE` | – | 1 to 4; overrides `ENABLE_DUAL_PUBLISH` |

Limits, with their defaults: 1,000 messages or 16 MiB unconfirmed (callers wait), 256 KiB an envelope, 256 deliveries
prefetched and 16 handled at a time, bodies up to 16 MiB taken in, 10,000 Redis commands under way, item indexes up to
10,000,000; a publish ends after 30 s, a tracker operation after 10 s. A project's keys live for a week after its last update.

## Promises

Tests are written against them.

1. A receipt means that the broker has the event, for every queue that was bound.
2. Every call ends by its deadline with a typed outcome, also while librabbitmq hangs; cancelling the task ends it too.
3. A delivery is settled once, after its handler has decided.
4. An item counts once, however often it is reported; `0 ≤ errors ≤ done`, and `done ≤ total` once sealed.
5. A finish is decided once, in the store, and published at least once under one `event_id`, whoever dies in between.
6. While dual publishing, an event is confirmed on both exchanges under one id, or the error names the missing leg.
7. No password, payload or personal data in errors and logs.
8. Memory, messages in flight, threads and sockets are bounded.

What it does not do yet stands in the [changelog](CHANGELOG.md). At least once means that a consumer may see an event twice:
handlers must bear that.

## The wire

[Schemas](Schemas/README.md) describe what is written. Reading is tolerant: an `event_id` may be any text of up to 255
bytes; a timestamp may have 0 to 9 fractional digits, an offset or no zone, or be missing; the payload may be flat, its fields
beside each other instead of in `data`; `null` counts as absent, and unknown fields are ignored. `project.created`,
`data.collected`, `analysis.finished` and `job.completed` are written both ways, nested and flat, because consumers of either
kind read them.

## Modules

| Module | Purpose |
|---|---|
| `SMAPEvents` | the core, pure Swift: envelope, events, publishing, subscribing, progress, migration, and the protocols `EventTransport` and `ProgressStore` |
| `SMAPRabbitMQ` | the live transport, over librabbitmq |
| `SMAPRedis` | the live progress store, over hiredis |
| `SMAPEventsTesting` | broker and store in memory, test harness, contract suites, `LocalStack` |
| `ConnectionThread` | internal: one OS thread that owns one C connection, and the watchdog over it |
| `CRabbitMQ`, `CHiredis`, `CConnectionThread` | internal: module maps of system libraries |
| `smap-events`, `smap-events-bench` | the command line, and the benchmark against the raw C loop |

## Measured

BENCH

Licence: [Apache 2.0](LICENSE). To change it: [CONTRIBUTING.md](CONTRIBUTING.md).
''')
