//! The performance-monitoring unit: four general counters and three fixed ones.
//! SDM vol. 3, *Performance Monitoring*, *Architectural Performance Monitoring Version 2*.
//!
//! The core's clock is its own progress: each instruction that retires takes one cycle, so both are exact and the same
//! on every run. Reference cycles are ticks of the machine's time-stamp counter while the processor is not halted.
//!
//! Nothing is counted while it happens. The unit notes a [`Moment`], and adds what has passed since to whatever
//! counts when someone asks, when the privilege changes, and when an overflow that interrupts is due: until then the
//! interpreter, and translated code, run no more instructions than [`Pmu::deadline`] leaves.

use engine::MsrFault;
use x86::{Cr4, msr};

use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::insn::{Insn, Stop};

/// General counters.
pub const GENERAL: usize = 4;
/// Fixed counters: instructions, core cycles, reference cycles.
pub const FIXED: usize = 3;
/// Bits of every counter.
pub const WIDTH: u32 = 48;
/// How many of the architectural events leaf 0AH tells of.
pub const EVENTS: u32 = 7;
/// Those of them that are not counted: last-level cache references and misses, branches, mispredicted branches.
pub const ABSENT_EVENTS: u32 = 0b111_1000;

const COUNTERS: usize = GENERAL + FIXED;
const MASK: u64 = (1 << WIDTH) - 1;
/// Where the fixed counters begin in the global registers.
const FIXED_SHIFT: u32 = 32;
/// The bits that the global registers have.
const GLOBAL: u64 = (1 << GENERAL) - 1 | ((1 << FIXED) - 1) << FIXED_SHIFT;
/// What besides IA32_PERF_GLOBAL_OVF_CTRL may be asked to clear: the buffer's overflow, and that the state changed.
const OTHER_STATUS: u64 = 3 << 62;
/// IA32_PERF_CAPABILITIES: counters can be written in their full width.
const FULL_WIDTH_WRITES: u64 = 1 << 13;
/// Instructions between two looks at the clock, where reaching a number of reference cycles interrupts.
const CLOCK_LOOK: u64 = 20_000;

/// Bits of IA32_PERFEVTSELx.
mod select {
    pub const EVENT_AND_UNIT: u64 = 0xffff;
    pub const USER: u64 = 1 << 16;
    pub const OS: u64 = 1 << 17;
    pub const EDGE: u64 = 1 << 18;
    pub const INTERRUPT: u64 = 1 << 20;
    pub const ENABLE: u64 = 1 << 22;
    pub const INVERT: u64 = 1 << 23;
    pub const CMASK_SHIFT: u32 = 24;
    /// Bit 21 (any thread) came with version 3.
    pub const RESERVED: u64 = !0xffff_ffff | 1 << 21;
}

/// Bits of a fixed counter's field in IA32_FIXED_CTR_CTRL.
mod fixed {
    pub const OS: u64 = 1;
    pub const USER: u64 = 2;
    pub const INTERRUPT: u64 = 8;
    /// The fields of all counters without bit 2 (any thread).
    pub const WRITABLE: u64 = 0xbbb;
}

/// Until when something has been counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Instructions retired.
    pub instructions: u64,
    /// Ticks of the machine's time-stamp counter.
    pub ticks: u64,
}

impl Moment {
    /// The moment after an instruction that began at this one.
    pub fn after(self) -> Self {
        Self { instructions: self.instructions.wrapping_add(1), ..self }
    }
}

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Nothing,
    /// One for each instruction, which is also one for each core cycle.
    Instructions,
    Reference,
}

/// How a counter is set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    event: Event,
    user: bool,
    os: bool,
    interrupts: bool,
}

/// The unit's registers.
#[derive(Clone, Debug, PartialEq)]
pub struct Pmu {
    select: [u64; GENERAL],
    fixed_control: u64,
    global_control: u64,
    status: u64,
    /// The general counters, then the fixed ones.
    counters: [u64; COUNTERS],
    /// What the counters' values hold.
    since: Moment,
    /// Whether CPL 3 is what counts now.
    user: bool,
    /// Whether anything may count.
    active: bool,
    /// An overflow's interrupt has not been sent yet.
    interrupt: bool,
    deadline: u64,
}

