//! Delivery of exceptions and interrupts through the interrupt descriptor table, and the instructions that ask for it.
//! SDM vol. 3, *Interrupt and Exception Handling*; SDM vol. 2, *INT n/INTO/INT3/INT1*.
//!
//! A delivery checks everything and pushes its frame before it changes a register, so that one that faults leaves the
//! state of the event's origin, to which its own fault is then delivered.

mod gate;
mod iret;
mod v86;

use gate::Entry;
pub use iret::iret;
use x86::{Exception, Flags, SegmentRegister, Selector, Vector};

use super::segment::Stack;
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::{NO_PAGE, View};

/// Which instruction asked for a software interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareKind {
    /// INT n.
    IntN,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1.
    Int1,
}

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception of the instruction at RIP.
    Exception(Exception),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A software interrupt.
    Software {
        /// Its vector.
        vector: u8,
        /// RIP of the instruction after the one that asked for it.
        next_rip: u64,
        /// That instruction.
        kind: SoftwareKind,
    },
}

impl Event {
    /// The vector in the interrupt descriptor table.
    pub fn vector(&self) -> u8 {
        match *self {
            Self::Exception(exception) => exception.vector as u8,
            Self::Interrupt(vector) | Self::Software { vector, .. } => vector,
            Self::Nmi => Vector::Nmi as u8,
        }
    }

    /// Whether faults of its delivery have EXT set in their error codes.
    fn is_external(&self) -> bool {
        !matches!(
            self,
            Self::Software { kind: SoftwareKind::IntN | SoftwareKind::Int3 | SoftwareKind::Into, .. }
        )
    }

    /// Whether the gate's DPL must allow it.
    fn checks_privilege(&self) -> bool {
        !self.is_external()
    }

    fn error_code(&self) -> Option<u32> {
        match self {
            Self::Exception(exception) => exception.error_code,
            _ => None,
        }
    }

    /// Faults push RF set, so that their instruction's breakpoint does not hit again when it is restarted.
    fn sets_resume_flag(&self) -> bool {
        match self {
            Self::Exception(Exception { vector: Vector::Debug, address, .. }) => {
                address & super::control::DR6_ACCESS != 0
            }
            Self::Exception(exception) => {
                !matches!(exception.vector, Vector::Breakpoint | Vector::Overflow | Vector::Nmi)
            }
            _ => false,
        }
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exception(exception) => exception.fmt(f),
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#x}"),
            Self::Nmi => f.write_str("NMI"),
            Self::Software { vector, .. } => write!(f, "INT {vector:#x}"),
        }
    }
}

/// Nothing could be delivered: the processor shuts down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TripleFault {
    /// What met what, for a person.
    pub reason: String,
}

/// So many faults one after another, none of which makes a double fault of the one before, are taken for a shutdown: a
/// delivery that raises the very fault that it delivers would go on for ever, as it does on processors.
const MOST_SERIAL: usize = 16;

/// What becomes of a fault during the delivery of another. SDM vol. 3, *Double Fault Exception*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meeting {
    /// The second is delivered as if the first had not been.
    Serial,
    DoubleFault,
    Shutdown,
}

fn meeting(first: &Event, second: Vector) -> Meeting {
    let Event::Exception(first) = first else { return Meeting::Serial };
    match first.vector {
        Vector::DoubleFault => Meeting::Shutdown,
        v if v.is_contributory() && second.is_contributory() => Meeting::DoubleFault,
        v if v.is_page_fault() && (second.is_contributory() || second.is_page_fault()) => {
            Meeting::DoubleFault
        }
        _ => Meeting::Serial,
    }
}

