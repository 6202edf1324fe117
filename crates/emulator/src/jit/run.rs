//! The interpreter's side of the translator: what is hot, the entry, and the handlers that translated code calls.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use engine::Signals;
use iced_x86::Instruction;
use x86::Flags;

use super::flat;
use super::native_set::is_copied;
use super::region::Region;
use super::{Context, DYNAMIC, Jit, STEP_DISPATCH, Settings, Source, Use, exit};
use crate::block::{NO_REGION, Regime};
use crate::insn::Stop;
use crate::interpreter::{Interpreter, Leave};
use crate::mmu::NO_PAGE;
use crate::native::execute::refusal;

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
        self.cpu.mmu.tlb.forget_targets();
        let states = self.cpu.memory.marks().state_address(0);
        self.jit = Some(Jit::new(settings, states, self.cpu.mmu.tlb.is_folded())?);
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
        // What follows the last page of flat code is not the first one.
        let is_last = !self.cpu.mode.is_64() && block.rip >> 12 == u64::from(u32::MAX) >> 12;
        block.heat > hot && !is_last
    }

    /// Translates a block, and what belongs to it.
    pub(crate) fn translate(&mut self, number: u32, rip: u64, regime: Regime) {
        let Some(jit) = &mut self.jit else { return };
        let (block, mode) = (*self.blocks.get(number), self.cpu.mode);
        let marks = self.cpu.memory.marks();
        let crosses = block.pages[1] != NO_PAGE;
        let pages = if crosses { &block.pages[..] } else { &block.pages[..1] };
        let states = pages.iter().map(|&page| (marks.state(page), marks.state_address(page))).collect();
        if !self.blocks.is_fresh(&block, &self.cpu.memory) || !pages.iter().all(|&page| marks.is_code(page)) {
            return;
        }
        let model = self.cpu.wires.model.clone();
        let unit = &self.cpu.native.unit;
        let vector_use = |i: &Instruction| {
            let same = mode.is_64() || flat::is_the_same(i);
            let native = unit.known(i).filter(|_| same && model.allows(i.cpuid_features()))?;
            refusal(native.class, mode.vector()).is_none().then(|| Use::of(i, &native))?
        };
        let copies = |i: &Instruction| is_copied(i) || vector_use(i).is_some();
        let region = Region::around(
            number,
            mode,
            (&self.blocks, &self.cpu.memory, &model),
            &copies,
            // What lies in two pages is only reached by way of the table, which knows both.
            if crosses { (1, 1) } else { jit.most_blocks() },
        );
        let source = Source {
            mode,
            states,
            model: &model,
            vector_use: &vector_use,
            counts_at_entry: jit.counts_at_entry(),
            tsc_start: self.cpu.wires.time.host_tsc_start(),
        };
        let Some(added) = jit.add(&source, &region) else {
            self.forget();
            return;
        };
        for &(entry, code) in &added.entries {
            let block = self.blocks.get_mut(entry);
            (block.code, block.region) = (code, added.region);
        }
        for key in added.exits {
            let target = self.blocks.find(key.offset, key.rip, mode).map(|n| self.blocks.get(n));
            if let Some(target) = target.filter(|target| target.code != 0 && target.pages[1] == NO_PAGE) {
                jit.connect(key, target.code);
            }
        }
        self.remember(rip, regime, number);
    }

    /// Remembers which block is at a RIP, and its code where it has some.
    pub(crate) fn remember(&mut self, rip: u64, regime: Regime, number: u32) {
        self.blocks.remember(rip, regime, number);
        let code = self.blocks.get(number).code;
        if let Some(jit) = self.jit.as_mut().filter(|_| code != 0) {
            jit.remember(rip, regime, code);
        }
    }

    /// Remembers where the code of a region's blocks is: they are in the page that an address was just translated to.
    pub(crate) fn remember_region(&mut self, region: u32, regime: Regime) {
        let targets = self.targets(regime);
        let Some(jit) = self.jit.as_mut().filter(|_| targets != 0) else { return };
        let Some(blocks) = jit.blocks_of(region).map(<[_]>::to_vec) else { return };
        for (number, first) in blocks {
            let block = self.blocks.get(number);
            if block.first == first && block.code != 0 {
                jit.suggest(block.rip, regime, block.code);
            }
        }
    }

    /// The present regime's table from RIP to code.
    fn targets(&mut self, regime: Regime) -> u64 {
        let Some(jit) = &mut self.jit else { return 0 };
        let (targets, given_up) = jit.targets(regime);
        let cpu = &mut self.cpu;
        if given_up {
            cpu.mmu.tlb.forget_targets();
        }
        if cpu.bases[1] == 0 {
            let view = cpu.mmu.fetch_view();
            cpu.mmu.tlb.set_targets(view, cpu.mode, targets);
        }
        targets
    }

    /// Compares a region's bytes with the page's, which may have changed. Where they are the same, its blocks are good
    /// again and its translation expects the page's new state.
    pub(crate) fn follow_state(&mut self, number: u32, generation: u32, state: u32) {
        let Some(jit) = &mut self.jit else { return };
        let region = self.blocks.get(number).region;
        let Some(blocks) = jit.blocks_of(region).map(<[_]>::to_vec) else { return };
        let same = blocks.iter().all(|&(block, first)| {
            self.blocks.get(block).first == first
                && self.blocks.refresh(block, &self.cpu.memory, [generation, 0])
        });
        if same {
            jit.expect(region, state);
        } else {
            let block = self.blocks.get_mut(number);
            (block.code, block.region, block.heat) = (0, NO_REGION, 0);
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
        let targets = self.targets(regime);
        if let Some(jit) = &mut self.jit {
            jit.remember(self.cpu.rip, regime, code);
            if jit.wants_growth() {
                self.attention.raise(Signals::ENGINE);
            }
        }
        let mut context = Context {
            registers: self.cpu.registers.all_mut().as_mut_ptr() as u64,
            flags: to_frame(self.cpu.flags.bits()),
            tlb: self.cpu.mmu.tlb.base(self.cpu.mmu.view) as u64,
            attention: self.jit.as_ref().and_then(|jit| jit.leaves_after(self.run_at_least)).unwrap_or(word),
            targets,
            fs_base: self.cpu.bases[4],
            gs_base: self.cpu.bases[5],
            step: step as *const () as u64,
            vector: (&raw mut *self.cpu.vector) as u64,
            x87_area: self.jit.as_mut().map_or(0, Jit::x87_area),
            count: start,
            start,
            ..Context::default()
        };
        self.shadow_began = start;
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
        if let Some(jit) = &mut self.jit {
            jit.count_entry(why == exit::DISPATCH);
        }
        if let Some(panic) = self.panic.take() {
            resume_unwind(panic);
        }
        if why != exit::STOP && context.count != self.shadow_began {
            self.cpu.shadow = false;
        }
        if why != exit::STOP {
            self.cpu.rip = context.rip;
            self.cpu.flags.set_bits(self.flags_of(&context, context.recipe));
        }
        if why == exit::DISPATCH {
            if executed == 0 {
                self.found_changed(context.rip, regime);
            }
            return None;
        }
        if why == exit::REFUSED {
            self.interprets_next = true;
            return None;
        }
        // Where nothing was left here, the block is complete.
        let (call, stop) = self.stopped_at.take()?;
        self.cpu.instructions = self.cpu.instructions.wrapping_add_signed(call.pending.into());
        let first = self.blocks.get(call.block).first;
        let at = *self.blocks.insn(call.insn);
        match self.stopped(&at, u64::from(call.insn - first), stop) {
            None if self.steps_alone() => Some(Leave::Boundary),
            leave => leave,
        }
    }

    /// The arithmetic flags of translated code, which follow from registers by the recipe of a number.
    fn flags_of(&self, context: &Context, recipe: u32) -> u64 {
        let frame = from_frame(context.flags);
        self.jit.as_ref().map_or(frame, |jit| jit.flags(recipe, self.cpu.registers.all(), frame))
    }

    /// A translation left before its first instruction: other marks of its page than those of its code may have changed.
    fn found_changed(&mut self, rip: u64, regime: Regime) {
        let Some(number) = self.blocks.recent(rip, regime) else { return };
        let block = self.blocks.get(number);
        let marks = self.cpu.memory.marks();
        let (generation, state) = (marks.generation(block.offset), marks.state(block.offset));
        if block.code != 0 && self.blocks.is_fresh(block, &self.cpu.memory) {
            self.follow_state(number, generation, state);
        }
    }

    /// Runs the handler that translated code calls.
    fn step(&mut self, context: &mut Context, number: u32) -> u32 {
        let Some(jit) = &mut self.jit else { return exit::STOP };
        let call = jit.call(number);
        let recipe = if call.recipe == DYNAMIC { context.recipe } else { call.recipe };
        let cpu = &mut self.cpu;
        let flags = jit.flags(recipe, cpu.registers.all(), from_frame(context.flags));
        cpu.flags.set_bits(flags);
        jit.count_handler_call(self.blocks.insn(call.insn).mnemonic);
        let block = *self.blocks.get(call.block);
        (cpu.block_rip, cpu.rip) = (block.rip, block.end);
        cpu.mmu.executing = block.pages;
        let executed = context.count.wrapping_sub(context.start);
        cpu.translated = executed.wrapping_add_signed(call.pending.into());
        let at = *self.blocks.insn(call.insn);
        cpu.shadow = false;
        let result = (at.run)(cpu, &at);
        let is_last = call.insn + 1 == block.first + block.count;
        match result {
            Ok(()) => {}
            Err(Stop::EndBlock) if is_last && self.may_go_on() => {}
            Err(stop) => {
                self.stopped_at = Some((call, stop));
                return exit::STOP;
            }
        }
        let cpu = &mut self.cpu;
        if cpu.shadow {
            self.shadow_began = context.count;
        }
        if cpu.mmu.tlb.wants_fold() {
            self.attention.raise(Signals::ENGINE);
        }
        context.flags = to_frame(cpu.flags.bits());
        context.tlb = cpu.mmu.tlb.base(cpu.mmu.view) as u64;
        context.vector = (&raw mut *cpu.vector) as u64;
        (context.fs_base, context.gs_base) = (cpu.bases[4], cpu.bases[5]);
        context.rip = cpu.rip;
        let regime = self.regime();
        context.targets = self.targets(regime);
        match is_last {
            false => 0,
            true if self.has_more_to_look_at() => exit::STOP,
            true => STEP_DISPATCH,
        }
    }
}

/// What translated code calls for an instruction that has no code of its own, or whose operand was not found.
unsafe extern "sysv64" fn step(context: *mut Context, call: u32) -> u32 {
    // SAFETY: translated code passes on the context that it was entered with, which nobody else uses meanwhile.
    let context = unsafe { &mut *context };
    // SAFETY: the owner is the interpreter that entered the code and does nothing until it comes back.
    let owner = unsafe { &mut *(context.owner as *mut Interpreter) };
    // A panic must not unwind through translated code: it goes on behind it.
    match catch_unwind(AssertUnwindSafe(|| owner.step(context, call))) {
        Ok(why) => why,
        Err(panic) => {
            owner.panic = Some(panic);
            exit::STOP
        }
    }
}
