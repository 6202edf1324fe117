//! Single flags, and decimal arithmetic. SDM vol. 2.

use x86::{Exception, Flags, Vector};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::width::{HIGH_BYTE, Width};

const AH: u8 = HIGH_BYTE;

/// CLC.
pub fn clc(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.flags.set_cf(false);
    Ok(())
}
/// STC.
pub fn stc(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.flags.set_cf(true);
    Ok(())
}
/// CMC.
pub fn cmc(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}
/// CLD.
pub fn cld(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.system_flags.remove(Flags::DF);
    Ok(())
}
/// STD.
pub fn std_(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    cpu.system_flags.insert(Flags::DF);
    Ok(())
}
/// LAHF.
pub fn lahf(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let bits = cpu.flags.bits() as u8 & 0xd5 | 2;
    u8::write(&mut cpu.registers, AH, bits);
    Ok(())
}
/// SAHF.
pub fn sahf(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let overflow = cpu.flags.bits() & Flags::OF.bits();
    let bits = u64::from(u8::read(&cpu.registers, AH)) & 0xd5;
    cpu.flags.set_bits(bits | overflow);
    Ok(())
}
/// SALC, undocumented: AL is all ones with CF, else zero.
pub fn salc(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let value = if cpu.flags.cf() { 0xff } else { 0 };
    u8::write(&mut cpu.registers, 0, value);
    Ok(())
}

fn set_decimal(cpu: &mut Cpu, al: u8, cf: bool, af: bool) {
    u8::write(&mut cpu.registers, 0, al);
    cpu.flags.set_result(al, cf, false);
    let bits = cpu.flags.bits() | if af { Flags::AF.bits() } else { 0 };
    cpu.flags.set_bits(bits);
}

fn adjust(cpu: &mut Cpu, apply: fn(u8, u8) -> u8) {
    let (al, cf, af) = (u8::read(&cpu.registers, 0), cpu.flags.cf(), cpu.flags.af());
    let low = al & 15 > 9 || af;
    let high = al > 0x99 || cf;
    let result = apply(al, if low { 6 } else { 0 } + if high { 0x60 } else { 0 });
    set_decimal(cpu, result, high, low);
}
/// DAA.
pub fn daa(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    adjust(cpu, u8::wrapping_add);
    Ok(())
}
/// DAS.
pub fn das(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let (al, cf, af) = (u8::read(&cpu.registers, 0), cpu.flags.cf(), cpu.flags.af());
    let low = al & 15 > 9 || af;
    let borrow = low && al < 6;
    adjust(cpu, u8::wrapping_sub);
    cpu.flags.set_cf(al > 0x99 || cf || borrow);
    Ok(())
}

fn adjust_unpacked(cpu: &mut Cpu, step: u16) {
    let ax = cpu.registers.get(0) as u16;
    let carry = ax & 15 > 9 || cpu.flags.af();
    let adjusted = if carry { ax.wrapping_add(step) } else { ax } & 0xff0f;
    u16::write(&mut cpu.registers, 0, adjusted);
    cpu.flags.set_result(adjusted as u8, carry, false);
    let bits = cpu.flags.bits() | if carry { Flags::AF.bits() } else { 0 };
    cpu.flags.set_bits(bits);
}
/// AAA.
pub fn aaa(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    adjust_unpacked(cpu, 0x106);
    Ok(())
}
/// AAS.
pub fn aas(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    adjust_unpacked(cpu, 0u16.wrapping_sub(0x106));
    Ok(())
}
/// AAM.
pub fn aam(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (al, base) = (u8::read(&cpu.registers, 0), insn.imm as u8);
    if base == 0 {
        return Err(cpu.raise(Exception::new(Vector::DivideError)));
    }
    u16::write(&mut cpu.registers, 0, u16::from(al / base) << 8 | u16::from(al % base));
    cpu.flags.set_result(al % base, false, false);
    Ok(())
}
/// AAD.
pub fn aad(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (al, ah) = (u8::read(&cpu.registers, 0), u8::read(&cpu.registers, AH));
    let result = al.wrapping_add(ah.wrapping_mul(insn.imm as u8));
    u16::write(&mut cpu.registers, 0, u16::from(result));
    cpu.flags.set_result(result, false, false);
    Ok(())
}
/// NOP, prefetches, fences of a single processor's view, and hints.
pub fn nop(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    Ok(())
}
/// LFENCE, SFENCE, MFENCE: the host's order of memory is the guest's.
pub fn fence(_: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}
