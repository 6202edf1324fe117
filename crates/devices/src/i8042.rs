//! The keyboard controller: an i8042 as the IBM PS/2 Technical Reference has it, ports 0x60 and 0x64, with a keyboard
//! and a mouse at its auxiliary port.
//!
//! ```text
//!  keyboard ── queue ──> translation ──> output buffer ──> port 0x60 (IRQ 1; of the mouse IRQ 12)
//!     ^                                    ^      ^
//!     └──── port 0x60 ──── controller ─────┘      │
//!  mouse <── after 0xd4 ───┘ └────────────────────┘ answers to commands at port 0x64
//!     └──── queue ───> output buffer
//! ```
//!
//! The controller has no time: it takes each byte at once, so its input buffer is never full.

use std::collections::VecDeque;

use bitflags::bitflags;

use crate::bus::{ByteDevice, Window};
use crate::irq::IrqLine;
use crate::request::{MachineRequest, RequestSink};
use engine::Space;

mod keyboard;
mod mouse;
mod scan_codes;

use keyboard::Keyboard;
use mouse::Mouse;

/// The keyboard's ISA interrupt.
pub const KEYBOARD_IRQ: u32 = 1;
/// The mouse's.
pub const MOUSE_IRQ: u32 = 12;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Where the device has its registers: the port between them is not its.
pub const WINDOWS: [Window; 2] = [
    Window { space: Space::Port, base: 0x60, len: 1, offset: DATA },
    Window { space: Space::Port, base: 0x64, len: 1, offset: COMMAND },
];

bitflags! {
    /// Status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u8 {
        /// There is a byte to read.
        const OUTPUT_FULL = 1 << 0;
        /// The controller has been tested.
        const SYSTEM = 1 << 2;
        /// The last write was a command.
        const COMMAND = 1 << 3;
        /// The keyboard is not locked.
        const UNLOCKED = 1 << 4;
        /// What there is to read is of the auxiliary port.
        const AUX = 1 << 5;
    }

    /// The controller's configuration ("command byte").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Config: u8 {
        const KEYBOARD_INTERRUPT = 1 << 0;
        const AUX_INTERRUPT = 1 << 1;
        const SYSTEM = 1 << 2;
        const KEYBOARD_DISABLED = 1 << 4;
        const AUX_DISABLED = 1 << 5;
        /// Scan codes of set 2 become those of set 1.
        const TRANSLATE = 1 << 6;
    }

    /// Output port.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct OutputPort: u8 {
        /// Low: the processor is held in reset.
        const NO_RESET = 1 << 0;
        const A20 = 1 << 1;
        /// The output buffer is full of the keyboard's, or of the controller's own.
        const KEYBOARD_FULL = 1 << 4;
        /// It is full of the auxiliary port's.
        const AUX_FULL = 1 << 5;
        const _ = !0;
    }
}

impl Config {
    /// As firmware leaves it.
    const INITIAL: Self =
        Self::KEYBOARD_INTERRUPT.union(Self::SYSTEM).union(Self::AUX_DISABLED).union(Self::TRANSLATE);
}

/// Commands at port 0x64.
mod command {
    pub(super) const READ_RAM: u8 = 0x20;
    pub(super) const READ_RAM_END: u8 = 0x3f;
    pub(super) const WRITE_RAM: u8 = 0x60;
    pub(super) const WRITE_RAM_END: u8 = 0x7f;
    pub(super) const DISABLE_AUX: u8 = 0xa7;
    pub(super) const ENABLE_AUX: u8 = 0xa8;
    pub(super) const TEST_AUX: u8 = 0xa9;
    pub(super) const SELF_TEST: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD: u8 = 0xab;
    pub(super) const DISABLE_KEYBOARD: u8 = 0xad;
    pub(super) const ENABLE_KEYBOARD: u8 = 0xae;
    pub(super) const READ_INPUT_PORT: u8 = 0xc0;
    pub(super) const READ_OUTPUT_PORT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub(super) const WRITE_KEYBOARD_OUTPUT: u8 = 0xd2;
    pub(super) const WRITE_AUX_OUTPUT: u8 = 0xd3;
    pub(super) const WRITE_AUX: u8 = 0xd4;
    pub(super) const READ_TEST_INPUTS: u8 = 0xe0;
    pub(super) const PULSE_OUTPUT_PORT: u8 = 0xf0;
}

