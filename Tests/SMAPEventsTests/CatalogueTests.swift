import Foundation
import SMAPEvents
import Testing

@Suite struct CatalogueTests {
    private func rejects(_ event: some SMAPEvent, naming field: String) {
        let error = #expect(throws: EventsError.self) { try event.validate() }
        #expect(error?.code == .invalidEvent)
        #expect(error?.message.contains(field) == true, "\(error?.message ?? "")")
    }

    private func mail(
        _ recipient: String = "a@example.com", subject: String = "s", body: String = "b", replyTo: String? = nil,
        cc: [String]? = nil, attachments: [EmailAttachment]? = nil
    ) -> EmailVerificationRequested {
        EmailVerificationRequested(
            recipient: recipient, subject: subject, body: body, replyTo: replyTo, ccAddresses: cc,
            attachments: attachments)
    }

    @Test func `a mail needs an address, a subject and a body`() throws {
        try mail().validate()
        try mail(replyTo: "", cc: [], attachments: []).validate()
        for address in ["", "nobody", "a@", "@b", "a@b@c", "a b@c", "a@b\r\nBcc: c@d", "<a@b>"] {
            rejects(mail(address), naming: "recipient")
        }
        rejects(mail(subject: ""), naming: "subject")
        rejects(mail(subject: "a\r\nBcc: x@y"), naming: "subject")
        rejects(mail(body: ""), naming: "body")
        rejects(mail(replyTo: "x"), naming: "reply_to")
        rejects(mail(cc: ["a@b", "x"]), naming: "cc_addresses[1]")
        rejects(
            mail(attachments: [EmailAttachment(filename: "", contentType: "a/b", data: Data())]),
            naming: "attachments[0].filename")
    }

    @Test func `the other events check what they require`() throws {
        let uuid = "550e8400-e29b-41d4-a716-446655440001"
        let project = try ProjectID("p")
        try SubscriptionCreated(subscriptionID: uuid, userID: "u").validate()
        rejects(SubscriptionCreated(subscriptionID: "7", userID: "u"), naming: "subscription_id")
        rejects(SubscriptionCreated(subscriptionID: uuid, userID: ""), naming: "user_id")
        rejects(SubscriptionCancelled(subscriptionID: "7", userID: "u"), naming: "subscription_id")
        rejects(SubscriptionCancelled(subscriptionID: uuid, userID: ""), naming: "user_id")
        rejects(UserRegistered(userID: ""), naming: "user_id")
        rejects(UserLoggedIn(userID: ""), naming: "user_id")
        rejects(UserLoggedOut(userID: ""), naming: "user_id")
        try DataCollected(projectID: project, jobID: "j", platform: "p", minioPath: "m").validate()
        rejects(DataCollected(projectID: project, jobID: "", platform: "p", minioPath: "m"), naming: "job_id")
        rejects(DataCollected(projectID: project, jobID: "j", platform: "", minioPath: "m"), naming: "platform")
        rejects(DataCollected(projectID: project, jobID: "j", platform: "p", minioPath: ""), naming: "minio_path")
        rejects(AnalysisFinished(projectID: project, itemID: ""), naming: "item_id")
        rejects(JobCompleted(projectID: project, total: 1, done: 1, errors: 2), naming: "errors")
        var created = ProjectCreated(projectID: project)
        created.projectID = nil
        rejects(created, naming: "project_id")
    }

    @Test func `fields go by the names of the contract, and absent ones are left out`() throws {
        let data = try JSONEncoder().encode(
            DataCollected(projectID: ProjectID("p"), jobID: "j", platform: "TIKTOK", minioPath: "m", batchIndex: 3))
        let json = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
        #expect(Set(json.keys) == ["job_id", "platform", "minio_path", "batch_index"])
        let finished = try JSONEncoder().encode(
            AnalysisFinished(projectID: ProjectID("p"), itemID: "i", status: .error))
        #expect(String(decoding: finished, as: UTF8.self).contains(#""status":"error""#))
    }

    @Test func `a subscription's own id is its idempotency key`() {
        #expect(SubscriptionCreated(subscriptionID: "x", userID: "u").idempotencyKey == "x")
    }
}

@Suite struct LegacyEmailTests {
    private func message(_ fixture: [UInt8]) throws -> LegacyEmailMessage { try LegacyEmailMessage(parsing: fixture) }

    @Test func `what Go's encoding makes of an untagged struct is read, every field`() throws {
        let plain = try message(fixture("legacy-send-email.go"))
        #expect(plain.subject == "Verify your email")
        #expect(plain.recipient == "nguyen@example.com")
        #expect(plain.body == "<html><body>Mã OTP: 123456</body></html>")
        #expect(plain.replyTo == "")
        #expect(plain.ccAddresses == [])
        #expect(plain.attachments == [])
        let full = try message(fixture("legacy-send-email.attachment.go"))
        #expect(full.replyTo == "support@example.com")
        #expect(full.ccAddresses == ["x@example.com", "y@example.com"])
        #expect(
            full.attachments == [
                .init(filename: "hoa-don.pdf", contentType: "application/pdf", data: "JVBERi0xLjQK")
            ])
    }

    @Test func `the documented snake case is read too, in any letter case`() throws {
        let documented = try message(fixture("legacy-send-email.documented"))
        #expect(documented.replyTo == "support@example.com")
        #expect(documented.ccAddresses == ["admin@example.com"])
        #expect(documented.attachments.first?.contentType == "application/pdf")
        let shouted = try message(Array(#"{"RECIPIENT":"a@b","REPLY_TO":"c@d","Attachments":null}"#.utf8))
        #expect(shouted.recipient == "a@b")
        #expect(shouted.replyTo == "c@d")
    }

    @Test func `it is written byte for byte as the Go service writes it`() throws {
        for name in ["legacy-send-email.go", "legacy-send-email.attachment.go"] {
            let bytes = try fixture(name)
            let written = String(decoding: try message(bytes).serialized(), as: UTF8.self)
            let original = String(decoding: bytes, as: UTF8.self).trimmingCharacters(in: .newlines)
            #expect(written == original)
        }
    }

    @Test func `an event becomes the legacy message, attachments included`() throws {
        let event = EmailVerificationRequested(
            recipient: "a@b.c", subject: "s\"", body: "b\n",
            attachments: [EmailAttachment(filename: "f", contentType: "t", data: Data([1, 2, 3]))])
        let written = String(decoding: try LegacyEmailMessage(event).serialized(), as: UTF8.self)
        #expect(
            written == #"{"Subject":"s\"","Recipient":"a@b.c","Body":"b\n","ReplyTo":"","CcAddresses":null,"#
                + #""Attachments":[{"Filename":"f","ContentType":"t","Data":"AQID"}]}"#)
    }

    @Test func `an attachment by storage key has no legacy form`() {
        let event = EmailVerificationRequested(
            recipient: "a@b.c", subject: "s", body: "b",
            attachments: [EmailAttachment(filename: "f", contentType: "t", storageKey: "k")])
        let error = #expect(throws: EventsError.self) { try LegacyEmailMessage(event) }
        #expect(error?.code == .invalidEvent)
    }

    @Test(arguments: ["", "[]", "{}", #"{"Recipient":7}"#, #"{"Recipient":""}"#])
    func `what is no legacy message is undecodable`(body: String) {
        let error = #expect(throws: EventsError.self) { try LegacyEmailMessage(parsing: Array(body.utf8)) }
        #expect(error?.code == .undecodable)
    }
}
