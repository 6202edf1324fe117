//! Segment registers: the checks on loading them, and the instructions that move them.
//! SDM vol. 3, *Protection*; SDM vol. 2, *MOV*, *POP*, *LDS*.

mod bases;
mod stack;
mod tables;
mod verify;

pub use bases::{rdfsbase, rdgsbase, swapgs, wrfsbase, wrgsbase};
pub use tables::{
    lgdt, lidt, lldt_memory, lldt_register, ltr_memory, ltr_register, sgdt, sidt, sldt_memory, sldt_register,
    str_memory, str_register,
};
pub use verify::{
    arpl_memory, arpl_register, lar_memory, lar_register, lsl_memory, lsl_register, verr_memory,
    verr_register, verw_memory, verw_register,
};

pub(crate) use stack::Stack;
use x86::descriptor::Attributes;
use x86::{Descriptor, Exception, Segment, SegmentRegister, Selector, Vector};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::{Access, Target, View};
use crate::mode::Mode;
use crate::width::Width;

/// Segment registers by their number in an instruction.
pub(crate) const REGISTERS: [SegmentRegister; 6] = [
    SegmentRegister::Es,
    SegmentRegister::Cs,
    SegmentRegister::Ss,
    SegmentRegister::Ds,
    SegmentRegister::Fs,
    SegmentRegister::Gs,
];

/// A descriptor and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) descriptor: Descriptor,
    /// Linear address of its first byte.
    pub(crate) address: u64,
}

impl Found {
    pub(crate) fn attributes(&self) -> Attributes {
        self.descriptor.attributes()
    }

    pub(crate) fn is_code(&self) -> bool {
        self.attributes().contains(Attributes::S | Attributes::CODE)
    }

    pub(crate) fn is_conforming(&self) -> bool {
        self.attributes().contains(Attributes::S | Attributes::CODE | Attributes::EXPAND_DOWN)
    }

    pub(crate) fn is_writable_data(&self) -> bool {
        let kind = Attributes::S | Attributes::CODE | Attributes::WRITABLE;
        self.attributes() & kind == Attributes::S | Attributes::WRITABLE
    }

    /// Data, or code that may be read.
    pub(crate) fn is_readable(&self) -> bool {
        let kind = Attributes::CODE | Attributes::WRITABLE;
        self.attributes().contains(Attributes::S) && self.attributes() & kind != Attributes::CODE
    }

    pub(crate) fn is_present(&self) -> bool {
        self.attributes().contains(Attributes::P)
    }

    /// What the segment register holds after a load, with the accessed flag.
    pub(crate) fn segment(&self, selector: Selector) -> Segment {
        let segment = self.descriptor.segment(selector);
        Segment { attributes: segment.attributes | Attributes::ACCESSED, ..segment }
    }
}

/// A segment register after the load of a null selector.
pub(crate) fn null_segment(selector: Selector, dpl: u8) -> Segment {
    let attributes = Attributes::UNUSABLE | Attributes::from_bits_retain(u32::from(dpl) << 5);
    Segment { selector, base: 0, limit: 0, attributes }
}