/// The answer to the self-test.
const SELF_TEST_PASSED: u8 = 0x55;
/// The answer to a test of a port whose lines are as they should be.
const PORT_TEST_PASSED: u8 = 0;
/// The input port: keyboard not locked, colour display, manufacturing jumper open.
const INPUT_PORT: u8 = 0xa0;
/// Answers of the controller that wait to be read, at most.
const ANSWERS: usize = 16;

/// What the next byte at port 0x60 is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    KeyboardByte,
    Ram(u8),
    OutputPort,
    KeyboardOutput,
    AuxOutput,
    AuxByte,
}

/// A byte in the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Output {
    byte: u8,
    /// AUX, or nothing.
    source: Status,
}

/// The controller, its keyboard and its mouse.
#[derive(Debug)]
pub struct I8042 {
    config: Config,
    ram: [u8; 32],
    output_port: OutputPort,
    expects: Expects,
    last_was_command: bool,
    /// What port 0x60 gives, again and again until there is something new.
    data: u8,
    output: Option<Output>,
    answers: VecDeque<Output>,
    keyboard: Keyboard,
    /// The keyboard has sent the prefix of a key's release, which translation holds back.
    release: bool,
    mouse: Mouse,
    /// The keyboard's interrupt and the mouse's.
    irqs: [IrqLine; 2],
    requests: RequestSink,
}

impl I8042 {
    /// A controller that firmware has tested, with `irqs` as the keyboard's and the mouse's interrupts.
    pub fn new(irqs: [IrqLine; 2], requests: RequestSink) -> Self {
        Self {
            config: Config::INITIAL,
            ram: [0; 32],
            output_port: OutputPort::NO_RESET | OutputPort::A20,
            expects: Expects::KeyboardByte,
            last_was_command: false,
            data: 0,
            output: None,
            answers: VecDeque::new(),
            keyboard: Keyboard::new(),
            release: false,
            mouse: Mouse::new(),
            irqs,
            requests,
        }
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.irqs.iter().for_each(|irq| irq.set(false));
        *self = Self::new(self.irqs.clone(), self.requests.clone());
    }

    /// Keys: bytes of scan code set 2, as a keyboard sends them. All of them are taken, or none where there is no room
    /// for all or the guest has not enabled the keyboard.
    pub fn push_scan_codes(&mut self, codes: &[u8]) -> bool {
        let taken = self.keyboard.push_scan_codes(codes);
        self.fill_output();
        taken
    }

    /// The mouse moves by so many counts to the right, up and of the wheel; `buttons` are those that are down: bit 0 the
    /// left one, bit 1 the right one, bit 2 the middle one.
    pub fn push_motion(&mut self, motion: [i16; 3], buttons: u8) {
        self.mouse.push_motion(motion, buttons);
        self.fill_output();
    }

    /// The state of the keyboard's lamps: bit 0 scroll lock, bit 1 num lock, bit 2 caps lock.
    pub fn lamps(&self) -> u8 {
        self.keyboard.lamps()
    }

    fn status(&self) -> Status {
        let mut status = Status::UNLOCKED;
        status.set(Status::SYSTEM, self.config.contains(Config::SYSTEM));
        status.set(Status::COMMAND, self.last_was_command);
        if let Some(output) = self.output {
            status |= Status::OUTPUT_FULL | output.source;
        }
        status
    }

    /// Moves the next byte into the output buffer if that is free: answers first, then the keyboard's, then the mouse's.
    fn fill_output(&mut self) {
        if self.output.is_none() {
            let next = self.answers.pop_front().or_else(|| self.next_key()).or_else(|| self.next_motion());
            if let Some(next) = next {
                self.data = next.byte;
                self.output = Some(next);
            }
        }
        self.update_irqs();
    }

