//! The time-stamp counter, and who reads it. SDM vol. 2, *RDTSC*, *RDTSCP*, *RDPID*.

use x86::Cr4;

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

fn read_counter(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr4.contains(Cr4::TSD) && cpu.cpl() > 0 {
        return Err(cpu.gp0());
    }
    let tsc = cpu.tsc();
    cpu.set_gpr_sized(0, 4, tsc & 0xffff_ffff);
    cpu.set_gpr_sized(2, 4, tsc >> 32);
    Ok(())
}

/// RDTSC.
pub fn rdtsc(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    read_counter(cpu)
}

/// RDTSCP.
pub fn rdtscp(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    read_counter(cpu)?;
    cpu.set_gpr_sized(1, 4, cpu.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

/// RDPID.
pub fn rdpid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.msrs.tsc_aux & 0xffff_ffff;
    cpu.registers.set(insn.r1, value);
    Ok(())
}
