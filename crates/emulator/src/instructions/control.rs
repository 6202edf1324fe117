//! Control registers, and the other instructions by which software runs the processor itself.
//! SDM vol. 3, *Control Registers*; SDM vol. 2, *MOV—Move to/from Control Registers*, *LMSW*, *CLTS*.

mod cache;
mod debug;
mod flags;
mod hypercall;
mod keys;
mod time;

pub use cache::{invd, invlpg, invpcid, wbinvd, xgetbv, xsetbv};
pub(crate) use debug::{DR6_ACCESS, DR7_GENERAL_DETECT};
pub use debug::{mov_from_dr, mov_to_dr};
pub use flags::{clac, cli, hlt, pause, popf, pushf, stac, sti};
pub use hypercall::vmcall;
pub use keys::{rdpkru, wrpkru};
pub use time::{rdpid, rdtsc, rdtscp};
use x86::descriptor::Attributes;
use x86::paging::Entry;
use x86::{Cr0, Cr3, Cr4, Efer, SegmentRegister};

use crate::cpu::Cpu;
use crate::cpuid::feature;
use crate::insn::{Insn, Stop};

/// MOV r32/r64, CRn. The driver has checked the privilege.
pub fn mov_from_cr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = match insn.r2 {
        0 => cpu.cr0.bits(),
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4.bits(),
        8 => u64::from(cpu.wires.interrupts.task_priority()),
        _ => return Err(cpu.ud()),
    };
    cpu.set_gpr_sized(insn.r1, control_size(cpu), value);
    Ok(())
}

/// MOV CRn, r32/r64. The driver has checked the privilege.
pub fn mov_to_cr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let value = cpu.gpr_sized(insn.r2, control_size(cpu));
    match insn.r1 {
        0 => cpu.write_cr0(value)?,
        2 => cpu.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        8 if value > 15 => return Err(cpu.gp0()),
        8 => cpu.wires.interrupts.set_task_priority(value as u8),
        _ => return Err(cpu.ud()),
    }
    cpu.end_block(insn)
}

/// Moves of control and debug registers have 8 bytes in 64-bit mode and 4 elsewhere, whatever the prefixes.
fn control_size(cpu: &Cpu) -> u8 {
    if cpu.mode.is_64() { 8 } else { 4 }
}

/// CLTS. The driver has checked the privilege.
pub fn clts(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.cr0.remove(Cr0::TS);
    cpu.update_mode();
    cpu.end_block(insn)
}

fn lmsw(cpu: &mut Cpu, insn: &Insn, word: u16) -> Result<(), Stop> {
    let writable = Cr0::PE | Cr0::MP | Cr0::EM | Cr0::TS;
    // PE can be set this way, but not cleared.
    let kept = cpu.cr0.bits() & (!writable.bits() | Cr0::PE.bits());
    cpu.write_cr0(kept | u64::from(word) & writable.bits())?;
    cpu.end_block(insn)
}

/// LMSW r16. The driver has checked the privilege.
pub fn lmsw_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    lmsw(cpu, insn, cpu.registers.get(insn.r1) as u16)
}

/// LMSW m16.
pub fn lmsw_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let word = cpu.load::<u16>(insn)?;
    lmsw(cpu, insn, word)
}

/// SMSW r16/r32/r64.
pub fn smsw_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_umip()?;
    cpu.set_gpr_sized(insn.r1, insn.size, cpu.cr0.bits());
    Ok(())
}

/// SMSW m16.
pub fn smsw_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_umip()?;
    cpu.store::<u16>(insn, cpu.cr0.bits() as u16)
}

