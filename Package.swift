// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
]

// Third-party products, named once.
let argumentParser = Target.Dependency.product(name: "ArgumentParser", package: "swift-argument-parser")
let configuration = Target.Dependency.product(name: "Configuration", package: "swift-configuration")
let deque = Target.Dependency.product(name: "DequeModule", package: "swift-collections")
let histogram = Target.Dependency.product(name: "Histogram", package: "hdrhistogram-swift")
let lifecycle = Target.Dependency.product(name: "ServiceLifecycle", package: "swift-service-lifecycle")
let lifecycleTestKit = Target.Dependency.product(name: "ServiceLifecycleTestKit", package: "swift-service-lifecycle")
let logging = Target.Dependency.product(name: "Logging", package: "swift-log")
let metrics = Target.Dependency.product(name: "Metrics", package: "swift-metrics")
let inMemoryTracing = Target.Dependency.product(name: "InMemoryTracing", package: "swift-distributed-tracing")
let metricsTestKit = Target.Dependency.product(name: "MetricsTestKit", package: "swift-metrics")
let tracing = Target.Dependency.product(name: "Tracing", package: "swift-distributed-tracing")
let signals = Target.Dependency.product(name: "UnixSignals", package: "swift-service-lifecycle")
let subprocess = Target.Dependency.product(name: "Subprocess", package: "swift-subprocess")

let package = Package(
    name: "smap-events",
    platforms: [.macOS(.v15)],
    products: [
        .library(name: "SMAPEvents", targets: ["SMAPEvents"]),
        .library(name: "SMAPRabbitMQ", targets: ["SMAPRabbitMQ"]),
        .library(name: "SMAPRedis", targets: ["SMAPRedis"]),
        .library(name: "SMAPEventsTesting", targets: ["SMAPEventsTesting"]),
        .executable(name: "smap-events", targets: ["smap-events"]),
        .executable(name: "smap-events-bench", targets: ["smap-events-bench"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-collections", from: "1.6.0"),
        .package(url: "https://github.com/apple/swift-configuration", from: "1.4.0", traits: []),
        .package(url: "https://github.com/apple/swift-distributed-tracing", from: "1.7.3"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/apple/swift-metrics", from: "2.13.0"),
        .package(url: "https://github.com/HdrHistogram/hdrhistogram-swift", from: "0.2.0"),
        .package(url: "https://github.com/swift-server/swift-service-lifecycle", from: "2.13.0"),
        .package(url: "https://github.com/swiftlang/swift-subprocess", from: "1.0.2", traits: []),
    ],
    targets: [
        // No `pkgConfig:` on the first two: librabbitmq's .pc file spells `CFlags`, which SwiftPM cannot read, and
        // hiredis's carries a -D flag that warns on every build.
        .systemLibrary(name: "CRabbitMQ", providers: [.apt(["librabbitmq-dev"]), .brew(["rabbitmq-c"])]),
        .systemLibrary(name: "CHiredis", providers: [.apt(["libhiredis-dev"]), .brew(["hiredis"])]),
        .systemLibrary(name: "COpenSSL", providers: [.apt(["libssl-dev"]), .brew(["openssl"])]),

        // What Swift's Glibc module does not show of Linux; empty elsewhere.
        .systemLibrary(name: "CConnectionThread"),

        .target(name: "Waiting", swiftSettings: settings),
        .target(name: "ConnectionThread", dependencies: ["CConnectionThread", "COpenSSL"], swiftSettings: settings),
        .target(
            name: "SMAPEvents",
            dependencies: ["Waiting", configuration, deque, lifecycle, logging, metrics, tracing],
            swiftSettings: settings
        ),
        .target(
            name: "SMAPRabbitMQ",
            dependencies: [
                "SMAPEvents", "ConnectionThread", "Waiting", "CRabbitMQ", configuration, deque, lifecycle, logging,
                metrics,
            ],
            swiftSettings: settings
        ),
        .target(
            name: "SMAPRedis",
            dependencies: ["SMAPEvents", "ConnectionThread", "Waiting", "CHiredis", configuration, deque, logging],
            swiftSettings: settings
        ),
        .target(
            name: "SMAPEventsTesting",
            dependencies: ["SMAPEvents", "ConnectionThread", deque, logging, subprocess],
            swiftSettings: settings
        ),
        .executableTarget(
            name: "smap-events",
            dependencies: [
                "SMAPEvents", "SMAPRabbitMQ", "SMAPRedis", "SMAPEventsTesting", argumentParser, configuration,
                lifecycle, logging, signals, subprocess,
            ],
            swiftSettings: settings
        ),
        .executableTarget(
            name: "smap-events-bench",
            dependencies: [
                "SMAPEvents", "SMAPRabbitMQ", "SMAPRedis", "SMAPEventsTesting", "ConnectionThread", "CRabbitMQ",
                "CHiredis",
                argumentParser, configuration, histogram,
            ],
            swiftSettings: settings
        ),

        .testTarget(name: "WaitingTests", dependencies: ["Waiting"], swiftSettings: settings),
        .testTarget(
            name: "ConnectionThreadTests",
            dependencies: ["COpenSSL", "ConnectionThread"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "SMAPEventsTests",
            dependencies: [
                "SMAPEvents", "SMAPEventsTesting", configuration, inMemoryTracing, lifecycle, lifecycleTestKit, metrics,
                metricsTestKit, tracing,
            ],
            resources: [.copy("Fixtures")],
            swiftSettings: settings
        ),
        .testTarget(
            name: "SMAPRabbitMQTests",
            dependencies: ["SMAPRabbitMQ", "SMAPEvents", "ConnectionThread", "Waiting", configuration],
            swiftSettings: settings
        ),
        .testTarget(
            name: "SMAPRedisTests",
            dependencies: ["SMAPRedis", "SMAPEvents", "ConnectionThread", configuration],
            swiftSettings: settings
        ),
        // The README's examples, compiled.
        .testTarget(
            name: "ReadmeTests",
            dependencies: ["SMAPEvents", "SMAPRabbitMQ", "SMAPRedis"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "IntegrationTests",
            dependencies: [
                "SMAPEvents", "SMAPRabbitMQ", "SMAPRedis", "SMAPEventsTesting", "smap-events", configuration, lifecycle,
                logging,
                subprocess,
            ],
            resources: [.copy("Python")],
            swiftSettings: settings
        ),
    ]
)
