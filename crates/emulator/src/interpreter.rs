//! The interpreter: finds the block at RIP, runs its instructions, and looks at what came up in between.

use std::sync::Arc;
use std::time::Instant;

use engine::{Attention, Counter, CpuEvent, Signals, VmExit};
use exits::{Detail, Exit};
use guest_memory::Offset;
use x86::{ExitReason, Flags};

use crate::block::{Blocks, NO_BLOCK, NO_REGION, NewBlock, Regime};
use crate::cpu::Cpu;
use crate::decode::{LONGEST, MOST};
use crate::insn::{Insn, Stop};
use crate::instructions::event::{Event, TripleFault};
use crate::jit::{Call, Jit};
use crate::mmu::{Access, NO_PAGE};
use crate::shared::Peers;

/// A vCPU with its decoded code.
pub struct Interpreter {
    /// The processor.
    pub cpu: Cpu,
    pub(crate) blocks: Blocks,
    pub(crate) attention: Arc<Attention>,
    peers: Peers,
    /// What the memory's layout was when translations were looked up.
    layout: u64,
    /// An interrupt waits at the local APIC for RFLAGS.IF.
    pub(crate) interrupt_waits: bool,
    /// NMIs were blocked when the controller was last asked: ask again when they no longer are.
    nmi_waits: bool,
    /// The generation of the native unit that the blocks' stubs belong to.
    native_generation: u64,
    scratch: Vec<Insn>,
    /// The translator, where it is on.
    pub(crate) jit: Option<Jit>,
    /// With [`jit::exit::STOP`]: which handler, and why.
    pub(crate) stopped_at: Option<(Call, Stop)>,
    /// The next block must be interpreted, even if it is translated.
    pub(crate) interprets_next: bool,
    /// Exceptions delivered, and repeated instructions left before their end: what happened besides whole instructions.
    pub(crate) interruptions: u64,
    /// With [`crate::jit::Settings::leave_early`]: instructions after which translated code comes back, 1 or 256.
    pub(crate) run_at_least: u64,
    /// The count of instructions in translated code when STI's shadow began.
    pub(crate) shadow_began: u64,
    /// A handler's panic, on its way around translated code.
    pub(crate) panic: Option<Box<dyn std::any::Any + Send>>,
}

/// DR6.BS: a single step.
const DR6_STEP: u64 = 1 << 14;
/// IA32_DEBUGCTL.BTF: single steps end at branches only.
const DEBUGCTL_BTF: u64 = 2;
/// IA32_DEBUGCTL.FREEZE_PERFMON_ON_PMI: the counters stop when they interrupt.
const DEBUGCTL_FREEZE_PERFMON: u64 = 1 << 12;

/// Why the inner loop came back.
pub(crate) enum Leave {
    /// `run` returns this.
    Exit(VmExit),
    /// Look at what came up, and go on.
    Boundary,
}

impl Interpreter {
    /// Around a processor.
    pub fn new(mut cpu: Cpu, attention: Arc<Attention>, peers: Peers) -> Self {
        let native_generation = cpu.native.unit.generation();
        let layout = cpu.memory.layout_generation();
        cpu.mmu.tlb.set_ram(cpu.memory.host_address(0).unwrap_or(0));
        Self {
            cpu,
            layout,
            blocks: Blocks::new(),
            attention,
            peers,
            interrupt_waits: false,
            nmi_waits: false,
            native_generation,
            scratch: Vec::new(),
            jit: None,
            stopped_at: None,
            interprets_next: false,
            interruptions: 0,
            run_at_least: 1,
            shadow_began: 0,
            panic: None,
        }
    }

    /// Runs the guest until something outside has to decide.
    pub fn run(&mut self) -> VmExit {
        self.peers.enter();
        self.answer_peers();
        if self.cpu.pmu.is_active() {
            // No reference cycle while the processor was halted.
            let now = self.cpu.boundary_moment();
            self.cpu.pmu.resume(now);
        }
        let exit = self.run_until_exit();
        if self.cpu.pmu.is_active() {
            let now = self.cpu.boundary_moment();
            self.cpu.pmu.advance(now);
        }
        self.peers.leave();
        exit
    }

