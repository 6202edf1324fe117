//! From a region's instructions to host code.
//!
//! An instruction that only computes is copied: its registers are renamed where they have to be, its memory operand
//! becomes the host address that an inline probe of the translation cache gives. Branches and the stack are written
//! out. For everything else, and whenever a probe finds nothing, the instruction's handler is called: so each
//! instruction has one meaning, the interpreter's, and a fault finds the guest's exact state.
//!
//! Flags are in the frame, and executed instructions in the count, wherever a join is reached or the region is left.

mod divide;
mod edges;
mod flags;
mod flow;
mod operand;
mod string;
mod system;
mod window;

use iced_x86::{Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind};

use super::Source;
use super::assembler::{ADDRESS, Assembler, Host, Jump, RSP, SCRATCH};
use super::call::{Call, Calls, DYNAMIC};
use super::frame::Stubs;
use super::native_set::{is_copied, keeps_flags, leaves_flags};
use super::recipe::Recipe;
use super::region::{FLAGS, Part, Region};
use super::targets::FarExit;
use super::vectors;
use crate::mmu::Access;
use flags::Flags;

/// A finished translation.
pub struct Translation {
    pub bytes: Vec<u8>,
    /// Displacements that lead to an offset in code memory outside this code.
    pub outward: Vec<(usize, usize)>,
    /// Exits to a known RIP in the same page: where the code of each starts. It may be replaced by a jump.
    pub exits: Vec<(u64, usize)>,
    /// Exits to a known RIP in another page.
    pub far: Vec<(u64, FarExit)>,
    /// Parts that can be entered, and where.
    pub entries: Vec<(usize, usize)>,
    /// Where the page's expected state stands.
    pub states: Vec<usize>,
}

/// What is true at a place in the code.
#[derive(Clone, Copy)]
struct At {
    flags: Flags,
    /// How the flags in the host's follow from registers, where they do.
    recipe: Option<Recipe>,
    /// What the count of instructions lacks, of those before the present block.
    pending: i32,
    /// Whether the frame may have a recipe that does not hold any more. None may be there where it is left or a join is
    /// reached.
    stale: bool,
}

/// What leads to a handler.
#[derive(Clone, Copy)]
struct Miss {
    from: Jump,
    /// Where it is for an operand on the stack, what looks for it again.
    stack: Option<StackMiss>,
}

/// Looks again for an operand on the stack: the page that is known does not hold it.
#[derive(Clone, Copy)]
struct StackMiss {
    /// The routine that does, and where it goes on where that finds it.
    routine: usize,
    found: usize,
    /// The operand's place: so far from the stack pointer, or from its low 32 bits where not `wide`.
    displacement: i32,
    wide: bool,
}

impl From<Jump> for Miss {
    fn from(from: Jump) -> Self {
        Self { from, stack: None }
    }
}

/// A way to a handler, and back.
struct Cold {
    miss: Miss,
    call: Call,
    /// Whether the way back needs the flags in the host's.
    load_flags: bool,
    /// Where it goes on; `None` where the instruction ends its block, and RIP says where to go.
    resume: Option<usize>,
    /// RIP of the next instruction, and how many of the block's are executed then.
    next: u64,
    executed: usize,
    /// Instructions to be added to the count first: the handler goes on elsewhere.
    counts: i32,
    /// Where it is several pushes or pops by one probe, what they do and their registers: see [`Translator::one_by_one`].
    group: Option<(Access, Vec<u8>)>,
}

struct Translator<'a> {
    a: Assembler,
    source: &'a Source<'a>,
    region: &'a Region,
    calls: &'a mut Calls,
    stubs: Stubs,
    /// The part that is being translated, and its instruction's number in it.
    present: usize,
    number: usize,
    at: At,
    /// For joins that do not need the flags at once: the registers that must be as they were until they are overwritten.
    dynamic: Vec<Option<u16>>,
    /// What a part that is no join finds when it is reached.
    incoming: Vec<Option<At>>,
    /// Where the parts start.
    labels: Vec<Option<usize>>,
    /// Jumps to parts that have not been translated.
    waiting: Vec<Vec<Jump>>,
    /// Ways out of conditional branches, to be written behind the code proper.
    deferred: Vec<(Jump, u64, usize, At)>,
    /// Polls that found something: where to go, and RIP.
    leaving: Vec<(Vec<Jump>, u64)>,
    /// Calls of vector-state routines that refused, and RIP; the count is right.
    refused: Vec<(Jump, u64)>,
    cold: Vec<Cold>,
    /// Where a window begins, while its instructions are translated: see [`window`].
    window_low: Option<i64>,
    /// Copies for windows that are not found.
    slow: Vec<window::Slow>,
    /// Whether the flags are saved wherever they are given up: the end of a copy has to have them.
    keeps_flags: bool,
    outward: Vec<(usize, usize)>,
    exits: Vec<(u64, usize)>,
    /// RIP, the exit, and its ways where the table is another or nothing is known yet.
    far: Vec<(u64, FarExit, [Jump; 2])>,
    /// Where the page's expected state stands.
    states: Vec<usize>,
    /// Where the code is going to be.
    address: u64,
    /// Vector state that is live throughout.
    need: u8,
    factory: InstructionInfoFactory,
    encoder: Encoder,
}

