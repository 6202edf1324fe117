//! Which instructions are copied into translated code.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

use crate::undefined::Undefined;

/// Whether an instruction only computes on general registers, flags and one memory operand, in a form that may be
/// copied with its registers renamed.
pub fn is_copied(i: &Instruction) -> bool {
    use Mnemonic::*;
    let operands_fit = (0..i.op_count()).all(|n| match i.op_kind(n) {
        OpKind::Register => i.op_register(n).is_gpr(),
        OpKind::Memory => true,
        kind => crate::instructions::shape::is_immediate(kind),
    });
    let known = matches!(i.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !known || !operands_fit || i.has_rep_prefix() && legacy(i) || i.has_repne_prefix() {
        return false;
    }
    let bit_in_memory =
        i.op_count() == 2 && i.op_kind(0) == OpKind::Memory && i.op_kind(1) == OpKind::Register;
    match i.mnemonic() {
        Bt | Bts | Btr | Btc => !bit_in_memory,
        // Whole turns by an immediate change no flag, but for OF on some hosts.
        Rcl | Rcr if i.rflags_modified() == 0 => false,
        Mov | Movzx | Movsx | Movsxd | Lea | Add | Adc | Sub | Sbb | And | Or | Xor | Cmp | Test | Inc
        | Dec | Neg | Not | Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd | Imul | Mul
        | Cmpxchg16b | Bsf | Bsr | Bswap | Xchg | Xadd | Cmpxchg | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo
        | Clc | Stc | Cmc | Popcnt | Lzcnt | Tzcnt | Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Mulx
        | Pdep | Pext | Rorx | Sarx | Shlx | Shrx | Adcx | Adox | Movbe | Crc32 | Seto | Setno | Setb
        | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp | Setl | Setge | Setle | Setg
        | Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns | Cmovp
        | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => true,
        _ => false,
    }
}

/// Instructions for which REP is part of the opcode.
fn legacy(i: &Instruction) -> bool {
    !matches!(i.mnemonic(), Mnemonic::Popcnt | Mnemonic::Lzcnt | Mnemonic::Tzcnt)
}

/// Whether the host may leave undefined flags as they are after an instruction that overwrites all others; see
/// [`Undefined::products_keep_flags`].
pub fn leaves_flags(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Mul | Mnemonic::Imul) && Undefined::of_host().products_keep_flags
}

/// Shifts whose count may be zero, which leaves the flags alone, and instructions that may leave undefined flags as
/// they are.
pub fn keeps_flags(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Shl | Sal | Shr | Sar => {
            let last = i.op_count() - 1;
            let wide = i.op_count() > 0 && i.op_kind(0) == OpKind::Register && i.op_register(0).size() == 8;
            let mask = if wide { 63 } else { 31 };
            !(crate::instructions::shape::is_immediate(i.op_kind(last)) && i.immediate(last) & mask != 0)
                && i.op_kind(last) != OpKind::Immediate8_2nd
        }
        Rol | Ror | Rcl | Rcr | Shld | Shrd | Div | Idiv => true,
        Lzcnt | Tzcnt => Undefined::of_host().counts_keep_of,
        _ => false,
    }
}
