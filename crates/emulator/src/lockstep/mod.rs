//! Lockstep: the same guest on the translator and on the interpreter, compared after each block.
//!
//! Two vCPUs with a RAM of their own each start in the same state. The translated one goes first, for a *slice*: what is
//! due between blocks, then one block or one entry of translated code. All that it learns from outside meanwhile
//! (device registers, time, interrupts, what devices write to RAM) is recorded ([`recording`]); devices' threads have their
//! turn between slices. The interpreted one
//! then does the same slice: it gets the same answers, takes the same interrupts at the same boundary, and executes
//! exactly as many instructions ([`follow`]). Then they are compared:
//!
//! - the general registers, RIP, flags (those that are defined: [`meaning`]), control registers, the mode, what blocks
//!   interrupts, the count of instructions and the memory that was stored to, after every slice;
//! - x87 and vector registers, after every slice with an instruction that uses them;
//! - segments, descriptor tables, debug registers and MSRs, whenever an exception or an interrupt was taken;
//! - all of RAM that was written since the start, and everything above, every so many slices and at every exit: this
//!   finds the store that went astray.
//!
//! The two never share a result, so whichever is wrong is seen, and the first difference is reported with the code of
//! its slice. Random numbers of the host are not recorded: give the guest a CPU without RDRAND and RDSEED.

pub(crate) mod difference;
pub(crate) mod follow;
mod meaning;
mod recording;

use std::sync::Arc;

use engine::{
    Attention, Bus, Counter, DebugEvent, EngineError, InterruptController, Kick, Signals, TimeSource, Vcpu,
    VcpuState, VmExit,
};
use guest_memory::GuestMemory;

use crate::VcpuConfig;
use crate::cpu::{Cpu, Native, Wires};
use crate::interpreter::{Interpreter, Leave};
use crate::jit::Settings;
use crate::native::NativeUnit;
use crate::shared::{Peers, Shared};
use difference::{Difference, Registers, differing_store, same_state, same_system_state};
use follow::{Progress, Watch, follow};
use recording::{Log, Recording, Replay, device_writes, write_again};

/// Slices between two comparisons of everything.
const EVERYTHING: u64 = 1 << 22;
/// Of so many slices, one goes on for at least [`LONG`] instructions, so that blocks run linked as they do without us.
const LONG_ONES: u64 = 64;
const LONG: u64 = 256;

/// A vCPU that is two.
pub struct LockstepVcpu {
    translated: Interpreter,
    interpreted: Interpreter,
    log: Arc<Log>,
    watch: Watch,
    /// What others raise; each side has one of its own, which gets the same at the same boundary.
    attention: Arc<Attention>,
    bus: Option<Arc<dyn Bus>>,
    slices: u64,
    every: u64,
}

impl LockstepVcpu {
    /// A vCPU in its state after power-up, the only one of its machine.
    ///
    /// # Errors
    /// [`EngineError::Host`] where the host gives no memory.
    pub fn new(config: VcpuConfig) -> Result<Self, EngineError> {
        let twin = config.memory.twin().map_err(|source| EngineError::Host {
            what: "mapping a second RAM",
            source: std::io::Error::other(source),
        })?;
        config.memory.marks().log_device_writes();
        let log = Arc::new(Log::default());
        let time: Arc<dyn TimeSource> = Recording::new(config.time.clone(), &log, &config.memory);
        let interrupts: Arc<dyn InterruptController> =
            Recording::new(config.interrupts.clone(), &log, &config.memory);
        let replay = Replay::new(&log, &twin, config.time.tsc_frequency());
        let wires = Wires {
            bus: replay.clone(),
            interrupts,
            time,
            recorder: config.recorder.clone(),
            model: config.cpu.clone(),
        };
        let mut translated = side(&config, config.memory.clone(), wires)?;
        let settings = Settings { hot: 4, leave_early: true, rounds: 1, ..Settings::default() };
        translated
            .enable_jit_with(settings)
            .map_err(|source| EngineError::Host { what: "mapping code memory", source })?;
        let wires = Wires {
            bus: replay.clone(),
            interrupts: replay.clone(),
            time: replay,
            recorder: None,
            model: config.cpu.clone(),
        };
        let interpreted = side(&config, twin, wires)?;
        Ok(Self {
            translated,
            interpreted,
            log,
            watch: Watch::default(),
            attention: config.attention,
            bus: None,
            slices: 0,
            every: EVERYTHING,
        })
    }

    /// Both sides do what is due between blocks, then one block or, now and then, more of them.
    fn slice(&mut self) -> Result<Option<VmExit>, String> {
        self.slices += 1;
        self.pass_on_signals();
        self.log.start();
        self.watch.start();
        let due = (self.translated.boundary(), self.interpreted.boundary());
        if due.0 != due.1 {
            return Err(format!("between blocks: {:?}, {:?}", due.0, due.1));
        }
        if let Err(exit) = due.0 {
            return self.compare_all().map(|()| Some(exit));
        }
        let start = Progress::of(&self.translated);
        self.translated.run_at_least = if self.slices.is_multiple_of(LONG_ONES) { LONG } else { 1 };
        // Translated code that counts instructions for the guest cannot count them for us.
        let counted = self.translated.cpu.pmu.deadline() != u64::MAX;
        let first = match counted || self.translated.steps_alone() {
            true => Some(self.translated.single()),
            false => self.translated.run_block(),
        };
        let end = Progress::of(&self.translated);
        let second = follow(&mut self.interpreted, &mut self.watch, end)?;
        let exits = (exit(first), exit(second));
        if exits.0 != exits.1 {
            return Err(format!("one comes back with {:?}, the other with {:?}", exits.0, exits.1));
        }
        if end.interruptions != start.interruptions
            || self.slices.is_multiple_of(self.every)
            || exits.0.is_some()
        {
            self.compare_all()?;
        } else {
            self.compare()?;
        }
        Ok(exits.0)
    }