    fn run_until_exit(&mut self) -> VmExit {
        // The controller may have had something before the first instruction.
        self.attention.raise(Signals::INTERRUPT);
        loop {
            if let Err(exit) = self.boundary() {
                return exit;
            }
            let covered = self.cpu.shadow;
            let leave = if self.steps_alone() { self.single() } else { self.free_run() };
            if covered {
                // An NMI may wait.
                self.attention.raise(Signals::INTERRUPT);
            }
            if let Leave::Exit(exit) = leave {
                return exit;
            }
        }
    }

    /// Whether the next instruction must run by itself: it is traced, or RF holds for it, or a shadow covers it. The
    /// shadow of STI only matters where something waits: what comes up later finds the instruction done.
    pub(crate) fn steps_alone(&self) -> bool {
        let cpu = &self.cpu;
        let waits = cpu.stack_shadow || self.interrupt_waits || self.attention.pending();
        cpu.shadow && waits || cpu.system_flags.intersects(Flags::TF | Flags::RF)
    }

    /// Whether there is anything for [`Interpreter::boundary`] that the attention word does not tell.
    pub(crate) fn has_more_to_look_at(&self) -> bool {
        self.interrupt_waits && self.cpu.system_flags.contains(Flags::IF) || self.steps_alone()
    }

    /// After an instruction that ends its block: whether there is nothing to do before the next one.
    pub(crate) fn may_go_on(&self) -> bool {
        let cpu = &self.cpu;
        let stopped = cpu.halted || cpu.waits_for_sipi || cpu.debug_traps != 0;
        let watched = cpu.pmu.is_active() || self.nmi_waits || self.attention.pending();
        self.peers.is_settled() && !stopped && !watched && !self.has_more_to_look_at()
    }

    /// Blocks after blocks, until there is something to look at.
    fn free_run(&mut self) -> Leave {
        loop {
            self.look_at_counters();
            if self.attention.pending() || self.interrupt_waits && self.cpu.system_flags.contains(Flags::IF) {
                return Leave::Boundary;
            }
            if let Some(leave) = self.run_block() {
                return leave;
            }
        }
    }

    /// The block at RIP, or what its translation leads to. `None`: go on with the next.
    #[inline(always)]
    pub(crate) fn run_block(&mut self) -> Option<Leave> {
        let regime = self.regime();
        let rip = self.cpu.rip;
        let number = match self.find_block(rip, regime) {
            Ok(number) => number,
            Err(leave) => return Some(leave),
        };
        let block = *self.blocks.get(number);
        if u64::from(block.count) > self.instructions_left() {
            return Some(self.single());
        }
        let interprets = std::mem::take(&mut self.interprets_next);
        if block.code != 0 && !interprets {
            return self.run_translated(block.code, regime);
        }
        // The same bytes may be entered through a segment whose limit is lower.
        if !self.cpu.mode.is_64() && block.end > u64::from(self.cpu.segments[1].limit) + 1 {
            return Some(self.single());
        }
        if self.jit.is_some() && self.cpu.mode.is_translated() && block.code == 0 && self.is_hot(number) {
            self.translate(number, rip, regime);
            return None;
        }
        self.cpu.shadow = false;
        self.cpu.block_rip = rip;
        self.cpu.rip = block.end;
        self.cpu.mmu.executing = block.pages;
        let insns = self.blocks.insns(&block);
        if let Err((at, stop)) = execute(&mut self.cpu, insns) {
            let insn = insns[at];
            let leave = self.stopped(&insn, at as u64, stop);
            return leave.or_else(|| self.steps_alone().then_some(Leave::Boundary));
        }
        None
    }

    /// The block at RIP. Where there is none that can be kept, its first instruction is run, or the fault delivered
    /// that the fetch raised.
    #[inline(always)]
    pub(crate) fn find_block(&mut self, rip: u64, regime: Regime) -> Result<u32, Leave> {
        match self.blocks.recent(rip, regime) {
            Some(number) if self.blocks.is_fresh(self.blocks.get(number), &self.cpu.memory) => Ok(number),
            _ => match self.look_up(rip, regime) {
                Ok(NO_BLOCK) => Err(self.single()),
                Ok(number) => Ok(number),
                Err(stop) => Err(self.stopped_before(stop)),
            },
        }
    }

