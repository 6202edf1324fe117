//! The mouse behind the controller, as it speaks over its own wire: the commands of the IBM PS/2 Technical Reference,
//! and the wheel of Microsoft's IntelliMouse.
//!
//! ```text
//!            EA               stream: a packet when it moves (once F4 has allowed it)
//!   stream <────> remote      remote: a packet when EB asks
//!        \\  F0  /             wrap: each byte comes back, but for EC and FF
//!     EE  wrap  EC
//! ```

use std::collections::VecDeque;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

mod command {
    pub(super) const SCALING_1_TO_1: u8 = 0xe6;
    pub(super) const SCALING_2_TO_1: u8 = 0xe7;
    pub(super) const SET_RESOLUTION: u8 = 0xe8;
    pub(super) const STATUS: u8 = 0xe9;
    pub(super) const STREAM_MODE: u8 = 0xea;
    pub(super) const READ_DATA: u8 = 0xeb;
    pub(super) const RESET_WRAP: u8 = 0xec;
    pub(super) const WRAP_MODE: u8 = 0xee;
    pub(super) const REMOTE_MODE: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const SET_RATE: u8 = 0xf3;
    pub(super) const ENABLE: u8 = 0xf4;
    pub(super) const DISABLE: u8 = 0xf5;
    pub(super) const SET_DEFAULTS: u8 = 0xf6;
    pub(super) const RESEND: u8 = 0xfe;
    pub(super) const RESET: u8 = 0xff;
}

/// Bits of the status byte.
mod status {
    pub(super) const SCALING: u8 = 1 << 4;
    pub(super) const ENABLED: u8 = 1 << 5;
    pub(super) const REMOTE: u8 = 1 << 6;
}

/// Bits of a packet's first byte; the buttons are bits 0 to 2 of both.
mod packet {
    pub(super) const ALWAYS: u8 = 1 << 3;
    pub(super) const X_NEGATIVE: u8 = 1 << 4;
    pub(super) const Y_NEGATIVE: u8 = 1 << 5;
}

const BUTTONS: u8 = 7;
/// Bytes of packets that it keeps for a host that does not listen.
const QUEUE: usize = 64;
/// Samples per second that, set one after another, turn the wheel on.
const WHEEL_KNOCK: [u8; 3] = [200, 100, 80];

/// What the next byte from the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Command,
    Resolution,
    Rate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stream,
    Remote,
    /// And whether it comes back to the remote mode.
    Wrap(bool),
}

/// A mouse.
#[derive(Debug)]
pub(super) struct Mouse {
    enabled: bool,
    mode: Mode,
    expects: Expects,
    scaling: bool,
    resolution: u8,
    rate: u8,
    /// The last rates that were set, the latest last.
    knocks: [u8; 3],
    has_wheel: bool,
    buttons: u8,
    /// What has moved since the last packet.
    moved: [i32; 3],
    last_sent: u8,
    /// Answers; they go before packets.
    answers: VecDeque<u8>,
    packets: VecDeque<u8>,
}

impl Mouse {
    /// A mouse after its self-test: it sends nothing until it is enabled.
    pub(super) fn new() -> Self {
        Self {
            enabled: false,
            mode: Mode::Stream,
            expects: Expects::Command,
            scaling: false,
            resolution: 2,
            rate: 100,
            knocks: [0; 3],
            has_wheel: false,
            buttons: 0,
            moved: [0; 3],
            last_sent: 0,
            answers: VecDeque::new(),
            packets: VecDeque::new(),
        }
    }

    /// It moves by so many counts to the right, up and of the wheel, and these are the buttons that are down: bit 0
    /// the left one, bit 1 the right one, bit 2 the middle one.
    pub(super) fn push_motion(&mut self, [x, y, wheel]: [i16; 3], buttons: u8) {
        for (sum, by) in self.moved.iter_mut().zip([x, y, wheel]) {
            *sum = sum.saturating_add(by.into());
        }
        self.buttons = buttons & BUTTONS;
        if self.mode == Mode::Stream && self.enabled && self.packets.len() < QUEUE {
            let packet = self.packet();
            self.packets.extend(packet);
        }
    }

