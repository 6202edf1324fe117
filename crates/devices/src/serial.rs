//! The 16550A serial port, as the data sheet "PC16550D Universal Asynchronous Receiver/Transmitter with FIFOs" has it.
//!
//! The line has no speed: what the guest sends goes to the [`SerialOutput`] at once, and the transmitter is empty again
//! before the guest can look, as long as the output takes what it is given. Where it does not, the bytes stay in the
//! transmit FIFO, the transmitter is not empty, and the guest waits, as it would for a slow line. The device tries again
//! when the guest asks for the line status, every [`RETRY_NS`], and when it is told to ([`Serial::output_ready`]).
//!
//! What comes in waits in a bounded queue, so the receiver never overruns but in loopback.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bitflags::bitflags;

use crate::bus::ByteDevice;
use crate::clock::{Timer, Timers};
use crate::irq::IrqLine;

/// Ports of the registers.
pub const PORTS: u64 = 8;
/// COM1's first port.
pub const COM1_BASE: u64 = 0x3f8;
/// COM1's ISA interrupt.
pub const COM1_IRQ: u32 = 4;
/// COM2's first port.
pub const COM2_BASE: u64 = 0x2f8;
/// COM2's ISA interrupt.
pub const COM2_IRQ: u32 = 3;

/// Bytes in each FIFO.
const FIFO: usize = 16;
/// Bytes of input that wait for the guest at most.
const INPUT: usize = 128;
/// How long after a refusal the output is tried again, in nanoseconds.
const RETRY_NS: u64 = 1_000_000;

/// Where the bytes go that the guest sends.
///
/// It is called on the vCPU's thread with the device's lock held, so it does not wait: it takes what it has room for.
pub trait SerialOutput: Send {
    /// Takes the first bytes of `bytes`, as many as there is room for now, and tells how many (0 where there is none).
    fn accept(&mut self, bytes: &[u8]) -> usize;
}

impl<F: FnMut(&[u8]) -> usize + Send> SerialOutput for F {
    fn accept(&mut self, bytes: &[u8]) -> usize {
        self(bytes)
    }
}

bitflags! {
    /// Interrupt enable register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Ier: u8 {
        /// Received data available.
        const ERBFI = 1 << 0;
        /// Transmitter holding register empty.
        const ETBEI = 1 << 1;
        /// Receiver line status.
        const ELSI = 1 << 2;
        /// Modem status.
        const EDSSI = 1 << 3;
    }

    /// FIFO control register; its top two bits are the trigger level.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Fcr: u8 {
        const ENABLE = 1 << 0;
        const RESET_RECEIVER = 1 << 1;
        const RESET_TRANSMITTER = 1 << 2;
        const _ = !0;
    }

    /// Modem control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        /// On a PC: lets the interrupt through.
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// Line status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Lsr: u8 {
        /// Data ready.
        const DR = 1 << 0;
        /// Overrun error.
        const OE = 1 << 1;
        /// Break interrupt.
        const BI = 1 << 4;
        /// Transmitter holding register (in FIFO mode: the FIFO) empty.
        const THRE = 1 << 5;
        /// Transmitter empty.
        const TEMT = 1 << 6;
        /// A character with an error is in the FIFO.
        const FIFO_ERROR = 1 << 7;
    }

    /// Modem status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Msr: u8 {
        const DCTS = 1 << 0;
        const DDSR = 1 << 1;
        /// Trailing edge of the ring indicator.
        const TERI = 1 << 2;
        const DDCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
    }
}

impl Msr {
    const DELTAS: Self = Self::DCTS.union(Self::DDSR).union(Self::TERI).union(Self::DDCD);
    /// A terminal that is there and ready.
    const CONNECTED: Self = Self::CTS.union(Self::DSR).union(Self::DCD);
}

/// Divisor latch access bit of the line control register.
const LCR_DLAB: u8 = 1 << 7;
/// Both FIFO bits of the interrupt identification register.
const IIR_FIFOS: u8 = 0xc0;

/// Interrupt identification: the reason of the highest priority, as its register shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    None = 0x1,
    ModemStatus = 0x0,
    TransmitterEmpty = 0x2,
    DataAvailable = 0x4,
    LineStatus = 0x6,
    CharacterTimeout = 0xc,
}

/// One received character.
#[derive(Clone, Copy, Debug)]
struct Received {
    byte: u8,
    is_break: bool,
}