impl Cpu {
    /// An exception whose error code is a selector.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: Vector, selector: Selector) -> Stop {
        self.raise(Exception::with_code(vector, selector.error_code()))
    }

    /// Linear address of a selector's descriptor of `size` bytes, where that lies in its table.
    pub(crate) fn descriptor_address(&self, selector: Selector, size: u32) -> Option<u64> {
        let (base, limit) = if selector.is_local() {
            if self.ldtr.attributes.contains(Attributes::UNUSABLE) {
                return None;
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        };
        let address = base.wrapping_add(u64::from(selector.offset()));
        let in_table = selector.offset() + size - 1 <= limit;
        in_table.then_some(if self.is_long() { address } else { address & 0xffff_ffff })
    }

    /// Reads the descriptor of a selector that is not null.
    ///
    /// # Errors
    /// `vector` with the selector where it lies outside its table; page faults.
    pub(crate) fn find_descriptor(&mut self, selector: Selector, vector: Vector) -> Result<Found, Stop> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Err(self.selector_fault(vector, selector));
        };
        Ok(Found { descriptor: Descriptor(self.load_as(View::Supervisor, address)?), address })
    }

    /// Sets bits of a descriptor's type byte in memory, atomically, where they are not set.
    pub(crate) fn set_descriptor_type(&mut self, found: &Found, bits: u8) -> Result<(), Stop> {
        self.change_descriptor_type(found, bits, 0)
    }

    /// Sets and clears bits of a descriptor's type byte in memory, atomically.
    pub(crate) fn change_descriptor_type(&mut self, found: &Found, set: u8, clear: u8) -> Result<(), Stop> {
        let old = (found.descriptor.0 >> 40) as u8;
        if (old | set) & !clear == old {
            return Ok(());
        }
        // Elsewhere than in RAM the flag is lost, as any store is.
        if let Target::Ram(offset) =
            self.target(View::Supervisor, found.address.wrapping_add(5), Access::Write)?
        {
            let mut held = old;
            loop {
                let now = self.memory.compare_exchange(offset, held, (held | set) & !clear);
                if now == held {
                    break;
                }
                held = now;
            }
        }
        Ok(())
    }

    /// What a data-segment or stack-segment register will hold after a load of `selector`; changes nothing but the
    /// accessed flag of the descriptor.
    ///
    /// # Errors
    /// The fault that the load raises.
    pub(crate) fn checked_segment(
        &mut self,
        register: SegmentRegister,
        selector: Selector,
    ) -> Result<Segment, Stop> {
        if self.mode.is_real_or_v86() {
            return Ok(self.real_segment(register, selector.0));
        }
        if register == SegmentRegister::Ss {
            return self.checked_stack(selector, self.cpl(), self.mode.is_64());
        }
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        let found = self.find_descriptor(selector, Vector::GeneralProtection)?;
        let privilege = selector.rpl().max(self.cpl());
        if !found.is_readable() || !found.is_conforming() && privilege > found.descriptor.dpl() {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        self.set_descriptor_type(&found, 1)?;
        Ok(found.segment(selector))
    }

    /// SS for privilege level `cpl`. `null_allowed`: code at that level is 64-bit, where a null SS is good below 3.
    ///
    /// # Errors
    /// #GP or #SS.
    pub(crate) fn checked_stack(
        &mut self,
        selector: Selector,
        cpl: u8,
        null_allowed: bool,
    ) -> Result<Segment, Stop> {
        if selector.is_null() {
            if null_allowed && cpl < 3 && selector.rpl() == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(self.gp0());
        }
        let found = self.find_descriptor(selector, Vector::GeneralProtection)?;
        if selector.rpl() != cpl || found.descriptor.dpl() != cpl || !found.is_writable_data() {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::StackFault, selector));
        }
        self.set_descriptor_type(&found, 1)?;
        Ok(found.segment(selector))
    }

    /// A segment register after a load in real or virtual-8086 mode. Real mode keeps the limit that protected mode
    /// has left.
    pub(crate) fn real_segment(&self, register: SegmentRegister, selector: u16) -> Segment {
        let fresh = Segment::real_mode(selector, register == SegmentRegister::Cs);
        if self.mode.is_v86() {
            return Segment { attributes: Attributes::from_bits_retain(0xf3), ..fresh };
        }
        let old = self.segment(register);
        if old.attributes.contains(Attributes::UNUSABLE) {
            return fresh;
        }
        let kept = old.attributes & (Attributes::DB | Attributes::G);
        Segment { limit: old.limit, attributes: fresh.attributes | kept, ..fresh }
    }

    /// A register of `size` bytes, zero-extended.
    pub(crate) fn gpr_sized(&self, number: u8, size: u8) -> u64 {
        let value = self.registers.get(number);
        match size {
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Writes a register as an instruction with that operand size does.
    pub(crate) fn set_gpr_sized(&mut self, number: u8, size: u8, value: u64) {
        match size {
            2 => u16::write(&mut self.registers, number, value as u16),
            4 => u32::write(&mut self.registers, number, value as u32),
            _ => self.registers.set(number, value),
        }
    }

    /// Loads `size` bytes at a linear address with the present rights.
    pub(crate) fn load_sized(&mut self, linear: u64, size: u8) -> Result<u64, Stop> {
        Ok(match size {
            2 => u64::from(self.load_linear::<u16>(linear)?),
            4 => u64::from(self.load_linear::<u32>(linear)?),
            _ => self.load_linear::<u64>(linear)?,
        })
    }
}

/// The segment register of an instruction's operand.
fn register(number: u8) -> SegmentRegister {
    REGISTERS[usize::from(number).min(5)]
}

fn load_register(cpu: &mut Cpu, insn: &Insn, selector: u16) -> Result<(), Stop> {
    let register = register(insn.r1);
    if register == SegmentRegister::Cs {
        return Err(cpu.ud());
    }
    let segment = cpu.checked_segment(register, Selector(selector))?;
    finish_load(cpu, insn, register, segment)
}

/// A load of SS holds interrupts off for one instruction, so that SS and RSP change together.
fn finish_load(cpu: &mut Cpu, insn: &Insn, register: SegmentRegister, segment: Segment) -> Result<(), Stop> {
    let mode = cpu.mode;
    cpu.set_segment(register, segment);
    if register == SegmentRegister::Ss {
        (cpu.shadow, cpu.stack_shadow) = (true, true);
    }
    follow_mode(cpu, insn, register, mode)
}

/// After a load, before which the mode was `mode`. What follows may run on another stack, or is looked up by segments that
/// are not what they were.
fn follow_mode(cpu: &mut Cpu, insn: &Insn, register: SegmentRegister, mode: Mode) -> Result<(), Stop> {
    if register == SegmentRegister::Ss || cpu.mode != mode { cpu.end_block(insn) } else { Ok(()) }
}

/// MOV Sreg, r16.
pub fn mov_to_segment_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_register(cpu, insn, cpu.registers.get(insn.r2) as u16)
}

