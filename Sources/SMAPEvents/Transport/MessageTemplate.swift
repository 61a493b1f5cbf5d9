package import Synchronization

/// What all messages of one publisher and one event type have in common, so that it is checked and laid out once.
package final class MessageTemplate: Sendable {
    /// Finished bytes before the body, with places for what differs from message to message. Made by the transport.
    package struct Layout: Sendable {
        private let head: [UInt8]
        package let largestFrame: Int
        private let messageIDOffset: Int
        private let timestampOffset: Int
        private let bodySizeOffset: Int

        /// - Parameters:
        ///   - head: The bytes, with an id of the right length.
        ///   - largestFrame: The size of the largest frame in them.
        package init(
            head: [UInt8], largestFrame: Int, messageIDOffset: Int, timestampOffset: Int, bodySizeOffset: Int
        ) {
            self.head = head
            self.largestFrame = largestFrame
            self.messageIDOffset = messageIDOffset
            self.timestampOffset = timestampOffset
            self.bodySizeOffset = bodySizeOffset
        }

        /// The bytes for one message.
        package func head(messageID: String, timestamp: UInt64, bodySize: Int) -> [UInt8] {
            [UInt8](unsafeUninitializedCapacity: head.count) { buffer, count in
                _ = buffer.initialize(from: head)
                count = head.count
                let bytes = UnsafeMutableRawBufferPointer(buffer)
                var id = messageID
                // Sound: the transport uses a layout only for ids of the length that it was made with.
                id.withUTF8 { bytes[messageIDOffset..<messageIDOffset + $0.count].copyBytes(from: $0) }
                bytes.storeBytes(of: timestamp.bigEndian, toByteOffset: timestampOffset, as: UInt64.self)
                bytes.storeBytes(of: UInt64(bodySize).bigEndian, toByteOffset: bodySizeOffset, as: UInt64.self)
            }
        }
    }

    package let destination: PublishDestination
    /// All but the message id and the timestamp.
    package let properties: MessageProperties
    package let layout = Mutex<Layout?>(nil)

    package init(_ destination: PublishDestination, properties: MessageProperties) {
        self.destination = destination
        self.properties = properties
    }
}