/// A 16550A. Map it for [`PORTS`] ports.
pub struct Serial {
    ier: Ier,
    fcr: Fcr,
    lcr: u8,
    mcr: Mcr,
    msr: Msr,
    scratch: u8,
    divisor: [u8; 2],
    received: VecDeque<Received>,
    overrun: bool,
    transmit: VecDeque<u8>,
    /// The transmitter became empty, and the guest has not been told.
    transmitter_interrupt: bool,
    irq: IrqLine,
    /// The interrupt line's level.
    asserted: bool,
    output: Box<dyn SerialOutput>,
    retry: Timer,
    input_refused: bool,
    input_wake: Option<Box<dyn Fn() + Send>>,
}

impl Serial {
    /// A port after its reset, with `irq` as its interrupt.
    pub fn new(irq: IrqLine, output: Box<dyn SerialOutput>, timers: &Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &std::sync::Weak<Mutex<Self>>| {
            let this = this.clone();
            let retry = timers.timer(move |_| {
                if let Some(serial) = this.upgrade() {
                    serial.lock().unwrap_or_else(PoisonError::into_inner).output_ready();
                }
            });
            Mutex::new(Self {
                ier: Ier::empty(),
                fcr: Fcr::empty(),
                lcr: 0,
                mcr: Mcr::empty(),
                msr: Msr::CONNECTED,
                scratch: 0,
                divisor: [12, 0],
                received: VecDeque::with_capacity(INPUT),
                overrun: false,
                transmit: VecDeque::with_capacity(FIFO),
                transmitter_interrupt: false,
                irq,
                asserted: false,
                output,
                retry,
                input_refused: false,
                input_wake: None,
            })
        })
    }

    /// The reset of the machine: registers to their defaults, FIFOs empty.
    pub fn reset(&mut self) {
        self.ier = Ier::empty();
        self.fcr = Fcr::empty();
        self.lcr = 0;
        self.mcr = Mcr::empty();
        self.msr = Msr::CONNECTED;
        self.scratch = 0;
        self.divisor = [12, 0];
        self.received.clear();
        self.overrun = false;
        self.transmit.clear();
        self.transmitter_interrupt = false;
        self.retry.disarm();
        self.tell_feeder();
        self.update_irq();
    }

    /// Lets the guest receive the first bytes of `bytes`, as many as there is room for, and tells how many. After a
    /// refusal the function of [`Self::set_input_wake`] is called when there is room again.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let room = if self.mcr.contains(Mcr::LOOP) { 0 } else { INPUT.saturating_sub(self.received.len()) };
        let accepted = room.min(bytes.len());
        self.received.extend(bytes[..accepted].iter().map(|&byte| Received { byte, is_break: false }));
        self.input_refused |= accepted < bytes.len();
        self.update_irq();
        accepted
    }

    /// Whether the guest has read all that was pushed.
    pub fn is_input_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Lets the guest receive a break condition; false where there is no room now.
    pub fn push_break(&mut self) -> bool {
        let room = self.received.len() < INPUT && !self.mcr.contains(Mcr::LOOP);
        if room {
            self.received.push_back(Received { byte: 0, is_break: true });
            self.update_irq();
        }
        room
    }

    /// Calls `wake` when there is room again after [`Self::push_input`] took less than it was given, and when
    /// [`Self::wants_input`] becomes true. It is called with the device's lock held: it must not touch the device.
    pub fn set_input_wake(&mut self, wake: impl Fn() + Send + 'static) {
        self.input_wake = Some(Box::new(wake));
    }

    /// Whether the guest takes input by interrupt: a driver has opened the port. A driver empties the receiver as it
    /// opens it, so what was pushed before is lost, as on the hardware; input that cannot be typed again (a file) waits
    /// for this.
    pub fn wants_input(&self) -> bool {
        self.ier.contains(Ier::ERBFI) && self.mcr.contains(Mcr::OUT2) && !self.mcr.contains(Mcr::LOOP)
    }

    /// The output may have room again: sends what waits.
    pub fn output_ready(&mut self) {
        self.send();
        self.update_irq();
    }

    /// Whether all that the guest has sent has been accepted.
    pub fn is_output_empty(&self) -> bool {
        self.transmit.is_empty()
    }

    fn tell_feeder(&mut self) {
        self.input_refused = false;
        if let Some(wake) = &self.input_wake {
            wake();
        }
    }

    fn divisor_latch(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn send(&mut self) {
        if self.transmit.is_empty() {
            return;
        }
        let accepted = self.output.accept(self.transmit.make_contiguous()).min(self.transmit.len());
        self.transmit.drain(..accepted);
        if self.transmit.is_empty() {
            self.retry.disarm();
            self.transmitter_interrupt = true;
        } else {
            self.retry.arm(self.retry_time());
        }
    }

    fn retry_time(&self) -> u64 {
        self.retry.now().saturating_add(RETRY_NS)
    }

    fn write_transmitter(&mut self, byte: u8) {
        self.transmitter_interrupt = false;
        if self.mcr.contains(Mcr::LOOP) {
            self.transmitter_interrupt = true;
            if self.received.len() >= if self.fcr.contains(Fcr::ENABLE) { FIFO } else { 1 } {
                self.overrun = true;
            } else {
                self.received.push_back(Received { byte, is_break: false });
            }
            return;
        }
        // A guest that does not wait for THRE loses what it writes, as it does on the hardware.
        if self.transmit.len() < if self.fcr.contains(Fcr::ENABLE) { FIFO } else { 1 } {
            self.transmit.push_back(byte);
        }
        self.send();
    }

    fn read_receiver(&mut self) -> u8 {
        let byte = self.received.pop_front().map_or(0, |received| received.byte);
        if self.input_refused && self.received.len() <= INPUT / 2 {
            self.tell_feeder();
        }
        byte
    }

    fn write_ier(&mut self, value: u8) {
        let before = std::mem::replace(&mut self.ier, Ier::from_bits_truncate(value));
        let enabled = self.ier.difference(before);
        // Enabling the interrupt while the transmitter is empty raises it: drivers start sending that way.
        if enabled.contains(Ier::ETBEI) && self.transmit.is_empty() {
            self.transmitter_interrupt = true;
        }
        if enabled.contains(Ier::ERBFI) && self.wants_input() {
            self.tell_feeder();
        }
    }

    fn write_fcr(&mut self, value: u8) {
        let fcr = Fcr::from_bits_retain(value);
        let toggled = fcr.contains(Fcr::ENABLE) != self.fcr.contains(Fcr::ENABLE);
        if toggled || fcr.contains(Fcr::ENABLE | Fcr::RESET_RECEIVER) {
            self.received.clear();
            if self.input_refused {
                self.tell_feeder();
            }
        }
        if toggled || fcr.contains(Fcr::ENABLE | Fcr::RESET_TRANSMITTER) {
            self.transmitter_interrupt |= !self.transmit.is_empty();
            self.transmit.clear();
            self.retry.disarm();
        }
        self.fcr = fcr.difference(Fcr::RESET_RECEIVER | Fcr::RESET_TRANSMITTER);
    }

    fn write_mcr(&mut self, value: u8) {
        let wanted_input = self.wants_input();
        self.mcr = Mcr::from_bits_truncate(value);
        let inputs = if self.mcr.contains(Mcr::LOOP) {
            let pairs =
                [(Mcr::RTS, Msr::CTS), (Mcr::DTR, Msr::DSR), (Mcr::OUT1, Msr::RI), (Mcr::OUT2, Msr::DCD)];
            let looped = pairs.into_iter().filter(|(from, _)| self.mcr.contains(*from));
            looped.map(|(_, to)| to).fold(Msr::empty(), Msr::union)
        } else {
            Msr::CONNECTED
        };
        let before = self.msr;
        let changed = before.symmetric_difference(inputs);
        self.msr = inputs | (before & Msr::DELTAS);
        self.msr.set(Msr::DCTS, self.msr.contains(Msr::DCTS) || changed.contains(Msr::CTS));
        self.msr.set(Msr::DDSR, self.msr.contains(Msr::DDSR) || changed.contains(Msr::DSR));
        self.msr.set(Msr::DDCD, self.msr.contains(Msr::DDCD) || changed.contains(Msr::DCD));
        let ring_ended = before.contains(Msr::RI) && !inputs.contains(Msr::RI);
        self.msr.set(Msr::TERI, self.msr.contains(Msr::TERI) || ring_ended);
        if self.wants_input() && !wanted_input {
            self.tell_feeder();
        }
    }

    fn line_status(&self) -> Lsr {
        let mut lsr = Lsr::empty();
        lsr.set(Lsr::DR, !self.received.is_empty());
        lsr.set(Lsr::OE, self.overrun);
        lsr.set(Lsr::BI, self.received.front().is_some_and(|received| received.is_break));
        lsr.set(Lsr::THRE | Lsr::TEMT, self.transmit.is_empty());
        let error_waits = || self.received.iter().any(|received| received.is_break);
        lsr.set(Lsr::FIFO_ERROR, self.fcr.contains(Fcr::ENABLE) && error_waits());
        lsr
    }

    /// Reads the line status, which ends the conditions that it reports.
    fn read_lsr(&mut self) -> u8 {
        self.send();
        let lsr = self.line_status();
        self.overrun = false;
        if let Some(first) = self.received.front_mut() {
            first.is_break = false;
        }
        lsr.bits()
    }

    fn trigger_level(&self) -> usize {
        if !self.fcr.contains(Fcr::ENABLE) {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr.bits() >> 6)]
    }

    fn reason(&self) -> Reason {
        let errors = self.line_status() & (Lsr::OE | Lsr::BI);
        if self.ier.contains(Ier::ELSI) && !errors.is_empty() {
            Reason::LineStatus
        } else if self.ier.contains(Ier::ERBFI) && self.received.len() >= self.trigger_level() {
            Reason::DataAvailable
        } else if self.ier.contains(Ier::ERBFI) && !self.received.is_empty() {
            // On a line without speed, the four character times of silence have always passed.
            Reason::CharacterTimeout
        } else if self.ier.contains(Ier::ETBEI) && self.transmitter_interrupt {
            Reason::TransmitterEmpty
        } else if self.ier.contains(Ier::EDSSI) && self.msr.intersects(Msr::DELTAS) {
            Reason::ModemStatus
        } else {
            Reason::None
        }
    }

    fn read_iir(&mut self) -> u8 {
        let reason = self.reason();
        if reason == Reason::TransmitterEmpty {
            self.transmitter_interrupt = false;
        }
        reason as u8 | if self.fcr.contains(Fcr::ENABLE) { IIR_FIFOS } else { 0 }
    }

    fn read_msr(&mut self) -> u8 {
        let msr = self.msr;
        self.msr.remove(Msr::DELTAS);
        msr.bits()
    }

    fn update_irq(&mut self) {
        // In loopback the OUT2 pin is inactive, and with it the gate of the interrupt.
        let gate = self.mcr.contains(Mcr::OUT2) && !self.mcr.contains(Mcr::LOOP);
        let asserted = gate && self.reason() != Reason::None;
        if asserted != self.asserted {
            self.asserted = asserted;
            self.irq.set(asserted);
        }
    }
}