    /// Each port's interrupt is up while a byte of it waits to be read.
    fn update_irqs(&self) {
        let of_aux = self.output.map(|output| output.source.contains(Status::AUX));
        self.irqs[0].set(of_aux == Some(false) && self.config.contains(Config::KEYBOARD_INTERRUPT));
        self.irqs[1].set(of_aux == Some(true) && self.config.contains(Config::AUX_INTERRUPT));
    }

    fn next_key(&mut self) -> Option<Output> {
        if self.config.contains(Config::KEYBOARD_DISABLED) {
            return None;
        }
        loop {
            let byte = self.keyboard.take()?;
            if let Some(byte) = self.translated(byte) {
                return Some(Output { byte, source: Status::empty() });
            }
        }
    }

    fn next_motion(&mut self) -> Option<Output> {
        if self.config.contains(Config::AUX_DISABLED) {
            return None;
        }
        Some(Output { byte: self.mouse.take()?, source: Status::AUX })
    }

    /// What the guest sees of a byte from the keyboard; nothing yet of a prefix that belongs to the next.
    fn translated(&mut self, byte: u8) -> Option<u8> {
        if !self.config.contains(Config::TRANSLATE) {
            return Some(byte);
        }
        if byte == scan_codes::RELEASE {
            self.release = true;
            return None;
        }
        let release = std::mem::take(&mut self.release);
        Some(scan_codes::set_1(byte) | if release { 0x80 } else { 0 })
    }

    fn answer(&mut self, byte: u8, source: Status) {
        // A guest that asks and never reads loses the answers, not our memory.
        if self.answers.len() < ANSWERS {
            self.answers.push_back(Output { byte, source });
        }
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.data;
        if self.output.take().is_some() {
            // The lines fall before they rise for the next byte.
            self.update_irqs();
            self.fill_output();
        }
        byte
    }

    fn write_command(&mut self, value: u8) {
        self.last_was_command = true;
        self.expects = Expects::KeyboardByte;
        let none = Status::empty();
        match value {
            command::READ_RAM..=command::READ_RAM_END => self.answer(self.read_ram(value & 0x1f), none),
            command::WRITE_RAM..=command::WRITE_RAM_END => self.expects = Expects::Ram(value & 0x1f),
            command::DISABLE_AUX => self.config |= Config::AUX_DISABLED,
            command::ENABLE_AUX => self.config -= Config::AUX_DISABLED,
            command::TEST_AUX | command::TEST_KEYBOARD => self.answer(PORT_TEST_PASSED, none),
            command::SELF_TEST => {
                self.config |= Config::SYSTEM;
                self.answer(SELF_TEST_PASSED, none);
            }
            command::DISABLE_KEYBOARD => self.config |= Config::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.config -= Config::KEYBOARD_DISABLED,
            command::READ_INPUT_PORT => self.answer(INPUT_PORT, none),
            command::READ_OUTPUT_PORT => self.answer(self.read_output_port().bits(), none),
            command::WRITE_OUTPUT_PORT => self.expects = Expects::OutputPort,
            command::WRITE_KEYBOARD_OUTPUT => self.expects = Expects::KeyboardOutput,
            command::WRITE_AUX_OUTPUT => self.expects = Expects::AuxOutput,
            command::WRITE_AUX => self.expects = Expects::AuxByte,
            command::READ_TEST_INPUTS => self.answer(0, none),
            command::PULSE_OUTPUT_PORT.. => {
                // The bits that are zero are pulsed low; only the reset line listens.
                if value & OutputPort::NO_RESET.bits() == 0 {
                    self.requests.send(MachineRequest::Reset("i8042 pulse"));
                }
            }
            _ => log::debug!("i8042: unknown command {value:#04x}"),
        }
        self.fill_output();
    }

