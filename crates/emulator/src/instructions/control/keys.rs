//! PKRU. SDM vol. 2, *RDPKRU*, *WRPKRU*.

use x86::Cr4;

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// Both are undefined without CR4.PKE, and want zero in ECX.
fn check(cpu: &mut Cpu) -> Result<(), Stop> {
    if !cpu.cr4.contains(Cr4::PKE) {
        return Err(cpu.ud());
    }
    if cpu.gpr_sized(1, 4) != 0 {
        return Err(cpu.gp0());
    }
    Ok(())
}

/// RDPKRU.
pub fn rdpkru(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    cpu.set_gpr_sized(0, 4, u64::from(cpu.vector.pkru));
    cpu.set_gpr_sized(2, 4, 0);
    Ok(())
}

/// WRPKRU.
pub fn wrpkru(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    check(cpu)?;
    if cpu.gpr_sized(2, 4) != 0 {
        return Err(cpu.gp0());
    }
    cpu.write_pkru(cpu.gpr_sized(0, 4) as u32);
    Ok(())
}
