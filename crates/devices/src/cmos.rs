//! The real-time clock and its battery-backed memory: an MC146818 as its data sheet has it, at ports 0x70 and 0x71,
//! with the bytes that a PC's firmware keeps there.
//!
//! Its time is the wall clock (UTC) plus an offset that the guest changes by setting the time. The registers show it
//! unless they are *frozen* (the SET bit, or the divider in reset): then they are plain memory, and what is in them when
//! they thaw becomes the time.
//!
//! ```text
//!             SET = 1 or divider reset: registers := time
//!   running ──────────────────────────────────────────────> frozen
//!           <──────────────────────────────────────────────
//!             time := registers, at the second's phase (half a second after a divider reset)
//! ```

use std::sync::{Arc, Mutex, PoisonError, Weak};

use bitflags::bitflags;

use crate::bus::ByteDevice;
use crate::clock::{Timer, Timers};
use crate::irq::IrqLine;

mod calendar;

use calendar::{Calendar, Encoding};

/// First of the two ports: index and data.
pub const BASE: u64 = 0x70;
/// Ports at [`BASE`].
pub const PORTS: u64 = 2;
/// Its ISA interrupt.
pub const IRQ: u32 = 8;
/// Where the century stands: the FADT's CENTURY.
pub const CENTURY: u8 = 0x32;
/// The shutdown status byte.
pub const SHUTDOWN_STATUS: u8 = 0x0f;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES_ALARM: u8 = 0x03;
const HOURS_ALARM: u8 = 0x05;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const EQUIPMENT: u8 = 0x14;

/// Register A: update in progress.
const UIP: u8 = 1 << 7;
/// Register A: the time base; this value is the 32,768 Hz crystal that PCs have.
const DIVIDER: u8 = 0x70;
const DIVIDER_32768: u8 = 0x20;
/// Register A: values of the divider from here on hold it in reset.
const DIVIDER_RESET: u8 = 0x60;
/// Register A: rate selection of the periodic interrupt.
const RATE: u8 = 0x0f;
/// Register D: the battery is good.
const VRT: u8 = 1 << 7;
/// The index port's bit that masks NMIs.
const NMI_MASK: u8 = 1 << 7;
/// An alarm byte with both of these set matches everything.
const ALARM_ANY: u8 = 0xc0;

const SECOND: i128 = 1_000_000_000;
/// How long before the update UIP announces it, in nanoseconds.
const UIP_NS: i128 = 244_000;
/// The crystal, in Hz.
const CRYSTAL: i128 = 32_768;

bitflags! {
    /// Register B.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Control: u8 {
        /// Daylight saving.
        const DSE = 1 << 0;
        const HOURS_24 = 1 << 1;
        /// Binary, not BCD.
        const BINARY = 1 << 2;
        /// Square wave.
        const SQWE = 1 << 3;
        const UPDATE_INTERRUPT = 1 << 4;
        const ALARM_INTERRUPT = 1 << 5;
        const PERIODIC_INTERRUPT = 1 << 6;
        /// The time does not change: the guest sets it.
        const SET = 1 << 7;
    }

    /// Register C: what has happened since it was read.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Events: u8 {
        const UPDATE = 1 << 4;
        const ALARM = 1 << 5;
        const PERIODIC = 1 << 6;
        const REQUEST = 1 << 7;
    }
}

impl Control {
    const INTERRUPTS: Self =
        Self::UPDATE_INTERRUPT.union(Self::ALARM_INTERRUPT).union(Self::PERIODIC_INTERRUPT);

    fn encoding(self) -> Encoding {
        Encoding { binary: self.contains(Self::BINARY), hours_24: self.contains(Self::HOURS_24) }
    }
}

/// What the memory's bytes tell of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CmosConfig {
    /// Bytes of RAM below 4 GiB, from address 0.
    pub memory_below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub memory_above_4g: u64,
    /// vCPUs, 1 to 256.
    pub cpus: u32,
}

/// The clock and its memory.
pub struct Cmos {
    index: u8,
    /// The memory, and the time registers where they are frozen.
    ram: [u8; 128],
    register_a: u8,
    control: Control,
    events: Events,
    /// The clock's time minus the wall clock's, in nanoseconds.
    offset: i128,
    /// The clock's time up to which events have been looked for, in nanoseconds since the Unix epoch.
    seen: i128,
    irq: IrqLine,
    timers: Timers,
    timer: Timer,
}

