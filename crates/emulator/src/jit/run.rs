//! The interpreter's side of the translator: what is hot, the entry, and the handlers that translated code calls.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use x86::Flags;

use super::{Context, Jit, STEP_DISPATCH, Settings, Source, exit};
use crate::block::Regime;
use crate::interpreter::{Interpreter, Leave};
use crate::mmu::NO_PAGE;

/// SF, ZF, AF, PF, CF and the bit that is always one: what LAHF gives.
const LAHF: u64 = 0xd5;

/// RFLAGS' arithmetic flags as the frame has them.
fn to_frame(flags: u64) -> u64 {
    flags & LAHF | 2 | (flags & Flags::OF.bits()) >> 11 << 8
}

/// And back.
fn from_frame(flags: u64) -> u64 {
    flags & LAHF | (flags >> 8 & 1) << 11
}

impl Interpreter {
    /// Turns the translator on.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn enable_jit(&mut self) -> std::io::Result<()> {
        self.enable_jit_with(Settings::default())
    }

    /// The same, with settings of its own.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn enable_jit_with(&mut self, settings: Settings) -> std::io::Result<()> {
        self.jit = Some(Jit::new(settings)?);
        Ok(())
    }

    /// What the translator did; `None` where it is off.
    pub fn jit_statistics(&self) -> Option<super::Statistics> {
        self.jit.as_ref().map(Jit::statistics)
    }

    /// Counts a run of an untranslated block; whether it has been run often enough.
    pub(crate) fn is_hot(&mut self, number: u32) -> bool {
        let Some(hot) = self.jit.as_ref().map(Jit::hot) else { return false };
        let block = self.blocks.get_mut(number);
        block.heat = block.heat.saturating_add(1);
        block.heat > hot && block.pages[1] == NO_PAGE
    }

    /// Translates a block.
    pub(crate) fn translate(&mut self, number: u32, rip: u64, regime: Regime) {
        let Some(jit) = &mut self.jit else { return };
        let (block, mode) = (*self.blocks.get(number), self.cpu.mode);
        let marks = self.cpu.memory.marks();
        let state = marks.state(block.offset);
        if !self.blocks.is_fresh(&block, &self.cpu.memory) || !marks.is_code(block.offset) {
            return;
        }
        let bytes = self.blocks.bytes(&block);
        let model = self.cpu.wires.model.clone();
        let source = Source {
            number,
            block: &block,
            mode,
            bytes,
            state,
            state_address: marks.state_address(block.offset),
            model: &model,
        };
        let Some(added) = jit.add(&source) else {
            self.forget();
            return;
        };
        for key in added.exits {
            let target = self.blocks.find(key.offset, key.rip, mode).map(|n| self.blocks.get(n).code);
            if let Some(code) = target.filter(|&code| code != 0) {
                jit.connect(key, code);
            }
        }
        let block = self.blocks.get_mut(number);
        (block.code, block.state_at) = (added.code, added.state_at);
        self.blocks.remember(rip, regime, number);
    }

    /// A translation left before its first instruction. Where the page's code is what it was, and only the page's
    /// other marks have changed, it has to expect those.
    fn follow_state(&mut self, rip: u64, regime: Regime) {
        let Some(number) = self.blocks.recent(rip, regime) else { return };
        let block = self.blocks.get(number);
        let state = self.cpu.memory.marks().state(block.offset);
        if block.code != 0
            && self.blocks.is_fresh(block, &self.cpu.memory)
            && let Some(jit) = &mut self.jit
        {
            jit.expect(block.state_at, state);
        }
    }

    /// Runs translated code until it leaves. `None`: find the block at RIP.
    pub(crate) fn run_translated(&mut self, code: u64, regime: Regime) -> Option<Leave> {
        let word = self.attention.word_address();
        let start = match self.cpu.pmu.deadline() {
            u64::MAX => 0,
            _ if self.jit.as_mut().is_some_and(Jit::count_down) => {
                self.forget();
                return None;
            }
            _ => !self.instructions_left(),
        };
        let mut context = Context {
            registers: self.cpu.registers.all_mut().as_mut_ptr() as u64,
            flags: to_frame(self.cpu.flags.bits()),
            tlb: self.cpu.mmu.tlb.base(self.cpu.mmu.view) as u64,
            attention: self.jit.as_ref().and_then(|jit| jit.leaves_after(self.run_at_least)).unwrap_or(word),
            ram: self.cpu.memory.host_address(0).unwrap_or(0),
            recent: self.blocks.recent_address(),
            regime,
            fs_base: self.cpu.bases[4],
            gs_base: self.cpu.bases[5],
            step: step as *const () as u64,
            count: start,
            start,
            ..Context::default()
        };
        let this: *mut Self = self;
        context.owner = this as u64;
        // SAFETY: the block's code is of this generation (forgetting code forgets the blocks). The context points to
        // this vCPU's registers, translation cache, table and attention word and to RAM, all of which live as long as
        // `self`, which is not used until the code comes back but by `step`, through `owner`.
        let why = unsafe {
            let jit = (*this).jit.as_ref()?;
            jit.enter(&mut context, code)
        };
        let executed = context.count.wrapping_sub(start);
        self.cpu.instructions = self.cpu.instructions.wrapping_add(executed);
        self.cpu.translated = 0;
        if let Some(panic) = self.panic.take() {
            resume_unwind(panic);
        }
        if why == exit::DISPATCH {
            self.cpu.rip = context.rip;
            self.cpu.flags.set_bits(from_frame(context.flags));
            if executed == 0 {
                self.follow_state(context.rip, regime);
            }
            return None;
        }
        // Where nothing was left here, the block is complete.
        let (insn, block, stop) = self.stopped_at.take()?;
        let (first, count) = (self.blocks.get(block).first, self.blocks.get(block).count);
        // The block's instructions were counted when it was entered.
        self.cpu.instructions = self.cpu.instructions.wrapping_sub(u64::from(count));
        let at = *self.blocks.insn(insn);
        match self.stopped(&at, u64::from(insn - first), stop) {
            None if self.steps_alone() => Some(Leave::Boundary),
            leave => leave,
        }
    }

    /// Runs the handler of an instruction in a block that translated code is in.
    fn step(&mut self, context: &mut Context, insn: u32, number: u32) -> u32 {
        let block = *self.blocks.get(number);
        let cpu = &mut self.cpu;
        cpu.flags.set_bits(from_frame(context.flags));
        (cpu.block_rip, cpu.rip) = (block.rip, block.end);
        cpu.mmu.executing = block.pages;
        cpu.translated = context.count.wrapping_sub(context.start).wrapping_sub(u64::from(block.count));
        let at = *self.blocks.insn(insn);
        if let Err(stop) = (at.run)(cpu, &at) {
            self.stopped_at = Some((insn, number, stop));
            return exit::STOP;
        }
        context.flags = to_frame(cpu.flags.bits());
        context.tlb = cpu.mmu.tlb.base(cpu.mmu.view) as u64;
        (context.fs_base, context.gs_base) = (cpu.bases[4], cpu.bases[5]);
        (context.rip, context.regime) = (cpu.rip, self.regime());
        if let Some(jit) = &mut self.jit {
            jit.count_handler_call();
        }
        match insn + 1 == block.first + block.count {
            false => 0,
            true if self.has_more_to_look_at() => exit::STOP,
            true => STEP_DISPATCH,
        }
    }
}

/// What translated code calls for an instruction that has no code of its own, or whose operand was not found.
unsafe extern "sysv64" fn step(context: *mut Context, insn: u32, block: u32) -> u32 {
    // SAFETY: translated code passes on the context that it was entered with, which nobody else uses meanwhile.
    let context = unsafe { &mut *context };
    // SAFETY: the owner is the interpreter that entered the code and does nothing until it comes back.
    let owner = unsafe { &mut *(context.owner as *mut Interpreter) };
    // A panic must not unwind through translated code: it goes on behind it.
    match catch_unwind(AssertUnwindSafe(|| owner.step(context, insn, block))) {
        Ok(why) => why,
        Err(panic) => {
            owner.panic = Some(panic);
            exit::STOP
        }
    }
}