impl Pmu {
    /// Where [`Pmu::is_active`] stands, for translated code.
    pub const ACTIVE_OFFSET: usize = std::mem::offset_of!(Pmu, active);

    /// After power-up: every general counter is enabled globally, none by itself.
    pub fn reset() -> Self {
        Self {
            select: [0; GENERAL],
            fixed_control: 0,
            global_control: (1 << GENERAL) - 1,
            status: 0,
            counters: [0; COUNTERS],
            since: Moment::default(),
            user: false,
            active: false,
            interrupt: false,
            deadline: u64::MAX,
        }
    }

    /// Whether anything may count, at some privilege.
    #[inline(always)]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// How many instructions may have retired before [`Pmu::advance`] must be called; `u64::MAX` where it does not
    /// matter.
    #[inline(always)]
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Whether [`Pmu::look`] has something to do.
    #[inline(always)]
    pub fn needs_look(&self, instructions: u64, user: bool) -> bool {
        self.active && (instructions >= self.deadline || user != self.user)
    }

    /// Counts what has happened, and goes on at this privilege. Gives whether counters ask for their interrupt.
    pub fn look(&mut self, now: Moment, user: bool) -> bool {
        self.advance(now);
        self.user = user;
        let interrupt = std::mem::take(&mut self.interrupt);
        self.plan();
        interrupt
    }

    /// Forgets what happened until now without counting it: the processor was halted.
    pub fn resume(&mut self, now: Moment) {
        self.since = now;
        self.plan();
    }

    /// Counts what has happened until now.
    pub fn advance(&mut self, now: Moment) {
        let instructions = now.instructions.wrapping_sub(self.since.instructions);
        let ticks = now.ticks.saturating_sub(self.since.ticks);
        self.since = now;
        for n in 0..COUNTERS {
            let Some(setup) = self.counting(n) else { continue };
            let sum = self.counters[n].wrapping_add(match setup.event {
                Event::Instructions => instructions,
                Event::Reference => ticks,
                Event::Nothing => 0,
            });
            self.counters[n] = sum & MASK;
            if sum & !MASK != 0 {
                self.status |= global_bit(n);
                self.interrupt |= setup.interrupts;
            }
        }
        self.plan();
    }

    /// Stops all counters: IA32_DEBUGCTL asks for that when they interrupt.
    pub fn freeze(&mut self) {
        self.global_control = 0;
        self.plan();
    }

    /// A counter's setup, where it is enabled by all its switches; whatever the privilege.
    fn setup(&self, n: usize) -> Option<Setup> {
        if self.global_control & global_bit(n) == 0 {
            return None;
        }
        if let Some(fixed_number) = n.checked_sub(GENERAL) {
            let field = self.fixed_control >> (4 * fixed_number);
            let event = if fixed_number == 2 { Event::Reference } else { Event::Instructions };
            let interrupts = field & fixed::INTERRUPT != 0;
            let (user, os) = (field & fixed::USER != 0, field & fixed::OS != 0);
            return (user || os).then_some(Setup { event, user, os, interrupts });
        }
        let chosen = self.select[n];
        let event = event(chosen);
        let interrupts = chosen & select::INTERRUPT != 0;
        let (user, os) = (chosen & select::USER != 0, chosen & select::OS != 0);
        let enabled = chosen & select::ENABLE != 0 && (user || os) && event != Event::Nothing;
        enabled.then_some(Setup { event, user, os, interrupts })
    }

    /// The same, where it counts at the present privilege.
    fn counting(&self, n: usize) -> Option<Setup> {
        self.setup(n).filter(|setup| if self.user { setup.user } else { setup.os })
    }

    /// Follows a change of the registers, of the privilege or of the counters' values.
    fn plan(&mut self) {
        self.active = self.interrupt || (0..COUNTERS).any(|n| self.setup(n).is_some());
        let start = self.since.instructions;
        let due = (0..COUNTERS).filter_map(|n| {
            let setup = self.counting(n).filter(|setup| setup.interrupts)?;
            Some(match setup.event {
                Event::Instructions => start.saturating_add(MASK + 1 - self.counters[n]),
                _ => start.saturating_add(CLOCK_LOOK),
            })
        });
        self.deadline = if self.interrupt { 0 } else { due.min().unwrap_or(u64::MAX) };
    }