impl Cpu {
    /// Writes CR0 with all that follows from it: paging and long mode switch on and off here.
    ///
    /// # Errors
    /// #GP(0) for what CR0 cannot hold.
    pub fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let old = self.cr0;
        let new = Cr0::from_bits_truncate(value) | Cr0::ET;
        let paging = new.contains(Cr0::PG);
        if value >> 32 != 0
            || paging && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
            || !paging && self.cr4.contains(Cr4::PCIDE)
            || !paging && self.mode.is_64()
        {
            return Err(self.gp0());
        }
        let mut efer = self.efer;
        if paging && !old.contains(Cr0::PG) {
            if efer.contains(Efer::LME) {
                let code = self.segment(SegmentRegister::Cs).attributes;
                if !self.cr4.contains(Cr4::PAE)
                    || code.contains(Attributes::L)
                    || self.tr.attributes.bits() & 8 == 0
                {
                    return Err(self.gp0());
                }
                efer.insert(Efer::LMA);
            }
        } else if !paging {
            efer.remove(Efer::LMA);
        }
        let loads_pointers = Cr0::PG | Cr0::CD | Cr0::NW;
        let pae = paging && !efer.contains(Efer::LMA) && self.cr4.contains(Cr4::PAE);
        if pae && old.symmetric_difference(new).intersects(loads_pointers) {
            self.load_directory_pointers(self.cr3)?;
        }
        self.cr0 = new;
        self.efer = efer;
        self.after_change(old.symmetric_difference(new).intersects(Cr0::PG | Cr0::WP | Cr0::PE | Cr0::AM));
        Ok(())
    }

    /// Writes CR3: another address space.
    ///
    /// # Errors
    /// #GP(0) for reserved bits, of CR3 or of the entries that PAE paging loads.
    pub fn write_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let pcids = self.cr4.contains(Cr4::PCIDE);
        let keep = pcids && value & Cr3::NO_FLUSH.bits() != 0;
        let value = if pcids { value & !Cr3::NO_FLUSH.bits() } else { value };
        let masks = Cr3::LAM_U48 | Cr3::LAM_U57;
        let masks = if self.wires.model.has(feature::LAM) { masks } else { Cr3::empty() };
        if self.is_long() && (value & !masks.bits()) >> self.wires.model.physical_bits() != 0 {
            return Err(self.gp0());
        }
        if self.paging_enabled() && !self.is_long() && self.cr4.contains(Cr4::PAE) {
            self.load_directory_pointers(value)?;
        }
        self.cr3 = value;
        self.switch_address_space(keep);
        Ok(())
    }

    /// Writes CR4.
    ///
    /// # Errors
    /// #GP(0) for bits of features that the model does not have, and for what the present mode forbids.
    pub fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let (old, new) = (self.cr4, Cr4::from_bits_retain(value));
        let long = self.is_long();
        let enables_pcids = new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE);
        if !self.wires.model.control_bits().contains(new)
            || long && (!new.contains(Cr4::PAE) || (old ^ new).contains(Cr4::LA57))
            || enables_pcids && (!long || self.cr3 & 0xfff != 0)
        {
            return Err(self.gp0());
        }
        let loads_pointers = Cr4::PAE | Cr4::PSE | Cr4::PGE | Cr4::SMEP;
        let changed = old.symmetric_difference(new);
        if self.paging_enabled() && !long && new.contains(Cr4::PAE) && changed.intersects(loads_pointers) {
            self.load_directory_pointers(self.cr3)?;
        }
        self.cr4 = new;
        self.update_breakpoints();
        let translates = Cr4::PCIDE | Cr4::SMAP | Cr4::LA57 | Cr4::PKE | Cr4::PKS | Cr4::LAM_SUP;
        self.after_change(changed.intersects(loads_pointers | translates));
        Ok(())
    }

    /// Makes the mode, and where asked the translations, follow the control registers.
    fn after_change(&mut self, paging: bool) {
        if paging {
            self.update_paging();
        } else {
            self.update_mode();
        }
    }

    /// Loads the four topmost entries of PAE paging, as loads of CR3 do and changes of how paging works.
    /// SDM vol. 3, *PAE Paging*.
    fn load_directory_pointers(&mut self, cr3: u64) -> Result<(), Stop> {
        let address_bits = (1 << self.wires.model.physical_bits()) - 1;
        let allowed = address_bits & !0xfff | (Entry::P | Entry::PWT | Entry::PCD).bits() | 0xe00;
        let pointers = self.read_directory_pointers(cr3);
        if pointers.iter().any(|&entry| entry & Entry::P.bits() != 0 && entry & !allowed != 0) {
            return Err(self.gp0());
        }
        self.mmu.paging.pointers = pointers;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
