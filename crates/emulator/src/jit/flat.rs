//! Flat 32-bit code: what is different about it, for those who translate it.
//!
//! Its instructions are those of 64-bit code with 32-bit addresses, but for a few whose encodings mean something else
//! there. Addresses are computed with 32 bits, and no segment adds anything to them but FS and GS. The stack and the
//! targets of branches are as wide as addresses. The upper halves of the registers are not visible: what writes to a
//! register clears its upper half, as the interpreter does.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::mode::Mode;

/// An instruction of 32-bit code in a form that 64-bit code has too, where there is one.
pub fn widened(mut instruction: Instruction) -> Instruction {
    let code = match instruction.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    };
    instruction.set_code(code);
    instruction
}

/// Whether 64-bit code does the same with an instruction that only computes: not what clears registers that 32-bit code
/// cannot name.
pub fn is_the_same(i: &Instruction) -> bool {
    !matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall)
}

/// Whether every access to an instruction's memory operand is within its segment, and 32 bits wide as an address.
pub fn reaches(i: &Instruction, mode: Mode) -> bool {
    let narrow = [i.memory_base(), i.memory_index()].into_iter().any(Register::is_gpr16);
    let whole = match i.memory_segment() {
        Register::FS => mode.has_whole_fs(),
        Register::GS => mode.has_whole_gs(),
        // Nothing is written through it, and it may be unreadable.
        Register::CS => false,
        _ => true,
    };
    !narrow && whole
}

/// The kind of operand that a direct branch of a mode has.
pub fn near_branch(mode: Mode) -> OpKind {
    if mode.is_64() { OpKind::NearBranch64 } else { OpKind::NearBranch32 }
}
