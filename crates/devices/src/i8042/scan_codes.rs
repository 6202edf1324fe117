//! The three sets of scan codes. Keys come in as set 2 has them; sets 1 and 3 are made of that.

/// The prefix of a key's release in sets 2 and 3.
pub(super) const RELEASE: u8 = 0xf0;
/// The prefixes of further keys in sets 1 and 2.
const EXTENDED: u8 = 0xe0;
const PAUSE: u8 = 0xe1;
/// Set 1: the release of a key.
const BREAK: u8 = 0x80;

/// A set of scan codes; the discriminants are the keyboard's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Set {
    One = 1,
    #[default]
    Two = 2,
    Three = 3,
}

impl Set {
    /// The set of this number.
    pub(super) fn from_number(number: u8) -> Option<Self> {
        [Self::One, Self::Two, Self::Three].into_iter().find(|&set| set as u8 == number)
    }
}

/// Turns set 2 into another one, byte by byte.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Converter {
    set: Set,
    /// What has come of the key at hand: 0, or [`EXTENDED`] or [`PAUSE`]; and [`RELEASE`].
    prefix: u8,
    release: bool,
    /// Set 3: keys other than modifiers tell their release too.
    breaks: bool,
}

impl Converter {
    /// To this set, as after power-up.
    pub(super) fn new(set: Set) -> Self {
        Self { set, ..Self::default() }
    }

    pub(super) fn set(&self) -> Set {
        self.set
    }

    /// Set 3: whether all keys tell their release.
    pub(super) fn set_breaks(&mut self, breaks: bool) {
        self.breaks = breaks;
    }

    /// What a byte of set 2 comes to: up to two bytes.
    pub(super) fn convert(&mut self, byte: u8) -> impl Iterator<Item = u8> + use<> {
        let bytes: [Option<u8>; 2] = match (self.set, byte) {
            (Set::Two, _) => [Some(byte), None],
            (_, RELEASE) => {
                self.release = true;
                [None; 2]
            }
            (Set::One, EXTENDED | PAUSE) => [Some(byte), None],
            (Set::One, _) => {
                [Some(set_1(byte) | if std::mem::take(&mut self.release) { BREAK } else { 0 }), None]
            }
            (Set::Three, EXTENDED | PAUSE) => {
                self.prefix = byte;
                [None; 2]
            }
            (Set::Three, _) => self.third(byte),
        };
        bytes.into_iter().flatten()
    }

    fn third(&mut self, byte: u8) -> [Option<u8>; 2] {
        let release = std::mem::take(&mut self.release);
        if self.prefix == PAUSE && byte != PAUSE_LAST {
            return [None; 2];
        }
        let prefix = std::mem::take(&mut self.prefix);
        match set_3(prefix, byte) {
            None => [None; 2],
            Some(code) if !release => [Some(code), None],
            Some(code) if self.breaks || MODIFIERS.contains(&code) => [Some(RELEASE), Some(code)],
            Some(_) => [None; 2],
        }
    }
}

/// Set 1's code of a key by its code in set 2, as the controller's table has it.
#[rustfmt::skip]
const SET_1: [u8; 0x85] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
    0x80, 0x81, 0x82, 0x41, 0x54,
];

/// The controller's translation of one byte; what is no key's code stays what it is.
pub(super) fn set_1(byte: u8) -> u8 {
    SET_1.get(usize::from(byte)).copied().unwrap_or(byte)
}

/// The last byte of the pause key's sequence.
const PAUSE_LAST: u8 = 0x77;
/// Set 3's codes of the keys that always tell their release: control, shift and alternate, caps lock.
const MODIFIERS: [u8; 7] = [0x11, 0x12, 0x14, 0x19, 0x39, 0x58, 0x59];

