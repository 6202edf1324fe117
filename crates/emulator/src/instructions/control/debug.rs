//! Debug registers. SDM vol. 3, *Debug Registers*; SDM vol. 2, *MOV—Move to/from Debug Registers*.

use x86::{Cr4, Exception};

use super::control_size;
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// DR7.GD: an access to a debug register raises #DB.
pub(crate) const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// DR6.BD: it was for DR7.GD.
pub(crate) const DR6_ACCESS: u64 = 1 << 13;
/// DR6 with nothing reported: the bits that always read as ones.
const DR6_RESET: u64 = 0xffff_0ff0;
/// What may be set in DR6: B0 to B3, BD, BS, BT.
const DR6_WRITABLE: u64 = 0xe00f;
/// What always reads as one in DR7, and as zero.
const DR7_ONES: u64 = 0x400;
const DR7_ZEROS: u64 = 0xd800;

/// Which entry of [`Cpu::debug`] a debug register is: DR4 and DR5 are DR6 and DR7 unless CR4.DE takes them away.
fn slot(cpu: &mut Cpu, number: u8) -> Result<usize, Stop> {
    match number {
        0..=3 => Ok(usize::from(number)),
        4 | 5 if cpu.cr4.contains(Cr4::DE) => Err(cpu.ud()),
        4 | 6 => Ok(4),
        5 | 7 => Ok(5),
        _ => Err(cpu.ud()),
    }
}

fn check(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.debug[5] & DR7_GENERAL_DETECT != 0 {
        return Err(cpu.raise(Exception::debug(DR6_ACCESS)));
    }
    Ok(())
}

/// MOV r32/r64, DRn. The driver has checked the privilege.
pub fn mov_from_dr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let slot = slot(cpu, insn.r2)?;
    check(cpu)?;
    cpu.set_gpr_sized(insn.r1, control_size(cpu), cpu.debug[slot]);
    Ok(())
}

/// MOV DRn, r32/r64. The driver has checked the privilege.
pub fn mov_to_dr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let slot = slot(cpu, insn.r1)?;
    check(cpu)?;
    let value = cpu.gpr_sized(insn.r2, control_size(cpu));
    if slot >= 4 && value >> 32 != 0 {
        return Err(cpu.gp0());
    }
    cpu.debug[slot] = match slot {
        4 => value & DR6_WRITABLE | DR6_RESET,
        5 => value & !DR7_ZEROS | DR7_ONES,
        _ => value,
    };
    cpu.update_breakpoints();
    cpu.end_block(insn)
}
