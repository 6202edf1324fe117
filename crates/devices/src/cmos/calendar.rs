//! Dates, and their form in the clock's registers.

use super::CENTURY;

/// How the registers hold numbers: register B's DM and 24/12 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Encoding {
    pub(super) binary: bool,
    pub(super) hours_24: bool,
}

/// The hours register in the form of 12 hours: afternoon.
const PM: u8 = 1 << 7;

impl Encoding {
    fn encode(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    /// A byte's value. Nibbles beyond 9 count for what they are: the guest wrote them.
    pub(super) fn decode(self, byte: u8) -> u8 {
        if self.binary { byte } else { (byte >> 4) * 10 + (byte & 0xf) }
    }

    fn encode_hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.encode(hour);
        }
        let clock_face = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(clock_face) | if hour >= 12 { PM } else { 0 }
    }

    /// An hours byte's value: 0 to 23 where it is one.
    pub(super) fn decode_hour(self, byte: u8) -> u8 {
        if self.hours_24 {
            return self.decode(byte);
        }
        self.decode(byte & !PM) % 12 + if byte & PM != 0 { 12 } else { 0 }
    }
}

/// A date and a time of day in the proleptic Gregorian calendar. Fields that a guest has set need not be in their range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    pub(super) year: i64,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
    /// 1 is Sunday.
    pub(super) weekday: u8,
}

const DAY: i64 = 86_400;
/// Days from 1 March of the year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;
/// Days in 400 years.
const ERA: i64 = 146_097;

impl Calendar {
    /// The date `seconds` after the Unix epoch.
    pub(super) fn from_seconds(seconds: i128) -> Self {
        // Years of the registers are 0 to 9999; farther away the registers wrap, so a clamp loses nothing real.
        let seconds = seconds.clamp(-(1 << 40), 1 << 40) as i64;
        let (days, of_day) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // Years here begin in March, so that the leap day is their last.
        let since = days + EPOCH;
        let (era, of_era) = (since.div_euclid(ERA), since.rem_euclid(ERA));
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * of_year + 2) / 153;
        let is_next_year = month >= 10;
        Self {
            year: era * 400 + year_of_era + i64::from(is_next_year),
            month: (if is_next_year { month - 9 } else { month + 3 }) as u8,
            day: (of_year - (153 * month + 2) / 5 + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Seconds from the Unix epoch. A field beyond its range counts on into the next one.
    pub(super) fn to_seconds(self) -> i64 {
        let months = self.year * 12 + i64::from(self.month.max(1)) - 1;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
        // March is month 0 here, and January and February belong to the year before.
        let (year, month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let of_year = (153 * month + 2) / 5 + i64::from(self.day.max(1)) - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA + of_era - EPOCH;
        days * DAY + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// Puts it into the time registers of `ram`.
    pub(super) fn store(&self, ram: &mut [u8; 128], encoding: Encoding) {
        let year = self.year.rem_euclid(10_000);
        ram[0x00] = encoding.encode(self.second);
        ram[0x02] = encoding.encode(self.minute);
        ram[0x04] = encoding.encode_hour(self.hour);
        ram[0x06] = encoding.encode(self.weekday);
        ram[0x07] = encoding.encode(self.day);
        ram[0x08] = encoding.encode(self.month);
        ram[0x09] = encoding.encode((year % 100) as u8);
        ram[usize::from(CENTURY)] = encoding.encode((year / 100) as u8);
    }

    /// Takes it from the time registers of `ram`.
    pub(super) fn load(ram: &[u8; 128], encoding: Encoding) -> Self {
        let value = |index: usize| encoding.decode(ram[index]);
        Self {
            year: i64::from(value(usize::from(CENTURY))) * 100 + i64::from(value(0x09)),
            month: value(0x08),
            day: value(0x07),
            hour: encoding.decode_hour(ram[0x04]),
            minute: value(0x02),
            second: value(0x00),
            weekday: value(0x06),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(seconds: i64) -> (i64, u8, u8) {
        let calendar = Calendar::from_seconds(seconds.into());
        (calendar.year, calendar.month, calendar.day)
    }

    #[test]
    fn known_days_have_their_dates() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(951_782_400), (2000, 2, 29));
        assert_eq!(date(951_868_800), (2000, 3, 1));
        assert_eq!(date(-1), (1969, 12, 31));
        assert_eq!(date(4_107_542_399), (2100, 2, 28));
        assert_eq!(date(4_107_542_400), (2100, 3, 1));
        assert_eq!(Calendar::from_seconds(1_700_000_000).weekday, 3, "14 November 2023 was a Tuesday");
    }

    #[test]
    fn every_day_of_four_centuries_round_trips() {
        for day in (-30_000..130_000).map(|day| day * DAY + 12_345) {
            assert_eq!(Calendar::from_seconds(day.into()).to_seconds(), day);
        }
    }

    #[test]
    fn the_twelve_hour_form_has_no_zero() {
        let encoding = Encoding { binary: false, hours_24: false };
        for (hour, byte) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            assert_eq!(encoding.encode_hour(hour), byte);
            assert_eq!(encoding.decode_hour(byte), hour);
        }
    }
}
