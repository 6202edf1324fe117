//! The high precision event timer: a counter of 64 bits and three comparators, as Intel's *IA-PC HPET Specification*
//! has them.
//!
//! Nothing counts: the counter is computed from the time when it is asked for, and a comparator has a timer for the
//! next match. Each access first catches up with the matches since the one before.
//!
//! ```text
//! legacy replacement off: comparator n -> the I/O APIC's pin that it is routed to
//! legacy replacement on:  comparator 0 -> ISA interrupt 0, instead of the interval timer
//!                         comparator 1 -> ISA interrupt 8, instead of the clock
//!                         comparator 2 -> as it is routed
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bitflags::bitflags;

use crate::bus::Device;
use crate::clock::{Timer, Timers};
use crate::irq::{IrqLine, IrqSink};

mod comparator;

use comparator::{Comparator, Config};

/// Bytes of registers.
pub const SIZE: u64 = 1024;
/// How long the counter's period is, in femtoseconds: 100 MHz.
pub const PERIOD_FS: u32 = 10_000_000;
/// Nanoseconds of a tick.
const TICK_NS: u64 = 10;
/// Comparators.
pub const COMPARATORS: usize = 3;
/// The I/O APIC's pins that comparators can be routed to: interrupts that no device of a PC here has.
pub const ROUTES: [u32; 3] = [5, 10, 11];
/// Least time between two interrupts of a comparator, in nanoseconds: a guest that asks for more than it can take gets
/// no more.
const LEAST_PERIOD_NS: u64 = 20_000;

/// General capabilities: revision 1, three comparators, 64 bits, legacy replacement, Intel's vendor number, period.
const CAPABILITIES: u64 =
    1 | (COMPARATORS as u64 - 1) << 8 | 1 << 13 | 1 << 15 | 0x8086 << 16 | (PERIOD_FS as u64) << 32;
/// The low half, which the ACPI table repeats.
pub const EVENT_TIMER_BLOCK_ID: u32 = CAPABILITIES as u32;

/// Registers, as offsets.
mod register {
    pub(super) const CAPABILITIES: u64 = 0x000;
    pub(super) const CONFIGURATION: u64 = 0x010;
    pub(super) const INTERRUPT_STATUS: u64 = 0x020;
    pub(super) const COUNTER: u64 = 0x0f0;
    /// The first comparator's; the others follow in steps of [`STRIDE`].
    pub(super) const COMPARATORS: u64 = 0x100;
    pub(super) const STRIDE: u64 = 0x20;
    /// Within a comparator's.
    pub(super) const TN_CONFIGURATION: u64 = 0x00;
    pub(super) const TN_COMPARATOR: u64 = 0x08;
}

bitflags! {
    /// The general configuration register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct General: u64 {
        /// The counter counts, and comparators interrupt.
        const ENABLE_CNF = 1 << 0;
        /// Legacy replacement.
        const LEG_RT_CNF = 1 << 1;
    }
}

/// The device.
pub struct Hpet {
    general: General,
    /// The counter when it was last started, set or stopped.
    base: u64,
    /// When that was, in nanoseconds; meaningless while it stands.
    since: u64,
    /// The counter up to which matches have been looked for.
    seen: u64,
    comparators: [Comparator; COMPARATORS],
    /// By the position in [`ROUTES`].
    lines: [IrqLine; ROUTES.len()],
    legacy: [Arc<LegacyLine>; 2],
    timers: Timers,
    /// One for each comparator.
    alarms: Vec<Timer>,
}

