//! RFLAGS as a whole, the interrupt flag, and waiting. SDM vol. 2, *CLI*, *STI*, *PUSHF*, *POPF*, *HLT*, *CLAC*.

use x86::Flags;

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// Whether the program may change IF.
fn may_mask(cpu: &Cpu) -> bool {
    // Virtual-8086 mode, whose CPL is 3, needs no case of its own.
    !cpu.mode.is_protected() || cpu.cpl() <= cpu.system_flags.iopl()
}

/// CLI.
pub fn cli(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if may_mask(cpu) {
        cpu.system_flags.remove(Flags::IF);
    } else if cpu.has_virtual_interrupts() {
        cpu.system_flags.remove(Flags::VIF);
    } else {
        return Err(cpu.gp0());
    }
    Ok(())
}

/// STI: interrupts are held off for one more instruction where it is the one that allows them.
pub fn sti(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !may_mask(cpu) {
        if !cpu.has_virtual_interrupts() || cpu.system_flags.contains(Flags::VIP) {
            return Err(cpu.gp0());
        }
        cpu.system_flags.insert(Flags::VIF);
        return cpu.end_block(insn);
    }
    if !cpu.system_flags.contains(Flags::IF) {
        cpu.system_flags.insert(Flags::IF);
        cpu.shadow = true;
    }
    cpu.end_block(insn)
}

/// PUSHF, PUSHFD, PUSHFQ.
pub fn pushf(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.mode.is_v86() && cpu.system_flags.iopl() < 3 {
        if insn.size != 2 || !cpu.has_virtual_interrupts() {
            return Err(cpu.gp0());
        }
        return cpu.push_sized(2, cpu.virtual_flags());
    }
    let hidden = (Flags::RF | Flags::VM).bits();
    cpu.push_sized(insn.size, cpu.rflags() & !hidden)
}

/// POPF, POPFD, POPFQ.
pub fn popf(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.mode.is_v86() && cpu.system_flags.iopl() < 3 {
        if insn.size != 2 || !cpu.has_virtual_interrupts() {
            return Err(cpu.gp0());
        }
        let value = cpu.peek_sized(2, 0)?;
        cpu.set_virtual_flags(value)?;
        cpu.discard(2);
        return Ok(());
    }
    let value = cpu.peek_sized(insn.size, 0)?;
    cpu.discard(u64::from(insn.size));
    let before = cpu.system_flags;
    let writable = cpu.writable_flags(insn.size);
    cpu.set_rflags(value, writable);
    // What was masked may be waiting, and a single step runs by itself.
    let stops = Flags::IF | Flags::TF;
    if (cpu.system_flags - before).intersects(stops) { cpu.end_block(insn) } else { Ok(()) }
}

fn set_access(cpu: &mut Cpu, allowed: bool) -> Result<(), Stop> {
    if cpu.cpl() != 0 {
        return Err(cpu.ud());
    }
    cpu.system_flags.set(Flags::AC, allowed);
    // The view of memory changes, what is decoded does not.
    cpu.mmu.set_view(0, allowed);
    Ok(())
}

/// CLAC.
pub fn clac(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    set_access(cpu, false)
}

/// STAC.
pub fn stac(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    set_access(cpu, true)
}

/// HLT. The driver has checked the privilege.
pub fn hlt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.halted = true;
    cpu.end_block(insn)
}

/// PAUSE: whoever is waited for may need this host processor.
pub fn pause(_cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    std::hint::spin_loop();
    Ok(())
}
