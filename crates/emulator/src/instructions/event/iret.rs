//! IRET. SDM vol. 2, *IRET/IRETD/IRETQ*.

use x86::descriptor::Attributes;
use x86::{Flags, Segment, SegmentRegister, Selector};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::instructions::segment::Stack;
use crate::instructions::task::return_to_previous;

/// What every IRET pops.
struct Popped {
    rip: u64,
    cs: Selector,
    flags: u64,
}

/// IRET, IRETD and IRETQ in every mode.
pub fn iret(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.mode.is_v86() && cpu.system_flags.iopl() < 3 && (insn.size != 2 || !cpu.has_virtual_interrupts()) {
        return Err(cpu.gp0());
    }
    // NMIs are open again even where the rest of the instruction faults.
    cpu.nmi_blocked = false;
    if cpu.mode.is_protected() && !cpu.mode.is_v86() && cpu.system_flags.contains(Flags::NT) {
        // Long mode has no nested tasks.
        return if cpu.is_long() { Err(cpu.gp0()) } else { return_to_previous(cpu, insn) };
    }
    let mut stack = Stack::current(cpu);
    let popped = Popped {
        rip: stack.pop(cpu, insn.size)?,
        cs: Selector(stack.pop(cpu, insn.size)? as u16),
        flags: stack.pop(cpu, insn.size)?,
    };
    if cpu.mode.is_real_or_v86() {
        return to_real(cpu, insn.size, stack, &popped);
    }
    if popped.flags & Flags::VM.bits() != 0 && insn.size == 4 && cpu.cpl() == 0 && !cpu.is_long() {
        return to_v86(cpu, stack, &popped);
    }
    to_protected(cpu, insn.size, stack, &popped)
}

impl Cpu {
    /// What IRET and POPF of an operand size may change of RFLAGS at the present privilege, without RF.
    pub(crate) fn writable_flags(&self, size: u8) -> Flags {
        let mut flags = Flags::ARITHMETIC | Flags::TF | Flags::DF | Flags::NT;
        flags.set(Flags::AC | Flags::ID, size > 2);
        flags.set(Flags::IF, self.cpl() <= self.system_flags.iopl());
        flags.set(Flags::IOPL, self.cpl() == 0);
        flags
    }

    /// RF, where it matters: it holds back an instruction breakpoint for one instruction. Where there is none it stays
    /// clear, so that nobody has to look at it.
    pub(crate) fn loadable_rf(&self) -> Flags {
        if self.breakpoints.has_code() { Flags::RF } else { Flags::empty() }
    }
}

fn writable(cpu: &Cpu, size: u8) -> Flags {
    let mut flags = cpu.writable_flags(size);
    flags.set(cpu.loadable_rf(), size > 2);
    flags.set(Flags::VIF | Flags::VIP, size > 2 && cpu.cpl() == 0 && cpu.mode.is_protected());
    flags
}

fn to_real(cpu: &mut Cpu, size: u8, stack: Stack, popped: &Popped) -> Result<(), Stop> {
    let code = cpu.real_segment(SegmentRegister::Cs, popped.cs.0);
    if popped.rip > u64::from(code.limit) {
        return Err(cpu.gp0());
    }
    if cpu.mode.is_v86() && cpu.system_flags.iopl() < 3 {
        cpu.set_virtual_flags(popped.flags)?;
    } else {
        let flags = writable(cpu, size);
        cpu.set_rflags(popped.flags, flags);
    }
    stack.set_pointer(cpu);
    cpu.set_segment(SegmentRegister::Cs, code);
    cpu.rip = popped.rip;
    Err(Stop::EndBlock)
}

fn to_v86(cpu: &mut Cpu, mut stack: Stack, popped: &Popped) -> Result<(), Stop> {
    use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
    let pointer = stack.pop(cpu, 4)?;
    let mut selectors = [0; 5];
    for selector in &mut selectors {
        *selector = stack.pop(cpu, 4)? as u16;
    }
    if popped.rip > 0xffff {
        return Err(cpu.gp0());
    }
    cpu.set_rflags(popped.flags, writable(cpu, 4) | Flags::VM);
    for (register, selector) in [Ss, Es, Ds, Fs, Gs].into_iter().zip(selectors) {
        let segment = cpu.real_segment(register, selector);
        cpu.set_segment(register, segment);
    }
    let code = cpu.real_segment(Cs, popped.cs.0);
    cpu.set_segment(Cs, code);
    cpu.registers.set(4, pointer);
    cpu.rip = popped.rip;
    Err(Stop::EndBlock)
}

fn to_protected(cpu: &mut Cpu, size: u8, mut stack: Stack, popped: &Popped) -> Result<(), Stop> {
    let code = cpu.return_target(popped.cs)?;
    let outer = popped.cs.rpl() > cpu.cpl();
    let new_stack = if outer || cpu.mode.is_64() {
        let pointer = stack.pop(cpu, size)?;
        let selector = Selector(stack.pop(cpu, size)? as u16);
        let null_allowed = cpu.is_long() && code.attributes.contains(Attributes::L);
        Some((cpu.checked_stack(selector, popped.cs.rpl(), null_allowed)?, pointer))
    } else {
        None
    };
    cpu.check_entry(&code, popped.rip)?;
    // Nothing fails any more. What may change of the flags goes by the privilege that is left.
    let flags = writable(cpu, size);
    cpu.set_rflags(popped.flags, flags);
    match new_stack {
        Some((segment, pointer)) => cpu.return_to(code, segment, pointer),
        None => {
            stack.set_pointer(cpu);
            cpu.set_segment(SegmentRegister::Cs, code);
        }
    }
    if outer {
        cpu.drop_inner_segments(popped.cs.rpl());
    }
    cpu.rip = if cpu.mode.is_64() { popped.rip } else { popped.rip & 0xffff_ffff };
    Err(Stop::EndBlock)
}

impl Cpu {
    /// Loads CS, SS and the stack pointer of the code that is returned to.
    pub(crate) fn return_to(&mut self, code: Segment, stack: Segment, pointer: u64) {
        self.set_segment(SegmentRegister::Ss, stack);
        self.set_segment(SegmentRegister::Cs, code);
        let mask = self.stack_mask();
        let kept = if mask == 0xffff { self.registers.get(4) & !0xffff } else { 0 };
        self.registers.set(4, kept | pointer & mask);
    }
}
