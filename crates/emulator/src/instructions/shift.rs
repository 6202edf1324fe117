//! Shifts and rotates. SDM vol. 2, *SAL/SAR/SHL/SHR*, *RCL/RCR/ROL/ROR*, *SHLD*, *SHRD*.

use super::shape::{Form, Shape, by_size, by_size_from_16};
use crate::cpu::Cpu;
use crate::flags::LazyFlags;
use crate::insn::{Handler, Insn, Stop};
use crate::undefined::Undefined;
use crate::width::Width;

/// A shift or rotate by a count that is already masked to 5 bits, or 6 for quadwords, and not zero.
pub trait Shift {
    /// The result; sets the flags.
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W;
}

/// SHL and SAL.
pub struct Shl;
/// SHR.
pub struct Shr;
/// SAR.
pub struct Sar;
/// ROL.
pub struct Rol;
/// ROR.
pub struct Ror;
/// RCL.
pub struct Rcl;
/// RCR.
pub struct Rcr;

/// Bit `at` of a value; zero from bit 64 on.
fn bit(value: u64, at: u32) -> bool {
    value.checked_shr(at).unwrap_or(0) & 1 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let result = W::truncate(a.zext().checked_shl(count).unwrap_or(0));
        let cf = count <= W::BITS && bit(a.zext(), W::BITS - count);
        flags.set_shifted(result, cf, result.sign() != cf);
        result
    }
}
impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let result = W::truncate(a.zext().checked_shr(count).unwrap_or(0));
        // OF is the old sign for a count of one; for others, where it is undefined, the top two bits' difference.
        let of = result.sign() != bit(result.zext(), W::BITS - 2);
        flags.set_shifted(result, bit(a.zext(), count - 1), if count == 1 { a.sign() } else { of });
        result
    }
}
impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let signed = a.sext() as i64;
        let result = W::truncate((signed >> count.min(63)) as u64);
        flags.set_shifted(result, (signed >> (count - 1).min(63)) & 1 != 0, false);
        result
    }
}
impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let result = rotate_left(a, count % W::BITS);
        let cf = result.zext() & 1 != 0;
        flags.set_cf_of(cf, result.sign() != cf);
        result
    }
}
impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let result = rotate_left(a, (W::BITS - count % W::BITS) % W::BITS);
        let cf = result.sign();
        flags.set_cf_of(cf, cf != bit(result.zext(), W::BITS - 2));
        result
    }
}

fn rotate_left<W: Width>(a: W, count: u32) -> W {
    if count == 0 {
        return a;
    }
    W::truncate(a.zext() << count | a.zext() >> (W::BITS - count))
}

impl Shift for Rcl {
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let count = count % (W::BITS + 1);
        if count == 0 {
            if Undefined::of_host().whole_turns_set_of {
                let cf = flags.cf();
                flags.set_cf_of(cf, a.sign() != cf);
            }
            return a;
        }
        let ring = u128::from(a.zext()) | u128::from(flags.cf()) << W::BITS;
        let turned = ring << count | ring >> (W::BITS + 1 - count);
        let (result, cf) = (W::truncate(turned as u64), turned >> W::BITS & 1 != 0);
        flags.set_cf_of(cf, result.sign() != cf);
        result
    }
}
impl Shift for Rcr {
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let count = count % (W::BITS + 1);
        if count == 0 {
            if Undefined::of_host().whole_turns_set_of {
                flags.set_cf_of(flags.cf(), a.sign() != bit(a.zext(), W::BITS - 2));
            }
            return a;
        }
        let ring = u128::from(a.zext()) | u128::from(flags.cf()) << W::BITS;
        let turned = ring >> count | ring << (W::BITS + 1 - count);
        let (result, cf) = (W::truncate(turned as u64), turned >> W::BITS & 1 != 0);
        flags.set_cf_of(cf, result.sign() != bit(result.zext(), W::BITS - 2));
        result
    }
}

/// The instance of a shift for an instruction's operands.
pub fn shift<O: Shift + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.by_cl) {
        (Form::RegImm, _) => by_size!(shape.size, reg_imm, O),
        (Form::MemImm, _) => by_size!(shape.size, mem_imm, O),
        (Form::RegReg, true) => by_size!(shape.size, reg_cl, O),
        (Form::MemReg, true) => by_size!(shape.size, mem_cl, O),
        _ => return None,
    })
}

#[inline(always)]
fn masked<W: Width>(count: u64) -> u32 {
    count as u32 & if W::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn on_register<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn, count: u32) -> Result<(), Stop> {
    let a = W::read(&cpu.registers, insn.r1);
    // A count of zero leaves the flags, but still writes: a doubleword's upper half is cleared.
    let result = if count == 0 { a } else { O::apply(&mut cpu.flags, a, count) };
    W::write(&mut cpu.registers, insn.r1, result);
    Ok(())
}