impl Cmos {
    /// A clock that shows the wall clock in BCD and 24 hours, as firmware leaves it.
    pub fn new(config: &CmosConfig, irq: IrqLine, timers: &Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let timer = timers.timer(move |_| {
                if let Some(cmos) = this.upgrade() {
                    cmos.lock().unwrap_or_else(PoisonError::into_inner).update();
                }
            });
            let mut cmos = Self {
                index: 0,
                ram: firmware_bytes(config),
                register_a: DIVIDER_32768 | 6,
                control: Control::HOURS_24,
                events: Events::empty(),
                offset: 0,
                seen: 0,
                irq,
                timers: timers.clone(),
                timer,
            };
            cmos.seen = cmos.time();
            Mutex::new(cmos)
        })
    }

    /// The reset of the machine: the clock runs on, the memory stays, no interrupt is enabled.
    pub fn reset(&mut self) {
        self.index = 0;
        self.control -= Control::INTERRUPTS | Control::SQWE;
        self.events = Events::empty();
        self.update();
    }

    /// Whether the guest masks NMIs through the index port.
    pub fn masks_nmi(&self) -> bool {
        self.index & NMI_MASK != 0
    }

    /// The time as it would be if it were not frozen, in nanoseconds since the Unix epoch.
    fn time(&self) -> i128 {
        i128::from(self.timers.time().wall_clock()) + self.offset
    }

    fn is_frozen(&self) -> bool {
        self.control.contains(Control::SET) || self.divider_is_reset()
    }

    fn divider_is_reset(&self) -> bool {
        self.register_a & DIVIDER >= DIVIDER_RESET
    }

    /// Puts the time into the registers.
    fn store_time(&mut self) {
        let calendar = Calendar::from_seconds(self.time().div_euclid(SECOND));
        calendar.store(&mut self.ram, self.control.encoding());
    }

    /// Takes the time from the registers; `phase` is how long its second has lasted, in nanoseconds.
    fn load_time(&mut self, phase: i128) {
        let seconds = Calendar::load(&self.ram, self.control.encoding()).to_seconds();
        self.offset += i128::from(seconds) * SECOND + phase - self.time();
        self.seen = self.time();
    }

    /// Changes registers A and B, with what freezing and thawing brings.
    fn set_control(&mut self, register_a: u8, control: Control) {
        let (was_frozen, divider_was_reset) = (self.is_frozen(), self.divider_is_reset());
        if !was_frozen {
            self.collect_events();
            self.store_time();
        }
        // The time's bytes keep their old form only while they are memory.
        let phase = self.time().rem_euclid(SECOND);
        if !was_frozen {
            let calendar = Calendar::load(&self.ram, self.control.encoding());
            calendar.store(&mut self.ram, control.encoding());
        }
        (self.register_a, self.control) = (register_a & !UIP, control);
        if was_frozen && !self.is_frozen() {
            self.load_time(if divider_was_reset { SECOND / 2 } else { phase });
        }
        self.seen = self.time();
        self.update();
    }

    /// Notes what has happened since it was last looked.
    fn collect_events(&mut self) {
        let (before, now) = (self.seen, self.time());
        if now <= before {
            return;
        }
        self.seen = now;
        if self.periodic_tick(now) != self.periodic_tick(before) {
            self.events |= Events::PERIODIC;
        }
        if !self.is_frozen() {
            if now.div_euclid(SECOND) != before.div_euclid(SECOND) {
                self.events |= Events::UPDATE;
            }
            if self.next_alarm(before).is_some_and(|alarm| alarm <= now) {
                self.events |= Events::ALARM;
            }
        }
    }

    /// Brings the events, the interrupt line and the timer up to date.
    fn update(&mut self) {
        self.collect_events();
        let requested = self.events.bits() & self.control.bits() & Control::INTERRUPTS.bits() != 0;
        self.events.set(Events::REQUEST, requested);
        self.irq.set(requested);
        // The line stays up until register C is read; until then nothing more can be told.
        match if requested { None } else { self.next_event() } {
            Some(time) => {
                let wait = (time - self.time()).max(0).try_into().unwrap_or(u64::MAX);
                self.timer.arm(self.timers.now().saturating_add(wait));
            }
            None => self.timer.disarm(),
        }
    }

    /// The time of the next event whose interrupt is enabled.
    fn next_event(&self) -> Option<i128> {
        let now = self.time();
        let running = !self.is_frozen();
        let enabled = |interrupt| self.control.contains(interrupt);
        let periodic = enabled(Control::PERIODIC_INTERRUPT).then(|| self.next_periodic(now)).flatten();
        let update =
            (running && enabled(Control::UPDATE_INTERRUPT)).then(|| (now.div_euclid(SECOND) + 1) * SECOND);
        let alarm = (running && enabled(Control::ALARM_INTERRUPT)).then(|| self.next_alarm(now)).flatten();
        [periodic, update, alarm].into_iter().flatten().min()
    }

    /// Periods of the crystal in one of the periodic interrupt, as a shift.
    fn periodic_shift(&self) -> Option<u32> {
        match self.register_a & RATE {
            0 => None,
            _ if self.divider_is_reset() => None,
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    fn periodic_tick(&self, time: i128) -> Option<i128> {
        self.periodic_shift().map(|shift| (time * CRYSTAL).div_euclid(SECOND) >> shift)
    }

    fn next_periodic(&self, now: i128) -> Option<i128> {
        let (shift, tick) = (self.periodic_shift()?, self.periodic_tick(now)?);
        let crystal = (tick + 1) << shift;
        Some(-(-crystal * SECOND).div_euclid(CRYSTAL))
    }

    /// The first second after `time` that the alarm bytes match.
    fn next_alarm(&self, time: i128) -> Option<i128> {
        let wanted = |index: u8| {
            let byte = self.ram[usize::from(index)];
            (byte & ALARM_ANY != ALARM_ANY).then_some(byte)
        };
        let encoding = self.control.encoding();
        let hour = wanted(HOURS_ALARM).map(|byte| encoding.decode_hour(byte));
        let minute = wanted(MINUTES_ALARM).map(|byte| encoding.decode(byte));
        let second = wanted(SECONDS_ALARM).map(|byte| encoding.decode(byte));
        let matches =
            |wanted: Option<u8>, value: i128| wanted.is_none_or(|wanted| i128::from(wanted) == value);
        let first = time.div_euclid(SECOND) + 1;
        let mut candidate = first;
        // Each step leaves an hour, a minute or a second behind, so a day has few.
        while candidate <= first + 86_400 {
            let of_day = candidate.rem_euclid(86_400);
            if !matches(hour, of_day / 3600) {
                candidate += 3600 - of_day % 3600;
            } else if !matches(minute, of_day / 60 % 60) {
                candidate += 60 - of_day % 60;
            } else if !matches(second, of_day % 60) {
                candidate += 1;
            } else {
                return Some(candidate * SECOND);
            }
        }
        None
    }

    fn read_register_a(&self) -> u8 {
        let left = SECOND - self.time().rem_euclid(SECOND);
        let updates_soon = !self.is_frozen() && left <= UIP_NS;
        self.register_a | if updates_soon { UIP } else { 0 }
    }

    fn read_register_c(&mut self) -> u8 {
        self.update();
        let events = std::mem::replace(&mut self.events, Events::empty());
        self.update();
        events.bits()
    }

    fn read_data(&mut self) -> u8 {
        match self.index & !NMI_MASK {
            REGISTER_A => self.read_register_a(),
            REGISTER_B => self.control.bits(),
            REGISTER_C => self.read_register_c(),
            REGISTER_D => VRT,
            index => {
                if is_time(index) && !self.is_frozen() {
                    self.store_time();
                }
                self.ram[usize::from(index)]
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.index & !NMI_MASK {
            REGISTER_A => self.set_control(value, self.control),
            REGISTER_B => {
                let mut control = Control::from_bits_truncate(value);
                if control.contains(Control::SET) {
                    control.remove(Control::UPDATE_INTERRUPT);
                }
                self.set_control(self.register_a, control);
            }
            REGISTER_C | REGISTER_D => {}
            index if is_time(index) && !self.is_frozen() => {
                self.collect_events();
                self.store_time();
                self.ram[usize::from(index)] = value;
                self.load_time(self.time().rem_euclid(SECOND));
                self.update();
            }
            index => {
                self.collect_events();
                self.ram[usize::from(index)] = value;
                self.update();
            }
        }
    }
}

/// Whether `index` is a register that the clock drives.
fn is_time(index: u8) -> bool {
    matches!(index, SECONDS | 0x02 | 0x04 | 0x06..=YEAR | CENTURY)
}

/// The memory as a PC's firmware fills it. Sizes that do not fit their bytes are given as the largest that does.
fn firmware_bytes(config: &CmosConfig) -> [u8; 128] {
    let mut ram = [0; 128];
    let mut put = |index: usize, value: u64, len: usize| {
        let largest = (1u64 << (8 * len)) - 1;
        ram[index..index + len].copy_from_slice(&value.min(largest).to_le_bytes()[..len]);
    };
    let below = config.memory_below_4g;
    let base_kib = (below >> 10).min(640);
    let extended_kib = below.saturating_sub(1 << 20) >> 10;
    put(0x15, base_kib, 2);
    put(0x17, extended_kib, 2);
    put(0x30, extended_kib, 2);
    put(0x34, below.saturating_sub(16 << 20) >> 16, 2);
    put(0x5b, config.memory_above_4g >> 16, 3);
    // The other processors; what to boot from: disk, diskette, CD-ROM.
    put(0x5f, u64::from(config.cpus.saturating_sub(1)), 1);
    put(0x3d, 0x12, 1);
    put(0x38, 0x30, 1);
    // A coprocessor and an EGA or better; no diskette drive.
    ram[usize::from(EQUIPMENT)] = 0x02;
    let sum: u16 = ram[0x10..0x2e].iter().map(|&byte| u16::from(byte)).sum();
    ram[0x2e..0x30].copy_from_slice(&sum.to_be_bytes());
    ram
}

impl ByteDevice for Cmos {
    fn read_register(&mut self, offset: u64) -> u8 {
        match offset {
            0 => self.index,
            1 => self.read_data(),
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            0 => self.index = value,
            1 => self.write_data(value),
            _ => {}
        }
    }

    fn register_name(&self, offset: u64, _write: bool) -> &'static str {
        // Not by what the index is now: a reader of the ledger asks once, for all that went through the port.
        match offset {
            0 => "INDEX",
            1 => "DATA",
            _ => "none",
        }
    }
}

#[cfg(test)]
mod tests;
