//! Fast system calls. SDM vol. 2, *SYSCALL*, *SYSRET*, *SYSENTER*, *SYSEXIT*.

use x86::descriptor::Attributes;
use x86::{Cr0, Efer, Flags, Segment, SegmentRegister, Selector};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

const RCX: u8 = 1;
const RDX: u8 = 2;
const RSP: u8 = 4;
const R11: u8 = 11;

/// The attributes of the flat code segment that SYSCALL and its kin load.
pub(crate) fn code_attributes(dpl: u8, long: bool) -> Attributes {
    let size = if long { Attributes::L } else { Attributes::DB };
    Attributes::from_bits_retain(0x8b | 0x10 | u32::from(dpl) << 5) | size | Attributes::G
}

/// The same of the stack segment.
pub(crate) fn stack_attributes(dpl: u8) -> Attributes {
    Attributes::from_bits_retain(0x83 | 0x10 | u32::from(dpl) << 5) | Attributes::DB | Attributes::G
}

/// A flat code segment as these instructions load it, without looking at a descriptor.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    flat(selector, code_attributes(dpl, long))
}

/// A flat stack segment.
fn flat_stack(selector: u16, dpl: u8) -> Segment {
    flat(selector, stack_attributes(dpl))
}

fn flat(selector: u16, attributes: Attributes) -> Segment {
    Segment { selector: Selector(selector), base: 0, limit: u32::MAX, attributes }
}

fn load(cpu: &mut Cpu, code: Segment, stack: Segment) {
    cpu.set_segment(SegmentRegister::Cs, code);
    cpu.set_segment(SegmentRegister::Ss, stack);
}

/// SYSCALL: on Intel's processors in 64-bit mode only.
pub fn syscall(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !cpu.mode.is_64() || !cpu.efer.contains(Efer::SCE) {
        return Err(cpu.ud());
    }
    let (next, flags) = (cpu.next_rip(insn), cpu.rflags() & !Flags::RF.bits());
    let selector = (cpu.msrs.star >> 32) as u16 & 0xfffc;
    cpu.registers.set(RCX, next);
    cpu.registers.set(R11, flags);
    let masked = flags & !cpu.msrs.fmask;
    cpu.set_rflags(masked, Flags::all() - Flags::VM);
    load(cpu, flat_code(selector, 0, true), flat_stack(selector.wrapping_add(8), 0));
    cpu.rip = cpu.msrs.lstar;
    Err(Stop::EndBlock)
}