    /// How many instructions may run before [`Interpreter::look_at_counters`] has to be called again.
    #[inline(always)]
    pub(crate) fn instructions_left(&self) -> u64 {
        self.cpu.pmu.deadline().saturating_sub(self.cpu.instructions)
    }

    /// Lets the performance counters follow a change of the privilege, and interrupt.
    #[inline(always)]
    pub(crate) fn look_at_counters(&mut self) {
        if self.cpu.pmu.needs_look(self.cpu.instructions, self.cpu.cpl() == 3) {
            self.counters_due();
        }
    }

    #[cold]
    fn counters_due(&mut self) {
        let (now, user) = (self.cpu.boundary_moment(), self.cpu.cpl() == 3);
        if self.cpu.pmu.look(now, user) {
            if self.cpu.msrs.debugctl & DEBUGCTL_FREEZE_PERFMON != 0 {
                self.cpu.pmu.freeze();
            }
            self.cpu.wires.interrupts.performance_interrupt();
        }
    }

    /// One instruction, outside any kept block: it may store to the page that it comes from.
    pub(crate) fn single(&mut self) -> Leave {
        let traced = self.cpu.system_flags.contains(Flags::TF);
        let covered = std::mem::take(&mut self.cpu.stack_shadow);
        self.cpu.shadow = false;
        let rip = self.cpu.rip;
        if let Some(leave) = self.code_breakpoint(rip, covered) {
            return leave;
        }
        let mut insns = std::mem::take(&mut self.scratch);
        insns.clear();
        let leave = match self.fetch_one(rip, &mut insns) {
            Err(stop) => self.stopped_before(stop),
            Ok(len) => {
                let next = self.wrapped(rip.wrapping_add(len));
                self.cpu.block_rip = rip;
                self.cpu.rip = next;
                self.cpu.mmu.executing = [NO_PAGE; 2];
                let result = execute(&mut self.cpu, &insns);
                let leave = match result {
                    Ok(()) => None,
                    Err((at, stop)) => self.stopped(&insns[at], at as u64, stop),
                };
                match result {
                    Ok(()) | Err((_, Stop::EndBlock)) if traced => self.single_step(&insns[0], next),
                    Err((_, Stop::Repeat)) => self.iterated(traced),
                    _ => {}
                }
                leave.unwrap_or(Leave::Boundary)
            }
        };
        insns.clear();
        self.scratch = insns;
        if self.cpu.native.unit.generation() != self.native_generation {
            self.forget();
        }
        leave
    }

    /// An instruction breakpoint at RIP, unless RF or a load of SS (`covered`) holds it back.
    fn code_breakpoint(&mut self, rip: u64, covered: bool) -> Option<Leave> {
        let resumed = self.cpu.system_flags.contains(Flags::RF);
        self.cpu.system_flags.remove(Flags::RF);
        if covered || resumed || !self.cpu.breakpoints.has_code() {
            return None;
        }
        let linear =
            if self.cpu.mode.is_64() { rip } else { rip.wrapping_add(self.cpu.bases[1]) & 0xffff_ffff };
        match self.cpu.code_breakpoints(linear) {
            0 => None,
            hits => Some(self.deliver(Event::Exception(x86::Exception::debug(hits)))),
        }
    }

    /// A traced instruction is complete; `next` is the one that follows it in memory.
    fn single_step(&mut self, insn: &Insn, next: u64) {
        use iced_x86::Mnemonic;
        const HANDED_ON: [Mnemonic; 5] =
            [Mnemonic::Int, Mnemonic::Int3, Mnemonic::Into, Mnemonic::Int1, Mnemonic::Syscall];
        // Those that clear TF on the way to their handler are not traced into it.
        let handed_on = HANDED_ON.iter().any(|&m| m as u16 == insn.mnemonic)
            && !self.cpu.system_flags.contains(Flags::TF);
        let branches_only = self.cpu.msrs.debugctl & DEBUGCTL_BTF != 0;
        let held_off = handed_on || self.cpu.stack_shadow || branches_only && self.cpu.rip == next;
        if !held_off {
            self.cpu.debug_traps |= DR6_STEP;
        }
    }

