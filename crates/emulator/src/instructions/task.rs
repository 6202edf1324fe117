//! Task switches, by far JMP and CALL, IRET, and events through task gates. SDM vol. 3, *Task Management*.
//!
//! A switch first checks all that it will touch; then the old task's state is saved and the new one's is loaded, and
//! from there on a fault belongs to the new task.

use exits::Exit;
use x86::descriptor::Attributes;
use x86::{
    Cr0, Descriptor, Exception, ExitReason, Flags, Segment, SegmentRegister, Selector, SystemType, Vector,
};

use super::event::Event;
use super::segment::{Found, Stack, null_segment};
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::{Access, NO_PAGE, View};

/// Bit 1 of a TSS descriptor's type.
const BUSY: u8 = 2;
/// DR6.BT: a switch to a task whose T flag is set.
const DR6_TASK: u64 = 1 << 15;
/// DR7.L0 to L3 and LE, which hold for one task alone.
const DR7_LOCAL: u64 = 0x155;
/// Offsets in a 32-bit TSS.
const CR3: u64 = 0x1c;
const TRAP: usize = 0x64;

/// What a switch was asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// JMP: the old task ends.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// IRET: back to the task that the present one is nested in.
    Iret,
    /// An exception or interrupt: nested too.
    Event,
}

impl Cause {
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Event)
    }
}

/// A task to switch to: its TSS, of the right type and present.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task {
    selector: Selector,
    found: Found,
}

/// The format of a task-state segment.
struct Layout {
    /// Bytes that it has at least.
    size: u32,
    /// Where the saved registers begin.
    first: u64,
    /// Bytes of each.
    width: usize,
    /// How many segment registers there are.
    segments: usize,
}

const WIDE: Layout = Layout { size: 104, first: 0x20, width: 4, segments: 6 };
const NARROW: Layout = Layout { size: 44, first: 0xe, width: 2, segments: 4 };

impl Layout {
    fn of(attributes: Attributes) -> &'static Self {
        if attributes.bits() & 8 != 0 { &WIDE } else { &NARROW }
    }

    /// Bytes from the first saved register to the last.
    fn saved(&self) -> usize {
        (10 + self.segments) * self.width
    }

    fn is_wide(&self) -> bool {
        self.width == 4
    }
}

/// The registers of a task as its TSS holds them.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    rip: u32,
    flags: u32,
    registers: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    cr3: u32,
    trap: bool,
}

impl State {
    fn from_bytes(bytes: &[u8; 104], layout: &Layout) -> Self {
        let value = |n: usize| {
            let at = layout.first as usize + n * layout.width;
            let low = u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
            let high = u32::from(u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]));
            if layout.is_wide() { low | high << 16 } else { low }
        };
        let segment = |n: usize| if n < layout.segments { value(10 + n) as u16 } else { 0 };
        let cr3 = CR3 as usize;
        Self {
            rip: value(0),
            flags: value(1),
            registers: std::array::from_fn(|n| value(2 + n)),
            segments: std::array::from_fn(segment),
            ldt: value(10 + layout.segments) as u16,
            cr3: u32::from_le_bytes([bytes[cr3], bytes[cr3 + 1], bytes[cr3 + 2], bytes[cr3 + 3]]),
            trap: layout.is_wide() && bytes[TRAP] & 1 != 0,
        }
    }

    fn cs(&self) -> Selector {
        Selector(self.segments[1])
    }
}

