//! SWAPGS and the instructions on the bases of FS and GS. SDM vol. 2.

use x86::{Cr4, SegmentRegister};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

impl Cpu {
    /// Sets a segment's base alone.
    pub(crate) fn set_segment_base(&mut self, register: SegmentRegister, base: u64) {
        self.segments[register as usize].base = base;
        self.bases[register as usize] = base;
    }
}

/// SWAPGS. The driver has checked the privilege.
pub fn swapgs(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if !cpu.mode.is_64() {
        return Err(cpu.ud());
    }
    let base = cpu.segment(SegmentRegister::Gs).base;
    let kernel = std::mem::replace(&mut cpu.msrs.kernel_gs_base, base);
    cpu.set_segment_base(SegmentRegister::Gs, kernel);
    Ok(())
}

fn check(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.mode.is_64() && cpu.cr4.contains(Cr4::FSGSBASE) { Ok(()) } else { Err(cpu.ud()) }
}

fn read(cpu: &mut Cpu, insn: &Insn, register: SegmentRegister) -> Result<(), Stop> {
    check(cpu)?;
    let base = cpu.segment(register).base;
    cpu.set_gpr_sized(insn.r1, insn.size, base);
    Ok(())
}

fn write(cpu: &mut Cpu, insn: &Insn, register: SegmentRegister) -> Result<(), Stop> {
    check(cpu)?;
    let base = cpu.gpr_sized(insn.r1, insn.size);
    // By the width that CR4.LA57 chooses, not by that of the registers.
    if !cpu.mmu.paging.is_canonical(base) {
        return Err(cpu.gp0());
    }
    cpu.set_segment_base(register, base);
    Ok(())
}

/// RDFSBASE.
pub fn rdfsbase(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    read(cpu, insn, SegmentRegister::Fs)
}

/// RDGSBASE.
pub fn rdgsbase(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    read(cpu, insn, SegmentRegister::Gs)
}

/// WRFSBASE.
pub fn wrfsbase(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    write(cpu, insn, SegmentRegister::Fs)
}

/// WRGSBASE.
pub fn wrgsbase(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    write(cpu, insn, SegmentRegister::Gs)
}
