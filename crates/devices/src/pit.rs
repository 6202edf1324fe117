//! The interval timer: an i8254 as the data sheet "82C54 CHMOS Programmable Interval Timer" has it, with the speaker
//! port 0x61 that gates its third counter.
//!
//! Nothing counts: each counter knows the tick at which its count was loaded and computes its value and its output
//! from the time when it is asked. Only counter 0, whose output is IRQ 0, has a timer for the next rising edge.
//!
//! ```text
//! counter 0: gate high            -> IRQ 0
//! counter 1: gate high            -> (memory refresh, once)
//! counter 2: gate = port 61H[0]   -> port 61H[5], speaker
//! ```

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::bus::ByteDevice;
use crate::clock::{Timer, Timers};
use crate::irq::IrqLine;

mod counter;

use counter::Counter;

/// The input clock, in Hz.
pub const FREQUENCY: u64 = 1_193_182;
/// First of the four ports.
pub const BASE: u64 = 0x40;
/// Ports at [`BASE`]: the counters and the control word.
pub const PORTS: u64 = 4;
/// The speaker's port.
pub const SPEAKER_PORT: u64 = 0x61;
/// The device's offset of the speaker's port, for its [`crate::bus::Window`].
pub const SPEAKER_OFFSET: u64 = 0x10;
/// Counter 0's ISA interrupt.
pub const IRQ: u32 = 0;

/// Least time between two interrupts, in nanoseconds: a guest that asks for more than it can take gets no more.
const LEAST_PERIOD_NS: u64 = 50_000;
/// Ticks of half a refresh period (15 µs).
const REFRESH_TICKS: i64 = 18;

/// Control word: counter select of the read-back command.
const SELECT_READ_BACK: u8 = 3;
/// Read-back command: active low, latch the counts.
const READ_BACK_NO_COUNT: u8 = 1 << 5;
/// Read-back command: active low, latch the status.
const READ_BACK_NO_STATUS: u8 = 1 << 4;

/// Port 0x61: bits that a write keeps: gate, speaker, and the two parity-check disables.
const SPEAKER_WRITABLE: u8 = 0x0f;
const SPEAKER_GATE: u8 = 1 << 0;
const SPEAKER_REFRESH: u8 = 1 << 4;
const SPEAKER_OUT: u8 = 1 << 5;

/// The i8254 and port 0x61.
pub struct Pit {
    counters: [Counter; 3],
    speaker: u8,
    irq: IrqLine,
    timers: Timers,
    timer: Timer,
    last_interrupt: u64,
}

/// Input clocks in `ns` nanoseconds.
fn ticks(ns: u64) -> i64 {
    (u128::from(ns) * u128::from(FREQUENCY) / 1_000_000_000) as i64
}

/// The first nanosecond that belongs to tick `tick`.
fn nanoseconds(tick: i64) -> u64 {
    let tick = u128::from(tick.max(0).unsigned_abs());
    (tick * 1_000_000_000).div_ceil(u128::from(FREQUENCY)).try_into().unwrap_or(u64::MAX)
}

impl Pit {
    /// A timer after power-up, with `irq` as the output of counter 0.
    pub fn new(irq: IrqLine, timers: &Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let this = this.clone();
            let timer = timers.timer(move |now| {
                if let Some(pit) = this.upgrade() {
                    pit.lock().unwrap_or_else(PoisonError::into_inner).tick(now);
                }
            });
            Mutex::new(Self {
                counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
                speaker: 0,
                irq,
                timers: timers.clone(),
                timer,
                last_interrupt: 0,
            })
        })
    }

    /// The reset of the machine.
    pub fn reset(&mut self) {
        self.counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        self.speaker = 0;
        self.timer.disarm();
        self.irq.set(false);
    }

    /// Counter 0's output has risen since the last call.
    fn tick(&mut self, now: u64) {
        self.last_interrupt = now;
        // The output may have been low for one clock only: an edge, whatever the line's level is.
        self.irq.set(false);
        self.follow_counter_0(now);
        self.irq.set(true);
    }

    /// Brings IRQ 0 and its timer, which is not armed, in line with counter 0.
    fn follow_counter_0(&mut self, now: u64) {
        let counter = &mut self.counters[0];
        counter.advance(ticks(now));
        self.irq.set(counter.out(ticks(now)));
        let first = counter.next_rise(ticks(now));
        let earliest = self.last_interrupt.saturating_add(LEAST_PERIOD_NS);
        let next = match first {
            Some(tick) if nanoseconds(tick) < earliest => counter.next_rise(ticks(earliest)).or(first),
            _ => first,
        };
        match next {
            Some(tick) => self.timer.arm(nanoseconds(tick)),
            None => self.timer.disarm(),
        }
    }

    fn read_speaker(&mut self) -> u8 {
        let tick = ticks(self.timers.now());
        let counter = &mut self.counters[2];
        counter.advance(tick);
        let refresh = if (tick / REFRESH_TICKS) & 1 != 0 { SPEAKER_REFRESH } else { 0 };
        let out = if counter.out(tick) { SPEAKER_OUT } else { 0 };
        self.speaker | refresh | out
    }

    fn write_speaker(&mut self, value: u8) {
        self.speaker = value & SPEAKER_WRITABLE;
        self.counters[2].set_gate(value & SPEAKER_GATE != 0, ticks(self.timers.now()));
    }

    fn write_control(&mut self, value: u8) {
        let now = self.timers.now();
        let select = value >> 6;
        if select == SELECT_READ_BACK {
            for (index, counter) in self.counters.iter_mut().enumerate() {
                if value & (2 << index) == 0 {
                    continue;
                }
                counter.advance(ticks(now));
                if value & READ_BACK_NO_COUNT == 0 {
                    counter.latch_count(ticks(now));
                }
                if value & READ_BACK_NO_STATUS == 0 {
                    counter.latch_status(ticks(now));
                }
            }
            return;
        }
        self.counters[usize::from(select)].write_control(value, ticks(now));
        if select == 0 {
            self.rearm(now);
        }
    }

    /// Counter 0 was programmed: what was due of the old programme is not any more.
    fn rearm(&mut self, now: u64) {
        self.timer.disarm();
        self.follow_counter_0(now);
    }
}

impl ByteDevice for Pit {
    fn read_register(&mut self, offset: u64) -> u8 {
        match offset {
            0..=2 => {
                let tick = ticks(self.timers.now());
                let counter = &mut self.counters[offset as usize];
                counter.advance(tick);
                counter.read(tick)
            }
            SPEAKER_OFFSET => self.read_speaker(),
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        match offset {
            0..=2 => {
                let now = self.timers.now();
                let counter = &mut self.counters[offset as usize];
                counter.advance(ticks(now));
                counter.write(value, ticks(now));
                if offset == 0 {
                    self.rearm(now);
                }
            }
            3 => self.write_control(value),
            SPEAKER_OFFSET => self.write_speaker(value),
            _ => {}
        }
    }

    fn register_name(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            0 => "COUNTER0",
            1 => "COUNTER1",
            2 => "COUNTER2",
            3 => "CONTROL",
            SPEAKER_OFFSET => "NMI_SC",
            _ => "none",
        }
    }

    fn lose_power(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