impl Cpu {
    /// The task that the target of a far JMP or CALL stands for, where it is a TSS or a task gate.
    ///
    /// # Errors
    /// #GP and #NP as *JMP* and *CALL* have them.
    pub(crate) fn far_task(&mut self, selector: Selector, found: &Found) -> Result<Option<Task>, Stop> {
        let kind = found.descriptor.system_type();
        let gate = kind == Some(SystemType::TaskGate);
        let tss = matches!(
            kind,
            Some(
                SystemType::TssAvailable
                    | SystemType::Tss16Available
                    | SystemType::TssBusy
                    | SystemType::Tss16Busy
            )
        );
        if self.is_long() || !gate && !tss {
            return Ok(None);
        }
        let dpl = found.descriptor.dpl();
        if dpl < self.cpl() || dpl < selector.rpl() {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if tss {
            return self.find_task(selector, Cause::Jump).map(Some);
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        self.find_task(found.descriptor.gate_selector(), Cause::Jump).map(Some)
    }

    /// Checks the TSS that a selector names: busy for IRET, available for all others.
    ///
    /// # Errors
    /// #GP, for IRET #TS; #NP.
    pub(crate) fn find_task(&mut self, selector: Selector, cause: Cause) -> Result<Task, Stop> {
        let back = cause == Cause::Iret;
        let vector = if back { Vector::InvalidTss } else { Vector::GeneralProtection };
        if selector.is_local() {
            return Err(self.selector_fault(vector, selector));
        }
        let found = self.find_descriptor(selector, vector)?;
        let kind = found.descriptor.system_type().filter(|_| !found.descriptor.is_code_or_data());
        let good = match kind {
            Some(SystemType::TssAvailable | SystemType::Tss16Available) => !back,
            Some(SystemType::TssBusy | SystemType::Tss16Busy) => back,
            _ => false,
        };
        if !good {
            return Err(self.selector_fault(vector, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        Ok(Task { selector, found })
    }

    /// Switches to a task. `rip` and `flags` are what the old one goes on with. A fault that finds TR changed belongs
    /// to the new task: RIP is that task's.
    ///
    /// # Errors
    /// [`Stop::Fault`].
    pub(crate) fn switch_task(
        &mut self,
        task: &Task,
        cause: Cause,
        rip: u64,
        flags: u64,
    ) -> Result<(), Stop> {
        // The block is over: the segments may well lie on the page that it was decoded from.
        self.mmu.executing = [NO_PAGE; 2];
        self.recorded(
            |_| Exit::new(ExitReason::TaskSwitch),
            |cpu| {
                let (new, old) = (cpu.read_task(task)?, cpu.check_old_task()?);
                let kept = if cause == Cause::Iret { !Flags::NT.bits() } else { u64::MAX };
                cpu.save_task(rip, flags & kept)?;
                if !cause.nests() {
                    cpu.change_descriptor_type(&old, 0, BUSY)?;
                }
                cpu.enter_task(task, &new, cause)
            },
        )
    }

    /// Reads the new task's state, and checks that its segment can be written to.
    fn read_task(&mut self, task: &Task) -> Result<State, Stop> {
        let layout = Layout::of(task.found.attributes());
        let segment = task.found.segment(task.selector);
        if segment.limit < layout.size - 1 {
            return Err(self.selector_fault(Vector::InvalidTss, task.selector));
        }
        let mut bytes = [0; 104];
        self.read_bytes(View::Supervisor, segment.base, &mut bytes[..layout.size as usize])?;
        self.target(View::Supervisor, segment.base, Access::Write)?;
        self.target(View::Supervisor, task.found.address.wrapping_add(5), Access::Write)?;
        Ok(State::from_bytes(&bytes, layout))
    }

    /// Checks that the present task's state can be saved. Gives its descriptor.
    fn check_old_task(&mut self) -> Result<Found, Stop> {
        let selector = self.tr.selector;
        let layout = Layout::of(self.tr.attributes);
        if self.tr.limit < layout.size - 1 {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        for at in [layout.first, layout.first + layout.saved() as u64 - 1] {
            let linear = self.linear_after(self.tr.base, at);
            self.target(View::Supervisor, linear, Access::Write)?;
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        self.target(View::Supervisor, found.address.wrapping_add(5), Access::Write)?;
        Ok(found)
    }

    /// Writes the present registers to the present TSS.
    fn save_task(&mut self, rip: u64, flags: u64) -> Result<(), Stop> {
        let layout = Layout::of(self.tr.attributes);
        let mut values = [0u32; 16];
        values[0] = rip as u32;
        values[1] = flags as u32;
        for n in 0..8 {
            values[2 + n] = self.registers.get(n as u8) as u32;
        }
        for (value, segment) in values[10..].iter_mut().zip(&self.segments) {
            *value = u32::from(segment.selector.0);
        }
        let mut bytes = [0; 64];
        for (chunk, value) in bytes.chunks_exact_mut(layout.width).zip(values) {
            chunk.copy_from_slice(&value.to_le_bytes()[..layout.width]);
        }
        let linear = self.linear_after(self.tr.base, layout.first);
        self.write_bytes(View::Supervisor, linear, &bytes[..layout.saved()])
    }

    fn enter_task(&mut self, task: &Task, state: &State, cause: Cause) -> Result<(), Stop> {
        let segment = task.found.segment(task.selector);
        if cause.nests() {
            self.store_as(View::Supervisor, segment.base, self.tr.selector.0)?;
        }
        self.set_descriptor_type(&task.found, BUSY)?;
        let busy = Attributes::from_bits_retain(u32::from(BUSY));
        let layout = Layout::of(segment.attributes);
        let attributes = task.found.attributes() | busy;
        self.tr = Segment { attributes, ..segment };
        self.cr0.insert(Cr0::TS);
        self.debug[5] &= !DR7_LOCAL;
        self.update_breakpoints();
        self.load_task_registers(state, layout, cause);
        if layout.is_wide() && self.paging_enabled() {
            self.write_cr3(u64::from(state.cr3))?;
        }
        self.load_task_segments(state)?;
        if state.trap {
            self.debug_traps |= DR6_TASK;
        }
        let code = *self.segment(SegmentRegister::Cs);
        self.check_entry(&code, self.rip)
    }

    /// Everything that needs no look into memory. Segment registers hold their selectors, but nothing to use yet.
    fn load_task_registers(&mut self, state: &State, layout: &Layout, cause: Cause) {
        let nested = if cause.nests() { Flags::NT.bits() } else { 0 };
        let vm = if layout.is_wide() { Flags::VM } else { Flags::empty() };
        let flags =
            u64::from(state.flags) & (Flags::all() - Flags::VM - Flags::RF | vm | self.loadable_rf()).bits();
        self.set_rflags(flags | nested, Flags::all());
        for (number, &value) in (0..).zip(&state.registers) {
            self.registers.set(number, u64::from(value));
        }
        self.rip = u64::from(state.rip);
        let cpl = state.cs().rpl();
        for (n, register) in super::segment::REGISTERS.into_iter().enumerate() {
            self.set_segment(register, null_segment(Selector(state.segments[n]), cpl));
        }
        self.ldtr = null_segment(Selector(state.ldt), 0);
    }

    fn load_task_segments(&mut self, state: &State) -> Result<(), Stop> {
        self.load_task_ldt(Selector(state.ldt))?;
        let all = super::segment::REGISTERS.into_iter().zip(state.segments);
        if self.mode.is_v86() {
            for (register, selector) in all {
                let segment = self.real_segment(register, selector);
                self.set_segment(register, segment);
            }
            return Ok(());
        }
        let cpl = state.cs().rpl();
        let code = self.task_code(state.cs())?;
        // CPL is SS's, which is that of CS here.
        self.set_segment(SegmentRegister::Cs, code);
        let stack = self.task_stack(Selector(state.segments[2]), cpl)?;
        self.set_segment(SegmentRegister::Ss, stack);
        for (register, selector) in all {
            if !matches!(register, SegmentRegister::Cs | SegmentRegister::Ss) {
                let segment = self.task_data(Selector(selector), cpl)?;
                self.set_segment(register, segment);
            }
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: Selector) -> Result<(), Stop> {
        if selector.is_null() {
            return Ok(());
        }
        if selector.is_local() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        let ldt = found.descriptor.system_type() == Some(SystemType::Ldt);
        if !ldt || found.descriptor.is_code_or_data() || !found.is_present() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        self.ldtr = found.descriptor.segment(selector);
        Ok(())
    }

    fn task_code(&mut self, selector: Selector) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        let dpl = found.descriptor.dpl();
        let privilege = if found.is_conforming() { dpl <= selector.rpl() } else { dpl == selector.rpl() };
        if !found.is_code() || !privilege {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        self.task_segment(&found, selector, Vector::SegmentNotPresent)
    }

    fn task_stack(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        if selector.rpl() != cpl || found.descriptor.dpl() != cpl || !found.is_writable_data() {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        self.task_segment(&found, selector, Vector::StackFault)
    }

    fn task_data(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        let found = self.find_descriptor(selector, Vector::InvalidTss)?;
        let privilege = found.is_conforming() || selector.rpl().max(cpl) <= found.descriptor.dpl();
        if !found.is_readable() || !privilege {
            return Err(self.selector_fault(Vector::InvalidTss, selector));
        }
        self.task_segment(&found, selector, Vector::SegmentNotPresent)
    }

    /// The segment, where it is present.
    fn task_segment(&mut self, found: &Found, selector: Selector, absent: Vector) -> Result<Segment, Stop> {
        if !found.is_present() {
            return Err(self.selector_fault(absent, selector));
        }
        self.set_descriptor_type(found, 1)?;
        Ok(found.segment(selector))
    }

    /// An event through a task gate: the switch, and the error code on the new task's stack.
    ///
    /// # Errors
    /// As [`Cpu::switch_task`].
    pub(crate) fn event_to_task(
        &mut self,
        gate: Descriptor,
        (rip, flags): (u64, u64),
        error_code: Option<u32>,
    ) -> Result<(), Stop> {
        let task = self.find_task(gate.gate_selector(), Cause::Event)?;
        self.switch_task(&task, Cause::Event, rip, flags)?;
        if let Some(code) = error_code {
            let size = Layout::of(self.tr.attributes).width as u8;
            let mut stack = Stack::current(self);
            stack.push(self, size, u64::from(code))?;
            stack.set_pointer(self);
        }
        Ok(())
    }

    /// Ends an instruction that may have switched tasks: `task` was the task before it. A fault of the new task is
    /// delivered there, not to the instruction.
    ///
    /// # Errors
    /// Always: what the interpreter is to do.
    pub(crate) fn after_switch(&mut self, result: Result<(), Stop>, task: Selector) -> Result<(), Stop> {
        match result {
            Ok(()) => Err(Stop::EndBlock),
            Err(Stop::Fault) if self.tr.selector != task => {
                let fault = self.fault.take().unwrap_or(Exception::gp(0));
                match self.deliver(Event::Exception(fault)) {
                    Ok(()) => Err(Stop::EndBlock),
                    Err(triple) => {
                        let event = engine::DebugEvent { rip: self.rip, reason: triple.reason };
                        self.exit = Some(engine::VmExit::Shutdown(event));
                        Err(Stop::Exit)
                    }
                }
            }
            Err(stop) => Err(stop),
        }
    }
}

/// The switch that a far JMP or CALL asks for.
pub(crate) fn transfer(cpu: &mut Cpu, insn: &Insn, task: &Task, cause: Cause) -> Result<(), Stop> {
    let before = cpu.tr.selector;
    let result = cpu.switch_task(task, cause, cpu.next_rip(insn), cpu.rflags());
    cpu.after_switch(result, before)
}

/// IRET with NT set: back to the task that the present one is nested in.
pub(crate) fn return_to_previous(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let before = cpu.tr.selector;
    let link = Selector(cpu.load_task_state(0, 2)? as u16);
    let task = cpu.find_task(link, Cause::Iret)?;
    let result = cpu.switch_task(&task, Cause::Iret, cpu.next_rip(insn), cpu.rflags());
    cpu.after_switch(result, before)
}

#[cfg(test)]
mod tests;