fn on_memory<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn, count: u32) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    let a = cpu.load_place::<W>(place);
    if count != 0 {
        let result = O::apply(&mut cpu.flags, a, count);
        cpu.store_place(place, result);
    }
    Ok(())
}

fn reg_imm<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    on_register::<O, W>(cpu, insn, masked::<W>(insn.imm))
}
fn mem_imm<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    on_memory::<O, W>(cpu, insn, masked::<W>(insn.imm))
}
fn reg_cl<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = masked::<W>(cpu.registers.get(1));
    on_register::<O, W>(cpu, insn, count)
}
fn mem_cl<O: Shift, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = masked::<W>(cpu.registers.get(1));
    on_memory::<O, W>(cpu, insn, count)
}

/// SHLD.
pub fn shld(shape: &Shape) -> Option<Handler> {
    double::<Left>(shape)
}
/// SHRD.
pub fn shrd(shape: &Shape) -> Option<Handler> {
    double::<Right>(shape)
}

/// A shift of two operands as one.
trait Double {
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W, count: u32) -> W;
}
struct Left;
struct Right;

impl Double for Left {
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W, count: u32) -> W {
        let pair = u128::from(a.zext()) << W::BITS | u128::from(b.zext());
        let pair = if W::BITS == 16 { pair << 16 | u128::from(beyond(a, b).zext()) } else { pair };
        let top = if W::BITS == 16 { 48 } else { 2 * W::BITS };
        let turned = pair << count;
        let result = W::truncate((turned >> (top - W::BITS)) as u64);
        let cf = pair >> (top - count) & 1 != 0 && !loses_carry::<W>(count);
        let top_bits = Undefined::of_host().double_shifts_compare_top_bits;
        flags.set_shifted(result, cf, result.sign() != if top_bits { cf } else { a.sign() });
        result
    }
}
impl Double for Right {
    fn apply<W: Width>(flags: &mut LazyFlags, a: W, b: W, count: u32) -> W {
        let pair = u128::from(b.zext()) << W::BITS | u128::from(a.zext());
        let pair = if W::BITS == 16 { pair | u128::from(beyond(a, b).zext()) << 32 } else { pair };
        let result = W::truncate((pair >> count) as u64);
        let cf = pair >> (count - 1) & 1 != 0 && !loses_carry::<W>(count);
        let top_bits = Undefined::of_host().double_shifts_compare_top_bits;
        let other = if top_bits { bit(result.zext(), W::BITS - 2) } else { a.sign() };
        flags.set_shifted(result, cf, result.sign() != other);
        result
    }
}

/// What words are shifted into where the count is more than 16, and the result undefined: the destination or the source.
fn beyond<W: Width>(a: W, b: W) -> W {
    if Undefined::of_host().words_go_on_with_source { b } else { a }
}

/// Whether CF is clear after that whatever the bits.
fn loses_carry<W: Width>(count: u32) -> bool {
    W::BITS == 16 && count > 16 && Undefined::of_host().words_go_on_with_source
}

fn double<O: Double + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.third_immediate) {
        (Form::RegReg, true) => by_size_from_16!(shape.size, double_reg_imm, O),
        (Form::MemReg, true) => by_size_from_16!(shape.size, double_mem_imm, O),
        (Form::RegReg, false) => by_size_from_16!(shape.size, double_reg_cl, O),
        (Form::MemReg, false) => by_size_from_16!(shape.size, double_mem_cl, O),
        _ => return None,
    })
}

fn double_on_register<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn, count: u32) -> Result<(), Stop> {
    let (a, b) = (W::read(&cpu.registers, insn.r1), W::read(&cpu.registers, insn.r2));
    let result = if count == 0 { a } else { O::apply(&mut cpu.flags, a, b, count) };
    W::write(&mut cpu.registers, insn.r1, result);
    Ok(())
}
fn double_on_memory<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn, count: u32) -> Result<(), Stop> {
    let place = cpu.place::<W>(insn)?;
    if count != 0 {
        let (a, b) = (cpu.load_place::<W>(place), W::read(&cpu.registers, insn.r2));
        let result = O::apply(&mut cpu.flags, a, b, count);
        cpu.store_place(place, result);
    }
    Ok(())
}
fn double_reg_imm<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    double_on_register::<O, W>(cpu, insn, masked::<W>(insn.imm))
}
fn double_mem_imm<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    double_on_memory::<O, W>(cpu, insn, masked::<W>(insn.imm))
}
fn double_reg_cl<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = masked::<W>(cpu.registers.get(1));
    double_on_register::<O, W>(cpu, insn, count)
}
fn double_mem_cl<O: Double, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let count = masked::<W>(cpu.registers.get(1));
    double_on_memory::<O, W>(cpu, insn, count)
}
