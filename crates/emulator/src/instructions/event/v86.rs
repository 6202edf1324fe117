//! INT n in virtual-8086 mode, whose task says with CR4.VME which vectors its program handles itself.
//! SDM vol. 3, *Handling Software Interrupts in Virtual-8086 Mode*.

use x86::{Cr4, Flags, SegmentRegister};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::instructions::segment::Stack;

/// Where a 32-bit TSS has the base of the I/O permission bitmap, below which the redirection bitmap lies.
const MAP_BASE: u64 = 0x66;
/// Bytes of the redirection bitmap.
const REDIRECTION: u64 = 32;

impl Cpu {
    /// Whether VIF stands for IF: with CR4.VME in virtual-8086 mode, with CR4.PVI for programs at CPL 3.
    pub(crate) fn has_virtual_interrupts(&self) -> bool {
        let control = if self.mode.is_v86() { Cr4::VME } else { Cr4::PVI };
        self.mode.is_protected()
            && self.cpl() == 3
            && self.system_flags.iopl() < 3
            && self.cr4.contains(control)
    }

    /// FLAGS as a virtual-8086 program sees them with CR4.VME and IOPL below 3.
    pub(crate) fn virtual_flags(&self) -> u64 {
        let mut flags = self.rflags() | Flags::IOPL.bits();
        if !self.system_flags.contains(Flags::VIF) {
            flags &= !Flags::IF.bits();
        } else {
            flags |= Flags::IF.bits();
        }
        flags
    }

    /// Loads FLAGS for such a program: its IF goes to VIF.
    ///
    /// # Errors
    /// #GP(0) for TF, and for IF where an interrupt waits (VIP).
    pub(crate) fn set_virtual_flags(&mut self, value: u64) -> Result<(), Stop> {
        self.check_virtual_flags(value)?;
        let vif = if value & Flags::IF.bits() != 0 { Flags::VIF.bits() } else { 0 };
        self.set_rflags(
            value & 0xffff | vif,
            Flags::ARITHMETIC | Flags::DF | Flags::NT | Flags::TF | Flags::VIF,
        );
        Ok(())
    }

    /// The check of [`Cpu::set_virtual_flags`] alone.
    pub(crate) fn check_virtual_flags(&mut self, value: u64) -> Result<(), Stop> {
        let waits = self.system_flags.contains(Flags::VIP) && value & Flags::IF.bits() != 0;
        if waits || value & Flags::TF.bits() != 0 { Err(self.gp0()) } else { Ok(()) }
    }

    /// Whether the task leaves a vector to the virtual-8086 program.
    fn is_redirected(&mut self, vector: u8) -> Result<bool, Stop> {
        if !self.cr4.contains(Cr4::VME) {
            return Ok(false);
        }
        let limit = u64::from(self.tr.limit);
        if limit < MAP_BASE + 1 {
            return Err(self.gp0());
        }
        let map = self.load_task_state(MAP_BASE, 2)?;
        let Some(at) = map.checked_sub(REDIRECTION).map(|at| at + u64::from(vector) / 16 * 2) else {
            return Err(self.gp0());
        };
        if at + 1 > limit {
            return Err(self.gp0());
        }
        Ok(self.load_task_state(at, 2)? >> (vector % 16) & 1 == 0)
    }
}

