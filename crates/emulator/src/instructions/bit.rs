//! Bit tests and scans. SDM vol. 2, *BT*, *BTS*, *BTR*, *BTC*, *BSF*, *BSR*.

use super::shape::{Form, Shape, by_size_from_16};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop, flag};
use crate::undefined::Undefined;
use crate::width::Width;

/// What a bit test does to the bit.
pub trait BitOperation {
    /// Whether memory is only read.
    const READS: bool = false;
    /// The value with the bit changed.
    fn apply(value: u64, mask: u64) -> u64;
}

/// BT.
pub struct Keep;
/// BTS.
pub struct Set;
/// BTR.
pub struct Reset;
/// BTC.
pub struct Complement;

impl BitOperation for Keep {
    const READS: bool = true;
    fn apply(value: u64, _: u64) -> u64 {
        value
    }
}
impl BitOperation for Set {
    fn apply(value: u64, mask: u64) -> u64 {
        value | mask
    }
}
impl BitOperation for Reset {
    fn apply(value: u64, mask: u64) -> u64 {
        value & !mask
    }
}
impl BitOperation for Complement {
    fn apply(value: u64, mask: u64) -> u64 {
        value ^ mask
    }
}

/// The instance of a bit test for an instruction's operands.
pub fn test<O: BitOperation + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size_from_16!(shape.size, reg_reg, O),
        Form::RegImm => by_size_from_16!(shape.size, reg_imm, O),
        Form::MemReg => by_size_from_16!(shape.size, mem_reg, O),
        Form::MemImm => by_size_from_16!(shape.size, mem_imm, O),
        _ => return None,
    })
}

fn on_register<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn, bit: u64) -> Result<(), Stop> {
    let (value, mask) = (W::read(&cpu.registers, insn.r1).zext(), 1 << (bit % u64::from(W::BITS)));
    cpu.flags.set_cf(value & mask != 0);
    if !O::READS {
        W::write(&mut cpu.registers, insn.r1, W::truncate(O::apply(value, mask)));
    }
    Ok(())
}

fn reg_reg<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let bit = cpu.registers.get(insn.r2);
    on_register::<O, W>(cpu, insn, bit)
}
fn reg_imm<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    on_register::<O, W>(cpu, insn, insn.imm)
}

/// `insn` addresses the operand that holds the bit.
fn on_memory<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn, bit: u64) -> Result<(), Stop> {
    let mask = 1 << (bit % u64::from(W::BITS));
    let old = if O::READS {
        cpu.load::<W>(insn)?
    } else {
        let place = cpu.place::<W>(insn)?;
        let change = |value: W| W::truncate(O::apply(value.zext(), mask));
        if insn.has(flag::LOCK) {
            cpu.exchange_place(place, change)
        } else {
            let old = cpu.load_place(place);
            cpu.store_place(place, change(old));
            old
        }
    };
    cpu.flags.set_cf(old.zext() & mask != 0);
    Ok(())
}

/// The bit number is signed and reaches beyond the operand.
fn mem_reg<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let bit = W::read(&cpu.registers, insn.r2).sext() as i64;
    let operands = bit.div_euclid(i64::from(W::BITS));
    let mut moved = *insn;
    moved.disp = insn.disp.wrapping_add((operands * i64::from(W::BITS / 8)) as u64);
    on_memory::<O, W>(cpu, &moved, bit as u64)
}
fn mem_imm<O: BitOperation, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    on_memory::<O, W>(cpu, insn, insn.imm)
}

/// BSF.
pub fn bsf(shape: &Shape) -> Option<Handler> {
    scan::<Forward>(shape)
}
/// BSR.
pub fn bsr(shape: &Shape) -> Option<Handler> {
    scan::<Backward>(shape)
}

trait Direction {
    fn find(value: u64) -> u32;
}
struct Forward;
struct Backward;
impl Direction for Forward {
    fn find(value: u64) -> u32 {
        value.trailing_zeros()
    }
}
impl Direction for Backward {
    fn find(value: u64) -> u32 {
        63 - value.leading_zeros()
    }
}

fn scan<D: Direction + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::RegReg => by_size_from_16!(shape.size, scan_reg, D),
        Form::RegMem => by_size_from_16!(shape.size, scan_mem, D),
        _ => return None,
    })
}

/// Of zero: ZF is set and the destination keeps its value, as AMD documents and Intel's processors do.
fn finish_scan<D: Direction, W: Width>(cpu: &mut Cpu, insn: &Insn, value: W) {
    cpu.flags.set_logic(value);
    if value.zext() != 0 {
        let index = W::truncate(u64::from(D::find(value.zext())));
        W::write(&mut cpu.registers, insn.r1, index);
        if Undefined::of_host().scans_flag_the_index {
            cpu.flags.set_logic(index);
            cpu.flags.set_zf(false);
        }
    }
}

fn scan_reg<D: Direction, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = W::read(&cpu.registers, insn.r2);
    finish_scan::<D, W>(cpu, insn, value);
    Ok(())
}
fn scan_mem<D: Direction, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.load::<W>(insn)?;
    finish_scan::<D, W>(cpu, insn, value);
    Ok(())
}
