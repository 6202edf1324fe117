//! The registers of descriptor tables and of the task. SDM vol. 2, *LGDT/LIDT*, *LLDT*, *LTR*, *SGDT*.

use x86::{Cr4, Descriptor, Segment, Selector, SystemType, TableRegister, Vector};

use super::{Found, null_segment};
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::View;

/// Bit 1 of a TSS descriptor's type.
const BUSY: u8 = 2;

impl Cpu {
    /// #GP(0) for what user-mode instruction prevention takes from programs.
    pub(crate) fn check_umip(&mut self) -> Result<(), Stop> {
        if self.cr4.contains(Cr4::UMIP) && self.cpl() > 0 { Err(self.gp0()) } else { Ok(()) }
    }

    /// #UD for what real and virtual-8086 mode do not have.
    pub(crate) fn check_protected(&mut self) -> Result<(), Stop> {
        if self.mode.is_real_or_v86() { Err(self.ud()) } else { Ok(()) }
    }

    /// A linear address some bytes on.
    pub(crate) fn linear_after(&self, linear: u64, bytes: u64) -> u64 {
        let at = linear.wrapping_add(bytes);
        if self.is_long() { at } else { at & 0xffff_ffff }
    }
}

fn load_table(cpu: &mut Cpu, insn: &Insn) -> Result<TableRegister, Stop> {
    let long = cpu.mode.is_64();
    let linear = cpu.linear::<false>(insn, if long { 10 } else { 6 })?;
    let limit = cpu.load_linear::<u16>(linear)?;
    let at = cpu.linear_after(linear, 2);
    let base = if long { cpu.load_linear::<u64>(at)? } else { u64::from(cpu.load_linear::<u32>(at)?) };
    if long && !cpu.is_canonical_for_registers(base) {
        return Err(cpu.gp0());
    }
    let base = if !long && insn.size == 2 { base & 0xff_ffff } else { base };
    Ok(TableRegister { base, limit })
}

fn store_table(cpu: &mut Cpu, insn: &Insn, table: TableRegister) -> Result<(), Stop> {
    cpu.check_umip()?;
    let len = if cpu.mode.is_64() { 10 } else { 6 };
    let linear = cpu.linear::<true>(insn, len)?;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    cpu.write_bytes(cpu.mmu.view, linear, &bytes[..len as usize])
}

/// LGDT. The driver has checked the privilege.
pub fn lgdt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.gdtr = load_table(cpu, insn)?;
    Ok(())
}

/// LIDT. The driver has checked the privilege.
pub fn lidt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.idtr = load_table(cpu, insn)?;
    Ok(())
}

/// SGDT.
pub fn sgdt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_table(cpu, insn, cpu.gdtr)
}

/// SIDT.
pub fn sidt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_table(cpu, insn, cpu.idtr)
}

/// Reads the descriptor of an LDT or TSS, 16 bytes in long mode.
fn system_segment(
    cpu: &mut Cpu,
    selector: Selector,
    wanted: &[SystemType],
) -> Result<(Found, Segment), Stop> {
    let long = cpu.is_long();
    let address = match cpu.descriptor_address(selector, if long { 16 } else { 8 }) {
        Some(address) if !selector.is_local() => address,
        _ => return Err(cpu.selector_fault(Vector::GeneralProtection, selector)),
    };
    let descriptor = Descriptor(cpu.load_as(View::Supervisor, address)?);
    let high = if long { cpu.load_as::<u64>(View::Supervisor, address.wrapping_add(8))? } else { 0 };
    let kind = descriptor.system_type().filter(|kind| !descriptor.is_code_or_data() && wanted.contains(kind));
    if kind.is_none() || high >> 40 & 0x1f != 0 {
        return Err(cpu.selector_fault(Vector::GeneralProtection, selector));
    }
    let found = Found { descriptor, address };
    if !found.is_present() {
        return Err(cpu.selector_fault(Vector::SegmentNotPresent, selector));
    }
    let segment = descriptor.segment(selector);
    let base = segment.base | high << 32;
    if !cpu.is_canonical_for_registers(base) {
        return Err(cpu.selector_fault(Vector::GeneralProtection, selector));
    }
    Ok((found, Segment { base, ..segment }))
}

fn lldt(cpu: &mut Cpu, selector: u16) -> Result<(), Stop> {
    let selector = Selector(selector);
    cpu.ldtr = if selector.is_null() {
        null_segment(selector, 0)
    } else {
        system_segment(cpu, selector, &[SystemType::Ldt])?.1
    };
    Ok(())
}

/// LLDT r16. The driver has checked the privilege.
pub fn lldt_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    lldt(cpu, cpu.registers.get(insn.r1) as u16)
}

/// LLDT m16.
pub fn lldt_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    lldt(cpu, selector)
}

fn ltr(cpu: &mut Cpu, selector: u16) -> Result<(), Stop> {
    let selector = Selector(selector);
    if selector.is_null() {
        return Err(cpu.gp0());
    }
    let both = [SystemType::TssAvailable, SystemType::Tss16Available];
    let wanted = if cpu.is_long() { &both[..1] } else { &both };
    let (found, segment) = system_segment(cpu, selector, wanted)?;
    cpu.set_descriptor_type(&found, BUSY)?;
    let attributes = segment.attributes | x86::descriptor::Attributes::from_bits_retain(u32::from(BUSY));
    cpu.tr = Segment { attributes, ..segment };
    Ok(())
}

/// LTR r16. The driver has checked the privilege.
pub fn ltr_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    ltr(cpu, cpu.registers.get(insn.r1) as u16)
}

/// LTR m16.
pub fn ltr_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    ltr(cpu, selector)
}

fn store_to_register(cpu: &mut Cpu, insn: &Insn, selector: Selector) -> Result<(), Stop> {
    cpu.check_protected()?;
    cpu.check_umip()?;
    cpu.set_gpr_sized(insn.r1, insn.size, u64::from(selector.0));
    Ok(())
}

fn store_to_memory(cpu: &mut Cpu, insn: &Insn, selector: Selector) -> Result<(), Stop> {
    cpu.check_protected()?;
    cpu.check_umip()?;
    cpu.store::<u16>(insn, selector.0)
}

/// SLDT r16/r32/r64.
pub fn sldt_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_to_register(cpu, insn, cpu.ldtr.selector)
}

/// SLDT m16.
pub fn sldt_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_to_memory(cpu, insn, cpu.ldtr.selector)
}

/// STR r16/r32/r64.
pub fn str_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_to_register(cpu, insn, cpu.tr.selector)
}

/// STR m16.
pub fn str_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    store_to_memory(cpu, insn, cpu.tr.selector)
}