impl Hpet {
    /// A timer after power-up. `lines` are those of [`ROUTES`], `legacy` those of ISA interrupts 0 and 8.
    pub fn new(
        lines: [IrqLine; ROUTES.len()],
        legacy: [Arc<LegacyLine>; 2],
        timers: &Timers,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let alarm = |_| {
                let this = this.clone();
                timers.timer(move |now| {
                    if let Some(hpet) = this.upgrade() {
                        hpet.lock().unwrap_or_else(PoisonError::into_inner).follow(now);
                    }
                })
            };
            Mutex::new(Self {
                general: General::empty(),
                base: 0,
                since: 0,
                seen: 0,
                comparators: Default::default(),
                lines,
                legacy,
                timers: timers.clone(),
                alarms: (0..COMPARATORS).map(alarm).collect(),
            })
        })
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        (self.general, self.base, self.seen) = (General::empty(), 0, 0);
        self.comparators = Default::default();
        self.legacy.iter().for_each(|line| line.replace(false));
        self.rewire();
        self.follow(self.timers.now());
    }

    fn counter(&self, now: u64) -> u64 {
        if self.general.contains(General::ENABLE_CNF) {
            self.base.wrapping_add(now.saturating_sub(self.since) / TICK_NS)
        } else {
            self.base
        }
    }

    /// Catches up with what has happened until `now`, and looks ahead.
    fn follow(&mut self, now: u64) {
        let counter = self.counter(now);
        let elapsed = counter.wrapping_sub(self.seen);
        for index in 0..COMPARATORS {
            if elapsed != 0 && self.comparators[index].advance(self.seen, elapsed) {
                self.matched(index, now);
            }
        }
        self.seen = counter;
        for index in 0..COMPARATORS {
            match self.next_interrupt(index, counter, now) {
                Some(time) => self.alarms[index].arm(time),
                None => self.alarms[index].disarm(),
            }
        }
    }

    /// The counter has reached a comparator's value.
    fn matched(&mut self, index: usize, now: u64) {
        let line = self.line(index);
        let comparator = &mut self.comparators[index];
        let enabled = comparator.config.contains(Config::INT_ENB_CNF);
        if comparator.config.contains(Config::INT_TYPE_CNF) {
            comparator.pending = true;
            line.set(enabled);
        } else if enabled {
            line.pulse();
        }
        comparator.last_match = now;
    }

    /// When a comparator has to interrupt next.
    fn next_interrupt(&self, index: usize, counter: u64, now: u64) -> Option<u64> {
        let comparator = &self.comparators[index];
        // A level that is up says all there is to say.
        let up = comparator.pending && comparator.config.contains(Config::INT_TYPE_CNF);
        if !self.general.contains(General::ENABLE_CNF)
            || !comparator.config.contains(Config::INT_ENB_CNF)
            || up
        {
            return None;
        }
        // The tick begins up to a tick before `now`.
        let ticks = comparator.ticks_to_match(counter);
        let tick_began = now - now.saturating_sub(self.since) % TICK_NS;
        let time = ticks.checked_mul(TICK_NS)?.checked_add(tick_began)?;
        Some(time.max(comparator.last_match.saturating_add(LEAST_PERIOD_NS)))
    }

    /// Where a comparator's interrupt goes.
    fn line(&self, index: usize) -> IrqLine {
        if self.general.contains(General::LEG_RT_CNF)
            && let Some(line) = self.legacy.get(index)
        {
            return line.hpet_end();
        }
        let route = self.comparators[index].route();
        let position = ROUTES.iter().position(|&pin| pin == route);
        position.map_or_else(IrqLine::unconnected, |position| self.lines[position].clone())
    }

    /// Brings all lines in line with the pending levels, after a route may have changed.
    fn rewire(&self) {
        self.lines.iter().for_each(|line| line.set(false));
        self.legacy.iter().for_each(|line| line.hpet_end().set(false));
        for (index, comparator) in self.comparators.iter().enumerate() {
            if comparator.pending && comparator.config.contains(Config::INT_TYPE_CNF | Config::INT_ENB_CNF) {
                self.line(index).set(true);
            }
        }
    }

    fn status(&self) -> u64 {
        let pending = |(index, comparator): (usize, &Comparator)| u64::from(comparator.pending) << index;
        self.comparators.iter().enumerate().map(pending).sum()
    }

    /// Which comparator's register is at an offset, and which.
    fn comparator_at(offset: u64) -> Option<(usize, u64)> {
        let offset = offset.checked_sub(register::COMPARATORS)?;
        let index = usize::try_from(offset / register::STRIDE).ok()?;
        (index < COMPARATORS).then_some((index, offset % register::STRIDE))
    }

    fn read_register(&self, offset: u64) -> u64 {
        match (offset, Self::comparator_at(offset)) {
            (register::CAPABILITIES, _) => CAPABILITIES,
            (register::CONFIGURATION, _) => self.general.bits(),
            (register::INTERRUPT_STATUS, _) => self.status(),
            (register::COUNTER, _) => self.counter(self.timers.now()),
            (_, Some((index, register::TN_CONFIGURATION))) => self.comparators[index].configuration(),
            (_, Some((index, register::TN_COMPARATOR))) => self.comparators[index].value,
            _ => 0,
        }
    }

    /// Writes the bits of a register that `mask` has.
    fn write_register(&mut self, offset: u64, value: u64, mask: u64) {
        let merged = self.read_register(offset) & !mask | value & mask;
        match (offset, Self::comparator_at(offset)) {
            (register::CONFIGURATION, _) => self.configure(General::from_bits_truncate(merged)),
            (register::INTERRUPT_STATUS, _) => self.acknowledge(value & mask),
            (register::COUNTER, _) => {
                (self.base, self.since) = (merged, self.timers.now());
                self.seen = merged;
            }
            (_, Some((index, register::TN_CONFIGURATION))) => {
                self.comparators[index].configure(merged);
                self.rewire();
            }
            (_, Some((index, register::TN_COMPARATOR))) => self.comparators[index].set_value(value, mask),
            _ => {}
        }
    }

    fn configure(&mut self, general: General) {
        let now = self.timers.now();
        (self.base, self.since) = (self.counter(now), now);
        self.general = general;
        self.legacy.iter().for_each(|line| line.replace(general.contains(General::LEG_RT_CNF)));
        self.rewire();
    }

    fn acknowledge(&mut self, bits: u64) {
        for (index, comparator) in self.comparators.iter_mut().enumerate() {
            if bits >> index & 1 != 0 {
                comparator.pending = false;
            }
        }
        self.rewire();
    }
}

