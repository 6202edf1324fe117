//! The interpreted side: as many instructions as the translated side executed, watched.

use guest_memory::Offset;

use super::meaning::{Meaning, kind, meanings};
use crate::cpu::Cpu;
use crate::insn::Insn;
use crate::interpreter::{Interpreter, Leave};

/// How far a vCPU has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Instructions retired.
    pub instructions: u64,
    /// Exceptions delivered, and repeated instructions left before their end.
    pub interruptions: u64,
}

impl Progress {
    /// Of a vCPU.
    pub fn of(vcpu: &Interpreter) -> Self {
        Self { instructions: vcpu.cpu.instructions, interruptions: vcpu.interruptions }
    }
}

/// A run of instructions that the interpreter executed.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// RIP of the first.
    pub rip: u64,
    /// The block; `None` where it was one instruction alone.
    pub block: Option<u32>,
}

/// What is known of the present slice.
#[derive(Debug, Default)]
pub struct Watch {
    /// The runs of it.
    pub runs: Vec<Run>,
    /// Where it stored, as far as that is told by the instructions' operands: offset and bytes.
    pub stores: Vec<(Offset, u32)>,
    /// Arithmetic flags that are undefined now.
    pub undefined: u16,
    /// Whether x87 or vector registers may have changed.
    pub vector: bool,
    /// By instruction number; empty places are filled when their block is run.
    meanings: Vec<Option<Meaning>>,
    /// The blocks' epoch that the meanings belong to.
    epoch: u64,
    scratch: Vec<Meaning>,
}

/// Where an instruction may be about to store.
struct Before {
    operand: Option<u64>,
    string: Option<u64>,
    stack: u64,
}

impl Watch {
    /// A new slice.
    pub fn start(&mut self) {
        self.runs.clear();
        self.stores.clear();
        self.undefined = 0;
        self.vector = false;
    }

    fn learn(&mut self, vcpu: &Interpreter, number: u32) {
        if self.epoch != vcpu.blocks.epoch {
            self.epoch = vcpu.blocks.epoch;
            self.meanings.clear();
        }
        let block = vcpu.blocks.get(number);
        let (first, end) = (block.first as usize, (block.first + block.count) as usize);
        if self.meanings.len() < end {
            self.meanings.resize(end, None);
        }
        if self.meanings[first].is_some() {
            return;
        }
        self.scratch.clear();
        let options = vcpu.cpu.wires.model.decoder_options();
        let bytes = vcpu.blocks.bytes(block);
        meanings(vcpu.cpu.mode, block.rip, bytes, block.count, options, &mut self.scratch);
        self.meanings[first..end].iter_mut().zip(&self.scratch).for_each(|(to, from)| *to = Some(*from));
    }

    fn note(&mut self, cpu: &Cpu, meaning: Meaning, before: &Before) {
        self.undefined = meaning.undefined_after(self.undefined);
        self.vector |= meaning.kind & kind::VECTOR != 0;
        if let Some(at) = before.operand {
            self.store(cpu, at, u64::from(meaning.len));
        }
        if meaning.kind & kind::STACK != 0 {
            let now = cpu.registers.get(4);
            let len = before.stack.wrapping_sub(now);
            self.store(cpu, now, if len <= 64 { len } else { 8 });
        }
        if let Some(first) = before.string {
            let now = cpu.registers.get(7);
            let (low, high) = (first.min(now), first.max(now));
            self.store(cpu, low, (high - low).saturating_add(8));
            self.store(cpu, now, 8);
        }
    }

    /// Notes a store, where the translation cache tells its place: it was there a moment ago.
    fn store(&mut self, cpu: &Cpu, linear: u64, len: u64) {
        if let Some(offset) = cpu.mmu.tlb.write(cpu.mmu.view, linear, 1) {
            self.stores.push((offset, len.min(4096 - (offset & 0xfff)) as u32));
        }
    }
}

fn before(cpu: &Cpu, insn: &Insn, meaning: Meaning) -> Before {
    let base = cpu.bases[usize::from(insn.segment & 7)];
    let mask = if cpu.mode.is_64() { u64::MAX } else { 0xffff_ffff };
    Before {
        operand: (meaning.kind & kind::OPERAND != 0).then(|| cpu.effective(insn).wrapping_add(base) & mask),
        string: (meaning.kind & kind::STRING != 0).then(|| cpu.registers.get(7)),
        stack: cpu.registers.get(4),
    }
}

/// Runs a vCPU until it has come as far as `to`. What it comes back with, where that is not the next block.
///
/// # Errors
/// A sentence where it does something else on the way.
pub fn follow(vcpu: &mut Interpreter, watch: &mut Watch, to: Progress) -> Result<Option<Leave>, String> {
    loop {
        let now = Progress::of(vcpu);
        if now == to {
            return Ok(None);
        }
        if now.interruptions > to.interruptions {
            return Err("the interpreted vCPU raised an exception that the translated one did not".into());
        }
        if now.instructions > to.instructions {
            return Err(
                "the interpreted vCPU completed an instruction that faulted in translated code".into()
            );
        }
        let left = (to.instructions - now.instructions).max(1);
        let leave = if vcpu.steps_alone() {
            watch.runs.push(Run { rip: vcpu.cpu.rip, block: None });
            (watch.undefined, watch.vector) = (0, true);
            Some(vcpu.single())
        } else {
            run(vcpu, watch, left)
        };
        let moved = Progress::of(vcpu) != now;
        match leave {
            Some(Leave::Exit(exit)) if Progress::of(vcpu) == to => return Ok(Some(Leave::Exit(exit))),
            Some(Leave::Exit(exit)) => return Err(format!("the interpreted vCPU leaves with {exit:?}")),
            _ if !moved => return Err("the interpreted vCPU does not go on".into()),
            _ => {}
        }
    }
}

/// Runs the block at RIP, so many instructions of it at most.
fn run(vcpu: &mut Interpreter, watch: &mut Watch, most: u64) -> Option<Leave> {
    let (rip, regime) = (vcpu.cpu.rip, vcpu.regime());
    let number = match vcpu.find_block(rip, regime) {
        Ok(number) => number,
        Err(leave) => {
            watch.runs.push(Run { rip, block: None });
            (watch.undefined, watch.vector) = (0, true);
            return Some(leave);
        }
    };
    watch.runs.push(Run { rip, block: Some(number) });
    watch.learn(vcpu, number);
    let block = *vcpu.blocks.get(number);
    vcpu.cpu.shadow = false;
    vcpu.cpu.block_rip = rip;
    vcpu.cpu.rip = block.end;
    vcpu.cpu.mmu.executing = block.pages;
    let count = most.min(u64::from(block.count)) as u32;
    for at in 0..count {
        let insn = *vcpu.blocks.insn(block.first + at);
        let meaning = watch.meanings[(block.first + at) as usize].unwrap_or_default();
        let before = before(&vcpu.cpu, &insn, meaning);
        let result = (insn.run)(&mut vcpu.cpu, &insn);
        watch.note(&vcpu.cpu, meaning, &before);
        if let Err(stop) = result {
            return vcpu.stopped(&insn, u64::from(at), stop);
        }
    }
    vcpu.cpu.instructions += u64::from(count);
    if count < block.count {
        let next = *vcpu.blocks.insn(block.first + count);
        vcpu.cpu.rip = vcpu.cpu.this_rip(&next);
    }
    None
}