    /// A packet of what has moved, as far as it fits; the rest is for the next one.
    fn packet(&mut self) -> Vec<u8> {
        let mut take = |axis: usize, limit: i32| {
            let by = self.moved[axis].clamp(-limit - 1, limit);
            self.moved[axis] -= by;
            by
        };
        let (x, y, wheel) = (take(0, 255), take(1, 255), take(2, 7));
        let mut first = packet::ALWAYS | self.buttons;
        first |= if x < 0 { packet::X_NEGATIVE } else { 0 };
        first |= if y < 0 { packet::Y_NEGATIVE } else { 0 };
        let mut bytes = vec![first, x as u8, y as u8];
        if self.has_wheel {
            // Towards the user is positive.
            bytes.push(wheel.wrapping_neg() as u8);
        }
        bytes
    }

    /// The next byte for the host.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.answers.pop_front().or_else(|| self.packets.pop_front())?;
        self.last_sent = byte;
        Some(byte)
    }

    /// A byte from the host.
    pub(super) fn command(&mut self, value: u8) {
        // A new byte ends what the mouse was about to say.
        self.answers.clear();
        if let Mode::Wrap(_) = self.mode
            && !matches!(value, command::RESET_WRAP | command::RESET)
        {
            return self.answer(&[value]);
        }
        match std::mem::replace(&mut self.expects, Expects::Command) {
            Expects::Command => self.begin(value),
            Expects::Resolution if value < 4 => {
                self.resolution = value;
                self.answer(&[ACKNOWLEDGE]);
            }
            Expects::Resolution => self.answer(&[RESEND]),
            Expects::Rate => {
                self.rate = value;
                self.knocks = [self.knocks[1], self.knocks[2], value];
                self.answer(&[ACKNOWLEDGE]);
            }
        }
    }

    fn begin(&mut self, value: u8) {
        match value {
            command::SCALING_1_TO_1 | command::SCALING_2_TO_1 => {
                self.scaling = value == command::SCALING_2_TO_1;
            }
            command::SET_RESOLUTION => self.expects = Expects::Resolution,
            command::STATUS => return self.answer_status(),
            command::STREAM_MODE => self.enter(Mode::Stream),
            command::READ_DATA => {
                let packet = self.packet();
                self.answer(&[ACKNOWLEDGE]);
                return self.answer(&packet);
            }
            command::RESET_WRAP => {
                if let Mode::Wrap(remote) = self.mode {
                    self.enter(if remote { Mode::Remote } else { Mode::Stream });
                }
            }
            command::WRAP_MODE => self.enter(Mode::Wrap(self.mode == Mode::Remote)),
            command::REMOTE_MODE => self.enter(Mode::Remote),
            command::IDENTIFY => {
                self.has_wheel |= self.knocks == WHEEL_KNOCK;
                return self.answer(&[ACKNOWLEDGE, if self.has_wheel { 3 } else { 0 }]);
            }
            command::SET_RATE => self.expects = Expects::Rate,
            command::ENABLE | command::DISABLE => {
                self.enabled = value == command::ENABLE;
                self.forget();
            }
            command::SET_DEFAULTS => self.set_defaults(),
            command::RESEND => return self.answer(&[self.last_sent]),
            command::RESET => {
                *self = Self::new();
                return self.answer(&[ACKNOWLEDGE, SELF_TEST_PASSED, 0]);
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACKNOWLEDGE]);
    }

    fn enter(&mut self, mode: Mode) {
        self.mode = mode;
        self.forget();
    }

    /// What has moved so far is of no interest any more.
    fn forget(&mut self) {
        self.packets.clear();
        self.moved = [0; 3];
    }

    fn set_defaults(&mut self) {
        let (has_wheel, buttons, last_sent) = (self.has_wheel, self.buttons, self.last_sent);
        *self = Self { has_wheel, buttons, last_sent, ..Self::new() };
    }

    fn answer_status(&mut self) {
        // The left button is bit 2 here, the right one bit 0.
        let buttons = (self.buttons & 1) << 2 | (self.buttons & 4) >> 1 | (self.buttons & 2) >> 1;
        let mut first = buttons;
        first |= if self.scaling { status::SCALING } else { 0 };
        first |= if self.enabled { status::ENABLED } else { 0 };
        first |= if self.mode == Mode::Remote { status::REMOTE } else { 0 };
        self.answer(&[ACKNOWLEDGE, first, self.resolution, self.rate]);
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.answers.extend(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(mouse: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        let mut heard = Vec::new();
        for &byte in bytes {
            mouse.command(byte);
            heard.extend(std::iter::from_fn(|| mouse.take()));
        }
        heard
    }

    #[test]
    fn it_says_nothing_until_it_is_enabled_and_then_what_moved() {
        let mut mouse = Mouse::new();
        assert_eq!(say(&mut mouse, &[0xff]), [0xfa, 0xaa, 0x00]);
        mouse.push_motion([5, 5, 0], 1);
        assert_eq!(mouse.take(), None);
        assert_eq!(say(&mut mouse, &[0xf4]), [0xfa]);
        mouse.push_motion([5, -3, 0], 2);
        assert_eq!(say(&mut mouse, &[]), []);
        assert_eq!([(); 4].map(|()| mouse.take()), [Some(0x2a), Some(5), Some(0xfd), None]);
    }

    #[test]
    fn a_long_way_takes_several_packets() {
        let mut mouse = Mouse::new();
        say(&mut mouse, &[0xf0]);
        mouse.push_motion([300, -300, 0], 0);
        assert_eq!(say(&mut mouse, &[0xeb, 0xeb]), [0xfa, 0x28, 255, 0, 0xfa, 0x28, 45, 212]);
    }

    #[test]
    fn the_wheel_is_there_for_those_who_knock() {
        let mut mouse = Mouse::new();
        assert_eq!(say(&mut mouse, &[0xf2]), [0xfa, 0x00]);
        say(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80]);
        assert_eq!(say(&mut mouse, &[0xf2]), [0xfa, 0x03]);
        say(&mut mouse, &[0xf4]);
        mouse.push_motion([0, 0, 1], 0);
        assert_eq!([(); 4].map(|()| mouse.take().unwrap()), [8, 0, 0, 0xff]);
    }

    #[test]
    fn the_status_tells_what_was_set() {
        let mut mouse = Mouse::new();
        assert_eq!(say(&mut mouse, &[0xe9]), [0xfa, 0x00, 2, 100]);
        say(&mut mouse, &[0xe7, 0xe8, 3, 0xf3, 40, 0xf4]);
        mouse.push_motion([0, 0, 0], 1);
        assert_eq!(say(&mut mouse, &[0xe9])[..4], [0xfa, 0x34, 3, 40]);
        assert_eq!(say(&mut mouse, &[0xf6, 0xe9]), [0xfa, 0xfa, 0x04, 2, 100]);
    }

    #[test]
    fn the_wrap_mode_echoes_until_it_is_left() {
        let mut mouse = Mouse::new();
        assert_eq!(say(&mut mouse, &[0xf0, 0xee, 0xf4, 0x12, 0xec]), [0xfa, 0xfa, 0xf4, 0x12, 0xfa]);
        assert_eq!(say(&mut mouse, &[0xe9]), [0xfa, 0x40, 2, 100]);
    }

    #[test]
    fn a_host_that_does_not_listen_costs_no_memory() {
        let mut mouse = Mouse::new();
        say(&mut mouse, &[0xf4]);
        for _ in 0..10_000 {
            mouse.push_motion([i16::MAX, i16::MIN, 9], 7);
        }
        assert!(mouse.packets.len() < 2 * QUEUE);
    }
}
