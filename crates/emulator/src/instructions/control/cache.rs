//! Caches of translations and of memory, and XCR0. SDM vol. 2, *INVLPG*, *INVPCID*, *WBINVD*, *XSETBV*.

use x86::{Cr4, Xcr0};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// INVLPG. The driver has checked the privilege.
pub fn invlpg(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = cpu.effective(insn).wrapping_add(cpu.bases[usize::from(insn.segment & 7)]);
    let linear = if cpu.mode.is_64() { linear } else { linear & 0xffff_ffff };
    if cpu.mmu.paging.is_canonical(linear) {
        cpu.mmu.tlb.invalidate_page(linear);
    }
    cpu.end_block(insn)
}

/// INVPCID. The driver has checked the privilege.
pub fn invpcid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = cpu.linear::<false>(insn, 16)?;
    let descriptor = cpu.load_linear::<u64>(linear)?;
    let after = cpu.linear_after(linear, 8);
    let address = cpu.load_linear::<u64>(after)?;
    let kind = cpu.gpr_sized(insn.r1, if cpu.mode.is_64() { 8 } else { 4 });
    let pcid = (descriptor & 0xfff) as u16;
    let pcids = cpu.cr4.contains(Cr4::PCIDE);
    let names_space = kind < 2;
    if kind > 3 || descriptor > 0xfff || names_space && pcid != 0 && !pcids {
        return Err(cpu.gp0());
    }
    match kind {
        0 if !cpu.is_canonical_for_registers(address) => return Err(cpu.gp0()),
        0 if pcid == current_pcid(cpu) => cpu.mmu.tlb.invalidate_page(address),
        0 | 1 => cpu.mmu.tlb.flush_pcid(pcid),
        _ => cpu.mmu.tlb.flush_all(),
    }
    cpu.end_block(insn)
}

fn current_pcid(cpu: &Cpu) -> u16 {
    if cpu.cr4.contains(Cr4::PCIDE) { (cpu.cr3 & 0xfff) as u16 } else { 0 }
}

/// INVD: there is no cache that memory could differ from. The driver has checked the privilege.
pub fn invd(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.end_block(insn)
}

/// WBINVD and WBNOINVD, likewise. The driver has checked the privilege.
pub fn wbinvd(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.end_block(insn)
}

impl Cpu {
    /// Writes XCR0.
    ///
    /// # Errors
    /// #GP(0) for states that the model does not have and for combinations that no processor has.
    pub fn write_xcr0(&mut self, value: u64) -> Result<(), Stop> {
        let avx512 = Xcr0::OPMASK | Xcr0::ZMM_HI256 | Xcr0::HI16_ZMM;
        let new = Xcr0::from_bits_retain(value);
        if !self.wires.model.xsave_states().contains(new)
            || !new.contains(Xcr0::X87)
            || new.contains(Xcr0::AVX) && !new.contains(Xcr0::SSE)
            || new.intersects(avx512) && !new.contains(avx512 | Xcr0::AVX)
        {
            return Err(self.gp0());
        }
        self.xcr0 = value;
        self.update_mode();
        Ok(())
    }
}

/// XSETBV. The driver has checked the privilege.
pub fn xsetbv(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    let value = cpu.gpr_sized(2, 4) << 32 | cpu.gpr_sized(0, 4);
    if cpu.gpr_sized(1, 4) != 0 {
        return Err(cpu.gp0());
    }
    cpu.write_xcr0(value)?;
    cpu.end_block(insn)
}

/// XGETBV: XCR0, or which of its states are in use.
pub fn xgetbv(cpu: &mut Cpu, _insn: &Insn) -> Result<(), Stop> {
    if !cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    let value = match cpu.gpr_sized(1, 4) {
        0 => cpu.xcr0,
        1 if cpu.wires.model.has(crate::cpuid::feature::XGETBV1) => cpu.xcr0 & cpu.vector.in_use().bits(),
        _ => return Err(cpu.gp0()),
    };
    cpu.set_gpr_sized(0, 4, value & 0xffff_ffff);
    cpu.set_gpr_sized(2, 4, value >> 32);
    Ok(())
}
