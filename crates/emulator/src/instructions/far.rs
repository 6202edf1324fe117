//! Control transfers to other segments: JMP, CALL and RET far, through call gates too. SDM vol. 2.

use x86::descriptor::Attributes;
use x86::{Segment, SegmentRegister, Selector, SystemType, Vector};

use super::segment::{Found, Stack, load_far_pointer};
use super::task::{Cause, Task, transfer};
use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::mmu::View;

/// A call gate, checked.
struct CallGate {
    selector: Selector,
    offset: u64,
    /// Bytes of each value on the stack.
    size: u8,
    /// Values copied from the caller's stack to an inner one.
    parameters: u8,
}

/// Where a far JMP or CALL goes.
enum Target {
    /// To code at the same privilege level.
    Code(Segment),
    /// Through a gate.
    Gate(CallGate),
    /// To another task.
    Task(Task),
}

impl Cpu {
    /// The code segment that RET far or IRET returns to, checked; its accessed flag is set.
    pub(crate) fn return_target(&mut self, selector: Selector) -> Result<Segment, Stop> {
        if selector.is_null() {
            return Err(self.gp0());
        }
        let found = self.find_descriptor(selector, Vector::GeneralProtection)?;
        let dpl = found.descriptor.dpl();
        let privilege = if found.is_conforming() { dpl <= selector.rpl() } else { dpl == selector.rpl() };
        if selector.rpl() < self.cpl() || !found.is_code() || !privilege || self.is_malformed_code(&found) {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        self.set_descriptor_type(&found, 1)?;
        Ok(found.segment(selector))
    }

    /// 64-bit code with 32-bit operands is a combination that long mode reserves.
    fn is_malformed_code(&self, found: &Found) -> bool {
        self.is_long() && found.attributes().contains(Attributes::L | Attributes::DB)
    }

    /// What the selector of a far JMP or CALL refers to.
    fn far_target(&mut self, selector: Selector) -> Result<Target, Stop> {
        if selector.is_null() {
            return Err(self.gp0());
        }
        let found = self.find_descriptor(selector, Vector::GeneralProtection)?;
        if !found.descriptor.is_code_or_data() {
            return match self.far_task(selector, &found)? {
                Some(task) => Ok(Target::Task(task)),
                None => self.call_gate(selector, &found).map(Target::Gate),
            };
        }
        let dpl = found.descriptor.dpl();
        let privilege = if found.is_conforming() {
            dpl <= self.cpl()
        } else {
            dpl == self.cpl() && selector.rpl() <= self.cpl()
        };
        if !found.is_code() || !privilege || self.is_malformed_code(&found) {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        self.set_descriptor_type(&found, 1)?;
        Ok(Target::Code(found.segment(Selector(selector.0 & !3 | u16::from(self.cpl())))))
    }

    /// Checks a call gate.
    fn call_gate(&mut self, selector: Selector, found: &Found) -> Result<CallGate, Stop> {
        let descriptor = found.descriptor;
        let long = self.is_long();
        let size = match (descriptor.system_type(), long) {
            (Some(SystemType::CallGate), true) => 8,
            (Some(SystemType::CallGate), false) => 4,
            (Some(SystemType::CallGate16), false) => 2,
            _ => return Err(self.selector_fault(Vector::GeneralProtection, selector)),
        };
        let mut offset = u64::from(descriptor.gate_offset() & if size == 2 { 0xffff } else { 0xffff_ffff });
        if long {
            let Some(address) = self.descriptor_address(selector, 16) else {
                return Err(self.selector_fault(Vector::GeneralProtection, selector));
            };
            let high = self.load_as::<u64>(View::Supervisor, address.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(self.selector_fault(Vector::GeneralProtection, selector));
            }
            offset |= high << 32;
        }
        if descriptor.dpl() < self.cpl() || selector.rpl() > descriptor.dpl() {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        let parameters = if long { 0 } else { descriptor.gate_parameters() };
        Ok(CallGate { selector: descriptor.gate_selector(), offset, size, parameters })
    }

    /// The code segment behind a call gate and the privilege level there.
    fn gate_code(&mut self, gate: &CallGate, jump: bool) -> Result<(Segment, u8), Stop> {
        let selector = gate.selector;
        if selector.is_null() {
            return Err(self.gp0());
        }
        let found = self.find_descriptor(selector, Vector::GeneralProtection)?;
        let dpl = found.descriptor.dpl();
        let is_64 = found.attributes() & (Attributes::L | Attributes::DB) == Attributes::L;
        let privilege = if jump && !found.is_conforming() { dpl == self.cpl() } else { dpl <= self.cpl() };
        if !found.is_code() || !privilege || self.is_long() && !is_64 {
            return Err(self.selector_fault(Vector::GeneralProtection, selector));
        }
        if !found.is_present() {
            return Err(self.selector_fault(Vector::SegmentNotPresent, selector));
        }
        let cpl = if found.is_conforming() { self.cpl() } else { dpl };
        let segment = found.segment(Selector(selector.0 & !3 | u16::from(cpl)));
        self.check_entry(&segment, gate.offset)?;
        self.set_descriptor_type(&found, 1)?;
        Ok((segment, cpl))
    }

    fn enter(&mut self, code: Segment, rip: u64) -> Result<(), Stop> {
        self.set_segment(SegmentRegister::Cs, code);
        self.rip = if self.mode.is_64() { rip } else { rip & 0xffff_ffff };
        Err(Stop::EndBlock)
    }
}

fn jump(cpu: &mut Cpu, insn: &Insn, selector: Selector, offset: u64) -> Result<(), Stop> {
    if cpu.mode.is_real_or_v86() {
        let code = cpu.real_segment(SegmentRegister::Cs, selector.0);
        cpu.check_entry(&code, offset)?;
        return cpu.enter(code, offset);
    }
    match cpu.far_target(selector)? {
        Target::Code(code) => {
            cpu.check_entry(&code, offset)?;
            cpu.enter(code, offset)
        }
        Target::Gate(gate) => {
            let (code, _) = cpu.gate_code(&gate, true)?;
            cpu.enter(code, gate.offset)
        }
        Target::Task(task) => transfer(cpu, insn, &task, Cause::Jump),
    }
}

fn call(cpu: &mut Cpu, insn: &Insn, selector: Selector, offset: u64) -> Result<(), Stop> {
    let back = [u64::from(cpu.segment(SegmentRegister::Cs).selector.0), cpu.next_rip(insn)];
    let (code, rip, size) = if cpu.mode.is_real_or_v86() {
        (cpu.real_segment(SegmentRegister::Cs, selector.0), offset, insn.size)
    } else {
        match cpu.far_target(selector)? {
            Target::Code(code) => (code, offset, insn.size),
            Target::Gate(gate) => {
                let (code, cpl) = cpu.gate_code(&gate, false)?;
                if cpl < cpu.cpl() {
                    return call_inner(cpu, &gate, code, cpl, back);
                }
                (code, gate.offset, gate.size)
            }
            Target::Task(task) => return transfer(cpu, insn, &task, Cause::Call),
        }
    };
    cpu.check_entry(&code, rip)?;
    // What is pushed goes where the target's mode has its stack.
    let mut stack = Stack::current(cpu);
    stack.change_mode(cpu, &code);
    for value in back {
        stack.push(cpu, size, value)?;
    }
    stack.set_pointer(cpu);
    cpu.enter(code, rip)
}

/// A call through a gate to an inner level, on that level's stack.
fn call_inner(cpu: &mut Cpu, gate: &CallGate, code: Segment, cpl: u8, back: [u64; 2]) -> Result<(), Stop> {
    let old = [u64::from(cpu.segment(SegmentRegister::Ss).selector.0), cpu.registers.get(4)];
    let (segment, mut stack) = if gate.size == 8 {
        let pointer = cpu.load_task_state(4 + 8 * u64::from(cpl), 8)?;
        let null = super::segment::null_segment(Selector(u16::from(cpl)), cpl);
        (null, Stack::flat(cpu, pointer, cpl))
    } else {
        let (segment, pointer) = cpu.inner_stack(cpl)?;
        (segment, Stack::within(cpu, segment, pointer, cpl))
    };
    let mut parameters = [0; 31];
    let mut caller = Stack::current(cpu);
    let count = usize::from(gate.parameters);
    for parameter in &mut parameters[..count] {
        *parameter = caller.pop(cpu, gate.size)?;
    }
    for value in old {
        stack.push(cpu, gate.size, value)?;
    }
    // The last pushed of the parameters lies lowest on either stack.
    for &value in parameters[..count].iter().rev() {
        stack.push(cpu, gate.size, value)?;
    }
    for value in back {
        stack.push(cpu, gate.size, value)?;
    }
    cpu.set_segment(SegmentRegister::Ss, segment);
    cpu.set_segment(SegmentRegister::Cs, code);
    stack.set_pointer(cpu);
    cpu.rip = gate.offset;
    Err(Stop::EndBlock)
}

/// JMP ptr16:16/32: the selector is the instruction's second immediate.
pub fn jmp_far_pointer(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    jump(cpu, insn, Selector(insn.aux as u16), insn.imm)
}

/// JMP m16:16/32/64.
pub fn jmp_far_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (selector, offset) = load_far_pointer(cpu, insn)?;
    jump(cpu, insn, selector, offset)
}

/// CALL ptr16:16/32: the selector is the instruction's second immediate.
pub fn call_far_pointer(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    call(cpu, insn, Selector(insn.aux as u16), insn.imm)
}

/// CALL m16:16/32/64.
pub fn call_far_memory(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let (selector, offset) = load_far_pointer(cpu, insn)?;
    call(cpu, insn, selector, offset)
}

/// RET far, with the bytes of parameters to drop as its immediate.
pub fn ret_far(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let parameters = insn.imm & 0xffff;
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, insn.size)?;
    let selector = Selector(stack.pop(cpu, insn.size)? as u16);
    if cpu.mode.is_real_or_v86() {
        stack.skip(parameters);
        let code = cpu.real_segment(SegmentRegister::Cs, selector.0);
        cpu.check_entry(&code, rip)?;
        stack.set_pointer(cpu);
        return cpu.enter(code, rip);
    }
    let code = cpu.return_target(selector)?;
    cpu.check_entry(&code, rip)?;
    if selector.rpl() == cpu.cpl() {
        stack.change_mode(cpu, &code);
        stack.skip(parameters);
        stack.set_pointer(cpu);
        return cpu.enter(code, rip);
    }
    stack.skip(parameters);
    let pointer = stack.pop(cpu, insn.size)?;
    let ss = Selector(stack.pop(cpu, insn.size)? as u16);
    let null_allowed = cpu.is_long() && code.attributes.contains(Attributes::L);
    let segment = cpu.checked_stack(ss, selector.rpl(), null_allowed)?;
    cpu.return_to(code, segment, pointer.wrapping_add(parameters));
    cpu.drop_inner_segments(selector.rpl());
    cpu.rip = if cpu.mode.is_64() { rip } else { rip & 0xffff_ffff };
    Err(Stop::EndBlock)
}

#[cfg(test)]
mod tests {
    use x86::Exception;

