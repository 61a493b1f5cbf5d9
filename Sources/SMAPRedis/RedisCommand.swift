internal import CHiredis

/// A command as it goes over the wire, written by hiredis.
struct RedisCommand: Sendable {
    let bytes: [UInt8]
    /// Whether its answer is to wait for replicas.
    let awaitsReplicas: Bool

    init(_ arguments: [String], awaitsReplicas: Bool = false) {
        self.awaitsReplicas = awaitsReplicas
        var block: [UInt8] = []
        var lengths: [Int] = []
        lengths.reserveCapacity(arguments.count)
        block.reserveCapacity(arguments.reduce(0) { $0 + $1.utf8.count })
        for argument in arguments {
            block.append(contentsOf: argument.utf8)
            lengths.append(argument.utf8.count)
        }
        bytes = block.withUnsafeBytes { block in
            // Sound: the pointers lead into `block`, which outlives the call; hiredis reads `lengths` bytes from each, as
            // the C characters that they are to it.
            let base = block.baseAddress?.assumingMemoryBound(to: CChar.self)
            var offset = 0
            var pointers: [UnsafePointer<CChar>?] = lengths.map { length in
                defer { offset += length }
                return base.map { $0 + offset }
            }
            var target: UnsafeMutablePointer<CChar>?
            // The result's type differs between hiredis versions.
            let count = Int(redisFormatCommandArgv(&target, Int32(arguments.count), &pointers, lengths))
            guard count > 0, let target else { return [] }
            defer { redisFreeCommand(target) }
            return Array(UnsafeRawBufferPointer(start: target, count: count))
        }
    }
}
