import Foundation
import Testing

@Suite struct ReadmeTests {
    private static let repository = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()

    private func text(_ path: String) throws -> String {
        try String(contentsOf: Self.repository.appending(path: path), encoding: .utf8)
    }

    @Test(arguments: ["publisher", "subscriber", "tracker"])
    func `the README shows what is compiled here`(example: String) throws {
        let source = try ["ReadmeExamples", "SubscriberExample", "TrackerExample"].map {
            try text("Tests/ReadmeTests/\($0).swift")
        }.joined()
        let start = try #require(source.range(of: "// begin \(example)\n"))
        let end = try #require(source.range(of: "// end \(example)\n"))
        #expect(try text("README.md").contains("```swift\n\(source[start.upperBound..<end.lowerBound])```"))
    }

    @Test func `every setting of the template is explained in the README`() throws {
        let readme = try text("README.md")
        for line in try text("template.env").split(separator: "\n") {
            guard let name = line.firstMatch(of: /^#?([A-Z_]+)=/)?.output.1 else { continue }
            #expect(readme.contains("`\(name)`"), "\(name)")
        }
    }
}
