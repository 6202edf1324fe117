//! Where an event leads: the gate, the handler's code segment and its stack.

use x86::descriptor::Attributes;
use x86::{Descriptor, Exception, Segment, SegmentRegister, Selector, SystemType, Vector};

use super::Event;
use crate::cpu::Cpu;
use crate::insn::Stop;
use crate::instructions::segment::{Stack, null_segment};
use crate::mmu::View;

/// An interrupt or trap gate.
pub(super) struct Gate {
    pub(super) offset: u64,
    selector: Selector,
    /// The entry of the interrupt stack table, or zero.
    stack: u8,
    /// Bytes of each value in the frame.
    pub(super) size: u8,
    /// Whether it clears IF.
    pub(super) masks: bool,
}

/// What an entry of the interrupt descriptor table is.
pub(super) enum Entry {
    /// An interrupt or trap gate.
    Gate(Gate),
    /// A task gate.
    Task(Descriptor),
}

/// A code segment that control goes to, and the privilege level there.
pub(crate) struct CodeTarget {
    pub(crate) segment: Segment,
    pub(crate) cpl: u8,
}

impl Cpu {
    /// The gate of an event, checked.
    pub(super) fn find_gate(&mut self, event: &Event) -> Result<Entry, Stop> {
        let vector = u32::from(event.vector());
        let code = vector << 3 | 2;
        let size = if self.is_long() { 16 } else { 8 };
        if vector * size + size - 1 > u32::from(self.idtr.limit) {
            return Err(self.raise(Exception::gp(code)));
        }
        let address = self.linear_after(self.idtr.base, u64::from(vector * size));
        let descriptor = Descriptor(self.load_as(View::Supervisor, address)?);
        let high =
            if size == 16 { self.load_as::<u64>(View::Supervisor, address.wrapping_add(8))? } else { 0 };
        let kind = descriptor.system_type().filter(|_| !descriptor.is_code_or_data());
        let (bytes, masks) = match (kind, self.is_long()) {
            (Some(SystemType::InterruptGate), true) => (8, true),
            (Some(SystemType::TrapGate), true) => (8, false),
            (Some(SystemType::InterruptGate), false) => (4, true),
            (Some(SystemType::TrapGate), false) => (4, false),
            (Some(SystemType::InterruptGate16), false) => (2, true),
            (Some(SystemType::TrapGate16), false) => (2, false),
            (Some(SystemType::TaskGate), false) => (0, false),
            _ => return Err(self.raise(Exception::gp(code))),
        };
        if event.checks_privilege() && descriptor.dpl() < self.cpl() {
            return Err(self.raise(Exception::gp(code)));
        }
        if !descriptor.attributes().contains(Attributes::P) {
            return Err(self.raise(Exception::with_code(Vector::SegmentNotPresent, code)));
        }
        if bytes == 0 {
            return Ok(Entry::Task(descriptor));
        }
        let mask = if bytes == 2 { 0xffff } else { 0xffff_ffff };
        Ok(Entry::Gate(Gate {
            offset: u64::from(descriptor.gate_offset() & mask) | high << 32,
            selector: descriptor.gate_selector(),
            stack: if bytes == 8 { descriptor.gate_stack() } else { 0 },
            size: bytes,
            masks,
        }))
    }

    /// The code segment of a gate, checked; its accessed flag is set.
    pub(super) fn find_handler(&mut self, gate: &Gate) -> Result<CodeTarget, Stop> {
        if gate.selector.is_null() {
            return Err(self.gp0());
        }
        let found = self.find_descriptor(gate.selector, Vector::GeneralProtection)?;
        let dpl = found.descriptor.dpl();
        let is_64 = found.attributes() & (Attributes::L | Attributes::DB) == Attributes::L;
        if !found.is_code() || dpl > self.cpl() || self.is_long() && !is_64 {
            return Err(self.selector_fault(Vector::GeneralProtection, gate.selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, gate.selector));
        }
        let cpl = if found.is_conforming() { self.cpl() } else { dpl };
        if self.mode.is_v86() && cpl != 0 {
            return Err(self.selector_fault(Vector::GeneralProtection, gate.selector));
        }
        let segment = found.segment(Selector(gate.selector.0 & !3 | u16::from(cpl)));
        self.check_entry(&segment, gate.offset)?;
        self.set_descriptor_type(&found, 1)?;
        Ok(CodeTarget { segment, cpl })
    }