impl Cpu {
    /// Delivers an event at [`Cpu::rip`]: that of the faulting instruction for a fault, of the next for others.
    ///
    /// # Errors
    /// [`TripleFault`] where neither it nor the faults of its delivery could be delivered.
    pub fn deliver(&mut self, event: Event) -> Result<(), TripleFault> {
        // The block is over: the frame may well lie on the page that it was decoded from.
        self.mmu.executing = [NO_PAGE; 2];
        let mut event = event;
        let mut story = String::new();
        for _ in 0..MOST_SERIAL {
            let Err(_) = self.deliver_once(&event) else { return Ok(()) };
            let second = self.fault.take().unwrap_or(Exception::gp(0));
            if second.vector == Vector::PageFault {
                self.cr2 = second.address;
            }
            let story_before = std::mem::take(&mut story);
            story = match story_before.is_empty() {
                true => format!("{second} while delivering {event}"),
                false => format!("{second} while delivering {event} after {story_before}"),
            };
            event = match meeting(&event, second.vector) {
                Meeting::Serial => Event::Exception(second),
                Meeting::DoubleFault => Event::Exception(Exception::with_code(Vector::DoubleFault, 0)),
                Meeting::Shutdown => return Err(TripleFault { reason: format!("triple fault: {story}") }),
            };
        }
        Err(TripleFault { reason: format!("exceptions without end: {story}") })
    }

    /// One delivery. Sets EXT in the error codes of its own faults where the event came from outside the program.
    fn deliver_once(&mut self, event: &Event) -> Result<(), Stop> {
        if let Event::Exception(exception) = event {
            self.note_exception(exception);
        }
        let delivered =
            if self.mode.is_protected() { self.deliver_protected(event) } else { self.deliver_real(event) };
        if let Err(stop) = delivered {
            if let Some(Exception { vector, error_code: Some(code), .. }) = &mut self.fault
                && event.is_external()
                && *vector != Vector::PageFault
            {
                *code |= 1;
            }
            return Err(stop);
        }
        if *event == Event::Nmi {
            self.nmi_blocked = true;
        }
        self.halted = false;
        self.shadow = false;
        Ok(())
    }

    /// CR2 and DR6 tell of an exception even where its delivery fails.
    fn note_exception(&mut self, exception: &Exception) {
        match exception.vector {
            Vector::PageFault => self.cr2 = exception.address,
            Vector::Debug => {
                self.debug[4] = self.debug[4] & !0xf | exception.address;
                self.debug[5] &= !super::control::DR7_GENERAL_DETECT;
                // LBR and BTF are off in the handler.
                self.msrs.debugctl &= !3;
            }
            _ => {}
        }
    }

    /// RIP and RFLAGS as the frame has them.
    fn return_point(&self, event: &Event) -> (u64, u64) {
        let rip = match *event {
            Event::Software { next_rip, .. } => next_rip,
            _ => self.rip,
        };
        let resume = if event.sets_resume_flag() { Flags::RF.bits() } else { 0 };
        (rip, self.rflags() | resume)
    }