impl Device for Hpet {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.follow(self.timers.now());
        let (first, within) = (offset & !7, (offset & 7) as usize);
        let both = [self.read_register(first), self.read_register(first.wrapping_add(8))];
        let bytes = both.map(u64::to_le_bytes).concat();
        for (to, from) in data.iter_mut().zip(&bytes[within..]) {
            *to = *from;
        }
    }

    /// Registers take aligned accesses of 32 and 64 bits.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        self.follow(self.timers.now());
        let value = data.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let shift = 8 * (offset & 7);
        let mask = u64::MAX >> (64 - 8 * data.len());
        self.write_register(offset & !7, value << shift, mask << shift);
        self.follow(self.timers.now());
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match (offset & !7, Self::comparator_at(offset & !7)) {
            (register::CAPABILITIES, _) => "GCAP_ID",
            (register::CONFIGURATION, _) => "GEN_CONF",
            (register::INTERRUPT_STATUS, _) => "GINTR_STA",
            (register::COUNTER, _) => "MAIN_CNT",
            (_, Some((_, register::TN_CONFIGURATION))) => "TIMn_CONF",
            (_, Some((_, register::TN_COMPARATOR))) => "TIMn_COMP",
            _ => "none",
        }
    }

    fn power_cycle(&mut self) {
        self.reset();
    }
}

/// An ISA interrupt line that belongs to a device of a PC, until legacy replacement gives it to the HPET.
pub struct LegacyLine {
    line: IrqLine,
    state: Mutex<LegacyState>,
}

#[derive(Default)]
struct LegacyState {
    replaced: bool,
    /// The levels at the PC's device's end and at the HPET's.
    levels: [bool; 2],
}

/// The numbers of a [`LegacyLine`]'s two ends.
const PC_END: u32 = 0;
const HPET_END: u32 = 1;

impl LegacyLine {
    /// The line `line`, which its PC's device has.
    pub fn new(line: IrqLine) -> Arc<Self> {
        Arc::new(Self { line, state: Mutex::default() })
    }

    /// The end for the PC's device.
    pub fn pc_end(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), PC_END)
    }

    fn hpet_end(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), HPET_END)
    }

    /// Gives the line to the HPET, or back.
    fn replace(&self, replaced: bool) {
        let mut state = self.lock();
        if state.replaced != replaced {
            state.replaced = replaced;
            self.line.set(state.levels[usize::from(replaced)]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, LegacyState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqSink for LegacyLine {
    fn set_line(&self, end: u32, level: bool) {
        let mut state = self.lock();
        state.levels[(end & 1) as usize] = level;
        if state.replaced == (end == HPET_END) {
            // With the state locked, so that changes arrive in their order.
            self.line.set(level);
        }
    }
}

#[cfg(test)]
mod tests;