/// SYSRET to 64-bit mode (with REX.W) or compatibility mode.
pub fn sysret(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !cpu.mode.is_64() || !cpu.efer.contains(Efer::SCE) {
        return Err(cpu.ud());
    }
    let (long, target) = (insn.size == 8, cpu.registers.get(RCX));
    if cpu.cpl() != 0 || long && !cpu.mmu.paging.is_canonical(target) {
        return Err(cpu.gp0());
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let code = if long { base.wrapping_add(16) } else { base } | 3;
    let flags = cpu.registers.get(R11);
    cpu.set_rflags(flags, Flags::all() - Flags::RF - Flags::VM);
    load(cpu, flat_code(code, 3, long), flat_stack(base.wrapping_add(8) | 3, 3));
    cpu.rip = if long { target } else { target & 0xffff_ffff };
    Err(Stop::EndBlock)
}

/// SYSENTER.
pub fn sysenter(cpu: &mut Cpu, _: &Insn) -> Result<(), Stop> {
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if !cpu.cr0.contains(Cr0::PE) || selector == 0 {
        return Err(cpu.gp0());
    }
    let long = cpu.is_long();
    cpu.set_rflags(0, Flags::VM | Flags::IF);
    load(cpu, flat_code(selector, 0, long), flat_stack(selector.wrapping_add(8), 0));
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.registers.set(RSP, cpu.msrs.sysenter_esp & mask);
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    Err(Stop::EndBlock)
}

/// SYSEXIT.
pub fn sysexit(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    let long = insn.size == 8;
    let (target, stack) = (cpu.registers.get(RDX), cpu.registers.get(RCX));
    let canonical = cpu.mmu.paging.is_canonical(target) && cpu.mmu.paging.is_canonical(stack);
    if !cpu.cr0.contains(Cr0::PE) || cpu.cpl() != 0 || selector == 0 || long && !canonical {
        return Err(cpu.gp0());
    }
    let first = selector.wrapping_add(if long { 32 } else { 16 }) | 3;
    load(cpu, flat_code(first, 3, long), flat_stack(first.wrapping_add(8), 3));
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.registers.set(RSP, stack & mask);
    cpu.rip = target & mask;
    Err(Stop::EndBlock)
}

#[cfg(test)]
mod tests {
    use x86::Exception;

    use super::*;
    use crate::testing::*;

    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const SYSRETD: [u8; 2] = [0x0f, 0x07];
    const SYSRETQ: [u8; 3] = [0x48, 0x0f, 0x07];
    const SYSENTER: [u8; 2] = [0x0f, 0x34];

    /// A 64-bit processor whose kernel's entry is at [`handler`]`(0)`.
    fn prepared() -> Cpu {
        let mut cpu = long();
        cpu.msrs.star = u64::from(USER_CODE32 | 3) << 48 | u64::from(KERNEL_CODE64) << 32;
        cpu.msrs.lstar = handler(0);
        cpu.msrs.fmask = (Flags::IF | Flags::DF).bits();
        cpu
    }

    #[test]
    fn a_system_call_goes_to_the_kernel_and_comes_back() {
        let mut cpu = prepared();
        to_user(&mut cpu);
        cpu.system_flags.insert(Flags::IF | Flags::DF);
        let flags = cpu.rflags();
        run(&mut cpu, &SYSCALL).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.rflags()), (handler(0), 0, 2));
        assert_eq!((cpu.registers.get(RCX), cpu.registers.get(R11)), (CODE + 2, flags));
        assert_eq!(cpu.registers.get(RSP), STACK, "the stack is the kernel's business");
        run(&mut cpu, &SYSRETQ).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.rflags()), (CODE + 2, 3, flags));
        let selectors = [SegmentRegister::Cs, SegmentRegister::Ss].map(|r| cpu.segment(r).selector.0);
        assert_eq!(selectors, [USER_CODE64, USER_DATA]);
    }

    #[test]
    fn sysret_without_rex_w_returns_to_compatibility_mode() {
        let mut cpu = prepared();
        cpu.registers.set(RCX, 0xffff_ffff_0000_1000);
        run(&mut cpu, &SYSRETD).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.mode.code_size(), cpu.is_long()), (0x1000, 3, 32, true));
        assert_eq!(cpu.segment(SegmentRegister::Cs).selector.0, USER_CODE32);
    }

    #[test]
    fn sysret_refuses_what_it_cannot_return_to() {
        let mut cpu = prepared();
        cpu.registers.set(RCX, 0x8000_0000_0000);
        assert_eq!(run(&mut cpu, &SYSRETQ), Err(Exception::gp(0)));
        to_user(&mut cpu);
        assert_eq!(run(&mut cpu, &SYSRETQ), Err(Exception::gp(0)));
        cpu.efer.remove(Efer::SCE);
        assert_eq!(run(&mut cpu, &SYSRETQ), Err(Exception::ud()));
        assert_eq!(run(&mut cpu, &SYSCALL), Err(Exception::ud()));
    }

    #[test]
    fn sysenter_and_sysexit_serve_32_bit_programs() {
        let mut cpu = prepared();
        cpu.msrs.sysenter_cs = u64::from(KERNEL_CODE64);
        cpu.msrs.sysenter_eip = handler(1);
        cpu.msrs.sysenter_esp = KERNEL_STACK;
        to_user(&mut cpu);
        run(&mut cpu, &SYSENTER).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(RSP)), (handler(1), 0, KERNEL_STACK));
        assert!(cpu.mode.is_64());
        cpu.registers.set(RDX, 0x1000);
        cpu.registers.set(RCX, 0x2000);
        run(&mut cpu, &[0x0f, 0x35]).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(RSP)), (0x1000, 3, 0x2000));
        assert_eq!(cpu.mode.code_size(), 32);
        cpu.msrs.sysenter_cs = 0;
        assert_eq!(run(&mut cpu, &SYSENTER), Err(Exception::gp(0)));
    }
}
