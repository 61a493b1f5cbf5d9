/// The text of a Lua script. One object a script, which lives as long as the process: it is told by its identity, since to
/// hash kilobytes of text for each call costs more than the rest of it.
final class RedisScript: Sendable {
    let text: String

    init(_ text: String) { self.text = text }
}
