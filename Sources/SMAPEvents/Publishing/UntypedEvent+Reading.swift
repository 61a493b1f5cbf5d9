extension UntypedEvent {
    /// Reads one line of `smap-events publish --stdin`: `{"routing_key","data","project_id"?}`. The data is kept byte for
    /// byte; other fields are ignored. Throws ``EventsError/Code/invalidEvent`` or ``EventsError/Code/invalidName``.
    package init(parsing line: [UInt8]) throws {
        var key: String?
        var project: String?
        var data: Range<Int>?
        let span = line.span
        do {
            try JSONText.readObject(span) { member in
                if JSONText.token(member.name, in: span, is: "routing_key") {
                    key = try JSONText.optionalString(member.value, in: span, field: "routing_key")
                } else if JSONText.token(member.name, in: span, is: "project_id") {
                    project = try JSONText.optionalString(member.value, in: span, field: "project_id")
                } else if JSONText.token(member.name, in: span, is: "data") {
                    data = member.value
                }
            }
        } catch let failure as JSONText.Failure {
            throw EventsError(.invalidEvent, "\(failure.reason) (byte \(failure.offset))", operation: "read event")
        }
        guard let key else { throw EventsError(.invalidEvent, "routing_key is missing", operation: "read event") }
        self.init(
            routingKey: try RoutingKey(key), data: data.map { Array(line[$0]) } ?? Array("{}".utf8),
            projectID: try project.map { try ProjectID($0) })
    }
}
