//! What is translated together: blocks of one page that lead to each other by direct branches.
//!
//! A region is entered at its root and at its joins, the blocks that more than one edge leads to. Every other block
//! follows the one block that leads to it, and finds flags, counts and registers as that left them.

use guest_memory::GuestMemory;
use iced_x86::{
    Code, Decoder, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register, RflagsBits,
};

use super::flat;
use crate::block::{Block, Blocks, Map};
use crate::cpuid::CpuModel;
use crate::mmu::NO_PAGE;
use crate::mode::Mode;

/// Instructions in a region, at most (the root's may be more).
const MOST_INSNS: usize = 400;
/// Instructions in the rounds of a loop that are translated one after another, at most.
const ROUNDS_INSNS: usize = 48;
/// Instructions of a block at a region's end that is copied for each block that leads to it, at most, and those of all copies.
const TAIL_INSNS: usize = 12;
const COPIED_INSNS: usize = 200;

/// The arithmetic flags, as iced names them.
pub const FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What the translation of earlier instructions wants to know of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// It needs the flags: it reads some, or leaves some as they are.
    pub needs_flags: bool,
    /// It overwrites all flags, and reads none.
    pub sets_flags: bool,
    /// It may go to its handler, which needs the guest's exact state.
    pub may_leave: bool,
    /// General registers that it writes, by number.
    pub writes: u16,
}

/// One block of a region.
#[derive(Clone)]
pub struct Part {
    /// The block's number.
    pub number: u32,
    /// The block.
    pub block: Block,
    /// Its instructions.
    pub insns: Vec<Instruction>,
    /// What there is to know of each.
    pub facts: Vec<Facts>,
    /// Where it goes on by direct branches and by falling through.
    pub successors: Vec<u64>,
    /// Whether more than one edge leads here, one from outside among them where it is the root.
    pub join: bool,
    /// Parts that only this one leads to, by RIP: copies of what others lead to as well.
    pub own: Vec<(u64, usize)>,
    /// Whether nothing leads here: all that would have copies of their own.
    pub dead: bool,
}

/// Blocks that are translated together, in the order of their code.
pub struct Region {
    /// The root comes first.
    pub parts: Vec<Part>,
    /// The parts by RIP.
    pub index: Map<u64, usize>,
}

impl Region {
    /// The region around a block: what is decoded of its page, has not changed, has no translation yet, and is led to
    /// by direct branches. At most `most` blocks, and so many rounds of a block that leads to itself.
    pub fn around(
        root: u32,
        mode: Mode,
        (blocks, memory, model): (&Blocks, &GuestMemory, &CpuModel),
        copies: &dyn Fn(&Instruction) -> bool,
        (most, rounds): (usize, usize),
    ) -> Self {
        let mut region = Self { parts: Vec::new(), index: Map::default() };
        let mut factory = InstructionInfoFactory::new();
        let page = blocks.get(root).offset & !0xfff;
        let base = blocks.get(root).rip & !0xfff;
        let (mut waiting, mut insns) = (vec![root], 0);
        while let Some(number) = waiting.pop() {
            let block = *blocks.get(number);
            let fits = region.parts.is_empty() || insns + block.count as usize <= MOST_INSNS;
            if region.index.contains_key(&block.rip) || region.parts.len() >= most.max(1) || !fits {
                continue;
            }
            let part = Part::new(number, (block, mode), blocks.bytes(&block), model, (&mut factory, copies));
            insns += part.insns.len();
            // The last that is pushed comes next: the one that it falls through to.
            for &rip in part.successors.iter().filter(|&&rip| rip & !0xfff == base) {
                let found = blocks.find(page | rip & 0xfff, rip, mode).filter(|&number| {
                    let block = blocks.get(number);
                    block.code == 0 && block.pages[1] == NO_PAGE && blocks.is_fresh(block, memory)
                });
                waiting.extend(found);
            }
            region.index.insert(block.rip, region.parts.len());
            region.parts.push(part);
        }
        if most >= 2 {
            let mut tail = |rip: u64| {
                let number = blocks.find(page | rip & 0xfff, rip, mode).filter(|_| rip & !0xfff == base)?;
                let block = *blocks.get(number);
                let good = block.count as usize <= TAIL_INSNS
                    && block.pages[1] == NO_PAGE
                    && blocks.is_fresh(&block, memory);
                let bytes = blocks.bytes(&block);
                let part = || Part::new(number, (block, mode), bytes, model, (&mut factory, copies));
                good.then(part).filter(Part::is_tail)
            };
            region.copy_parts(&mut tail, rounds);
        }
        region.find_joins(most);
        region
    }

    /// The part that an edge of another leads to.
    pub fn target(&self, from: usize, rip: u64) -> Option<usize> {
        let own = self.parts.get(from)?.own.iter().find(|&&(to, _)| to == rip);
        own.map(|&(_, part)| part).or_else(|| self.index.get(&rip).copied())
    }