    /// A repeated instruction has done an iteration, and will go on.
    fn iterated(&mut self, traced: bool) {
        if traced {
            self.cpu.debug_traps |= DR6_STEP;
        }
        // Its breakpoint has been passed.
        let resume = self.cpu.loadable_rf();
        self.cpu.system_flags.insert(resume);
    }

    /// RIP as the code segment's size has it.
    fn wrapped(&self, rip: u64) -> u64 {
        match self.cpu.mode.code_size() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }

    /// Handles what ended a block before its last instruction, or at it. `None`: go on with the next block.
    pub(crate) fn stopped(&mut self, insn: &Insn, executed: u64, stop: Stop) -> Option<Leave> {
        let not_run = match stop {
            Stop::EndBlock | Stop::Exit => executed + 1,
            Stop::Fault | Stop::OwnPage | Stop::Repeat => executed,
        };
        self.cpu.instructions += not_run;
        match stop {
            Stop::EndBlock => {
                if !self.peers.is_settled() {
                    self.settle();
                }
                if self.nmi_waits && !self.cpu.nmi_blocked {
                    self.nmi_waits = false;
                    self.attention.raise(Signals::INTERRUPT);
                }
                (self.cpu.halted || self.cpu.waits_for_sipi || self.cpu.debug_traps != 0)
                    .then_some(Leave::Boundary)
            }
            Stop::Repeat => {
                self.interruptions += 1;
                self.cpu.rip = self.cpu.this_rip(insn);
                (self.cpu.debug_traps != 0).then_some(Leave::Boundary)
            }
            Stop::OwnPage => {
                self.cpu.rip = self.cpu.this_rip(insn);
                Some(self.single())
            }
            Stop::Fault => {
                self.cpu.rip = self.cpu.this_rip(insn);
                self.cpu.debug_traps = 0;
                self.cpu.refine_fault(insn);
                match self.deliver_fault() {
                    Leave::Boundary if self.cpu.debug_traps == 0 => None,
                    exit => Some(exit),
                }
            }
            Stop::Exit => Some(Leave::Exit(self.cpu.exit.take().unwrap_or(VmExit::Interrupted))),
        }
    }

    /// A fault of the fetch itself.
    fn stopped_before(&mut self, stop: Stop) -> Leave {
        match stop {
            Stop::Fault => self.deliver_fault(),
            _ => Leave::Boundary,
        }
    }

    fn deliver_fault(&mut self) -> Leave {
        match self.cpu.fault.take() {
            Some(fault) => self.deliver(Event::Exception(fault)),
            None => Leave::Boundary,
        }
    }

    fn deliver(&mut self, event: Event) -> Leave {
        self.interruptions += 1;
        match self.cpu.deliver(event) {
            Ok(()) => Leave::Boundary,
            Err(fault) => Leave::Exit(self.triple_fault(fault)),
        }
    }

    fn triple_fault(&mut self, fault: TripleFault) -> VmExit {
        VmExit::Shutdown(engine::DebugEvent { rip: self.cpu.rip, reason: fault.reason })
    }

    /// What has to be looked at between instructions.
    pub(crate) fn boundary(&mut self) -> Result<(), VmExit> {
        self.look_at_counters();
        self.debug_traps()?;
        if self.attention.pending() {
            self.take_signals()?;
        }
        if self.interrupt_waits
            && !self.cpu.shadow
            && self.cpu.system_flags.contains(Flags::IF)
            && !self.cpu.waits_for_sipi
        {
            self.external_interrupt()?;
            self.debug_traps()?;
        }
        if self.cpu.waits_for_sipi {
            return Err(VmExit::WaitForSipi);
        }
        if self.cpu.halted {
            return Err(VmExit::Halt);
        }
        Ok(())
    }

