//! A stack that need not be the present one: what far transfers push to and pop from before anything is committed.

use x86::descriptor::Attributes;
use x86::{Exception, Flags, Segment, SegmentRegister, Vector};

use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::mmu::View;

const RSP: u8 = 4;

/// A stack segment, a pointer into it, and whose rights its accesses have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    pointer: u64,
    /// By SS.B; all ones for 64-bit stacks, which have no segment.
    mask: u64,
    view: View,
    /// The error code of its stack faults.
    code: u32,
}

impl Stack {
    /// The present one.
    pub(crate) fn current(cpu: &Cpu) -> Self {
        let mask = cpu.stack_mask();
        let segment = *cpu.segment(SegmentRegister::Ss);
        Self { segment, pointer: cpu.registers.get(RSP) & mask, mask, view: cpu.mmu.view, code: 0 }
    }

    /// One with a 64-bit pointer, used at privilege level `cpl`.
    pub(crate) fn flat(cpu: &Cpu, pointer: u64, cpl: u8) -> Self {
        Self { segment: Segment::default(), pointer, mask: u64::MAX, view: view(cpu, cpl), code: 0 }
    }

    /// One in a segment that is about to be loaded, used at privilege level `cpl`.
    pub(crate) fn within(cpu: &Cpu, segment: Segment, pointer: u64, cpl: u8) -> Self {
        let mask = if segment.attributes.contains(Attributes::DB) { 0xffff_ffff } else { 0xffff };
        let code = segment.selector.error_code();
        Self { segment, pointer: pointer & mask, mask, view: view(cpu, cpl), code }
    }

    /// Goes on as other code of this privilege level has it: with all of RSP and no segment in 64-bit mode, within the
    /// segment elsewhere. The processor does so between the two halves of far calls and returns.
    pub(crate) fn change_mode(&mut self, cpu: &Cpu, code: &Segment) {
        let wide = cpu.is_long() && code.attributes.contains(Attributes::L);
        if wide == (self.mask == u64::MAX) {
            return;
        }
        let whole = cpu.registers.get(RSP);
        let moved = self.pointer.wrapping_sub(whole) & self.mask;
        self.mask = match (wide, self.segment.attributes.contains(Attributes::DB)) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        };
        self.pointer = whole.wrapping_add(moved) & self.mask;
    }

    /// Rounds the pointer down to 16 bytes.
    pub(crate) fn align(&mut self) {
        self.pointer &= !0xf;
    }

    /// Moves the pointer up, without an access.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }

    /// Pushes `size` bytes.
    ///
    /// # Errors
    /// #SS and page faults, with the pointer as it was.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, size: u8, value: u64) -> Result<(), Stop> {
        let pointer = self.pointer.wrapping_sub(u64::from(size)) & self.mask;
        let linear = self.linear(cpu, pointer, size)?;
        match size {
            2 => cpu.store_as(self.view, linear, value as u16)?,
            4 => cpu.store_as(self.view, linear, value as u32)?,
            _ => cpu.store_as(self.view, linear, value)?,
        }
        self.pointer = pointer;
        Ok(())
    }

    /// Pops `size` bytes.
    ///
    /// # Errors
    /// #SS and page faults, with the pointer as it was.
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, size: u8) -> Result<u64, Stop> {
        let linear = self.linear(cpu, self.pointer, size)?;
        let value = match size {
            2 => u64::from(cpu.load_as::<u16>(self.view, linear)?),
            4 => u64::from(cpu.load_as::<u32>(self.view, linear)?),
            _ => cpu.load_as::<u64>(self.view, linear)?,
        };
        self.skip(u64::from(size));
        Ok(value)
    }

    /// Makes the pointer the processor's: 16-bit stacks leave the upper part of ESP alone.
    pub(crate) fn set_pointer(&self, cpu: &mut Cpu) {
        let kept = if self.mask == 0xffff { cpu.registers.get(RSP) & !0xffff } else { 0 };
        cpu.registers.set(RSP, kept | self.pointer & self.mask);
    }

    fn linear(&self, cpu: &mut Cpu, pointer: u64, size: u8) -> Result<u64, Stop> {
        let last = pointer.wrapping_add(u64::from(size) - 1);
        if self.mask == u64::MAX {
            if cpu.mmu.paging.is_data_canonical(pointer) && cpu.mmu.paging.is_data_canonical(last) {
                return Ok(pointer);
            }
        } else if in_limit(&self.segment, pointer, last) {
            return Ok(pointer.wrapping_add(self.segment.base) & 0xffff_ffff);
        }
        Err(cpu.raise(Exception::with_code(Vector::StackFault, self.code)))
    }
}

fn in_limit(segment: &Segment, first: u64, last: u64) -> bool {
    let limit = u64::from(segment.limit);
    if segment.attributes.contains(Attributes::UNUSABLE) {
        return false;
    }
    if segment.attributes.contains(Attributes::EXPAND_DOWN) {
        let top = if segment.attributes.contains(Attributes::DB) { 0xffff_ffff } else { 0xffff };
        return first > limit && last <= top;
    }
    last <= limit
}

/// The rights of accesses at a privilege level. While a program still runs they are implicit, and its RFLAGS.AC does not
/// count. SDM vol. 3, *Access Rights*.
fn view(cpu: &Cpu, cpl: u8) -> View {
    let explicit = cpu.cpl() < 3 && cpu.system_flags.contains(Flags::AC);
    match (cpl == 3, explicit || !cpu.mmu.paging.smap) {
        (true, _) => View::User,
        (false, true) => View::SupervisorUnguarded,
        (false, false) => View::Supervisor,
    }
}