/// Bytes that the host fetches and decodes together: loops of so many parts at most begin with them.
const LINE: u64 = 64;
const SMALL_LOOP: usize = 8;

/// The instruction cannot be copied: call its handler.
struct NotCopied;

/// Translates a region, to be placed at `address`.
pub fn translate(
    source: &Source<'_>,
    region: &Region,
    calls: &mut Calls,
    (stubs, address): (Stubs, u64),
) -> Translation {
    let parts = region.parts.len();
    let mut translator = Translator {
        a: Assembler::default(),
        source,
        region,
        calls,
        stubs,
        present: 0,
        number: 0,
        at: At { flags: Flags::Frame, recipe: None, pending: 0, stale: false },
        dynamic: flags::dynamic_joins(region),
        incoming: vec![None; parts],
        labels: vec![None; parts],
        waiting: (0..parts).map(|_| Vec::new()).collect(),
        deferred: Vec::new(),
        leaving: Vec::new(),
        refused: Vec::new(),
        cold: Vec::new(),
        window_low: None,
        slow: Vec::new(),
        keeps_flags: false,
        outward: Vec::new(),
        exits: Vec::new(),
        far: Vec::new(),
        states: Vec::new(),
        address,
        need: 0,
        factory: InstructionInfoFactory::new(),
        encoder: Encoder::new(64),
    };
    translator.need = translator.vector_state();
    translator.region()
}