    /// Copies parts for those that lead to them, so that flags and counts stay as they are on the way:
    /// - A block that leads to itself gets further rounds behind it, the last of which leads to the first one. What is done
    ///   once a round is done once for all of them.
    /// - A small block that ends in a return, a call or an indirect jump is copied for each block that leads to it, also where
    ///   it has a translation of its own.
    fn copy_parts(&mut self, tail: &mut dyn FnMut(u64) -> Option<Part>, most_rounds: usize) {
        let mut edges: Map<u64, usize> = Map::from_iter([(self.parts[0].block.rip, 1)]);
        for &rip in self.parts.iter().flat_map(|part| &part.successors) {
            *edges.entry(rip).or_default() += 1;
        }
        let mut copied = 0;
        let mut last = Vec::new();
        for part in std::mem::take(&mut self.parts) {
            let (rip, from) = (part.block.rip, self.parts.len());
            self.index.insert(rip, from);
            let successors = part.successors.clone();
            if successors.contains(&rip) {
                let rounds = (ROUNDS_INSNS / part.insns.len().max(1)).clamp(1, most_rounds.max(1));
                self.parts.extend(std::iter::repeat_n(part, rounds));
                (from + 1..from + rounds).for_each(|next| self.parts[next - 1].own.push((rip, next)));
                continue;
            }
            self.parts.push(part);
            for (n, &to) in successors.iter().enumerate() {
                let elsewhere =
                    !self.index.contains_key(&to) || edges.get(&to).is_some_and(|&edges| edges > 1);
                let Some(copy) = tail(to).filter(|_| elsewhere && copied < COPIED_INSNS) else { continue };
                copied += copy.insns.len();
                if n + 1 == successors.len() {
                    // What it falls through to, or jumps to in any case.
                    self.add_copy(from, to, copy);
                } else {
                    last.push((from, to, copy));
                }
            }
        }
        for (from, to, copy) in last {
            self.add_copy(from, to, copy);
        }
    }

    fn add_copy(&mut self, from: usize, rip: u64, copy: Part) {
        let at = self.parts.len();
        self.parts.push(copy);
        self.parts[from].own.push((rip, at));
    }

    fn find_joins(&mut self, most: usize) {
        if most < 2 {
            // Alone, without edges of its own.
            self.index.clear();
            return;
        }
        let mut edges = vec![0; self.parts.len()];
        edges[0] = 1;
        for (from, part) in self.parts.iter().enumerate() {
            for &rip in &part.successors {
                if let Some(to) = self.target(from, rip) {
                    // What a part behind it leads to cannot find things as that leaves them: it is translated first.
                    edges[to] += if from < to { 1 } else { 2 };
                }
            }
        }
        for (part, edges) in self.parts.iter_mut().zip(edges) {
            (part.join, part.dead) = (edges > 1, edges == 0);
        }
    }
}

impl Part {
    fn new(
        number: u32,
        (block, mode): (Block, Mode),
        bytes: &[u8],
        model: &CpuModel,
        (factory, copies): (&mut InstructionInfoFactory, &dyn Fn(&Instruction) -> bool),
    ) -> Self {
        let mut decoder = Decoder::with_ip(mode.code_size(), bytes, block.rip, model.decoder_options());
        let decode = |_| if mode.is_flat() { flat::widened(decoder.decode()) } else { decoder.decode() };
        let insns: Vec<_> = (0..block.count).map(decode).collect();
        let facts = insns.iter().map(|insn| Facts::of(insn, factory, copies)).collect();
        let successors = insns.last().map(|last| successors(last, block.end)).unwrap_or_default();
        Self { number, block, insns, facts, successors, join: false, own: Vec::new(), dead: false }
    }

    /// Whether it ends in a branch whose target is not known, or a call: nothing of the region follows.
    fn is_tail(&self) -> bool {
        use FlowControl::{Call, IndirectBranch, IndirectCall, Return};
        let last = self.insns.last().map(Instruction::flow_control);
        last.is_some_and(|flow| matches!(flow, Call | IndirectBranch | IndirectCall | Return))
    }
}

impl Facts {
    fn of(
        insn: &Instruction,
        factory: &mut InstructionInfoFactory,
        copies: &dyn Fn(&Instruction) -> bool,
    ) -> Self {
        let info = factory.info(insn);
        let written = |access| {
            !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
        };
        let mut writes = 0;
        for used in info.used_registers() {
            let register: Register = used.register();
            if written(used.access()) && register.is_gpr() {
                writes |= 1 << register.full_register().number();
            }
        }
        let modified = insn.rflags_modified() & FLAGS;
        let partial = modified != 0 && (modified != FLAGS || super::native_set::keeps_flags(insn));
        Self {
            needs_flags: insn.rflags_read() & FLAGS != 0 || partial,
            sets_flags: modified == FLAGS && !partial,
            may_leave: !info.used_memory().is_empty() || !copies(insn),
            writes,
        }
    }
}

/// Whether a conditional branch has code of its own.
pub fn is_branch(i: &Instruction) -> bool {
    i.is_jcc_short_or_near() || is_on_count(i)
}

/// LOOP and JRCXZ, or LOOP and JECXZ of flat code.
pub fn is_on_count(i: &Instruction) -> bool {
    use Code::{Jecxz_rel8_32, Jrcxz_rel8_64, Loop_rel8_32_ECX, Loop_rel8_64_RCX};
    matches!(i.code(), Loop_rel8_64_RCX | Jrcxz_rel8_64 | Loop_rel8_32_ECX | Jecxz_rel8_32)
}

/// Where an instruction at a block's end leads by itself.
fn successors(last: &Instruction, end: u64) -> Vec<u64> {
    let direct = matches!(last.op_kind(0), OpKind::NearBranch64 | OpKind::NearBranch32);
    match last.flow_control() {
        FlowControl::Next => vec![end],
        FlowControl::UnconditionalBranch if direct => vec![last.near_branch_target()],
        FlowControl::ConditionalBranch if direct && is_branch(last) => {
            vec![last.near_branch_target(), end]
        }
        _ => Vec::new(),
    }
}
