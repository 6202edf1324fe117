//! VMCALL as a guest of KVM knows it. Linux, *Documentation/virt/kvm/x86/hypercalls.rst*.

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};

/// KVM_HC_VAPIC_POLL_IRQ: lets pending interrupts in, which the end of the block does anyway.
const POLL_IRQ: u64 = 1;
/// -KVM_ENOSYS: no such call. Which calls there are the feature leaf of CPUID tells, and it offers none.
const NO_SUCH_CALL: u64 = 1000u64.wrapping_neg();
/// -KVM_EPERM: hypercalls are for the kernel.
const NOT_ALLOWED: u64 = 1u64.wrapping_neg();

/// VMCALL: the call's number is in RAX, and its result goes there.
pub fn vmcall(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let size = if cpu.mode.is_64() { 8 } else { 4 };
    let result = match cpu.gpr_sized(0, size) {
        _ if cpu.cpl() != 0 => NOT_ALLOWED,
        POLL_IRQ => 0,
        _ => NO_SUCH_CALL,
    };
    cpu.registers.set(0, if size == 8 { result } else { result & 0xffff_ffff });
    cpu.end_block(insn)
}