    /// RDPMC's counter.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn by_number(&self, number: u32) -> Result<u64, MsrFault> {
        const FIXED_KIND: u32 = 1 << 30;
        let n = match number {
            0..=3 => number as usize,
            FIXED_KIND.. if number - FIXED_KIND < FIXED as u32 => GENERAL + (number - FIXED_KIND) as usize,
            _ => return Err(MsrFault),
        };
        Ok(self.counters[n])
    }

    /// Reads one of the registers.
    ///
    /// # Errors
    /// It is not one of them.
    pub fn read(&self, index: u32) -> Result<u64, MsrFault> {
        Ok(match Register::of(index)? {
            Register::Counter(n) | Register::NarrowCounter(n) => self.counters[n],
            Register::Select(n) => self.select[n],
            Register::FixedControl => self.fixed_control,
            Register::GlobalControl => self.global_control,
            Register::Status => self.status,
            Register::StatusClear => 0,
            Register::Capabilities => FULL_WIDTH_WRITES,
        })
    }

    /// Writes one of the registers. `now` is behind the instruction that does: what ends with it is counted, what
    /// begins with it begins behind it.
    ///
    /// # Errors
    /// It is not one of them, cannot be written, or the value has reserved bits.
    pub fn write(&mut self, index: u32, value: u64, now: Moment) -> Result<(), MsrFault> {
        let register = Register::of(index)?;
        let reserved = match register {
            Register::Counter(_) => !MASK,
            Register::NarrowCounter(_) => 0,
            Register::Select(_) => select::RESERVED,
            Register::FixedControl => !fixed::WRITABLE,
            Register::GlobalControl => !GLOBAL,
            Register::StatusClear => !(GLOBAL | OTHER_STATUS),
            Register::Status | Register::Capabilities => return Err(MsrFault),
        };
        if value & reserved != 0 {
            return Err(MsrFault);
        }
        self.advance(now);
        match register {
            Register::Counter(n) => self.counters[n] = value,
            Register::NarrowCounter(n) => self.counters[n] = i64::from(value as i32) as u64 & MASK,
            Register::Select(n) => self.select[n] = value,
            Register::FixedControl => self.fixed_control = value,
            Register::GlobalControl => self.global_control = value,
            Register::StatusClear => self.status &= !value,
            Register::Status | Register::Capabilities => {}
        }
        self.plan();
        Ok(())
    }

    /// Restores IA32_PERF_GLOBAL_STATUS, which software cannot write.
    ///
    /// # Errors
    /// The value has reserved bits.
    pub fn restore_status(&mut self, value: u64) -> Result<(), MsrFault> {
        if value & !GLOBAL != 0 {
            return Err(MsrFault);
        }
        self.status = value;
        Ok(())
    }

    /// Whether a model-specific register is one of the unit's.
    pub fn has(index: u32) -> bool {
        Register::of(index).is_ok()
    }

    /// The registers to save, in the order of restoring: what lets counters run comes last.
    pub fn indices() -> impl Iterator<Item = u32> {
        (0..GENERAL as u32)
            .map(|n| msr::IA32_A_PMC0 + n)
            .chain((0..FIXED as u32).map(|n| msr::IA32_FIXED_CTR0 + n))
            .chain((0..GENERAL as u32).map(|n| msr::IA32_PERFEVTSEL0 + n))
            .chain([msr::IA32_FIXED_CTR_CTRL, msr::IA32_PERF_GLOBAL_STATUS, msr::IA32_PERF_GLOBAL_CTRL])
    }
}

/// The unit's registers by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// In its full width.
    Counter(usize),
    /// A write gives the low half, sign-extended.
    NarrowCounter(usize),
    Select(usize),
    FixedControl,
    GlobalControl,
    Status,
    StatusClear,
    Capabilities,
}