    /// Delivers what the debug facilities noted of the last instruction.
    fn debug_traps(&mut self) -> Result<(), VmExit> {
        if self.cpu.debug_traps == 0 || self.cpu.stack_shadow {
            return Ok(());
        }
        let traps = std::mem::take(&mut self.cpu.debug_traps);
        let event = Event::Exception(x86::Exception::debug(traps));
        self.cpu.deliver(event).map_err(|fault| self.triple_fault(fault))
    }

    fn take_signals(&mut self) -> Result<(), VmExit> {
        if self.attention.take(Signals::ENGINE) {
            self.answer_peers();
            let folds = self.cpu.mmu.tlb.wants_fold();
            if folds {
                self.cpu.mmu.tlb.fold();
            }
            let grows = self.jit.as_mut().is_some_and(Jit::grow_targets);
            if folds || grows {
                self.forget();
            }
        }
        if self.attention.take(Signals::INTERRUPT) {
            self.take_events()?;
            self.nmi_waits = self.cpu.nmi_blocked;
            self.interrupt_waits = self.cpu.wires.interrupts.has_interrupt();
        }
        if self.attention.take(Signals::EXIT) {
            return Err(VmExit::Interrupted);
        }
        Ok(())
    }

    fn take_events(&mut self) -> Result<(), VmExit> {
        while let Some(event) =
            self.cpu.wires.interrupts.take_event(!self.cpu.nmi_blocked && !self.cpu.shadow)
        {
            match event {
                CpuEvent::Init => {
                    self.cpu.init();
                    self.forget();
                }
                CpuEvent::Sipi(vector) => self.cpu.start(vector),
                CpuEvent::Nmi => {
                    self.cpu.halted = false;
                    self.cpu.nmi_blocked = true;
                    self.cpu.deliver(Event::Nmi).map_err(|fault| self.triple_fault(fault))?;
                }
            }
        }
        Ok(())
    }

    fn external_interrupt(&mut self) -> Result<(), VmExit> {
        let Some(vector) = self.cpu.wires.interrupts.acknowledge() else {
            self.interrupt_waits = false;
            return Ok(());
        };
        self.cpu.halted = false;
        let exit = |_: &Cpu| Exit { reason: ExitReason::ExternalInterrupt, detail: Detail::Vector(vector) };
        let result = self.cpu.recorded(exit, |cpu| cpu.deliver(Event::Interrupt(vector)));
        self.interrupt_waits = self.cpu.wires.interrupts.has_interrupt();
        result.map_err(|fault| self.triple_fault(fault))
    }

    fn answer_peers(&mut self) {
        let (mmu, marks) = (&mut self.cpu.mmu, self.cpu.memory.marks());
        self.peers.take_requests(
            |page| mmu.tlb.drop_writes(page),
            |page| {
                marks.written(page);
            },
        );
        let layout = self.cpu.memory.layout_generation();
        if layout != self.layout {
            self.layout = layout;
            self.cpu.mmu.tlb.flush_all();
        }
    }

    /// Waits until no other vCPU stores unseen to code that this one decoded.
    #[cold]
    fn settle(&mut self) {
        for _ in 0..200 {
            if self.peers.is_settled() || self.attention.is_raised(Signals::EXIT) {
                return;
            }
            self.answer_peers();
            std::thread::yield_now();
        }
    }

    /// Everything that finding a block by its address depends on.
    #[inline(always)]
    pub(crate) fn regime(&self) -> Regime {
        // Outside 64-bit mode the same RIP is another place in another code segment.
        let mmu = &self.cpu.mmu;
        let fetches = mmu.tlb.fetch_regime(mmu.fetch_view());
        (u64::from(self.cpu.mode.0) | fetches << 16) ^ self.cpu.bases[1] << 32
    }