    use super::*;
    use crate::testing::*;

    /// A 64-bit call gate at [`FREE`] for CPL 3.
    fn set_call_gate(cpu: &Cpu, selector: u16, offset: u64) {
        let low = offset & 0xffff | u64::from(selector) << 16 | 0xec << 40 | (offset >> 16 & 0xffff) << 48;
        put(cpu, GDT + u64::from(FREE), low);
        put(cpu, GDT + u64::from(FREE) + 8, offset >> 32);
    }

    /// CALL FAR [RAX] with an offset of `size` bytes in memory.
    fn call_through(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Exception> {
        put(cpu, 0x5000, offset as u32);
        put(cpu, 0x5004, selector);
        cpu.registers.set(0, 0x5000);
        run(cpu, &[0xff, 0x18])
    }

    #[test]
    fn a_far_jump_changes_between_64_bit_and_compatibility_mode() {
        let mut cpu = long();
        put(&cpu, 0x5000, 0x1234u32);
        put(&cpu, 0x5004, KERNEL_CODE32);
        cpu.registers.set(0, 0x5000);
        run(&mut cpu, &[0xff, 0x28]).unwrap();
        assert_eq!((cpu.rip, cpu.mode.code_size(), cpu.is_long()), (0x1234, 32, true));
        run(&mut cpu, &[0xea, 0x00, 0x20, 0, 0, KERNEL_CODE64 as u8, 0]).unwrap();
        assert_eq!((cpu.rip, cpu.mode.code_size()), (0x2000, 64));
    }

    #[test]
    fn a_far_call_from_32_bit_to_64_bit_code_pushes_without_a_segment() {
        let mut cpu = long();
        put(&cpu, 0x5000, 0u32);
        put(&cpu, 0x5004, KERNEL_CODE32);
        cpu.registers.set(0, 0x5000);
        run(&mut cpu, &[0xff, 0x28]).unwrap();
        let stack = *cpu.segment(SegmentRegister::Ss);
        cpu.set_segment(SegmentRegister::Ss, Segment { base: 0x10_0000, limit: 0xfff, ..stack });
        cpu.registers.set(4, 0x6000);
        run(&mut cpu, &[0x9a, 0x00, 0x20, 0, 0, KERNEL_CODE64 as u8, 0]).unwrap();
        assert_eq!((cpu.registers.get(4), get::<u32>(&cpu, 0x5ffc)), (0x5ff8, KERNEL_CODE32.into()));
    }

    #[test]
    fn a_far_call_and_return_come_back() {
        let mut cpu = long();
        call_through(&mut cpu, KERNEL_CODE64, 0x2000).unwrap();
        assert_eq!((cpu.rip, cpu.registers.get(4)), (0x2000, STACK - 8));
        run(&mut cpu, &[0xcb]).unwrap();
        assert_eq!((cpu.rip, cpu.registers.get(4)), (CODE + 2, STACK));
    }

    #[test]
    fn a_call_gate_leads_to_the_kernel_and_its_stack_and_back() {
        let mut cpu = long();
        to_user(&mut cpu);
        set_call_gate(&cpu, KERNEL_CODE64, 0x10_2000);
        call_through(&mut cpu, FREE | 3, 0).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(4)), (0x10_2000, 0, KERNEL_STACK - 32));
        assert_eq!(stack::<4>(&cpu, 8), [CODE + 2, USER_CODE64.into(), STACK, USER_DATA.into()]);
        run(&mut cpu, &[0x48, 0xcb]).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(4)), (CODE + 2, 3, STACK));
    }

    #[test]
    fn a_32_bit_call_gate_copies_parameters() {
        let mut cpu = protected();
        to_user(&mut cpu);
        let gate = 0x2000 | u64::from(KERNEL_CODE32) << 16 | 2 << 32 | 0xec << 40 | 0x10 << 48;
        put(&cpu, GDT + u64::from(FREE), gate);
        cpu.push(0x1111u32).unwrap();
        cpu.push(0x2222u32).unwrap();
        call_through(&mut cpu, FREE | 3, 0).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(4)), (0x10_2000, 0, KERNEL_STACK - 24));
        let frame = stack::<6>(&cpu, 4);
        assert_eq!(frame, [CODE + 2, USER_CODE32.into(), 0x2222, 0x1111, STACK - 8, USER_DATA.into()]);
        run(&mut cpu, &[0xca, 8, 0]).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.registers.get(4)), (CODE + 2, 3, STACK));
    }

    #[test]
    fn conforming_code_runs_at_the_callers_privilege() {
        let mut cpu = long();
        to_user(&mut cpu);
        call_through(&mut cpu, CONFORMING, 0x2000).unwrap();
        assert_eq!((cpu.cpl(), cpu.segment(SegmentRegister::Cs).selector.0), (3, CONFORMING | 3));
    }

    #[test]
    fn code_of_another_privilege_is_refused() {
        let mut cpu = long();
        let gp = |selector: u16| Err(Exception::gp(u32::from(selector & !3)));
        assert_eq!(call_through(&mut cpu, USER_CODE64, 0), gp(USER_CODE64));
        assert_eq!(call_through(&mut cpu, KERNEL_DATA, 0), gp(KERNEL_DATA));
        assert_eq!(call_through(&mut cpu, 0, 0), gp(0));
        to_user(&mut cpu);
        assert_eq!(call_through(&mut cpu, KERNEL_CODE64, 0), gp(KERNEL_CODE64));
        assert_eq!((cpu.rip, cpu.registers.get(4)), (CODE, STACK));
    }

    #[test]
    fn a_return_cannot_go_inwards() {
        let mut cpu = long();
        to_user(&mut cpu);
        cpu.push(u64::from(KERNEL_CODE64)).unwrap();
        cpu.push(0x2000u64).unwrap();
        assert_eq!(run(&mut cpu, &[0x48, 0xcb]), Err(Exception::gp(u32::from(KERNEL_CODE64))));
    }

    #[test]
    fn real_mode_calls_change_the_base_alone() {
        let mut cpu = real();
        run(&mut cpu, &[0x9a, 0x34, 0x12, 0x00, 0x20]).unwrap();
        assert_eq!((cpu.rip, cpu.segment(SegmentRegister::Cs).base), (0x1234, 0x20000));
        run(&mut cpu, &[0xcb]).unwrap();
        assert_eq!((cpu.rip, cpu.segment(SegmentRegister::Cs).base), (0x7c05, 0));
    }
}
