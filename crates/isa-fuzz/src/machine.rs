//! Whole programs on the software CPU, interpreted or translated: what they raise leads to a handler that halts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use emulator::interpreter::Interpreter;
use emulator::jit::{Settings, Statistics};
use emulator::shared::{Peers, Shared};
use engine::{Attention, Signals, VmExit};

use crate::case::{COMPLETED, Case, Outcome, TIMED_OUT};
use crate::interpreter::{CODE_PAGE, Executor, HANDLERS_AT, KERNEL_STACK_AT, Pages, load, processor, record};
use crate::layout::EXIT;

/// How often a program is looked at; one that has not ended by the second look is given up.
const PATIENCE: Duration = Duration::from_millis(200);
/// Cases after which code is forgotten, so that it is made in fresh memory now and then.
const KEPT: u64 = 500;

/// A processor with its interpreter or translator.
pub struct Machine {
    interpreter: Interpreter,
    memory: Pages,
    attention: Arc<Attention>,
    over: Arc<AtomicBool>,
    cases: u64,
}

impl Machine {
    /// Sets it up; `translated`: every block is translated before it runs.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn new(translated: bool) -> std::io::Result<Self> {
        let cpu = processor()?;
        let memory = Pages::new(&cpu.memory);
        let attention = Attention::new();
        let peers = Peers::join(Arc::new(Shared::new(1)), 0, attention.clone());
        let mut interpreter = Interpreter::new(cpu, attention.clone(), peers);
        if translated {
            interpreter.enable_jit_with(Settings { code_bytes: 4 << 20, hot: 0, ..Settings::default() })?;
        }
        let over = Arc::new(AtomicBool::new(false));
        let (kicked, seen) = (attention.clone(), over.clone());
        std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                std::thread::sleep(PATIENCE);
                kicked.raise(Signals::EXIT);
            }
        });
        Ok(Self { interpreter, memory, attention, over, cases: 0 })
    }

    /// What its translator did.
    pub fn statistics(&self) -> Option<Statistics> {
        self.interpreter.jit_statistics()
    }

    /// Runs until a handler halts. Gives its vector.
    fn run_to_halt(&mut self) -> Option<u8> {
        let mut looks = 0;
        loop {
            match self.interpreter.run() {
                VmExit::Halt => {
                    let vector = self.interpreter.cpu.rip.wrapping_sub(HANDLERS_AT + 1);
                    return u8::try_from(vector).ok();
                }
                VmExit::Interrupted if looks < 2 => looks += 1,
                _ => return None,
            }
        }
    }

    /// What the handler found on its stack: the interrupted state becomes the processor's.
    fn take_frame(&mut self, vector: u8, outcome: &mut Outcome) {
        let cpu = &mut self.interpreter.cpu;
        let coded = matches!(vector, 8 | 10..=14 | 17 | 21);
        let frame: [u64; 6] = std::array::from_fn(|n| {
            cpu.memory.load(KERNEL_STACK_AT - crate::interpreter::HIGH - 48 + 8 * n as u64)
        });
        let [error, rip, code, flags, pointer, stack] = frame;
        outcome.vector = vector;
        outcome.error = if coded { error } else { 0 };
        outcome.cr2 = if vector == 14 { cpu.cr2 } else { 0 };
        (outcome.rip, outcome.rflags, outcome.gprs[4]) = (rip, flags, pointer);
        (outcome.selectors[1], outcome.selectors[2]) = (code as u16, stack as u16);
    }
}

impl Executor for Machine {
    fn name(&self) -> &'static str {
        if self.statistics().is_some() { "translator" } else { "interpreter" }
    }

    fn run(&mut self, case: &Case) -> Outcome {
        self.cases += 1;
        if self.cases.is_multiple_of(KEPT) {
            self.interpreter.reset_code();
        }
        let cpu = &mut self.interpreter.cpu;
        load(cpu, case);
        self.memory.put(&cpu.memory, case);
        // As a device's writes do it.
        cpu.memory.marks().written(CODE_PAGE);
        (cpu.rip, cpu.halted, cpu.cr2) = (case.mode.rip(), false, 0);
        (cpu.debug_traps, cpu.fault, cpu.exit) = (0, None, None);
        self.attention.take(Signals::EXIT);
        let vector = self.run_to_halt();
        let mut outcome = Outcome::default();
        record(&self.interpreter.cpu, case, &mut outcome);
        match vector {
            Some(vector) => self.take_frame(vector, &mut outcome),
            None => outcome.vector = TIMED_OUT,
        }
        if outcome.vector == 14 && outcome.rip == EXIT {
            (outcome.vector, outcome.error, outcome.cr2) = (COMPLETED, 0, 0);
            outcome.rip = case.mode.rip() + case.code().len() as u64;
            outcome.selectors[1] = case.mode.code_selector();
        }
        self.memory.take(&self.interpreter.cpu.memory, case, &mut outcome);
        outcome
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