    /// Finds or decodes the block at an address. [`NO_BLOCK`] where the code cannot be kept.
    #[inline(never)]
    fn look_up(&mut self, rip: u64, regime: Regime) -> Result<u32, Stop> {
        let linear = self.fetch_linear(rip)?;
        let target = self.cpu.target(self.cpu.mmu.fetch_view(), linear, Access::Fetch)?;
        let Some(offset) = target.offset() else { return Ok(NO_BLOCK) };
        if self.cpu.breakpoints.in_code_page(linear) {
            return Ok(NO_BLOCK);
        }
        self.cpu.mmu.tlb.note_fetch(linear);
        if let Some(number) = self.blocks.find(offset, rip, self.cpu.mode) {
            let block = *self.blocks.get(number);
            // An instruction that crosses into another page is only good for the translation it was decoded with.
            let same = block.pages[1] == NO_PAGE || self.next_page(linear)? == Some(block.pages[1]);
            if same && (self.blocks.is_fresh(&block, &self.cpu.memory) || self.refresh(number, offset)) {
                self.remember(rip, regime, number);
                self.remember_region(block.region, regime);
                return Ok(number);
            }
        }
        self.decode_block(rip, linear, offset, regime)
    }

    /// The page of RAM that code goes on in behind the end of a linear address's page; `None` where there is none.
    fn next_page(&mut self, linear: u64) -> Result<Option<Offset>, Stop> {
        let next = (linear | 0xfff).wrapping_add(1);
        if next == 0 || !self.cpu.mode.is_64() && next >> 32 != 0 {
            return Ok(None);
        }
        let target = self.cpu.target(self.cpu.mmu.fetch_view(), next, Access::Fetch)?;
        self.cpu.mmu.tlb.note_fetch(next);
        Ok(target.offset())
    }

    fn refresh(&mut self, number: u32, offset: Offset) -> bool {
        let generation = self.mark_code(offset);
        let marks = self.cpu.memory.marks();
        let state = marks.state(offset);
        // Someone may have written to it since it was marked.
        let marked = marks.generation(offset) == generation;
        let same = self.blocks.refresh(number, &self.cpu.memory, [generation, 0]);
        let block = self.blocks.get(number);
        if same && marked && block.region != NO_REGION {
            self.follow_state(number, generation, state);
        }
        same
    }

    /// The linear address of an instruction, within the code segment.
    fn fetch_linear(&mut self, rip: u64) -> Result<u64, Stop> {
        if self.cpu.mode.is_64() {
            return Ok(rip);
        }
        if rip > u64::from(self.cpu.segments[1].limit) {
            return Err(self.cpu.gp0());
        }
        Ok(rip.wrapping_add(self.cpu.bases[1]) & 0xffff_ffff)
    }

    /// The bytes from an instruction's first to the code segment's last.
    fn code_left(&self, rip: u64) -> usize {
        if self.cpu.mode.is_64() {
            return usize::MAX;
        }
        (u64::from(self.cpu.segments[1].limit) + 1).saturating_sub(rip) as usize
    }

    /// Marks a page as holding code, and stops everyone's unseen stores to it. Gives the page's generation.
    fn mark_code(&mut self, offset: Offset) -> u32 {
        let page = offset & !0xfff;
        loop {
            let (generation, new) = self.cpu.memory.marks().mark_code(page);
            let stored = self.cpu.mmu.tlb.drop_writes(page);
            if new {
                self.peers.announce_code(page);
            }
            if new || !stored {
                return generation;
            }
            // Another vCPU marked it, and this one has not answered yet: it may have stored unseen since.
            self.cpu.memory.marks().written(page);
        }
    }

    fn decode_block(&mut self, rip: u64, linear: u64, offset: Offset, regime: Regime) -> Result<u32, Stop> {
        if self.blocks.is_full() {
            self.forget();
        }
        let number = self.decode_pages(rip, [offset, NO_PAGE], regime);
        let first = 4096 - (offset & 0xfff) as usize;
        if number != NO_BLOCK || first >= self.code_left(rip).min(LONGEST) {
            return Ok(number);
        }
        // The first instruction crosses into the next page: a block of its own.
        Ok(match self.next_page(linear)? {
            Some(next) => self.decode_pages(rip, [offset, next], regime),
            None => NO_BLOCK,
        })
    }