/// INT n of a virtual-8086 program, where its own handler takes it. Gives whether it did.
pub(super) fn redirect(cpu: &mut Cpu, insn: &Insn, vector: u8) -> Result<bool, Stop> {
    if !cpu.is_redirected(vector)? {
        return Ok(false);
    }
    let inner = cpu.system_flags.iopl() < 3;
    let flags = if inner { cpu.virtual_flags() } else { cpu.rflags() };
    let entry = cpu.load_linear::<u32>(u64::from(vector) * 4)?;
    let mut stack = Stack::current(cpu);
    for value in [flags, u64::from(cpu.segment(SegmentRegister::Cs).selector.0), cpu.next_rip(insn)] {
        stack.push(cpu, 2, value)?;
    }
    stack.set_pointer(cpu);
    cpu.system_flags.remove(Flags::TF | if inner { Flags::VIF } else { Flags::IF });
    let code = cpu.real_segment(SegmentRegister::Cs, (entry >> 16) as u16);
    cpu.set_segment(SegmentRegister::Cs, code);
    cpu.rip = u64::from(entry & 0xffff);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use x86::{Exception, Segment};

    use super::*;
    use crate::testing::*;

    /// A virtual-8086 program at 0x1000:0 whose stack is at 0x2000:0x100, with a redirection bitmap of zeros.
    fn program(iopl: u64) -> Cpu {
        let mut cpu = protected();
        cpu.cr4.insert(Cr4::VME | Cr4::PVI);
        let flags = Flags::from_bits_retain(Flags::VM.bits() | iopl << 12);
        cpu.set_rflags(flags.bits(), Flags::all());
        for register in [SegmentRegister::Cs, SegmentRegister::Ss, SegmentRegister::Ds] {
            let segment = cpu.real_segment(register, 0x1000);
            cpu.set_segment(register, Segment { ..segment });
        }
        cpu.registers.set(4, 0x100);
        cpu.rip = 0;
        cpu.tr.limit = 0x200;
        put(&cpu, TSS + MAP_BASE, 0x88u16);
        put(&cpu, 4 * 0x21, 0x3000_0055u32);
        cpu
    }

    fn top(cpu: &Cpu) -> [u16; 3] {
        std::array::from_fn(|n| get(cpu, 0x10000 + (cpu.registers.get(4) & 0xffff) + 2 * n as u64))
    }

    #[test]
    fn a_redirected_interrupt_stays_in_the_program() {
        let mut cpu = program(0);
        cpu.system_flags.insert(Flags::VIF);
        run(&mut cpu, &[0xcd, 0x21]).unwrap();
        assert!(cpu.mode.is_v86());
        assert_eq!((cpu.rip, cpu.segment(SegmentRegister::Cs).base), (0x55, 0x30000));
        assert_eq!(top(&cpu), [2, 0x1000, 0x3202]);
        assert!(!cpu.system_flags.contains(Flags::VIF));
        run(&mut cpu, &[0xcf]).unwrap();
        assert_eq!((cpu.rip, cpu.system_flags.contains(Flags::VIF)), (2, true));
    }

    #[test]
    fn other_vectors_go_through_the_interrupt_table_or_fault() {
        let mut cpu = program(0);
        put(&cpu, TSS + 0x68 + 4, 1u16 << 1);
        assert_eq!(run(&mut cpu, &[0xcd, 0x21]), Err(Exception::gp(0)));
        let mut cpu = program(3);
        put(&cpu, TSS + 0x68 + 4, 1u16 << 1);
        set_gate(&cpu, 0x21, 3, 0);
        run(&mut cpu, &[0xcd, 0x21]).unwrap();
        assert_eq!((cpu.rip, cpu.cpl()), (handler(0x21), 0));
    }

    #[test]
    fn the_programs_interrupt_flag_is_vif() {
        let mut cpu = program(0);
        run(&mut cpu, &[0xfb]).unwrap();
        assert_eq!(cpu.system_flags & (Flags::IF | Flags::VIF), Flags::VIF);
        run(&mut cpu, &[0x9c]).unwrap();
        assert_eq!(top(&cpu)[0], 0x3202);
        run(&mut cpu, &[0xfa]).unwrap();
        assert_eq!(cpu.system_flags & (Flags::IF | Flags::VIF), Flags::empty());
        run(&mut cpu, &[0x9d]).unwrap();
        assert_eq!(cpu.system_flags & (Flags::IF | Flags::VIF | Flags::IOPL), Flags::VIF);
        cpu.system_flags.insert(Flags::VIP);
        assert_eq!(run(&mut cpu, &[0xfb]), Err(Exception::gp(0)), "an interrupt waits");
        assert_eq!(run(&mut cpu, &[0x66, 0x9c]), Err(Exception::gp(0)), "PUSHFD shows too much");
        let mut cpu = program(0);
        cpu.cr4.remove(Cr4::VME);
        for code in [0xfa, 0xfb, 0x9c, 0x9d, 0xcf] {
            assert_eq!(run(&mut cpu, &[code]), Err(Exception::gp(0)), "{code:#x} without VME");
        }
    }

    #[test]
    fn protected_programs_have_virtual_interrupts_too() {
        let mut cpu = protected();
        cpu.cr4.insert(Cr4::PVI);
        to_user(&mut cpu);
        run(&mut cpu, &[0xfb]).unwrap();
        assert_eq!(cpu.system_flags & (Flags::IF | Flags::VIF), Flags::VIF);
        run(&mut cpu, &[0xfa]).unwrap();
        assert!(!cpu.system_flags.contains(Flags::VIF));
        cpu.cr4.remove(Cr4::PVI);
        assert_eq!(run(&mut cpu, &[0xfa]), Err(Exception::gp(0)));
    }
}