    fn write_data(&mut self, value: u8) {
        self.last_was_command = false;
        match std::mem::replace(&mut self.expects, Expects::KeyboardByte) {
            Expects::KeyboardByte => {
                // Sending to the keyboard enables its clock.
                self.config -= Config::KEYBOARD_DISABLED;
                self.keyboard.command(value);
            }
            Expects::Ram(0) => self.write_config(value),
            Expects::Ram(index) => self.ram[usize::from(index & 0x1f)] = value,
            Expects::OutputPort => {
                self.output_port = OutputPort::from_bits_retain(value);
                if !self.output_port.contains(OutputPort::NO_RESET) {
                    self.requests.send(MachineRequest::Reset("i8042 output port"));
                }
            }
            Expects::KeyboardOutput => self.answer(value, Status::empty()),
            Expects::AuxOutput => self.answer(value, Status::AUX),
            Expects::AuxByte => {
                // As with the keyboard.
                self.config -= Config::AUX_DISABLED;
                self.mouse.command(value);
            }
        }
        self.fill_output();
    }

    /// The controller's memory, whose first byte is the configuration.
    fn read_ram(&self, index: u8) -> u8 {
        if index == 0 { self.config.bits() } else { self.ram[usize::from(index & 0x1f)] }
    }

    /// The caller looks for what the ports may send now.
    fn write_config(&mut self, value: u8) {
        self.config = Config::from_bits_truncate(value);
    }

    /// The output port: what was written there, and the interrupts.
    fn read_output_port(&self) -> OutputPort {
        let mut port = self.output_port - (OutputPort::KEYBOARD_FULL | OutputPort::AUX_FULL);
        match self.output {
            Some(output) if output.source.contains(Status::AUX) => port |= OutputPort::AUX_FULL,
            Some(_) => port |= OutputPort::KEYBOARD_FULL,
            None => {}
        }
        port
    }
}

impl ByteDevice for I8042 {
    fn read_register(&mut self, offset: u64) -> u8 {
        match offset {
            DATA => self.read_data(),
            COMMAND => self.status().bits(),
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            DATA => self.write_data(value),
            COMMAND => self.write_command(value),
            _ => {}
        }
    }

