//! The keyboard behind the controller, as it speaks over its own wire: scan code set 2 unless the host asks for another,
//! and the commands of the IBM PS/2 Technical Reference.

use std::collections::VecDeque;

use super::scan_codes::{Converter, Set};

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
    pub(super) const ALL_KEYS_MAKE_BREAK: u8 = 0xf8;
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
    converter: Converter,
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
            converter: Converter::default(),
            answers: VecDeque::new(),
            keys: VecDeque::new(),
        }
    }

    pub(super) fn lamps(&self) -> u8 {
        self.lamps
    }

    /// All of `codes`, which are of set 2, or none.
    pub(super) fn push_scan_codes(&mut self, codes: &[u8]) -> bool {
        let fits = self.enabled && codes.len() <= QUEUE.saturating_sub(self.keys.len());
        if fits {
            // No set has more bytes for a key than set 2.
            let converter = &mut self.converter;
            self.keys.extend(codes.iter().flat_map(|&code| converter.convert(code)));
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
            (Expects::ScanCodeSet, 0) => self.answer(&[ACKNOWLEDGE, self.converter.set() as u8]),
            (Expects::ScanCodeSet, _) => match Set::from_number(value) {
                Some(set) => {
                    self.converter = Converter::new(set);
                    self.keys.clear();
                    self.answer(&[ACKNOWLEDGE]);
                }
                None => self.answer(&[RESEND]),
            },
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
                self.converter = Converter::new(self.converter.set());
                self.keys.clear();
                self.answer(&[ACKNOWLEDGE]);
            }
            command::SET_ALL_KEYS..=command::SET_ALL_KEYS_END => {
                let breaks = matches!(value, command::ALL_KEYS_MAKE_BREAK | command::SET_ALL_KEYS_END);
                self.converter.set_breaks(breaks);
                self.answer(&[ACKNOWLEDGE]);
            }
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