/// MOV Sreg, m16.
pub fn mov_to_segment_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.load::<u16>(insn)?;
    load_register(cpu, insn, selector)
}

/// MOV r16/r32/r64, Sreg.
pub fn mov_from_segment_register(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.segment(register(insn.r2)).selector.0;
    cpu.set_gpr_sized(insn.r1, insn.size, u64::from(selector));
    Ok(())
}

/// MOV m16, Sreg.
pub fn mov_from_segment_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = cpu.segment(register(insn.r2)).selector.0;
    cpu.store::<u16>(insn, selector)
}

/// PUSH Sreg. With 32-bit operands only the low word is written.
pub fn push_segment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let selector = u64::from(cpu.segment(register(insn.r1)).selector.0);
    let mut stack = Stack::current(cpu);
    if insn.size == 4 {
        stack.skip(2u64.wrapping_neg());
        stack.push(cpu, 2, selector)?;
    } else {
        stack.push(cpu, insn.size, selector)?;
    }
    stack.set_pointer(cpu);
    Ok(())
}

/// POP Sreg. Only the selector is read.
pub fn pop_segment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let register = register(insn.r1);
    let mut stack = Stack::current(cpu);
    let selector = stack.pop(cpu, 2)? as u16;
    stack.skip(u64::from(insn.size) - 2);
    let segment = cpu.checked_segment(register, Selector(selector))?;
    stack.set_pointer(cpu);
    finish_load(cpu, insn, register, segment)
}

/// A far pointer in memory: selector and offset.
pub(crate) fn load_far_pointer(cpu: &mut Cpu, insn: &Insn) -> Result<(Selector, u64), Stop> {
    let linear = cpu.linear::<false>(insn, u64::from(insn.size) + 2)?;
    let offset = cpu.load_sized(linear, insn.size)?;
    let at = linear.wrapping_add(u64::from(insn.size));
    let selector = cpu.load_linear::<u16>(if cpu.is_long() { at } else { at & 0xffff_ffff })?;
    Ok((Selector(selector), offset))
}

fn load_pointer(cpu: &mut Cpu, insn: &Insn, register: SegmentRegister) -> Result<(), Stop> {
    let (selector, offset) = load_far_pointer(cpu, insn)?;
    let segment = cpu.checked_segment(register, selector)?;
    let mode = cpu.mode;
    cpu.set_segment(register, segment);
    cpu.set_gpr_sized(insn.r1, insn.size, offset);
    // SS and the register change together: nothing is held off.
    follow_mode(cpu, insn, register, mode)
}

/// LDS.
pub fn lds(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_pointer(cpu, insn, SegmentRegister::Ds)
}

/// LES.
pub fn les(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_pointer(cpu, insn, SegmentRegister::Es)
}

/// LFS.
pub fn lfs(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_pointer(cpu, insn, SegmentRegister::Fs)
}

/// LGS.
pub fn lgs(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_pointer(cpu, insn, SegmentRegister::Gs)
}

/// LSS.
pub fn lss(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    load_pointer(cpu, insn, SegmentRegister::Ss)
}

#[cfg(test)]
mod tests;
