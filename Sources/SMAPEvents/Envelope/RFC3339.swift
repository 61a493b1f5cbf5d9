#if canImport(FoundationEssentials)
internal import FoundationEssentials
#else
internal import Foundation
#endif

/// The platform's timestamps: written as `2025-12-05T10:30:45.123Z`, read in every form that the siblings write.
enum RFC3339 {
    /// Appends `date` in UTC with milliseconds. Years outside 0 to 9999 are clamped: the format has four digits.
    static func append(_ date: Date, to bytes: inout [UInt8]) {
        let seconds = date.timeIntervalSince1970
        let interval = seconds.isNaN ? 0 : min(max(seconds, -62_167_219_200), 253_402_300_799.999)
        let milliseconds = Int64((interval * 1000).rounded())
        let days = Int64((Double(milliseconds) / 86_400_000).rounded(.down))
        let time = Int(milliseconds - days * 86_400_000)
        let (year, month, day) = civil(fromDays: Int(days))

        // One append of all 24 bytes: this is done for each event.
        withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 24) { buffer in
            func put(_ value: Int, at offset: Int) {
                buffer[offset] = 0x30 + UInt8(truncatingIfNeeded: value / 10)
                buffer[offset + 1] = 0x30 + UInt8(truncatingIfNeeded: value % 10)
            }
            // Sound: `2025-12-05T10:30:45.123Z` has 24 bytes, and each of them is written.
            put(year / 100, at: 0)
            put(year % 100, at: 2)
            buffer[4] = UInt8(ascii: "-")
            put(month, at: 5)
            buffer[7] = UInt8(ascii: "-")
            put(day, at: 8)
            buffer[10] = UInt8(ascii: "T")
            put(time / 3_600_000, at: 11)
            buffer[13] = UInt8(ascii: ":")
            put(time / 60_000 % 60, at: 14)
            buffer[16] = UInt8(ascii: ":")
            put(time / 1000 % 60, at: 17)
            buffer[19] = UInt8(ascii: ".")
            buffer[20] = 0x30 + UInt8(truncatingIfNeeded: time % 1000 / 100)
            put(time % 100, at: 21)
            buffer[23] = UInt8(ascii: "Z")
            bytes.append(contentsOf: buffer)
        }
    }

    static func string(from date: Date) -> String {
        var bytes: [UInt8] = []
        append(date, to: &bytes)
        return String(decoding: bytes, as: UTF8.self)
    }

    /// Reads `2025-12-05T10:30:45`, with fractional digits, of which nine count, and `Z`, an offset, or no zone at all (then
    /// UTC).
    /// Nil for anything else, dates that do not exist included.
    static func date(from text: String) -> Date? {
        let bytes = Array(text.utf8)
        var index = 0

        func number(_ width: Int) -> Int? {
            guard index + width <= bytes.count else { return nil }
            var value = 0
            for byte in bytes[index..<index + width] {
                guard (0x30...0x39).contains(byte) else { return nil }
                value = value * 10 + Int(byte - 0x30)
            }
            index += width
            return value
        }
        func take(_ accepted: String) -> UInt8? {
            guard index < bytes.count, accepted.utf8.contains(bytes[index]) else { return nil }
            defer { index += 1 }
            return bytes[index]
        }

        guard let year = number(4), take("-") != nil, let month = number(2), take("-") != nil, let day = number(2),
            take("Tt ") != nil, let hour = number(2), take(":") != nil, let minute = number(2), take(":") != nil,
            let second = number(2), (1...12).contains(month), hour < 24, minute < 60, second <= 60
        else { return nil }
        let days = daysFromCivil(year, month, day)
        guard civil(fromDays: days) == (year, month, day) else { return nil }

        var nanoseconds = 0
        if take(".") != nil {
            var digits = 0
            while digits < 9, let digit = number(1) {
                nanoseconds = nanoseconds * 10 + digit
                digits += 1
            }
            guard digits > 0 else { return nil }
            for _ in digits..<9 { nanoseconds *= 10 }
            while number(1) != nil {}
        }
        var offset = 0
        if let sign = take("+-") {
            guard let hours = number(2), hours < 24 else { return nil }
            let hasColon = take(":") != nil
            let minutes = index == bytes.count && !hasColon ? 0 : number(2)
            guard let minutes, minutes < 60 else { return nil }
            offset = (hours * 60 + minutes) * (sign == UInt8(ascii: "-") ? -60 : 60)
        } else {
            _ = take("Zz")
        }
        guard index == bytes.count else { return nil }
        let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset
        return Date(timeIntervalSince1970: Double(seconds) + Double(nanoseconds) / 1e9)
    }

    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": exact for the proleptic Gregorian calendar.

    private static func daysFromCivil(_ year: Int, _ month: Int, _ day: Int) -> Int {
        let year = month <= 2 ? year - 1 : year
        let era = (year >= 0 ? year : year - 399) / 400
        let yearOfEra = year - era * 400
        let dayOfYear = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1
        return era * 146_097 + yearOfEra * 365 + yearOfEra / 4 - yearOfEra / 100 + dayOfYear - 719_468
    }

    private static func civil(fromDays days: Int) -> (year: Int, month: Int, day: Int) {
        let days = days + 719_468
        let era = (days >= 0 ? days : days - 146_096) / 146_097
        let dayOfEra = days - era * 146_097
        let yearOfEra = (dayOfEra - dayOfEra / 1460 + dayOfEra / 36_524 - dayOfEra / 146_096) / 365
        let dayOfYear = dayOfEra - (365 * yearOfEra + yearOfEra / 4 - yearOfEra / 100)
        let shifted = (5 * dayOfYear + 2) / 153
        let day = dayOfYear - (153 * shifted + 2) / 5 + 1
        let month = shifted < 10 ? shifted + 3 : shifted - 9
        return (yearOfEra + era * 400 + (month <= 2 ? 1 : 0), month, day)
    }
}