impl Register {
    fn of(index: u32) -> Result<Self, MsrFault> {
        const NARROW: u32 = msr::IA32_PMC0;
        const WIDE: u32 = msr::IA32_A_PMC0;
        const SELECT: u32 = msr::IA32_PERFEVTSEL0;
        const FIXED_0: u32 = msr::IA32_FIXED_CTR0;
        let general = GENERAL as u32;
        Ok(match index {
            msr::IA32_FIXED_CTR_CTRL => Self::FixedControl,
            msr::IA32_PERF_GLOBAL_CTRL => Self::GlobalControl,
            msr::IA32_PERF_GLOBAL_STATUS => Self::Status,
            msr::IA32_PERF_GLOBAL_OVF_CTRL => Self::StatusClear,
            msr::IA32_PERF_CAPABILITIES => Self::Capabilities,
            NARROW.. if index - NARROW < general => Self::NarrowCounter((index - NARROW) as usize),
            WIDE.. if index - WIDE < general => Self::Counter((index - WIDE) as usize),
            SELECT.. if index - SELECT < general => Self::Select((index - SELECT) as usize),
            FIXED_0.. if index - FIXED_0 < FIXED as u32 => {
                Self::Counter(GENERAL + (index - FIXED_0) as usize)
            }
            _ => return Err(MsrFault),
        })
    }
}

/// A counter's bit in the global registers.
fn global_bit(n: usize) -> u64 {
    match n.checked_sub(GENERAL) {
        None => 1 << n,
        Some(fixed_number) => 1 << (FIXED_SHIFT + fixed_number as u32),
    }
}

/// What a general counter counts. With a counter mask it counts the cycles in which the event happened so often, or
/// less often: here it happens once in each.
fn event(chosen: u64) -> Event {
    const CORE_CYCLES: u64 = 0x003c;
    const INSTRUCTIONS: u64 = 0x00c0;
    const REFERENCE_CYCLES: u64 = 0x013c;
    let event = match chosen & select::EVENT_AND_UNIT {
        CORE_CYCLES | INSTRUCTIONS => Event::Instructions,
        REFERENCE_CYCLES => Event::Reference,
        _ => return Event::Nothing,
    };
    let (mask, inverted) = (chosen >> select::CMASK_SHIFT & 0xff, chosen & select::INVERT != 0);
    let holds = match mask {
        0 => true,
        _ => (mask <= 1) != inverted,
    };
    // What always holds has no edges.
    if holds && chosen & select::EDGE == 0 { event } else { Event::Nothing }
}

impl Cpu {
    /// Lets the counters hold what has happened before `insn`, which reads one of them.
    pub fn advance_counters(&mut self, insn: &Insn) {
        if self.pmu.is_active() {
            let now = self.moment(insn);
            self.pmu.advance(now);
        }
    }

    fn check_counters(&self, index: u32) -> Result<(), MsrFault> {
        let needed = if index == msr::IA32_PERF_CAPABILITIES { feature::PDCM } else { feature::ARCH_PERFMON };
        self.wires.model.has(needed).then_some(()).ok_or(MsrFault)
    }

    /// Reads one of the unit's registers as it was last advanced.
    ///
    /// # Errors
    /// [`MsrFault`] where there is no such register.
    pub fn read_counter_msr(&self, index: u32) -> Result<u64, MsrFault> {
        self.check_counters(index)?;
        self.pmu.read(index)
    }

    /// Writes one of the unit's registers; see [`Pmu::write`].
    ///
    /// # Errors
    /// [`MsrFault`] where there is no such register, or it refuses the value.
    pub fn write_counter_msr(&mut self, index: u32, value: u64, now: Moment) -> Result<(), MsrFault> {
        self.check_counters(index)?;
        self.pmu.write(index, value, now)
    }
}

/// RDPMC.
pub fn rdpmc(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let allowed = cpu.cpl() == 0 || cpu.cr4.contains(Cr4::PCE);
    let number = cpu.gpr_sized(1, 4) as u32;
    if !allowed || !cpu.wires.model.has(feature::ARCH_PERFMON) {
        return Err(cpu.gp0());
    }
    cpu.advance_counters(insn);
    let value = cpu.pmu.by_number(number).map_err(|MsrFault| cpu.gp0())?;
    cpu.set_gpr_sized(0, 4, value & 0xffff_ffff);
    cpu.set_gpr_sized(2, 4, value >> 32);
    Ok(())
}

#[cfg(test)]
mod tests;