impl Translator<'_> {
    fn region(mut self) -> Translation {
        let mut entries = vec![(0, 0)];
        self.enter(0);
        for present in (0..self.region.parts.len()).filter(|&n| !self.region.parts[n].dead) {
            self.part_at(present);
        }
        for (jump, rip, from, at) in std::mem::take(&mut self.deferred) {
            let here = self.a.here();
            self.a.land(jump, here);
            (self.present, self.at) = (from, at);
            self.edge(rip, false);
        }
        for present in 1..self.region.parts.len() {
            if self.region.parts[present].join {
                entries.push((present, self.a.here()));
                self.enter(present);
                let jump = self.a.jump();
                self.land_at(jump, present);
            }
        }
        self.cold_paths();
        let Self { a, outward, exits, far, states, .. } = self;
        let far = far.into_iter().map(|(rip, exit, _)| (rip, exit)).collect();
        Translation { bytes: a.bytes, outward, exits, far, entries, states }
    }

    fn part(&self) -> &Part {
        &self.region.parts[self.present]
    }

    /// Translates one part.
    fn part_at(&mut self, present: usize) {
        self.present = present;
        if self.begins_loop(present) {
            self.a.align(self.address, LINE);
        }
        let here = self.a.here();
        self.labels[present] = Some(here);
        for jump in std::mem::take(&mut self.waiting[present]) {
            self.a.land(jump, here);
        }
        let counted = if self.source.counts_at_entry { -(self.part().block.count as i32) } else { 0 };
        let stale = self.dynamic[present].is_some();
        let flags = if stale { Flags::Dynamic } else { Flags::Frame };
        let fresh = At { flags, recipe: None, pending: counted, stale };
        self.at = self.incoming[present].unwrap_or(fresh);
        let mut ended = false;
        let region = self.region;
        let insns = &region.parts[present].insns;
        let mut next = 0;
        while next < insns.len() {
            self.number = next;
            let mut together = flow::stack_group(&insns[next..], self.word());
            if together > 1 {
                self.stack_group(&insns[next..next + together]);
            } else {
                together = self.windowed(&insns[next..]);
            }
            if together == 0 {
                ended = self.instruction(&insns[next]);
            }
            next += together.max(1);
        }
        if !ended {
            self.number = region.parts[present].insns.len();
            self.edge(region.parts[present].block.end, true);
        }
    }

    /// Whether a part is where a small loop begins: one of the next parts leads back to it.
    fn begins_loop(&self, part: usize) -> bool {
        let rip = self.region.parts[part].block.rip;
        let leads_back = |from: usize| {
            let successors = &self.region.parts[from].successors;
            successors.contains(&rip) && self.region.target(from, rip) == Some(part)
        };
        (part..self.region.parts.len()).take(SMALL_LOOP).any(leads_back)
    }

    /// Whether the present instruction is its block's last.
    fn is_last(&self) -> bool {
        self.number + 1 == self.part().insns.len()
    }

    /// Emits one instruction. Gives whether it ended the block.
    fn instruction(&mut self, instruction: &Instruction) -> bool {
        let before = self.at.recipe;
        let start = (self.a.here(), self.at, self.calls.counts().0);
        let lengths = (self.cold.len(), self.outward.len(), self.exits.len(), self.far.len());
        let done = match self.special(instruction) {
            Some(result) => result,
            None if string::is_repeated(instruction) => self.repeated(instruction).map(|()| false),
            None if operand::is_bit_string(instruction) => self.bit_string(instruction).map(|()| false),
            None if matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) => {
                self.divide(instruction).map(|()| false)
            }
            None if instruction.mnemonic() == Mnemonic::Lea => self.lea(instruction).map(|()| false),
            None => self.copy(instruction).map(|()| false),
        };
        let ended = done.unwrap_or_else(|NotCopied| {
            self.a.bytes.truncate(start.0);
            self.at = start.1;
            self.calls.truncate(start.2);
            self.cold.truncate(lengths.0);
            self.outward.truncate(lengths.1);
            self.exits.truncate(lengths.2);
            self.far.truncate(lengths.3);
            self.handler(instruction)
        });
        self.check_recipe(before);
        ended
    }

    /// Emits an instruction that only computes.
    fn computes(&mut self, instruction: &Instruction) -> Result<(), NotCopied> {
        let before = self.at.recipe;
        match instruction.mnemonic() {
            Mnemonic::Nop => {}
            Mnemonic::Lea => self.lea(instruction)?,
            _ => self.copy(instruction)?,
        }
        self.check_recipe(before);
        Ok(())
    }

    /// What was known `before` of how the flags follow from registers may not hold behind the present instruction.
    fn check_recipe(&mut self, before: Option<Recipe>) {
        if let Some(recipe) = self.at.recipe
            && before == self.at.recipe
            && !self.region.parts[self.present].facts[self.number].sets_flags
            && self.region.parts[self.present].facts[self.number].writes & recipe.needs != 0
        {
            self.at.recipe = None;
        }
    }

    /// Calls the instruction's handler. Gives whether nothing follows.
    fn handler(&mut self, instruction: &Instruction) -> bool {
        let last = self.is_last();
        self.give_up_flags();
        if last {
            self.count_now();
        }
        let call = self.call();
        self.call_handler(call);
        // Whoever calls the handler leaves no recipe in the frame.
        self.at = At { flags: Flags::Frame, recipe: None, stale: false, ..self.at };
        if last {
            // The handler gives the next RIP itself.
            return true;
        }
        debug_assert!(instruction.flow_control() == FlowControl::Next, "a branch ends its block");
        self.revive(instruction.next_ip(), self.number + 1);
        false
    }

    /// The present instruction's handler, in the present state.
    fn call(&self) -> Call {
        let part = self.part();
        let recipe = match self.at.flags {
            Flags::Recipe(number) => number,
            Flags::Dynamic => DYNAMIC,
            _ => 0,
        };
        Call {
            insn: part.block.first + self.number as u32,
            block: part.number,
            recipe,
            pending: self.at.pending,
        }
    }

    fn call_handler(&mut self, call: Call) {
        let number = self.calls.add(call);
        self.a.mov_immediate(ADDRESS, u64::from(number));
        self.call_out(self.stubs.step);
    }

    fn call_out(&mut self, to: usize) {
        let call = self.a.call();
        self.outward.push((Assembler::at(call), to));
    }

    /// Copies an instruction that only computes.
    fn copy(&mut self, i: &Instruction) -> Result<(), NotCopied> {
        let vector = self.vector_use(i)?;
        let info = self.factory.info(i);
        let accesses: Vec<OpAccess> = (0..i.op_count()).map(|n| info.op_access(n)).collect();
        let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        let mut copy = *i;
        let mut misses = Vec::new();
        let mut call = self.call();
        if let Some(n) = memory.filter(|_| self.window_low.is_none()) {
            let reads = matches!(accesses[n as usize], OpAccess::Read | OpAccess::CondRead);
            self.give_up_flags();
            call = self.call();
            misses = self.locate(i, if reads { Access::Read } else { Access::Write }, vector)?;
        }
        let (mut modified, mut read) = (i.rflags_modified() & FLAGS, i.rflags_read() & FLAGS);
        if let Some(rotation) = self.rotation_without_flags(i) {
            (copy, modified, read) = (rotation, 0, 0);
        }
        if read != 0 || modified != 0 && (modified != FLAGS || keeps_flags(i)) {
            if let Flags::Recipe(_) = self.at.flags {
                return Err(NotCopied);
            }
            self.load_flags();
        }
        let address_is_used = memory.is_some() || self.window_low.is_some();
        let mut free = if address_is_used { vec![SCRATCH] } else { vec![SCRATCH, ADDRESS] };
        let mut spilled: Vec<(i32, Host)> = Vec::new();
        for n in 0..copy.op_count() {
            let is_general = copy.op_kind(n) == OpKind::Register && copy.op_register(n).is_gpr();
            if is_general && !operand::read_in_frame(&mut copy, n, accesses[n as usize], &spilled) {
                let only_written = accesses[n as usize] == OpAccess::Write && operand::is_once(i, n);
                let register = self.rename(copy.op_register(n), only_written, &mut free, &mut spilled)?;
                copy.set_op_register(n, register);
            }
        }
        if memory.is_some() {
            operand::set_memory(&mut copy, i, self.window_low);
        }
        if leaves_flags(i) {
            // The host's are as after a zero then: cmp rsp, rsp
            self.a.registers(true, &[0x3b], RSP, RSP);
        }
        self.encode(&copy)?;
        for (at, host) in spilled {
            if operand::writes(&copy, &accesses, host) {
                self.a.store(host, RSP, at);
            }
        }
        if vector.is_some_and(|used| used.is_pointed_to) {
            self.a.mov_immediate(SCRATCH, i.ip());
            self.a.store(SCRATCH, RSP, crate::jit::frame::slot::X87_RIP);
        }
        if modified != 0 {
            self.at.flags = Flags::Host;
            self.at.recipe = self.recipe_after(i);
        }
        misses.into_iter().for_each(|from| self.resume_here(from, call, i));
        Ok(())
    }

    /// Turns a memory operand into a host address in [`ADDRESS`]. Gives the ways to the handler.
    fn locate(
        &mut self,
        i: &Instruction,
        access: Access,
        vector: Option<vectors::Use>,
    ) -> Result<Vec<Miss>, NotCopied> {
        let mut misses = Vec::new();
        let size = i.memory_size().size() as u32;
        self.effective_address(i, size.max(1))?;
        let own = if i.mnemonic() == Mnemonic::Cmpxchg16b { 16 } else { 1 };
        if let Some(alignment) = Some(vector.map_or(own, |v| v.alignment)).filter(|&a| a > 1) {
            misses.push(self.misaligned(alignment).into());
        }
        misses.push(if operand::is_on_stack(i) {
            self.probe_stack(access, size, operand::beside_stack(i))
        } else {
            self.probe(access, size).into()
        });
        Ok(misses)
    }

    /// The vector state that the region's instructions need.
    fn vector_state(&self) -> u8 {
        let insns = self.region.parts.iter().flat_map(|part| &part.insns);
        insns.filter_map(|i| self.vector_use(i).ok().flatten()).fold(0, |need, used| need | used.need)
    }

    /// How an instruction uses vector or x87 state: `None` where it has only general operands.
    fn vector_use(&self, i: &Instruction) -> Result<Option<vectors::Use>, NotCopied> {
        if is_copied(i) {
            let allowed = self.source.model.allows(i.cpuid_features());
            return if allowed { Ok(None) } else { Err(NotCopied) };
        }
        (self.source.vector_use)(i).map(Some).ok_or(NotCopied)
    }

    fn encode(&mut self, instruction: &Instruction) -> Result<(), NotCopied> {
        self.encoder.set_buffer(std::mem::take(&mut self.a.bytes));
        let result = self.encoder.encode(instruction, 0);
        self.a.bytes = self.encoder.take_buffer();
        result.map(|_| ()).map_err(|_| NotCopied)
    }

    /// Remembers that a jump goes to the handler of the present instruction, as `call` says, and on from here. Where the
    /// instruction is its block's last, the handler's caller finds the next block.
    fn resume_here(&mut self, from: impl Into<Miss>, mut call: Call, i: &Instruction) {
        let load_flags = matches!(self.at.flags, Flags::Host | Flags::Both);
        let (mut resume, mut counts) = (Some(self.a.here()), 0);
        if self.is_last() {
            let count = self.part().block.count as i32;
            counts = call.pending + count;
            (call.pending, resume) = (-count, None);
        }
        let (next, executed) = (i.next_ip(), self.number + 1);
        let miss = from.into();
        self.cold.push(Cold { miss, call, load_flags, resume, next, executed, counts, group: None });
    }

    /// The same, where the instruction is a branch.
    fn no_resume(&mut self, from: impl Into<Miss>) {
        let call = self.call();
        debug_assert!(call.pending == -(self.part().block.count as i32), "the count is complete");
        self.cold.push(Cold {
            miss: from.into(),
            call,
            load_flags: false,
            resume: None,
            next: 0,
            executed: 0,
            counts: 0,
            group: None,
        });
    }
}