    /// #GP(0) where code in `segment` cannot start at `rip`.
    pub(crate) fn check_entry(&mut self, segment: &Segment, rip: u64) -> Result<(), Stop> {
        let good = if self.is_long() && segment.attributes.contains(Attributes::L) {
            self.mmu.paging.is_canonical(rip)
        } else {
            // Processors drop the upper half of an offset into compatibility-mode code.
            rip & 0xffff_ffff <= u64::from(segment.limit)
        };
        if good { Ok(()) } else { Err(self.gp0()) }
    }

    /// The stack of a handler at `cpl`, and SS where it changes.
    pub(super) fn handler_stack(&mut self, gate: &Gate, cpl: u8) -> Result<(Stack, Option<Segment>), Stop> {
        if !self.is_long() {
            if cpl == self.cpl() {
                return Ok((Stack::current(self), None));
            }
            let (segment, pointer) = self.inner_stack(cpl)?;
            return Ok((Stack::within(self, segment, pointer, cpl), Some(segment)));
        }
        let pointer = match gate.stack {
            0 if cpl == self.cpl() => self.registers.get(4) & self.stack_mask(),
            0 => self.load_task_state(4 + 8 * u64::from(cpl), 8)?,
            entry => self.load_task_state(0x1c + 8 * u64::from(entry), 8)?,
        };
        let mut stack = Stack::flat(self, pointer, cpl);
        stack.align();
        let segment = (cpl != self.cpl()).then(|| null_segment(Selector(u16::from(cpl)), cpl));
        Ok((stack, segment))
    }

    /// SS and ESP for an inner privilege level, from a 16-bit or 32-bit task-state segment.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Stop> {
        let wide = self.tr.attributes.bits() & 8 != 0;
        let (offset, size) = if wide { (4 + 8 * u64::from(cpl), 4) } else { (2 + 4 * u64::from(cpl), 2) };
        // Both must lie within the segment before either is looked at.
        self.check_task_state(offset, 2 * u64::from(size))?;
        let pointer = self.load_task_state(offset, size)?;
        let selector = Selector(self.load_task_state(offset + u64::from(size), 2)? as u16);
        if selector.is_null() {
            return Err(self.raise(Exception::with_code(Vector::InvalidTss, 0)));
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        if selector.rpl() != cpl || found.descriptor.dpl() != cpl || !found.is_writable_data() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::StackFault, selector));
        }
        self.set_descriptor_type(&found, 1)?;
        Ok((found.segment(selector), pointer))
    }

    fn check_task_state(&mut self, offset: u64, size: u64) -> Result<(), Stop> {
        if offset + size - 1 > u64::from(self.tr.limit) {
            return Err(self.selector_fault(Vector::InvalidTss, self.tr.selector));
        }
        Ok(())
    }

    /// Reads `size` bytes of the task-state segment.
    pub(crate) fn load_task_state(&mut self, offset: u64, size: u8) -> Result<u64, Stop> {
        self.check_task_state(offset, u64::from(size))?;
        let address = self.linear_after(self.tr.base, offset);
        Ok(match size {
            2 => u64::from(self.load_as::<u16>(View::Supervisor, address)?),
            4 => u64::from(self.load_as::<u32>(View::Supervisor, address)?),
            _ => self.load_as::<u64>(View::Supervisor, address)?,
        })
    }

    /// Nulls the data segments that code at `cpl` may not use, as a return to an outer level does.
    pub(crate) fn drop_inner_segments(&mut self, cpl: u8) {
        for register in [SegmentRegister::Es, SegmentRegister::Fs, SegmentRegister::Gs, SegmentRegister::Ds] {
            let segment = self.segment(register);
            let conforming = segment.attributes.contains(Attributes::CODE | Attributes::EXPAND_DOWN);
            if !conforming && segment.dpl() < cpl {
                let base = if self.is_long() { segment.base } else { 0 };
                let null = null_segment(Selector(0), 0);
                self.set_segment(register, Segment { base, ..null });
            }
        }
    }
}