    /// Through the interrupt vector table.
    fn deliver_real(&mut self, event: &Event) -> Result<(), Stop> {
        let vector = u64::from(event.vector());
        if vector * 4 + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp0());
        }
        let entry = self.linear_after(self.idtr.base, vector * 4);
        let pointer = self.load_as::<u32>(View::Supervisor, entry)?;
        let (rip, flags) = self.return_point(event);
        let mut stack = Stack::current(self);
        stack.push(self, 2, flags)?;
        stack.push(self, 2, u64::from(self.segment(SegmentRegister::Cs).selector.0))?;
        stack.push(self, 2, rip)?;
        stack.set_pointer(self);
        self.system_flags.remove(Flags::IF | Flags::TF | Flags::AC | Flags::RF);
        let code = self.real_segment(SegmentRegister::Cs, (pointer >> 16) as u16);
        self.set_segment(SegmentRegister::Cs, code);
        self.rip = u64::from(pointer & 0xffff);
        Ok(())
    }

    /// Through the interrupt descriptor table.
    fn deliver_protected(&mut self, event: &Event) -> Result<(), Stop> {
        let gate = match self.find_gate(event)? {
            Entry::Gate(gate) => gate,
            Entry::Task(gate) => {
                let point = self.return_point(event);
                return self.event_to_task(gate, point, event.error_code());
            }
        };
        let handler = self.find_handler(&gate)?;
        let frame = self.frame(event, handler.cpl);
        let (mut stack, new_ss) = self.handler_stack(&gate, handler.cpl)?;
        for &value in frame.values() {
            stack.push(self, gate.size, value)?;
        }
        // Everything has been checked and written: from here on nothing fails.
        let was_v86 = self.mode.is_v86();
        self.system_flags.remove(Flags::TF | Flags::NT | Flags::RF | Flags::VM);
        if gate.masks {
            self.system_flags.remove(Flags::IF);
        }
        if was_v86 {
            self.clear_data_segments();
        }
        if let Some(segment) = new_ss {
            self.set_segment(SegmentRegister::Ss, segment);
        }
        self.set_segment(SegmentRegister::Cs, handler.segment);
        stack.set_pointer(self);
        self.rip = gate.offset;
        Ok(())
    }

    /// What a handler finds on its stack, in the order of the pushes.
    fn frame(&self, event: &Event, handler_cpl: u8) -> Frame {
        let (rip, flags) = self.return_point(event);
        let selector = |register: SegmentRegister| u64::from(self.segment(register).selector.0);
        let mut frame = Frame::default();
        if self.mode.is_v86() {
            for register in
                [SegmentRegister::Gs, SegmentRegister::Fs, SegmentRegister::Ds, SegmentRegister::Es]
            {
                frame.add(selector(register));
            }
        }
        if self.is_long() || handler_cpl != self.cpl() {
            frame.add(selector(SegmentRegister::Ss));
            frame.add(self.registers.get(4));
        }
        frame.add(flags);
        frame.add(selector(SegmentRegister::Cs));
        frame.add(rip);
        if let Some(code) = event.error_code() {
            frame.add(u64::from(code));
        }
        frame
    }

    fn clear_data_segments(&mut self) {
        for register in [SegmentRegister::Gs, SegmentRegister::Fs, SegmentRegister::Ds, SegmentRegister::Es] {
            self.set_segment(register, super::segment::null_segment(Selector(0), 0));
        }
    }
}

/// Up to ten values.
#[derive(Default)]
struct Frame {
    values: [u64; 10],
    len: usize,
}

impl Frame {
    fn add(&mut self, value: u64) {
        self.values[self.len] = value;
        self.len += 1;
    }

    fn values(&self) -> &[u64] {
        &self.values[..self.len]
    }
}

fn software(cpu: &mut Cpu, insn: &Insn, vector: u8, kind: SoftwareKind) -> Result<(), Stop> {
    let next_rip = cpu.next_rip(insn);
    let task = cpu.tr.selector;
    let result = cpu.deliver_once(&Event::Software { vector, next_rip, kind });
    cpu.after_switch(result, task)
}

/// INT n.
pub fn int_n(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.mode.is_v86() {
        if v86::redirect(cpu, insn, insn.imm as u8)? {
            return Err(Stop::EndBlock);
        }
        if cpu.system_flags.iopl() < 3 {
            return Err(cpu.gp0());
        }
    }
    software(cpu, insn, insn.imm as u8, SoftwareKind::IntN)
}

/// INT3.
pub fn int3(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    software(cpu, insn, Vector::Breakpoint as u8, SoftwareKind::Int3)
}

/// INTO.
pub fn into(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.flags.of() { software(cpu, insn, Vector::Overflow as u8, SoftwareKind::Into) } else { Ok(()) }
}

/// INT1. What a load of SS before it held back is reported by the same #DB.
pub fn int1(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let held_back = std::mem::take(&mut cpu.debug_traps);
    cpu.note_exception(&Exception::debug(held_back));
    software(cpu, insn, Vector::Debug as u8, SoftwareKind::Int1)
}

#[cfg(test)]
mod tests;
