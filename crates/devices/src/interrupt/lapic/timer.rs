use std::sync::Arc;

use engine::TimeSource;
use x86::apic::Lvt;

/// The frequency that the timer's divider divides, in Hz: what CPUID.15H has to tell as the crystal's, if anything.
pub const TIMER_FREQUENCY: u64 = 1_000_000_000;

/// The deadline of a timer that does not run.
pub(super) const NEVER: u64 = u64::MAX;

/// The host wakes for a periodic timer no oftener than this, in nanoseconds. A guest that keeps up with a shorter period
/// gets its interrupts all the same: each EOI looks whether the next period has ended, at the guest's own cost.
const SHORTEST_HOST_PERIOD: u64 = 20_000;

/// The timer's mode, as its LVT entry has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: nothing runs.
    Reserved,
}

impl TimerMode {
    pub fn of(lvt: Lvt) -> Self {
        match (lvt.contains(Lvt::TSC_DEADLINE), lvt.contains(Lvt::PERIODIC)) {
            (false, false) => Self::OneShot,
            (false, true) => Self::Periodic,
            (true, false) => Self::TscDeadline,
            (true, true) => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Stopped,
    /// The count register had `count` at `since` nanoseconds.
    Counting {
        since: u64,
        count: u32,
    },
    /// Armed for this value of the guest's TSC.
    Deadline(u64),
}

/// The APIC's timer on a bus clock of [`TIMER_FREQUENCY`], so that a tick is a nanosecond. SDM vol. 3, *APIC Timer*.
///
/// Nothing here ticks: registers are computed from the time, and [`ApicTimer::settle`] says that the timer has expired.
pub(super) struct ApicTimer {
    time: Arc<dyn TimeSource>,
    /// What the guest's TSC is ahead of the machine's.
    tsc_offset: u64,
    mode: TimerMode,
    divide: u32,
    initial: u32,
    state: State,
    /// When the state expires, in nanoseconds.
    expiry: u64,
    /// When a periodic timer may wake the host again, in nanoseconds.
    not_before: u64,
}

impl ApicTimer {
    pub fn new(time: Arc<dyn TimeSource>) -> Self {
        Self {
            time,
            tsc_offset: 0,
            mode: TimerMode::OneShot,
            divide: 0,
            initial: 0,
            state: State::Stopped,
            expiry: NEVER,
            not_before: 0,
        }
    }

    /// The state after reset.
    pub fn reset(&mut self) {
        self.mode = TimerMode::OneShot;
        self.divide = 0;
        self.initial = 0;
        self.stop();
    }

    /// When the host must call [`Self::settle`], in nanoseconds; [`NEVER`] where it need not.
    pub fn wake_at(&self) -> u64 {
        if self.mode == TimerMode::Periodic { self.expiry.max(self.not_before) } else { self.expiry }
    }

    /// Whether the timer has expired since the last call. To be called before anything is changed.
    pub fn settle(&mut self) -> bool {
        match self.state {
            State::Stopped => false,
            State::Counting { .. } => self.settle_count(),
            State::Deadline(deadline) => {
                let expired = self.guest_tsc() >= deadline;
                if expired {
                    self.stop();
                }
                expired
            }
        }
    }

    fn settle_count(&mut self) -> bool {
        let now = self.time.now();
        if now < self.expiry {
            return false;
        }
        if self.mode == TimerMode::Periodic && self.initial != 0 {
            let period = u64::from(self.initial) * self.divisor();
            let since = now - (now - self.expiry) % period;
            self.count_from(since, self.initial);
        } else {
            self.stop();
        }
        true
    }

    /// Follows the LVT entry's mode. Going to or from TSC-deadline mode disarms the timer.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if mode.counts() != self.mode.counts() || !mode.counts() && mode != self.mode {
            self.initial = 0;
            self.stop();
        }
        self.mode = mode;
    }

    pub fn initial_count(&self) -> u32 {
        self.initial
    }

    /// Starts the count; zero stops it. Ignored in TSC-deadline mode.
    pub fn set_initial_count(&mut self, count: u32) {
        if !self.mode.counts() {
            return;
        }
        self.initial = count;
        self.not_before = 0;
        if count == 0 {
            self.stop();
        } else {
            self.count_from(self.time.now(), count);
        }
    }

    /// The count now, of a settled timer.
    pub fn current_count(&self) -> u32 {
        match self.state {
            State::Counting { since, count } => {
                let ticks = self.time.now().saturating_sub(since) / self.divisor();
                // Later by a hair than when it was settled: it has not reached zero officially.
                u64::from(count).saturating_sub(ticks).max(1) as u32
            }
            State::Stopped | State::Deadline(_) => 0,
        }
    }

    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Sets the divide configuration register; a running count goes on from where it is.
    pub fn set_divide(&mut self, divide: u32) {
        let count = self.current_count();
        self.divide = divide;
        if let State::Counting { .. } = self.state {
            self.count_from(self.time.now(), count);
        }
    }

    /// IA32_TSC_DEADLINE: zero where it is not armed.
    pub fn deadline(&self) -> u64 {
        match self.state {
            State::Deadline(deadline) => deadline,
            _ => 0,
        }
    }

    /// Arms the timer for a value of the guest's TSC, and says whether it has been reached already; zero disarms it.
    /// Ignored outside TSC-deadline mode.
    #[must_use]
    pub fn set_deadline(&mut self, deadline: u64) -> bool {
        if self.mode != TimerMode::TscDeadline {
            return false;
        }
        let ticks = deadline.saturating_sub(self.guest_tsc());
        if ticks == 0 {
            self.stop();
            return deadline != 0;
        }
        self.state = State::Deadline(deadline);
        self.expiry = self.after_ticks(ticks);
        false
    }

    /// The host has looked. Computes the expiry anew: the time may have been a little short of it then.
    pub fn reschedule(&mut self) {
        self.not_before = self.time.now().saturating_add(SHORTEST_HOST_PERIOD);
        if let State::Deadline(_) = self.state {
            self.schedule();
        }
    }

    /// Sets what the guest's TSC is ahead of the machine's, modulo 2^64.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.schedule();
    }

    fn guest_tsc(&self) -> u64 {
        self.time.tsc().wrapping_add(self.tsc_offset)
    }

    /// SDM vol. 3, *Divide Configuration Register*: bits 0, 1 and 3 are the exponent less one.
    fn divisor(&self) -> u64 {
        let exponent = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((exponent + 1) & 7)
    }

    fn stop(&mut self) {
        self.state = State::Stopped;
        self.expiry = NEVER;
    }

    fn count_from(&mut self, since: u64, count: u32) {
        self.state = State::Counting { since, count };
        self.schedule();
    }

    fn schedule(&mut self) {
        self.expiry = match self.state {
            State::Stopped => NEVER,
            State::Counting { since, count } => {
                since.saturating_add(u64::from(count) * self.divisor()).min(NEVER - 1)
            }
            State::Deadline(deadline) => self.after_ticks(deadline.saturating_sub(self.guest_tsc())),
        };
    }

    /// When `ticks` of the TSC have passed from now, in nanoseconds, rounded up.
    fn after_ticks(&self, ticks: u64) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        let frequency = self.time.tsc_frequency().max(1);
        let ns = match ticks.checked_mul(SECOND) {
            Some(scaled) => scaled.div_ceil(frequency),
            // A 128-bit division is slow, and only needed beyond some seconds.
            None => u64::try_from((u128::from(ticks) * u128::from(SECOND)).div_ceil(frequency.into()))
                .unwrap_or(NEVER),
        };
        self.time.now().saturating_add(ns).min(NEVER - 1)
    }
}
