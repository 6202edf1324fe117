//! The 16550A serial port, as the data sheet "PC16550D Universal Asynchronous Receiver/Transmitter with FIFOs" has it.
//!
//! The line has no speed: what the guest sends goes to the [`SerialOutput`] at once, and the transmitter is empty again
//! before the guest can look, as long as the output takes what it is given. Where it does not, the bytes stay in the
//! transmit FIFO, the transmitter is not empty, and the guest waits, as it would for a slow line. The device tries again
//! when the guest asks for the line status, every millisecond, and when it is told to ([`Serial::output_ready`]).
//!
//! What comes in waits in a bounded queue, so the receiver never overruns but in loopback.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

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

/// The registers that are no more than that.
#[derive(Clone, Copy, Debug)]
struct Registers {
    ier: Ier,
    fcr: Fcr,
    lcr: u8,
    mcr: Mcr,
    msr: Msr,
    scratch: u8,
    divisor: [u8; 2],
}

impl Registers {
    /// After a reset, at 9,600 baud.
    const RESET: Self = Self {
        ier: Ier::empty(),
        fcr: Fcr::empty(),
        lcr: 0,
        mcr: Mcr::empty(),
        msr: Msr::CONNECTED,
        scratch: 0,
        divisor: [12, 0],
    };

    /// Characters that the receiver and the transmitter hold: without FIFOs, one each.
    fn fifo_size(&self) -> usize {
        if self.fcr.contains(Fcr::ENABLE) { FIFO } else { 1 }
    }
}

#[derive(Default)]
struct Receiver {
    queue: VecDeque<Received>,
    overrun: bool,
    /// The feeder had more than there was room for.
    refused: bool,
    wake: Option<Box<dyn Fn() + Send>>,
}

struct Transmitter {
    fifo: VecDeque<u8>,
    /// It became empty, and the guest has not been told.
    interrupt: bool,
    output: Box<dyn SerialOutput>,
    retry: Timer,
}

impl Transmitter {
    /// Gives the output what it takes of what waits.
    fn send(&mut self) {
        if self.fifo.is_empty() {
            return;
        }
        let accepted = self.output.accept(self.fifo.make_contiguous()).min(self.fifo.len());
        self.fifo.drain(..accepted);
        if self.fifo.is_empty() {
            self.retry.disarm();
            self.interrupt = true;
        } else {
            self.retry.arm(self.retry.now().saturating_add(RETRY_NS));
        }
    }
}

/// A 16550A. Map it for [`PORTS`] ports.
pub struct Serial {
    registers: Registers,
    receiver: Receiver,
    transmitter: Transmitter,
    irq: IrqLine,
    /// The interrupt line's level.
    asserted: bool,
}

