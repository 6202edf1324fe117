//! String instructions and their repetition. SDM vol. 2, *REP/REPE/REPZ/REPNE/REPNZ*.

use engine::Space;
use x86::{Flags, SegmentRegister};

use super::arithmetic::{Binary, Cmp};
use super::shape::{Shape, by_size};
use crate::cpu::Cpu;
use crate::insn::{FLAT, Handler, Insn, Stop, flag};
use crate::width::Width;

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;
/// Repetitions after which interrupts are looked at.
const BATCH: u64 = 512;

impl Cpu {
    /// The linear address of a string operand.
    ///
    /// # Errors
    /// [`Stop::Fault`] where the segment does not allow it.
    #[inline(always)]
    pub fn string_linear(&mut self, segment: u8, offset: u64, size: u64, write: bool) -> Result<u64, Stop> {
        if self.mode.is_64() {
            return Ok(offset.wrapping_add(self.bases[usize::from(segment & 7)]));
        }
        self.segmented(segment, offset, size, write)
    }

    fn source(&mut self, insn: &Insn, size: u64) -> Result<u64, Stop> {
        let offset = self.registers.get(RSI) & insn.address_mask();
        self.string_linear(insn.segment, offset, size, false)
    }

    fn destination(&mut self, insn: &Insn, size: u64, write: bool) -> Result<u64, Stop> {
        let offset = self.registers.get(RDI) & insn.address_mask();
        let segment = if self.mode.is_64() { FLAT } else { SegmentRegister::Es as u8 };
        self.string_linear(segment, offset, size, write)
    }

    /// Moves an index register by a number of bytes within the address size.
    fn advance(&mut self, register: u8, bytes: u64, insn: &Insn) {
        let mask = insn.address_mask();
        let old = self.registers.get(register);
        let kept = if mask == 0xffff { old & !mask } else { 0 };
        self.registers.set(register, kept | old.wrapping_add(bytes) & mask);
    }

    fn step<W: Width>(&self) -> u64 {
        let size = u64::from(W::BITS / 8);
        if self.system_flags.contains(Flags::DF) { size.wrapping_neg() } else { size }
    }
}

/// Repeats `once` as the prefix says; `once` does one element and moves the index registers.
fn repeat(
    cpu: &mut Cpu,
    insn: &Insn,
    mut once: impl FnMut(&mut Cpu, &Insn, u64) -> Result<u64, Stop>,
    ends: impl Fn(&Cpu) -> bool,
) -> Result<(), Stop> {
    if !insn.has(flag::REP | flag::REPNE) {
        return once(cpu, insn, 1).map(|_| ());
    }
    for _ in 0..BATCH {
        let count = cpu.registers.get(RCX) & insn.address_mask();
        if count == 0 {
            // A 32-bit count clears what is above it, even where nothing was counted.
            cpu.advance(RCX, 0, insn);
            return Ok(());
        }
        // A single step is one iteration.
        let traced = cpu.system_flags.contains(Flags::TF);
        let done = once(cpu, insn, if traced { 1 } else { count })?;
        cpu.advance(RCX, done.wrapping_neg(), insn);
        if ends(cpu) {
            return Ok(());
        }
        if traced || cpu.debug_traps != 0 {
            break;
        }
    }
    if cpu.registers.get(RCX) & insn.address_mask() == 0 { Ok(()) } else { Err(Stop::Repeat) }
}

fn never(_: &Cpu) -> bool {
    false
}

/// How many elements from a linear address on lie within its page.
fn in_page(linear: u64, size: u64) -> u64 {
    (4096 - (linear & 0xfff)) / size
}

/// How many elements can be moved from an offset before it wraps in its address size or its segment's limit counts.
fn run_allowed(cpu: &Cpu) -> bool {
    cpu.mode.is_64() && !cpu.system_flags.contains(Flags::DF)
}

/// MOVS.
pub fn movs(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, movs_of))
}

fn movs_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    repeat(cpu, insn, movs_once::<W>, never)
}

/// Moves one element, or a run of them that stays within a page on both sides.
fn movs_once<W: Width>(cpu: &mut Cpu, insn: &Insn, count: u64) -> Result<u64, Stop> {
    let size = u64::from(W::BITS / 8);
    let from = cpu.source(insn, size)?;
    if !cpu.mode.is_64() {
        // The source is read before the destination's segment is looked at.
        cpu.load_linear::<W>(from)?;
    }
    let to = cpu.destination(insn, size, true)?;
    if count > 1 && run_allowed(cpu) {
        let run = count.min(in_page(from, size)).min(in_page(to, size));
        // A run may repeat its own beginning (`to` a little above `from`), but never within one element.
        let apart = to.wrapping_sub(from) >= size;
        if run > 1
            && apart
            && let (Some(source), Some(target)) = both(cpu, from, to, size)
        {
            cpu.memory.copy_forward(source, target, run * size);
            cpu.advance(RSI, run * size, insn);
            cpu.advance(RDI, run * size, insn);
            return Ok(run);
        }
    }
    let value = cpu.load_linear::<W>(from)?;
    cpu.store_linear(to, value)?;
    let step = cpu.step::<W>();
    cpu.advance(RSI, step, insn);
    cpu.advance(RDI, step, insn);
    Ok(1)
}