    /// Decodes the code at an offset to the end of its page; or one instruction, which crosses into a second page.
    /// [`NO_BLOCK`] where there is no whole instruction.
    fn decode_pages(&mut self, rip: u64, [offset, second]: [Offset; 2], regime: Regime) -> u32 {
        let crosses = second != NO_PAGE;
        let generations = [self.mark_code(offset), if crosses { self.mark_code(second) } else { 0 }];
        let mut bytes = [0; 512];
        let first = 4096 - (offset & 0xfff) as usize;
        let all = if crosses { LONGEST } else { first.min(bytes.len()) }.min(self.code_left(rip));
        let (head, tail) = bytes[..all].split_at_mut(first.min(all));
        self.cpu.memory.read_bytes(offset, head);
        if crosses {
            self.cpu.memory.read_bytes(second, tail);
        }
        let mut insns = std::mem::take(&mut self.scratch);
        insns.clear();
        let decoded = self.cpu.decode(rip, &bytes[..all], if crosses { 1 } else { MOST }, &mut insns);
        if self.cpu.native.unit.generation() != self.native_generation {
            // The stubs of all blocks are gone.
            self.forget();
            self.scratch = insns;
            return self.decode_pages(rip, [offset, second], regime);
        }
        let number = if decoded.truncated || insns.is_empty() {
            NO_BLOCK
        } else {
            let number = self.blocks.insert(&NewBlock {
                rip,
                mode: self.cpu.mode,
                offset,
                pages: [offset & !0xfff, second],
                generations,
                bytes: &bytes[..decoded.len],
                insns: &insns,
            });
            self.remember(rip, regime, number);
            number
        };
        self.scratch = insns;
        number
    }

    pub(crate) fn forget(&mut self) {
        let start = Instant::now();
        if let Some(jit) = &mut self.jit {
            jit.clear(self.cpu.mmu.tlb.is_folded());
        }
        // Its tables from RIP to code may be other regimes' next.
        self.cpu.mmu.tlb.forget_targets();
        self.blocks.clear();
        self.cpu.native.insns.clear();
        self.native_generation = self.cpu.native.unit.generation();
        if let Some(jit) = &mut self.jit {
            jit.count_pause(start.elapsed());
        }
    }

    /// Fetches and decodes one instruction that may cross into another page, or lie where no RAM is. Gives its length.
    fn fetch_one(&mut self, rip: u64, insns: &mut Vec<Insn>) -> Result<u64, Stop> {
        let linear = self.fetch_linear(rip)?;
        let mut bytes = [0; 15];
        let all = self.code_left(rip).min(15);
        let first = (4096 - (linear & 0xfff) as usize).min(all);
        let view = self.cpu.mmu.fetch_view();
        self.cpu.fetch_bytes(view, linear, &mut bytes[..first])?;
        let decoded = self.cpu.decode(rip, &bytes[..first], 1, insns);
        if !decoded.truncated {
            return Ok(decoded.len as u64);
        }
        insns.clear();
        if first < all {
            let next = linear.wrapping_add(first as u64);
            self.cpu.fetch_bytes(view, next, &mut bytes[first..all])?;
        }
        let decoded = self.cpu.decode(rip, &bytes[..all], 1, insns);
        // It runs over the code segment's end.
        if decoded.truncated { Err(self.cpu.gp0()) } else { Ok(decoded.len as u64) }
    }

    /// What is kept and what was done, by name.
    pub fn counters(&self) -> Vec<Counter> {
        let (blocks, insns) = self.blocks.counts();
        let mut counters = vec![
            Counter::count("blocks kept", blocks as u64),
            Counter::count("instructions in them", insns as u64),
            Counter::count("pages entered into the translation cache", self.cpu.mmu.tlb.fills()),
        ];
        counters.extend(self.jit.iter().flat_map(Jit::counters));
        counters
    }

    /// Forgets all decoded code: the state was replaced.
    pub fn reset_code(&mut self) {
        self.forget();
    }
}

/// Runs instructions one after another. Gives the index of the one that did not simply finish.
#[inline(always)]
fn execute(cpu: &mut Cpu, insns: &[Insn]) -> Result<(), (usize, Stop)> {
    for (at, insn) in insns.iter().enumerate() {
        if let Err(stop) = (insn.run)(cpu, insn) {
            return Err((at, stop));
        }
    }
    cpu.instructions += insns.len() as u64;
    Ok(())
}

#[cfg(test)]
mod tests;
