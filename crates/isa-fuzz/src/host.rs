//! What the host's processor does not have as the guest's model has it: its maker is another than Intel.
#![allow(unsafe_code)] // FXRSTOR and FXSAVE.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::case::{COMPLETED, Outcome};
use crate::layout::Mode;

/// An FXSAVE image.
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Whether Intel made the host's processor, whose manual the guest's model follows.
pub fn is_of_intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        let leaf = __cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == *b"GenuineIntel"
    })
}

/// Why an instruction is another one on the host.
pub fn has_another(instruction: &Instruction, mode: Mode, code: &[u8]) -> Option<&'static str> {
    let features = instruction.cpuid_features();
    let lacks = |feature, present: bool| features.contains(&feature) && !present;
    // Of these the software CPU has handlers.
    if lacks(CpuidFeature::MOVDIRI, has(27, 0))
        || lacks(CpuidFeature::MOVDIR64B, has(28, 0))
        || lacks(CpuidFeature::CLDEMOTE, has(25, 0))
        || lacks(CpuidFeature::SERIALIZE, has(0, 14))
    {
        return Some("is of a feature that this host lacks");
    }
    if is_of_intel() {
        return None;
    }
    let near = instruction.is_jmp_short_or_near()
        || instruction.is_jcc_short_or_near()
        || instruction.is_jmp_near_indirect()
        || instruction.is_call_near()
        || instruction.is_call_near_indirect()
        || instruction.is_loop()
        || instruction.is_loopcc()
        || instruction.is_jcx_short()
        || instruction.mnemonic() == Mnemonic::Ret;
    let long = mode == Mode::Bits64;
    let is_prefix = |byte: u8| {
        matches!(byte, 0x66 | 0x67 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0 | 0xf2 | 0xf3)
            || long && matches!(byte, 0x40..=0x4f)
    };
    let count = code.iter().take_while(|&&byte| is_prefix(byte)).count();
    let has_prefix = |wanted: &dyn Fn(u8) -> bool| code[..count].iter().any(|&byte| wanted(byte));
    let name = format!("{:?}", instruction.code());
    let repeated = has_prefix(&|byte| matches!(byte, 0xf2 | 0xf3));
    Some(if long && near && has_prefix(&|byte| byte == 0x66) {
        "is a near branch with an operand size of 16 bits, which Intel's processors ignore in 64-bit mode"
    } else if name.starts_with("Reservednop") {
        "is a hint with a register operand, which is invalid on AMD's processors"
    } else if instruction.is_loopcc() && repeated {
        "is LOOPE or LOOPNE with a prefix of repetition, which AMD's processors take for its condition"
    } else if instruction.mnemonic() == Mnemonic::Pause && long && has_prefix(&|byte| byte & 0xf1 == 0x41) {
        "is PAUSE with REX.B, which is an exchange on AMD's processors"
    } else if matches!(instruction.mnemonic(), Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss)
        && instruction.op0_register().is_gpr64()
    {
        "loads a far pointer of 64 bits, which AMD's processors do not have"
    } else if !long && name.starts_with("VEX_Kmov") {
        "moves to or from an opmask with VEX.W outside 64-bit mode, which AMD's processors heed"
    } else {
        return None;
    })
}

/// Whether the host has a feature of leaf 7 of CPUID, by its bit in ECX or in EDX; 0 for none.
fn has(ecx: u32, edx: u32) -> bool {
    static LEAF: OnceLock<[u32; 2]> = OnceLock::new();
    let leaf = LEAF.get_or_init(|| {
        let leaf = __cpuid_count(7, 0);
        [leaf.ecx, leaf.edx]
    });
    ecx != 0 && leaf[0] >> ecx & 1 != 0 || edx != 0 && leaf[1] >> edx & 1 != 0
}

/// Whether two outcomes are not to be compared: on the host of another maker all where one raised an exception, for which one
/// an access at a limit, of a vector, through a mask or without alignment raises differs in a hundred corners.
pub fn differs_by_maker(host: &Outcome, ours: &Outcome) -> bool {
    !is_of_intel() && (host.vector != COMPLETED || ours.vector != COMPLETED)
}

/// Whether what a push of a segment register leaves in the upper half of its place is the maker's affair.
pub fn pushes_selector(instruction: &Instruction) -> bool {
    !is_of_intel()
        && instruction.mnemonic() == Mnemonic::Push
        && instruction.op0_register().is_segment_register()
}

/// Whether an instruction that completes may do something else on the host, which a program's end does not show.
pub fn is_unlike_in_programs(instruction: &Instruction) -> bool {
    let in_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let sha = !is_of_intel() && in_memory && format!("{:?}", instruction.mnemonic()).starts_with("Sha");
    // With EVEX.X clear, Zen 4 takes for RSP what it was before the last push or pop.
    let is_stack_pointer = |n| {
        instruction.op_register(n).is_gpr() && instruction.op_register(n).full_register() == Register::RSP
    };
    let stale = !is_of_intel()
        && instruction.code().encoding() == EncodingKind::EVEX
        && (0..instruction.op_count()).any(is_stack_pointer);
    pushes_selector(instruction) || sha || stale
}

/// Whether the host keeps opcode and pointers of the last x87 instruction where no exception waits. AMD's processors do not
/// save or load them then.
pub fn keeps_x87_pointers() -> bool {
    static KEEPS: OnceLock<bool> = OnceLock::new();
    *KEEPS.get_or_init(|| {
        let (mut own, mut from, mut to) = (Image([0; 512]), Image([0; 512]), Image([0; 512]));
        from.0[..2].copy_from_slice(&0x037fu16.to_le_bytes());
        from.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let pointers = 8..24;
        from.0[pointers.clone()].fill(0x12);
        from.0[14..16].fill(0);
        from.0[22..24].fill(0);
        // SAFETY: the images are aligned and good ones; the state in use is put back before Rust goes on.
        unsafe {
            asm!(
                "fxsave64 [{own}]", "fxrstor64 [{from}]", "fxsave64 [{to}]", "fxrstor64 [{own}]",
                own = in(reg) own.0.as_mut_ptr(), from = in(reg) from.0.as_ptr(), to = in(reg) to.0.as_mut_ptr(),
                options(nostack),
            );
        }
        to.0[pointers.clone()] == from.0[pointers]
    })
}
