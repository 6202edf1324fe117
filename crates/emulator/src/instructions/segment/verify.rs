//! Instructions that ask what a selector would give. SDM vol. 2, *ARPL*, *LAR*, *LSL*, *VERR/VERW*.

use x86::{Descriptor, Selector, SystemType};

use super::Found;
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::View;

/// The descriptor of a selector, where it lies in its table and the privileges allow looking at it.
fn visible(cpu: &mut Cpu, selector: Selector) -> Result<Option<Found>, Stop> {
    cpu.check_protected()?;
    let address = cpu.descriptor_address(selector, 8).filter(|_| !selector.is_null());
    let Some(address) = address else { return Ok(None) };
    let found = Found { descriptor: Descriptor(cpu.load_as(View::Supervisor, address)?), address };
    let hidden = !found.is_conforming() && cpu.cpl().max(selector.rpl()) > found.descriptor.dpl();
    Ok((!hidden).then_some(found))
}

fn verify(cpu: &mut Cpu, selector: u16, good: fn(&Found) -> bool) -> Result<(), Stop> {
    let found = visible(cpu, Selector(selector))?;
    cpu.flags.set_zf(found.is_some_and(|found| good(&found)));
    Ok(())
}

/// Whether it is a system descriptor of a kind that LAR and LSL show, of which LAR shows the gates too.
fn is_shown(cpu: &Cpu, found: &Found, gates: bool) -> bool {
    if found.descriptor.is_code_or_data() {
        return true;
    }
    let long = cpu.is_long();
    match found.descriptor.system_type() {
        Some(SystemType::Ldt | SystemType::TssAvailable | SystemType::TssBusy) => true,
        Some(SystemType::Tss16Available | SystemType::Tss16Busy) => !long,
        Some(SystemType::CallGate) => gates,
        Some(SystemType::CallGate16 | SystemType::TaskGate) => gates && !long,
        _ => false,
    }
}

fn lar(cpu: &mut Cpu, insn: &Insn, selector: u16) -> Result<(), Stop> {
    let found = visible(cpu, Selector(selector))?.filter(|found| is_shown(cpu, found, true));
    if let Some(found) = found {
        cpu.set_gpr_sized(insn.r1, insn.size, found.descriptor.0 >> 32 & 0x00ff_ff00);
    }
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

fn lsl(cpu: &mut Cpu, insn: &Insn, selector: u16) -> Result<(), Stop> {
    let found = visible(cpu, Selector(selector))?.filter(|found| is_shown(cpu, found, false));
    if let Some(found) = found {
        cpu.set_gpr_sized(insn.r1, insn.size, u64::from(found.descriptor.limit()));
    }
    cpu.flags.set_zf(found.is_some());
    Ok(())
}

/// VERR r16.
pub fn verr_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    verify(cpu, cpu.registers.get(insn.r1) as u16, Found::is_readable)
}

/// VERR m16.
pub fn verr_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    verify(cpu, selector, Found::is_readable)
}

/// VERW r16.
pub fn verw_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    verify(cpu, cpu.registers.get(insn.r1) as u16, Found::is_writable_data)
}

/// VERW m16.
pub fn verw_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    verify(cpu, selector, Found::is_writable_data)
}

/// LAR reg, reg.
pub fn lar_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    lar(cpu, insn, cpu.registers.get(insn.r2) as u16)
}

/// LAR reg, m16.
pub fn lar_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    lar(cpu, insn, selector)
}

/// LSL reg, reg.
pub fn lsl_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    lsl(cpu, insn, cpu.registers.get(insn.r2) as u16)
}

/// LSL reg, m16.
pub fn lsl_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let selector = cpu.load::<u16>(insn)?;
    lsl(cpu, insn, selector)
}

/// The selector with at least the other's RPL, and whether that changed it.
fn adjusted(selector: u16, other: u16) -> (u16, bool) {
    let raised = Selector(selector).rpl() < Selector(other).rpl();
    (if raised { selector & !3 | other & 3 } else { selector }, raised)
}

/// ARPL r16, r16.
pub fn arpl_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let (selector, raised) = adjusted(cpu.registers.get(insn.r1) as u16, cpu.registers.get(insn.r2) as u16);
    cpu.set_gpr_sized(insn.r1, 2, u64::from(selector));
    cpu.flags.set_zf(raised);
    Ok(())
}

/// ARPL m16, r16.
pub fn arpl_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    cpu.check_protected()?;
    let other = cpu.registers.get(insn.r2) as u16;
    // The selector is read first, and only written where it changes.
    let (selector, raised) = adjusted(cpu.load::<u16>(insn)?, other);
    if raised {
        cpu.store(insn, selector)?;
    }
    cpu.flags.set_zf(raised);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_keeps_the_weaker_of_two_privileges() {
        assert_eq!(adjusted(0x10, 0x1b), (0x13, true));
        assert_eq!(adjusted(0x13, 0x18), (0x13, false));
    }

    #[test]
    fn execute_only_code_cannot_be_read() {
        let execute_only = Found { descriptor: Descriptor(0x00cf_9900_0000_ffff), address: 0 };
        assert!(!execute_only.is_readable());
        assert!(execute_only.is_code());
    }
}