impl ByteDevice for Serial {
    fn read_register(&mut self, offset: u64) -> u8 {
        let value = match offset {
            0 if self.divisor_latch() => self.divisor[0],
            1 if self.divisor_latch() => self.divisor[1],
            0 => self.read_receiver(),
            1 => self.ier.bits(),
            2 => self.read_iir(),
            3 => self.lcr,
            4 => self.mcr.bits(),
            5 => self.read_lsr(),
            6 => self.read_msr(),
            7 => self.scratch,
            _ => 0xff,
        };
        self.update_irq();
        value
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            0 if self.divisor_latch() => self.divisor[0] = value,
            1 if self.divisor_latch() => self.divisor[1] = value,
            0 => self.write_transmitter(value),
            1 => self.write_ier(value),
            2 => self.write_fcr(value),
            3 => self.lcr = value,
            4 => self.write_mcr(value),
            7 => self.scratch = value,
            _ => {}
        }
        self.update_irq();
    }

    fn register_name(&self, offset: u64, write: bool) -> &'static str {
        match (offset, write) {
            (0, _) if self.divisor_latch() => "DLL",
            (1, _) if self.divisor_latch() => "DLM",
            (0, false) => "RBR",
            (0, true) => "THR",
            (1, _) => "IER",
            (2, false) => "IIR",
            (2, true) => "FCR",
            (3, _) => "LCR",
            (4, _) => "MCR",
            (5, _) => "LSR",
            (6, _) => "MSR",
            (7, _) => "SCR",
            _ => "none",
        }
    }
}

#[cfg(test)]
mod tests;