impl Serial {
    /// A port after its reset, with `irq` as its interrupt.
    pub fn new(irq: IrqLine, output: Box<dyn SerialOutput>, timers: &Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let retry = timers.timer(move |_| {
                if let Some(serial) = this.upgrade() {
                    serial.lock().unwrap_or_else(PoisonError::into_inner).output_ready();
                }
            });
            let fifo = VecDeque::with_capacity(FIFO);
            Mutex::new(Self {
                registers: Registers::RESET,
                receiver: Receiver::default(),
                transmitter: Transmitter { fifo, interrupt: false, output, retry },
                irq,
                asserted: false,
            })
        })
    }

    /// The reset of the machine: registers to their defaults, FIFOs empty.
    pub fn reset(&mut self) {
        self.registers = Registers::RESET;
        self.receiver.queue.clear();
        self.receiver.overrun = false;
        self.transmitter.fifo.clear();
        self.transmitter.interrupt = false;
        self.transmitter.retry.disarm();
        self.tell_feeder();
        self.update_irq();
    }

    /// Lets the guest receive the first bytes of `bytes`, as many as there is room for, and tells how many. After a
    /// refusal the function of [`Self::set_input_wake`] is called when there is room again.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let room = if self.registers.mcr.contains(Mcr::LOOP) {
            0
        } else {
            INPUT.saturating_sub(self.receiver.queue.len())
        };
        let accepted = room.min(bytes.len());
        self.receiver.queue.extend(bytes[..accepted].iter().map(|&byte| Received { byte, is_break: false }));
        self.receiver.refused |= accepted < bytes.len();
        self.update_irq();
        accepted
    }

    /// Whether the guest has read all that was pushed.
    pub fn is_input_empty(&self) -> bool {
        self.receiver.queue.is_empty()
    }

    /// Lets the guest receive a break condition; false where there is no room now.
    pub fn push_break(&mut self) -> bool {
        let room = self.receiver.queue.len() < INPUT && !self.registers.mcr.contains(Mcr::LOOP);
        if room {
            self.receiver.queue.push_back(Received { byte: 0, is_break: true });
            self.update_irq();
        }
        room
    }

    /// Calls `wake` when there is room again after [`Self::push_input`] took less than it was given, and when
    /// [`Self::wants_input`] becomes true. It is called with the device's lock held: it must not touch the device.
    pub fn set_input_wake(&mut self, wake: impl Fn() + Send + 'static) {
        self.receiver.wake = Some(Box::new(wake));
    }

    /// Whether the guest takes input by interrupt and requests it (RTS): a driver has opened the port. A driver empties
    /// the receiver as it opens it, after the interrupt is enabled and before it raises RTS, so what was pushed before is
    /// lost, as on the hardware; input that cannot be typed again (a file) waits for this.
    pub fn wants_input(&self) -> bool {
        self.registers.ier.contains(Ier::ERBFI)
            && self.registers.mcr.contains(Mcr::OUT2 | Mcr::RTS)
            && !self.registers.mcr.contains(Mcr::LOOP)
    }

    /// The output may have room again: sends what waits.
    pub fn output_ready(&mut self) {
        self.transmitter.send();
        self.update_irq();
    }

    /// Whether all that the guest has sent has been accepted.
    pub fn is_output_empty(&self) -> bool {
        self.transmitter.fifo.is_empty()
    }

    fn tell_feeder(&mut self) {
        self.receiver.refused = false;
        if let Some(wake) = &self.receiver.wake {
            wake();
        }
    }

    fn divisor_latch(&self) -> bool {
        self.registers.lcr & LCR_DLAB != 0
    }

    fn write_transmitter(&mut self, byte: u8) {
        self.transmitter.interrupt = false;
        if self.registers.mcr.contains(Mcr::LOOP) {
            self.transmitter.interrupt = true;
            if self.receiver.queue.len() >= self.registers.fifo_size() {
                self.receiver.overrun = true;
            } else {
                self.receiver.queue.push_back(Received { byte, is_break: false });
            }
            return;
        }
        // A guest that does not wait for THRE loses what it writes, as it does on the hardware.
        if self.transmitter.fifo.len() < self.registers.fifo_size() {
            self.transmitter.fifo.push_back(byte);
        }
        self.transmitter.send();
    }

    fn read_receiver(&mut self) -> u8 {
        let byte = self.receiver.queue.pop_front().map_or(0, |received| received.byte);
        if self.receiver.refused && self.receiver.queue.len() <= INPUT / 2 {
            self.tell_feeder();
        }
        byte
    }

    fn write_ier(&mut self, value: u8) {
        let before = std::mem::replace(&mut self.registers.ier, Ier::from_bits_truncate(value));
        let enabled = self.registers.ier.difference(before);
        // Enabling the interrupt while the transmitter is empty raises it: drivers start sending that way.
        if enabled.contains(Ier::ETBEI) && self.transmitter.fifo.is_empty() {
            self.transmitter.interrupt = true;
        }
        if enabled.contains(Ier::ERBFI) && self.wants_input() {
            self.tell_feeder();
        }
    }

    fn write_fcr(&mut self, value: u8) {
        let fcr = Fcr::from_bits_retain(value);
        let toggled = fcr.contains(Fcr::ENABLE) != self.registers.fcr.contains(Fcr::ENABLE);
        if toggled || fcr.contains(Fcr::ENABLE | Fcr::RESET_RECEIVER) {
            self.receiver.queue.clear();
            if self.receiver.refused {
                self.tell_feeder();
            }
        }
        if toggled || fcr.contains(Fcr::ENABLE | Fcr::RESET_TRANSMITTER) {
            self.transmitter.interrupt |= !self.transmitter.fifo.is_empty();
            self.transmitter.fifo.clear();
            self.transmitter.retry.disarm();
        }
        self.registers.fcr = fcr.difference(Fcr::RESET_RECEIVER | Fcr::RESET_TRANSMITTER);
    }

    fn write_mcr(&mut self, value: u8) {
        let wanted_input = self.wants_input();
        self.registers.mcr = Mcr::from_bits_truncate(value);
        let inputs = if self.registers.mcr.contains(Mcr::LOOP) {
            let pairs =
                [(Mcr::RTS, Msr::CTS), (Mcr::DTR, Msr::DSR), (Mcr::OUT1, Msr::RI), (Mcr::OUT2, Msr::DCD)];
            let looped = pairs.into_iter().filter(|(from, _)| self.registers.mcr.contains(*from));
            looped.map(|(_, to)| to).fold(Msr::empty(), Msr::union)
        } else {
            Msr::CONNECTED
        };
        let before = self.registers.msr;
        let changed = before.symmetric_difference(inputs);
        self.registers.msr = inputs | (before & Msr::DELTAS);
        self.registers
            .msr
            .set(Msr::DCTS, self.registers.msr.contains(Msr::DCTS) || changed.contains(Msr::CTS));
        self.registers
            .msr
            .set(Msr::DDSR, self.registers.msr.contains(Msr::DDSR) || changed.contains(Msr::DSR));
        self.registers
            .msr
            .set(Msr::DDCD, self.registers.msr.contains(Msr::DDCD) || changed.contains(Msr::DCD));
        let ring_ended = before.contains(Msr::RI) && !inputs.contains(Msr::RI);
        self.registers.msr.set(Msr::TERI, self.registers.msr.contains(Msr::TERI) || ring_ended);
        let left_loopback = self.receiver.refused && !self.registers.mcr.contains(Mcr::LOOP);
        if left_loopback || self.wants_input() && !wanted_input {
            self.tell_feeder();
        }
    }

    fn line_status(&self) -> Lsr {
        let mut lsr = Lsr::empty();
        lsr.set(Lsr::DR, !self.receiver.queue.is_empty());
        lsr.set(Lsr::OE, self.receiver.overrun);
        lsr.set(Lsr::BI, self.receiver.queue.front().is_some_and(|received| received.is_break));
        lsr.set(Lsr::THRE | Lsr::TEMT, self.transmitter.fifo.is_empty());
        let error_waits = || self.receiver.queue.iter().any(|received| received.is_break);
        lsr.set(Lsr::FIFO_ERROR, self.registers.fcr.contains(Fcr::ENABLE) && error_waits());
        lsr
    }

    /// Reads the line status, which ends the conditions that it reports.
    fn read_lsr(&mut self) -> u8 {
        self.transmitter.send();
        let lsr = self.line_status();
        self.receiver.overrun = false;
        if let Some(first) = self.receiver.queue.front_mut() {
            first.is_break = false;
        }
        lsr.bits()
    }

    fn trigger_level(&self) -> usize {
        if !self.registers.fcr.contains(Fcr::ENABLE) {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.registers.fcr.bits() >> 6)]
    }

    fn reason(&self) -> Reason {
        let errors = self.line_status() & (Lsr::OE | Lsr::BI);
        if self.registers.ier.contains(Ier::ELSI) && !errors.is_empty() {
            Reason::LineStatus
        } else if self.registers.ier.contains(Ier::ERBFI) && self.receiver.queue.len() >= self.trigger_level()
        {
            Reason::DataAvailable
        } else if self.registers.ier.contains(Ier::ERBFI) && !self.receiver.queue.is_empty() {
            // On a line without speed, the four character times of silence have always passed.
            Reason::CharacterTimeout
        } else if self.registers.ier.contains(Ier::ETBEI) && self.transmitter.interrupt {
            Reason::TransmitterEmpty
        } else if self.registers.ier.contains(Ier::EDSSI) && self.registers.msr.intersects(Msr::DELTAS) {
            Reason::ModemStatus
        } else {
            Reason::None
        }
    }

    fn read_iir(&mut self) -> u8 {
        let reason = self.reason();
        if reason == Reason::TransmitterEmpty {
            self.transmitter.interrupt = false;
        }
        reason as u8 | if self.registers.fcr.contains(Fcr::ENABLE) { IIR_FIFOS } else { 0 }
    }

    fn read_msr(&mut self) -> u8 {
        let msr = self.registers.msr;
        self.registers.msr.remove(Msr::DELTAS);
        msr.bits()
    }

    fn update_irq(&mut self) {
        // In loopback the OUT2 pin is inactive, and with it the gate of the interrupt.
        let gate = self.registers.mcr.contains(Mcr::OUT2) && !self.registers.mcr.contains(Mcr::LOOP);
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
            0 if self.divisor_latch() => self.registers.divisor[0],
            1 if self.divisor_latch() => self.registers.divisor[1],
            0 => self.read_receiver(),
            1 => self.registers.ier.bits(),
            2 => self.read_iir(),
            3 => self.registers.lcr,
            4 => self.registers.mcr.bits(),
            5 => self.read_lsr(),
            6 => self.read_msr(),
            7 => self.registers.scratch,
            _ => 0xff,
        };
        self.update_irq();
        value
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            0 if self.divisor_latch() => self.registers.divisor[0] = value,
            1 if self.divisor_latch() => self.registers.divisor[1] = value,
            0 => self.write_transmitter(value),
            1 => self.write_ier(value),
            2 => self.write_fcr(value),
            3 => self.registers.lcr = value,
            4 => self.write_mcr(value),
            7 => self.registers.scratch = value,
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

    fn lose_power(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