fn both(cpu: &Cpu, from: u64, to: u64, size: u64) -> (Option<u64>, Option<u64>) {
    (cpu.mmu.tlb.read(cpu.mmu.view, from, size), cpu.mmu.tlb.write(cpu.mmu.view, to, size))
}

/// STOS.
pub fn stos(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, stos_of))
}

fn stos_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    repeat(cpu, insn, stos_once::<W>, never)
}

fn stos_once<W: Width>(cpu: &mut Cpu, insn: &Insn, count: u64) -> Result<u64, Stop> {
    let size = u64::from(W::BITS / 8);
    let to = cpu.destination(insn, size, true)?;
    let value = W::read(&cpu.registers, 0);
    if count > 1 && run_allowed(cpu) {
        let run = count.min(in_page(to, size));
        if run > 1
            && let Some(target) = cpu.mmu.tlb.write(cpu.mmu.view, to, size)
        {
            cpu.memory.fill(target, value, run);
            cpu.advance(RDI, run * size, insn);
            return Ok(run);
        }
    }
    cpu.store_linear(to, value)?;
    let step = cpu.step::<W>();
    cpu.advance(RDI, step, insn);
    Ok(1)
}

/// LODS.
pub fn lods(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, lods_of))
}

fn lods_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let once = |cpu: &mut Cpu, insn: &Insn, _: u64| {
        let from = cpu.source(insn, u64::from(W::BITS / 8))?;
        let value = cpu.load_linear::<W>(from)?;
        W::write(&mut cpu.registers, 0, value);
        let step = cpu.step::<W>();
        cpu.advance(RSI, step, insn);
        Ok(1)
    };
    repeat(cpu, insn, once, never)
}

/// SCAS.
pub fn scas(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, scas_of))
}

fn scas_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let once = |cpu: &mut Cpu, insn: &Insn, _: u64| {
        let at = cpu.destination(insn, u64::from(W::BITS / 8), false)?;
        let value = cpu.load_linear::<W>(at)?;
        let accumulator = W::read(&cpu.registers, 0);
        Cmp::apply(&mut cpu.flags, accumulator, value);
        let step = cpu.step::<W>();
        cpu.advance(RDI, step, insn);
        Ok(1)
    };
    compare_repeatedly(cpu, insn, once)
}

/// Repeats a comparison. A fault leaves the flags as they were before the instruction, whatever was compared since.
fn compare_repeatedly(
    cpu: &mut Cpu,
    insn: &Insn,
    once: impl FnMut(&mut Cpu, &Insn, u64) -> Result<u64, Stop>,
) -> Result<(), Stop> {
    let before = cpu.flags;
    repeat(cpu, insn, once, until(insn)).inspect_err(|stop| {
        if *stop == Stop::Fault {
            cpu.flags = before;
        }
    })
}

/// CMPS.
pub fn cmps(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, cmps_of))
}

fn cmps_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let once = |cpu: &mut Cpu, insn: &Insn, _: u64| {
        let size = u64::from(W::BITS / 8);
        // Processors read the second operand first, which shows where both fault.
        let second = cpu.destination(insn, size, false)?;
        let b = cpu.load_linear::<W>(second)?;
        let first = cpu.source(insn, size)?;
        let a = cpu.load_linear::<W>(first)?;
        Cmp::apply(&mut cpu.flags, a, b);
        let step = cpu.step::<W>();
        cpu.advance(RSI, step, insn);
        cpu.advance(RDI, step, insn);
        Ok(1)
    };
    compare_repeatedly(cpu, insn, once)
}

/// What ends a repeated comparison: REPE while equal, REPNE while not.
fn until(insn: &Insn) -> impl Fn(&Cpu) -> bool {
    let while_equal = insn.has(flag::REP);
    move |cpu| cpu.flags.zf() != while_equal
}

/// INS.
pub fn ins(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, ins_of))
}

fn ins_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let port = cpu.registers.get(2) as u16;
    cpu.check_port(port, W::BITS / 8)?;
    let once = |cpu: &mut Cpu, insn: &Insn, _: u64| {
        let size = u64::from(W::BITS / 8);
        let to = cpu.destination(insn, size, true)?;
        // The destination is checked before the device is read, so that a fault loses no input.
        let place = cpu.place_linear(to, size)?;
        let mut bytes = [0; 8];
        cpu.wires.bus.read(Space::Port, u64::from(port), &mut bytes[..size as usize]);
        cpu.store_place(place, W::truncate(u64::from_le_bytes(bytes)));
        let step = cpu.step::<W>();
        cpu.advance(RDI, step, insn);
        Ok(1)
    };
    repeat(cpu, insn, once, never)
}

/// OUTS.
pub fn outs(shape: &Shape) -> Option<Handler> {
    Some(by_size!(shape.size, outs_of))
}

fn outs_of<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let port = cpu.registers.get(2) as u16;
    cpu.check_port(port, W::BITS / 8)?;
    let once = |cpu: &mut Cpu, insn: &Insn, _: u64| {
        let size = u64::from(W::BITS / 8);
        let from = cpu.source(insn, size)?;
        let value = cpu.load_linear::<W>(from)?.zext().to_le_bytes();
        cpu.wires.bus.write(Space::Port, u64::from(port), &value[..size as usize]);
        let step = cpu.step::<W>();
        cpu.advance(RSI, step, insn);
        Ok(1)
    };
    repeat(cpu, insn, once, never)
}
