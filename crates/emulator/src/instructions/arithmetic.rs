//! Integer arithmetic and logic of two operands and of one. SDM vol. 2.

use super::shape::{Form, Shape, by_size};
use crate::cpu::Cpu;
use crate::flags::LazyFlags;
use crate::insn::{Handler, Insn, Stop};
use crate::width::Width;

/// An operation on two operands whose result replaces the first.
pub trait Binary {
    /// CMP and TEST only set flags.
    const WRITES: bool = true;
    /// The result; sets the flags.
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W;
}

/// An operation on one operand.
pub trait Unary {
    /// The result; sets the flags.
    fn apply<W: Width>(flags: &mut LazyFlags, a: W) -> W;
}

/// ADD.
pub struct Add;
/// ADC.
pub struct Adc;
/// SUB.
pub struct Sub;
/// SBB.
pub struct Sbb;
/// CMP.
pub struct Cmp;
/// AND.
pub struct And;
/// OR.
pub struct Or;
/// XOR.
pub struct Xor;
/// TEST.
pub struct Test;
/// INC.
pub struct Inc;
/// DEC.
pub struct Dec;
/// NEG.
pub struct Neg;
/// NOT.
pub struct Not;

impl Binary for Add {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext().wrapping_add(b.zext()));
        flags.set_add(a, b, result);
        result
    }
}
impl Binary for Adc {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext().wrapping_add(b.zext()).wrapping_add(u64::from(flags.cf())));
        flags.set_add(a, b, result);
        result
    }
}
impl Binary for Sub {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext().wrapping_sub(b.zext()));
        flags.set_sub(a, b, result);
        result
    }
}
impl Binary for Sbb {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext().wrapping_sub(b.zext()).wrapping_sub(u64::from(flags.cf())));
        flags.set_sub(a, b, result);
        result
    }
}
impl Binary for Cmp {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        Sub::apply(flags, a, b)
    }
}
impl Binary for And {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext() & b.zext());
        flags.set_logic(result);
        result
    }
}
impl Binary for Or {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext() | b.zext());
        flags.set_logic(result);
        result
    }
}
impl Binary for Xor {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        let result = W::truncate(a.zext() ^ b.zext());
        flags.set_logic(result);
        result
    }
}
impl Binary for Test {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W) -> W {
        And::apply(flags, a, b)
    }
}
impl Unary for Inc {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W) -> W {
        let cf = flags.cf();
        let result = Add::apply(flags, a, W::truncate(1));
        flags.set_cf(cf);
        result
    }
}
impl Unary for Dec {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W) -> W {
        let cf = flags.cf();
        let result = Sub::apply(flags, a, W::truncate(1));
        flags.set_cf(cf);
        result
    }
}
impl Unary for Neg {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W) -> W {
        Sub::apply(flags, W::truncate(0), a)
    }
}
impl Unary for Not {
    #[inline(always)]
    fn apply<W: Width>(_: &mut LazyFlags, a: W) -> W {
        W::truncate(!a.zext())
    }
}

/// The instance of a two-operand operation for an instruction's operands.
pub fn binary<O: Binary + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.lock) {
        (Form::RegReg, _) => by_size!(shape.size, reg_reg, O),
        (Form::RegMem, _) => by_size!(shape.size, reg_mem, O),
        (Form::RegImm, _) => by_size!(shape.size, reg_imm, O),
        (Form::MemReg, false) => by_size!(shape.size, mem_reg, O),
        (Form::MemImm, false) => by_size!(shape.size, mem_imm, O),
        (Form::MemReg, true) => by_size!(shape.size, locked_mem_reg, O),
        (Form::MemImm, true) => by_size!(shape.size, locked_mem_imm, O),
        _ => return None,
    })
}

/// The instance of a one-operand operation.
pub fn unary<O: Unary + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.lock) {
        (Form::Reg, _) => by_size!(shape.size, unary_reg, O),
        (Form::Mem, false) => by_size!(shape.size, unary_mem, O),
        (Form::Mem, true) => by_size!(shape.size, unary_locked, O),
        _ => return None,
    })
}

#[inline(always)]
fn finish_reg<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn, a: W, b: W) {
    let result = O::apply(&mut cpu.flags, a, b);
    if O::WRITES {
        W::write(&mut cpu.registers, insn.r1, result);
    }
}

fn reg_reg<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (a, b) = (W::read(&cpu.registers, insn.r1), W::read(&cpu.registers, insn.r2));
    finish_reg::<O, W>(cpu, insn, a, b);
    Ok(())
}

fn reg_imm<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = W::read(&cpu.registers, insn.r1);
    finish_reg::<O, W>(cpu, insn, a, W::truncate(insn.imm));
    Ok(())
}

fn reg_mem<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = cpu.load::<W>(insn)?;
    let a = W::read(&cpu.registers, insn.r1);
    finish_reg::<O, W>(cpu, insn, a, b);
    Ok(())
}

#[inline(always)]
fn on_memory<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn, b: W) -> Result<(), Stop> {
    if O::WRITES {
        let place = cpu.place::<W>(insn)?;
        let a = cpu.load_place(place);
        let result = O::apply(&mut cpu.flags, a, b);
        cpu.store_place(place, result);
    } else {
        let a = cpu.load::<W>(insn)?;
        O::apply(&mut cpu.flags, a, b);
    }
    Ok(())
}

fn mem_reg<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = W::read(&cpu.registers, insn.r2);
    on_memory::<O, W>(cpu, insn, b)
}

fn mem_imm<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    on_memory::<O, W>(cpu, insn, W::truncate(insn.imm))
}

fn locked<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn, b: W) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let before = cpu.flags;
    let mut after = before;
    cpu.exchange_place::<W>(place, |a| {
        after = before;
        O::apply(&mut after, a, b)
    });
    cpu.flags = after;
    Ok(())
}

fn locked_mem_reg<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = W::read(&cpu.registers, insn.r2);
    locked::<O, W>(cpu, insn, b)
}

fn locked_mem_imm<O: Binary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    locked::<O, W>(cpu, insn, W::truncate(insn.imm))
}

fn unary_reg<O: Unary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let result = O::apply(&mut cpu.flags, W::read(&cpu.registers, insn.r1));
    W::write(&mut cpu.registers, insn.r1, result);
    Ok(())
}

fn unary_mem<O: Unary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let a = cpu.load_place(place);
    let result = O::apply::<W>(&mut cpu.flags, a);
    cpu.store_place(place, result);
    Ok(())
}

fn unary_locked<O: Unary, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let before = cpu.flags;
    let mut after = before;
    cpu.exchange_place::<W>(place, |a| {
        after = before;
        O::apply(&mut after, a)
    });
    cpu.flags = after;
    Ok(())
}
