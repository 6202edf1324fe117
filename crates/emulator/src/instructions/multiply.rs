//! Multiplication and division. SDM vol. 2, *MUL*, *IMUL*, *DIV*, *IDIV*.

use x86::{Exception, Vector};

use super::shape::{Form, Shape, by_size, by_size_from_16};
use crate::cpu::Cpu;
use crate::insn::{Handler, Insn, Stop};
use crate::undefined::Undefined;
use crate::width::Width;

/// An operation on the accumulator (and RDX) with one operand.
pub trait Accumulate {
    /// Does it.
    ///
    /// # Errors
    /// #DE.
    fn apply<W: Width>(cpu: &mut Cpu, operand: W) -> Result<(), Stop>;
}

/// MUL.
pub struct Mul;
/// IMUL with one operand.
pub struct Imul;
/// DIV.
pub struct Div;
/// IDIV.
pub struct Idiv;

/// Writes a double-width product: AX, or DX:AX and its wider kin.
fn write_pair<W: Width>(cpu: &mut Cpu, value: u128) {
    if W::BITS == 8 {
        u16::write(&mut cpu.registers, 0, value as u16);
    } else {
        W::write(&mut cpu.registers, 0, W::truncate(value as u64));
        W::write(&mut cpu.registers, 2, W::truncate((value >> W::BITS) as u64));
    }
}

fn read_pair<W: Width>(cpu: &Cpu) -> u128 {
    if W::BITS == 8 {
        return u128::from(cpu.registers.get(0) as u16);
    }
    u128::from(W::read(&cpu.registers, 2).zext()) << W::BITS | u128::from(W::read(&cpu.registers, 0).zext())
}

fn write_quotient<W: Width>(cpu: &mut Cpu, quotient: u64, remainder: u64) {
    if W::BITS == 8 {
        u16::write(&mut cpu.registers, 0, (quotient & 0xff | remainder << 8) as u16);
    } else {
        W::write(&mut cpu.registers, 0, W::truncate(quotient));
        W::write(&mut cpu.registers, 2, W::truncate(remainder));
    }
}

impl Accumulate for Mul {
    fn apply<W: Width>(cpu: &mut Cpu, operand: W) -> Result<(), Stop> {
        let product = u128::from(W::read(&cpu.registers, 0).zext()) * u128::from(operand.zext());
        write_pair::<W>(cpu, product);
        let high = product >> W::BITS != 0;
        set_flags::<W>(cpu, product as u64, high);
        Ok(())
    }
}
impl Accumulate for Imul {
    fn apply<W: Width>(cpu: &mut Cpu, operand: W) -> Result<(), Stop> {
        let product = signed_product(W::read(&cpu.registers, 0), operand);
        write_pair::<W>(cpu, product as u128);
        set_signed_flags::<W>(cpu, product);
        Ok(())
    }
}
impl Accumulate for Div {
    fn apply<W: Width>(cpu: &mut Cpu, operand: W) -> Result<(), Stop> {
        let (dividend, divisor) = (read_pair::<W>(cpu), u128::from(operand.zext()));
        if divisor == 0 || dividend >> W::BITS >= divisor {
            return Err(cpu.raise(Exception::new(Vector::DivideError)));
        }
        if dividend >> 64 == 0 {
            let (dividend, divisor) = (dividend as u64, divisor as u64);
            write_quotient::<W>(cpu, dividend / divisor, dividend % divisor);
        } else {
            write_quotient::<W>(cpu, (dividend / divisor) as u64, (dividend % divisor) as u64);
        }
        Ok(())
    }
}
impl Accumulate for Idiv {
    fn apply<W: Width>(cpu: &mut Cpu, operand: W) -> Result<(), Stop> {
        let unused = 128 - 2 * W::BITS;
        let dividend = (read_pair::<W>(cpu) << unused) as i128 >> unused;
        let divisor = i128::from(operand.sext() as i64);
        let (quotient, remainder) = match (dividend.checked_div(divisor), dividend.checked_rem(divisor)) {
            (Some(quotient), Some(remainder)) => (quotient, remainder),
            _ => return Err(cpu.raise(Exception::new(Vector::DivideError))),
        };
        if i128::from(W::truncate(quotient as u64).sext() as i64) != quotient {
            return Err(cpu.raise(Exception::new(Vector::DivideError)));
        }
        write_quotient::<W>(cpu, quotient as u64, remainder as u64);
        Ok(())
    }
}

fn signed_product<W: Width>(a: W, b: W) -> i128 {
    i128::from(a.sext() as i64) * i128::from(b.sext() as i64)
}

/// CF and OF: whether the product was cut.
fn set_signed_flags<W: Width>(cpu: &mut Cpu, product: i128) {
    let low = W::truncate(product as u64);
    let cut = i128::from(low.sext() as i64) != product;
    set_flags::<W>(cpu, product as u64, cut);
}

/// CF and OF; the others, which are undefined, follow from the product, or as translated code has them where the host leaves
/// them alone: as after a zero.
fn set_flags<W: Width>(cpu: &mut Cpu, product: u64, cut: bool) {
    let product = if Undefined::of_host().products_keep_flags { 0 } else { product };
    cpu.flags.set_result(W::truncate(product), cut, cut);
}

/// The instance of an accumulator operation.
pub fn accumulate<O: Accumulate + 'static>(shape: &Shape) -> Option<Handler> {
    Some(match shape.form {
        Form::Reg => by_size!(shape.size, reg, O),
        Form::Mem => by_size!(shape.size, mem, O),
        _ => return None,
    })
}

fn reg<O: Accumulate, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let operand = W::read(&cpu.registers, insn.r1);
    O::apply(cpu, operand)
}
fn mem<O: Accumulate, W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let operand = cpu.load::<W>(insn)?;
    O::apply(cpu, operand)
}

/// IMUL in its three forms.
pub fn imul(shape: &Shape) -> Option<Handler> {
    Some(match (shape.form, shape.third_immediate) {
        (Form::Reg | Form::Mem, _) => return accumulate::<Imul>(shape),
        (Form::RegReg, false) => by_size_from_16!(shape.size, imul_reg),
        (Form::RegMem, false) => by_size_from_16!(shape.size, imul_mem),
        (Form::RegReg, true) => by_size_from_16!(shape.size, imul_reg_imm),
        (Form::RegMem, true) => by_size_from_16!(shape.size, imul_mem_imm),
        _ => return None,
    })
}

#[inline(always)]
fn finish<W: Width>(cpu: &mut Cpu, insn: &Insn, a: W, b: W) {
    let product = signed_product(a, b);
    set_signed_flags::<W>(cpu, product);
    W::write(&mut cpu.registers, insn.r1, W::truncate(product as u64));
}

fn imul_reg<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (a, b) = (W::read(&cpu.registers, insn.r1), W::read(&cpu.registers, insn.r2));
    finish(cpu, insn, a, b);
    Ok(())
}
fn imul_mem<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let b = cpu.load::<W>(insn)?;
    let a = W::read(&cpu.registers, insn.r1);
    finish(cpu, insn, a, b);
    Ok(())
}
fn imul_reg_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = W::read(&cpu.registers, insn.r2);
    finish(cpu, insn, a, W::truncate(insn.imm));
    Ok(())
}
fn imul_mem_imm<W: Width>(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let a = cpu.load::<W>(insn)?;
    finish(cpu, insn, a, W::truncate(insn.imm));
    Ok(())
}