/// Keys whose codes in set 3 are not those in set 2: prefix, code in set 2, code in set 3.
#[rustfmt::skip]
const SET_3: [(u8, u8, u8); 48] = [
    // Function keys, escape, locks.
    (0, 0x05, 0x07), (0, 0x06, 0x0f), (0, 0x04, 0x17), (0, 0x0c, 0x1f), (0, 0x03, 0x27), (0, 0x0b, 0x2f),
    (0, 0x83, 0x37), (0, 0x0a, 0x3f), (0, 0x01, 0x47), (0, 0x09, 0x4f), (0, 0x78, 0x56), (0, 0x07, 0x5e),
    (0, 0x76, 0x08), (0, 0x58, 0x14), (0, 0x7e, 0x5f), (0, 0x77, 0x76),
    // Control, alternate, the keys beside them, backslash.
    (0, 0x14, 0x11), (0, 0x11, 0x19), (0xe0, 0x14, 0x58), (0xe0, 0x11, 0x39), (0xe0, 0x1f, 0x8b), (0xe0, 0x27, 0x8c),
    (0xe0, 0x2f, 0x8d), (0, 0x5d, 0x5c), (0, 0x61, 0x13),
    // The cursor and the keys above it.
    (0xe0, 0x70, 0x67), (0xe0, 0x71, 0x64), (0xe0, 0x6b, 0x61), (0xe0, 0x6c, 0x6e), (0xe0, 0x69, 0x65), (0xe0, 0x75, 0x63),
    (0xe0, 0x72, 0x60), (0xe0, 0x7d, 0x6f), (0xe0, 0x7a, 0x6d), (0xe0, 0x74, 0x6a), (0xe0, 0x7c, 0x57), (0xe1, 0x77, 0x62),
    // The keypad's operators.
    (0xe0, 0x4a, 0x77), (0, 0x7c, 0x7e), (0, 0x7b, 0x84), (0, 0x79, 0x7c), (0xe0, 0x5a, 0x79),
    // Keys whose set-2 codes mean another key in set 3.
    (0, 0x13, 0x13), (0, 0x51, 0x51), (0, 0x64, 0x85), (0, 0x67, 0x86), (0, 0x6a, 0x5d), (0, 0x6d, 0x7b),
];

/// Set 3's code of a key; `None` for what is no key, as the shifts that set 2 sends around some.
fn set_3(prefix: u8, code: u8) -> Option<u8> {
    let listed = SET_3.iter().find(|key| (key.0, key.1) == (prefix, code)).map(|key| key.2);
    listed.or((prefix == 0).then_some(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(set: Set, breaks: bool, codes: &[u8]) -> Vec<u8> {
        let mut converter = Converter::new(set);
        converter.set_breaks(breaks);
        codes.iter().flat_map(|&code| converter.convert(code)).collect()
    }

    /// A down and up, right control down and up, pause, print screen down.
    const KEYS: [u8; 20] = [
        0x1c, 0xf0, 0x1c, 0xe0, 0x14, 0xe0, 0xf0, 0x14, 0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77, 0xe0,
        0x12, 0xe0, 0x7c,
    ];

    #[test]
    fn set_1_marks_releases_with_the_highest_bit() {
        let expected =
            [0x1e, 0x9e, 0xe0, 0x1d, 0xe0, 0x9d, 0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5, 0xe0, 0x2a, 0xe0, 0x37];
        assert_eq!(converted(Set::One, false, &KEYS), expected);
    }

    #[test]
    fn set_2_is_what_comes_in() {
        assert_eq!(converted(Set::Two, false, &KEYS), KEYS);
    }

    #[test]
    fn set_3_has_one_byte_for_each_key_and_tells_releases_of_modifiers_or_of_all() {
        assert_eq!(converted(Set::Three, false, &KEYS), [0x1c, 0x58, 0xf0, 0x58, 0x62, 0x57]);
        let all = [0x1c, 0xf0, 0x1c, 0x58, 0xf0, 0x58, 0x62, 0xf0, 0x62, 0x57];
        assert_eq!(converted(Set::Three, true, &KEYS), all);
    }

    #[test]
    fn no_two_keys_share_a_code_in_set_3() {
        // Set 1's codes of keys end with that of F12, and 0x55 is none.
        let is_key = |code: &u8| SET_1[usize::from(*code)] < 0x59 && SET_1[usize::from(*code)] != 0x55;
        let keys = (0..0x84).filter(is_key).map(|code| (0, code));
        let extended = SET_3.iter().filter(|key| key.0 != 0).map(|key| (key.0, key.1));
        let mut codes: Vec<_> =
            keys.chain(extended).filter_map(|(prefix, code)| set_3(prefix, code)).collect();
        codes.sort_unstable();
        let all = codes.len();
        codes.dedup();
        assert_eq!(codes.len(), all);
    }
}
