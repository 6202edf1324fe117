//! The keyboard behind the controller, as it speaks over its own wire: scan code set 2, and the commands of the IBM PS/2
//! Technical Reference.

use std::collections::VecDeque;

/// The prefix of a key's release in set 2.
pub(super) const RELEASE: u8 = 0xf0;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
const IDENTITY: [u8; 2] = [0xab, 0x83];

mod command {
    pub(super) const SET_LAMPS: u8 = 0xed;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const SCAN_CODE_SET: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const SET_REPEAT: u8 = 0xf3;
    pub(super) const ENABLE: u8 = 0xf4;
    pub(super) const DISABLE: u8 = 0xf5;
    pub(super) const SET_DEFAULTS: u8 = 0xf6;
    /// Four commands that set all keys of set 3 to something.
    pub(super) const SET_ALL_KEYS: u8 = 0xf7;
    pub(super) const SET_ALL_KEYS_END: u8 = 0xfa;
    pub(super) const RESEND: u8 = 0xfe;
    pub(super) const RESET: u8 = 0xff;
}

/// Bytes that a keyboard keeps for a host that does not listen.
const QUEUE: usize = 16;

/// What the next byte from the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Command,
    Lamps,
    Repeat,
    ScanCodeSet,
}

/// A keyboard.
#[derive(Debug)]
pub(super) struct Keyboard {
    enabled: bool,
    expects: Expects,
    lamps: u8,
    last_sent: u8,
    /// Answers; they go before keys.
    answers: VecDeque<u8>,
    keys: VecDeque<u8>,
}

impl Keyboard {
    /// A keyboard after its self-test, which sends what is typed.
    pub(super) fn new() -> Self {
        Self {
            enabled: true,
            expects: Expects::Command,
            lamps: 0,
            last_sent: 0,
            answers: VecDeque::new(),
            keys: VecDeque::new(),
        }
    }

    pub(super) fn lamps(&self) -> u8 {
        self.lamps
    }

    /// All of `codes`, or none.
    pub(super) fn push_scan_codes(&mut self, codes: &[u8]) -> bool {
        let fits = self.enabled && codes.len() <= QUEUE.saturating_sub(self.keys.len());
        if fits {
            self.keys.extend(codes);
        }
        fits
    }

    /// The next byte for the host.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.keys.pop_front())?;
        self.last_sent = byte;
        Some(byte)
    }

    /// A byte from the host.
    pub(super) fn command(&mut self, value: u8) {
        // A new byte ends what the keyboard was about to say.
        self.answers.clear();
        match (std::mem::replace(&mut self.expects, Expects::Command), value) {
            // A command in an argument's place is a command.
            (Expects::Command, _) | (_, command::SET_LAMPS..) => self.begin(value),
            (Expects::Lamps, _) => {
                self.lamps = value & 0x07;
                self.answer(&[ACKNOWLEDGE]);
            }
            (Expects::Repeat, _) => self.answer(&[ACKNOWLEDGE]),
            (Expects::ScanCodeSet, 0) => self.answer(&[ACKNOWLEDGE, 2]),
            (Expects::ScanCodeSet, 2) => self.answer(&[ACKNOWLEDGE]),
            (Expects::ScanCodeSet, _) => self.answer(&[RESEND]),
        }
    }

    fn begin(&mut self, value: u8) {
        match value {
            command::SET_LAMPS => self.acknowledge_and_expect(Expects::Lamps),
            command::ECHO => self.answer(&[command::ECHO]),
            command::SCAN_CODE_SET => self.acknowledge_and_expect(Expects::ScanCodeSet),
            command::IDENTIFY => self.answer(&[ACKNOWLEDGE, IDENTITY[0], IDENTITY[1]]),
            command::SET_REPEAT => self.acknowledge_and_expect(Expects::Repeat),
            command::ENABLE => {
                self.keys.clear();
                self.enabled = true;
                self.answer(&[ACKNOWLEDGE]);
            }
            command::DISABLE | command::SET_DEFAULTS => {
                self.enabled &= value == command::SET_DEFAULTS;
                self.keys.clear();
                self.answer(&[ACKNOWLEDGE]);
            }
            command::SET_ALL_KEYS..=command::SET_ALL_KEYS_END => self.answer(&[ACKNOWLEDGE]),
            command::RESEND => self.answer(&[self.last_sent]),
            command::RESET => {
                *self = Self::new();
                self.answer(&[ACKNOWLEDGE, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    fn acknowledge_and_expect(&mut self, expects: Expects) {
        self.expects = expects;
        self.answer(&[ACKNOWLEDGE]);
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.answers.extend(bytes);
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