    /// Gives both sides what was raised from outside, and the interpreted one what devices wrote besides: their threads wait
    /// for this moment.
    fn pass_on_signals(&mut self) {
        let memory = &self.translated.cpu.memory;
        if memory.marks().let_devices() {
            write_again(&self.interpreted.cpu.memory, &device_writes(memory));
        }
        if !self.attention.pending() {
            return;
        }
        for signal in [Signals::ENGINE, Signals::INTERRUPT, Signals::EXIT] {
            if self.attention.take(signal) {
                self.raise(signal);
            }
        }
    }

    /// Goes on, slice by slice.
    fn compare_until_exit(&mut self) -> VmExit {
        loop {
            let before = Registers::of(&self.translated.cpu);
            match self.slice() {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(what) => {
                    let (translated, interpreted) = (&self.translated, &self.interpreted);
                    let (watch, slices) = (&self.watch, self.slices - 1);
                    let difference =
                        Difference { translated, interpreted, watch, before, slices, what: &what };
                    let (rip, reason) = (translated.cpu.rip, difference.report());
                    return VmExit::Differs(DebugEvent { rip, reason });
                }
            }
        }
    }

    fn raise(&self, signal: Signals) {
        self.translated.attention.raise(signal);
        self.interpreted.attention.raise(signal);
    }

    fn compare(&mut self) -> Result<(), String> {
        if let Some(wrong) = self.log.difference() {
            return Err(wrong);
        }
        let (a, b) = (&self.translated.cpu, &self.interpreted.cpu);
        if !same_state(a, b, self.watch.undefined, self.watch.vector) {
            return Err("the state".into());
        }
        if differing_store(a, b, &self.watch).is_some() {
            return Err("memory that was stored to".into());
        }
        if self.watch.undefined != 0 {
            // Nobody may rely on them, but whoever stores them makes them visible.
            let flags = self.translated.cpu.rflags();
            self.interpreted.cpu.flags.set_bits(flags);
        }
        Ok(())
    }

    fn compare_all(&mut self) -> Result<(), String> {
        self.compare()?;
        let (a, b) = (&self.translated.cpu, &self.interpreted.cpu);
        if !same_system_state(a, b) {
            return Err("segments, tables, debug registers, MSRs or vector registers".into());
        }
        if self.slices.is_multiple_of(self.every) && a.memory.first_difference(&b.memory).is_some() {
            return Err("memory; the slice that stored to it was an earlier one".into());
        }
        Ok(())
    }
}

/// One of the two, with an attention word of its own.
fn side(config: &VcpuConfig, memory: GuestMemory, wires: Wires) -> Result<Interpreter, EngineError> {
    let unit =
        NativeUnit::new().map_err(|source| EngineError::Host { what: "mapping code memory", source })?;
    let cpu = Cpu::power_up(config.id, memory, wires, Native { unit, insns: Vec::new() });
    let attention = Attention::new();
    let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
    Ok(Interpreter::new(cpu, attention, peers))
}

fn exit(leave: Option<Leave>) -> Option<VmExit> {
    match leave {
        Some(Leave::Exit(exit)) => Some(exit),
        Some(Leave::Boundary) | None => None,
    }
}

impl Vcpu for LockstepVcpu {
    fn run(&mut self, bus: &Arc<dyn Bus>) -> Result<VmExit, EngineError> {
        if !self.bus.as_ref().is_some_and(|present| Arc::ptr_eq(bus, present)) {
            self.bus = Some(bus.clone());
            let cpu = &mut self.translated.cpu;
            cpu.wires.bus = Recording::new(bus.clone(), &self.log, &cpu.memory);
        }
        if self.slices == 0 {
            self.interpreted.cpu.memory.copy_from(&self.translated.cpu.memory);
        }
        self.raise(Signals::INTERRUPT);
        self.translated.cpu.memory.marks().begin_vcpu_turn();
        let exit = self.compare_until_exit();
        self.translated.cpu.memory.marks().end_vcpu_turn();
        Ok(exit)
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        Ok(self.translated.cpu.state())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.log.start();
        for side in [&mut self.translated, &mut self.interpreted] {
            side.cpu.set_state(state)?;
            side.reset_code();
        }
        match self.log.difference() {
            None => Ok(()),
            Some(what) => Err(EngineError::BadState(what)),
        }
    }

    fn kick(&self) -> Kick {
        Kick::new(self.attention.clone())
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.translated.cpu.instructions)
    }

    fn counters(&self) -> Vec<Counter> {
        let mut counters = self.translated.counters();
        counters.push(Counter::count("slices compared", self.slices));
        counters
    }
}

#[cfg(test)]
mod tests;