    fn register_name(&self, offset: u64, write: bool) -> &'static str {
        match (offset, write) {
            (DATA, _) => "DATA",
            (COMMAND, false) => "STATUS",
            (COMMAND, true) => "COMMAND",
            _ => "none",
        }
    }

    fn lose_power(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::irq::RecordedLines;

    type Requests = Arc<Mutex<Vec<MachineRequest>>>;

    fn controller() -> (I8042, Arc<RecordedLines>, Requests) {
        let lines = RecordedLines::new();
        let (sink, requests) = RequestSink::recording();
        (I8042::new([KEYBOARD_IRQ, MOUSE_IRQ].map(|irq| lines.line(irq)), sink), lines, requests)
    }

    fn command(controller: &mut I8042, command: u8, data: &[u8]) -> Vec<u8> {
        controller.write_register(COMMAND, command);
        data.iter().for_each(|&byte| controller.write_register(DATA, byte));
        drain(controller)
    }

    fn keyboard(controller: &mut I8042, data: &[u8]) -> Vec<u8> {
        data.iter().for_each(|&byte| controller.write_register(DATA, byte));
        drain(controller)
    }

    fn drain(controller: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while controller.read_register(COMMAND) & 1 != 0 {
            bytes.push(controller.read_register(DATA));
        }
        bytes
    }

    #[test]
    fn linux_finds_a_controller_with_a_keyboard_and_a_mouse() {
        // The steps of the i8042 driver, in its order.
        let (mut controller, ..) = controller();
        assert_eq!(command(&mut controller, 0x20, &[]), [0x65]);
        assert_eq!(command(&mut controller, 0x60, &[0x74]), []);
        assert_eq!(command(&mut controller, 0x20, &[]), [0x74]);
        controller.write_register(COMMAND, 0xd3);
        controller.write_register(DATA, 0x5a);
        assert_eq!(controller.read_register(COMMAND) & 0x21, 0x21, "the loop test gives auxiliary data");
        assert_eq!(drain(&mut controller), [0x5a]);
        assert_eq!(command(&mut controller, 0xa9, &[]), [0x00]);
        for (enable, config) in [(0xa7, 0x74), (0xa8, 0x54), (0xa7, 0x74)] {
            command(&mut controller, enable, &[]);
            assert_eq!(command(&mut controller, 0x20, &[]), [config]);
        }
        assert_eq!(command(&mut controller, 0xaa, &[]), [0x55]);
        assert_eq!(command(&mut controller, 0xab, &[]), [0x00]);
        assert_eq!(command(&mut controller, 0x60, &[0x65]), []);
        // And of the keyboard's driver.
        assert_eq!(keyboard(&mut controller, &[0xff]), [0xfa, 0xaa]);
        assert_eq!(keyboard(&mut controller, &[0xf2]), [0xfa, 0xab, 0x41]);
        assert_eq!(keyboard(&mut controller, &[0xed, 0x04]), [0xfa, 0xfa]);
        assert_eq!(controller.lamps(), 4);
        assert_eq!(keyboard(&mut controller, &[0xf3, 0x00]), [0xfa, 0xfa]);
        assert_eq!(keyboard(&mut controller, &[0xf4]), [0xfa]);
    }

    #[test]
    fn keys_come_translated_one_interrupt_each() {
        let (mut controller, lines, _) = controller();
        keyboard(&mut controller, &[0xf4]);
        lines.take_changes();
        // A down and up, cursor up down and up.
        assert!(controller.push_scan_codes(&[0x1c, 0xf0, 0x1c, 0xe0, 0x75, 0xe0, 0xf0, 0x75]));
        assert_eq!(drain(&mut controller), [0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8]);
        assert_eq!(lines.take_edges(KEYBOARD_IRQ), 6);
        assert!(!lines.level(KEYBOARD_IRQ));
    }

    #[test]
    fn without_translation_keys_come_as_they_are() {
        let (mut controller, ..) = controller();
        command(&mut controller, 0x60, &[0x25]);
        keyboard(&mut controller, &[0xf4]);
        controller.push_scan_codes(&[0x1c, 0xf0, 0x1c]);
        assert_eq!(drain(&mut controller), [0x1c, 0xf0, 0x1c]);
        assert_eq!(keyboard(&mut controller, &[0xf2]), [0xfa, 0xab, 0x83]);
    }

    #[test]
    fn the_keyboard_speaks_the_set_that_it_is_told_to() {
        let (mut controller, ..) = controller();
        command(&mut controller, 0x60, &[0x25]);
        for (set, expected) in
            [(1, &[0x1e, 0x9e, 0xe0, 0x1d][..]), (3, &[0x1c, 0x58]), (2, &[0x1c, 0xf0, 0x1c, 0xe0, 0x14])]
        {
            assert_eq!(keyboard(&mut controller, &[0xf0, set]), [0xfa, 0xfa]);
            assert_eq!(keyboard(&mut controller, &[0xf0, 0]), [0xfa, 0xfa, set]);
            controller.push_scan_codes(&[0x1c, 0xf0, 0x1c, 0xe0, 0x14]);
            assert_eq!(drain(&mut controller), expected, "set {set}");
        }
        assert_eq!(keyboard(&mut controller, &[0xf0, 4]), [0xfa, 0xfe]);
        assert_eq!(keyboard(&mut controller, &[0xf0, 3]), [0xfa, 0xfa]);
        assert_eq!(keyboard(&mut controller, &[0xf8]), [0xfa]);
        controller.push_scan_codes(&[0x1c, 0xf0, 0x1c]);
        assert_eq!(drain(&mut controller), [0x1c, 0xf0, 0x1c]);
        assert_eq!(keyboard(&mut controller, &[0xff]), [0xfa, 0xaa]);
        assert_eq!(keyboard(&mut controller, &[0xf0, 0]), [0xfa, 0xfa, 2]);
    }

    #[test]
    fn a_disabled_keyboard_keeps_its_bytes() {
        let (mut controller, lines, _) = controller();
        keyboard(&mut controller, &[0xf4]);
        command(&mut controller, 0xad, &[]);
        controller.push_scan_codes(&[0x1c]);
        assert_eq!(drain(&mut controller), []);
        lines.take_changes();
        controller.write_register(COMMAND, 0xae);
        assert!(lines.level(KEYBOARD_IRQ));
        assert_eq!(drain(&mut controller), [0x1e]);
    }

    #[test]
    fn the_reset_pulse_and_the_output_port_reset() {
        let (mut controller, _, requests) = controller();
        controller.write_register(COMMAND, 0xff);
        command(&mut controller, 0xd1, &[0xdf]);
        assert!(requests.lock().unwrap().is_empty());
        controller.write_register(COMMAND, 0xfe);
        command(&mut controller, 0xd1, &[0xde]);
        let who = ["i8042 pulse", "i8042 output port"].map(MachineRequest::Reset);
        assert_eq!(*requests.lock().unwrap(), who);
    }

    #[test]
    fn the_gate_of_a20_reads_back() {
        let (mut controller, ..) = controller();
        assert_eq!(command(&mut controller, 0xd0, &[]), [0x03]);
        assert_eq!(command(&mut controller, 0xd1, &[0xdd]), []);
        assert_eq!(
            command(&mut controller, 0xd0, &[]),
            [0xcd],
            "bits 4 and 5 are the interrupts, and nothing waits"
        );
    }

    #[test]
    fn the_mouse_has_its_own_interrupt_and_says_whose_its_bytes_are() {
        let (mut controller, lines, _) = controller();
        command(&mut controller, 0x60, &[0x47]);
        lines.take_changes();
        controller.write_register(COMMAND, 0xd4);
        controller.write_register(DATA, 0xff);
        assert_eq!(controller.read_register(COMMAND) & 0x21, 0x21);
        assert_eq!(drain(&mut controller), [0xfa, 0xaa, 0x00]);
        let rises = |irq| move |change: &&(u32, bool)| **change == (irq, true);
        let changes = lines.take_changes();
        assert_eq!(changes.iter().filter(rises(MOUSE_IRQ)).count(), 3);
        assert_eq!(changes.iter().filter(rises(KEYBOARD_IRQ)).count(), 0);
        assert!(!lines.level(MOUSE_IRQ));
        assert_eq!(command(&mut controller, 0xd4, &[0xf4]), [0xfa]);
        controller.push_motion([1, 2, 0], 4);
        assert!(lines.level(MOUSE_IRQ));
        assert_eq!(drain(&mut controller), [0x0c, 1, 2]);
    }

    #[test]
    fn a_disabled_auxiliary_port_keeps_its_bytes_while_the_keyboards_come() {
        let (mut controller, ..) = controller();
        command(&mut controller, 0xd4, &[0xf4]);
        keyboard(&mut controller, &[0xf4]);
        command(&mut controller, 0xa7, &[]);
        controller.push_motion([1, 2, 0], 0);
        controller.push_scan_codes(&[0x1c]);
        assert_eq!(drain(&mut controller), [0x1e]);
        assert_eq!(command(&mut controller, 0xa8, &[]), [0x08, 1, 2]);
    }

    #[test]
    fn the_output_port_shows_whose_byte_waits() {
        let (mut controller, lines, _) = controller();
        command(&mut controller, 0x60, &[0x47]);
        controller.write_register(COMMAND, 0xd3);
        controller.write_register(DATA, 0x5a);
        assert!(lines.level(MOUSE_IRQ) && !lines.level(KEYBOARD_IRQ));
        controller.write_register(COMMAND, 0xd0);
        assert_eq!(drain(&mut controller), [0x5a, 0x23]);
        controller.write_register(COMMAND, 0xd2);
        controller.write_register(DATA, 0x5b);
        assert!(lines.level(KEYBOARD_IRQ) && !lines.level(MOUSE_IRQ));
        controller.write_register(COMMAND, 0xd0);
        assert_eq!(drain(&mut controller), [0x5b, 0x13]);
    }

    #[test]
    fn commands_whose_answers_nobody_reads_stay_bounded() {
        let (mut controller, ..) = controller();
        for _ in 0..10_000 {
            controller.write_register(COMMAND, 0x20);
            controller.write_register(DATA, 0xf2);
        }
        assert!(drain(&mut controller).len() < 100);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|_| {
            let mut controller =
                I8042::new([(); 2].map(|()| IrqLine::unconnected()), RequestSink::recording().0);
            controller.write_register(DATA, 0xf4);
            controller.push_scan_codes(&[0x1c, 0xf0]);
            Arc::new(Mutex::new(controller))
        });
    }
}
