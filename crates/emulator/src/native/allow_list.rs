//! The allow-list: which instructions the host may execute for the guest.
//!
//! It is derived by rule from what the decoder's tables say of each encoding, and pinned in
//! `tests/golden/native_allow_list.txt`, so that an upgrade of the decoder cannot widen it. An instruction is listed if
//! it only computes: it reads and writes general, x87, mask and vector registers, arithmetic flags and at most one plain
//! memory operand. The tables' own notion of privilege is not enough for that (WRPKRU, LAR and XLATB pass it), hence
//! features are named one by one, and integer instructions mnemonic by mnemonic.

use std::sync::OnceLock;

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind, OpKind};

use super::features::{host_executes, is_base, is_computing};

/// Whether the host may execute this instruction for the guest: it is on the allow-list, in a form that keeps to its
/// explicit operand, and the host has its features.
pub fn is_listed(instruction: &Instruction) -> bool {
    static LISTED: OnceLock<Vec<bool>> = OnceLock::new();
    let listed = LISTED.get_or_init(|| Code::values().map(runs_here).collect());
    listed[instruction.code() as usize] && !instruction.has_lock_prefix() && !is_bit_string(instruction)
}

/// Whether the host has every feature that a listed encoding needs.
pub(super) fn runs_here(code: Code) -> bool {
    only_computes(code) && code.cpuid_features().iter().all(|&feature| host_executes(feature))
}

/// The rule: whether an encoding only computes, on whatever host has it.
pub(super) fn only_computes(code: Code) -> bool {
    let op_code = code.op_code();
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX);
    let plain = op_code.is_instruction()
        && encoding
        && op_code.mode64()
        && op_code.cpl3()
        && !op_code.fwait()
        && !op_code.may_require_cpl0()
        && !op_code.is_input_output()
        && !op_code.is_stack_instruction()
        && !code.is_privileged()
        && code.flow_control() == FlowControl::Next;
    plain
        && op_code.op_kinds().iter().all(|&kind| is_plain_operand(kind))
        && has_computing_features(code)
        && !is_refused(code.mnemonic())
}

/// BT, BTS, BTR and BTC with a register as bit offset reach memory beyond the operand.
fn is_bit_string(instruction: &Instruction) -> bool {
    let bit_test =
        matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    bit_test && instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Register
}

fn has_computing_features(code: Code) -> bool {
    let features = code.cpuid_features();
    if features.iter().all(|&feature| is_base(feature)) {
        return is_integer_arithmetic(code.mnemonic());
    }
    features.iter().all(|&feature| is_computing(feature) || is_base(feature))
}

/// Registers, immediates and a plain memory operand. Among what is missing: segment, control, debug and bound
/// registers, ports, string operands, absolute offsets, and the vector of addresses of a gather or scatter.
fn is_plain_operand(kind: OpCodeOperandKind) -> bool {
    is_register_operand(kind) || is_memory_operand(kind) || is_immediate(kind)
}

/// Operands that are memory, or may be. `seg_rDI` is that of MASKMOVQ and MASKMOVDQU.
pub(super) fn is_memory_operand(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        mem | seg_rDI
            | r8_or_mem
            | r16_or_mem
            | r32_or_mem
            | r64_or_mem
            | mm_or_mem
            | xmm_or_mem
            | ymm_or_mem
            | zmm_or_mem
            | k_or_mem
    )
}

fn is_register_operand(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    let general = matches!(
        kind,
        r8_reg | r8_opcode | r16_reg | r16_rm | r16_opcode | r32_reg | r32_rm | r32_opcode | r32_vvvv
    ) || matches!(kind, r64_reg | r64_rm | r64_opcode | r64_vvvv | al | cl | ax | eax | rax);
    let mask = matches!(kind, k_reg | k_rm | k_vvvv | kp1_reg);
    let vector = matches!(
        kind,
        mm_reg | mm_rm | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4
    ) || matches!(kind, zmm_reg | zmm_rm | zmm_vvvv);
    general || mask || vector || matches!(kind, st0 | sti_opcode)
}

fn is_immediate(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        imm8 | imm8_const_1 | imm8sex16 | imm8sex32 | imm8sex64 | imm16 | imm32 | imm32sex64 | imm64
    )
}

/// Instructions of computing features that do something else: they order or fetch memory.
fn is_refused(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Sfence | Lfence | Mfence | Pause | Nop | Lea)
        || matches!(mnemonic, Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2)
        || matches!(mnemonic, Prefetch | Prefetchw | Prefetchwt1 | Clflush | Monitor | Mwait)
}

/// The integer instructions of every x86-64 processor that only compute. DIV and IDIV fault on the host; XCHG, XADD and
/// CMPXCHG are atomic or may be. FWAIT is as old, and only looks for x87 exceptions.
fn is_integer_arithmetic(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let arithmetic = matches!(
        mnemonic,
        Adc | Add | And | Cmp | Dec | Imul | Inc | Mul | Neg | Not | Or | Sbb | Sub | Test | Xor
    );
    let bits = matches!(
        mnemonic,
        Bsf | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Rcl
            | Rcr
            | Rol
            | Ror
            | Sal
            | Sar
            | Shl
            | Shld
            | Shr
            | Shrd
    );
    let widening = matches!(mnemonic, Cbw | Cdq | Cdqe | Cqo | Cwd | Cwde | Movsx | Movsxd | Movzx);
    arithmetic || bits || widening || is_conditional(mnemonic) || mnemonic == Wait
}

fn is_conditional(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let moves = matches!(
        mnemonic,
        Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne | Cmovno | Cmovnp
    ) || matches!(mnemonic, Cmovns | Cmovo | Cmovp | Cmovs);
    let sets = matches!(
        mnemonic,
        Seta | Setae | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp
    ) || matches!(mnemonic, Setns | Seto | Setp | Sets);
    moves || sets
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write as _;

    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn the_list_is_the_golden_file() {
        let mut lines = BTreeMap::<String, Vec<String>>::new();
        for code in Code::values().filter(|&code| only_computes(code)) {
            lines.entry(format!("{:?}", code.mnemonic())).or_default().push(format!("{code:?}"));
        }
        let mut list = String::new();
        for (mnemonic, mut codes) in lines {
            codes.sort();
            writeln!(list, "{mnemonic}: {}", codes.join(" ")).unwrap();
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/native_allow_list.txt");
        if std::env::var_os("RINGSIDE_BLESS").is_some() {
            std::fs::write(path, &list).unwrap();
        }
        let golden = std::fs::read_to_string(path).unwrap();
        let differing = list.lines().zip(golden.lines()).find(|(new, old)| new != old);
        assert!(list == golden, "the allow-list changed (RINGSIDE_BLESS=1 accepts it): {differing:?}");
    }

    const NEVER: &[(&str, &[u8])] = &[
        ("hlt", &[0xf4]),
        ("in al, dx", &[0xec]),
        ("out dx, al", &[0xee]),
        ("mov rax, cr0", &[0x0f, 0x20, 0xc0]),
        ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
        ("popfq", &[0x9d]),
        ("pushfq", &[0x9c]),
        ("sti", &[0xfb]),
        ("cli", &[0xfa]),
        ("std", &[0xfd]),
        ("cpuid", &[0x0f, 0xa2]),
        ("rdmsr", &[0x0f, 0x32]),
        ("wrmsr", &[0x0f, 0x30]),
        ("rdtsc", &[0x0f, 0x31]),
        ("rdrand eax", &[0x0f, 0xc7, 0xf0]),
        ("rdpid rax", &[0xf3, 0x0f, 0xc7, 0xf8]),
        ("wrfsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xd0]),
        ("wrgsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xd8]),
        ("rdfsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
        ("wrpkru", &[0x0f, 0x01, 0xef]),
        ("rdpkru", &[0x0f, 0x01, 0xee]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("xsetbv", &[0x0f, 0x01, 0xd1]),
        ("xlatb", &[0xd7]),
        ("vgatherdps", &[0xc4, 0xe2, 0x6d, 0x92, 0x04, 0x08]),
        ("vpscatterdd", &[0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x08]),
        ("lar eax, ecx", &[0x0f, 0x02, 0xc1]),
        ("lsl eax, ecx", &[0x0f, 0x03, 0xc1]),
        ("verr ax", &[0x0f, 0x00, 0xe0]),
        ("str eax", &[0x0f, 0x00, 0xc8]),
        ("sldt eax", &[0x0f, 0x00, 0xc0]),
        ("smsw eax", &[0x0f, 0x01, 0xe0]),
        ("sgdt [rax]", &[0x0f, 0x01, 0x00]),
        ("lfs rax, [rax]", &[0x48, 0x0f, 0xb4, 0x00]),
        ("lgs rax, [rax]", &[0x48, 0x0f, 0xb5, 0x00]),
        ("lss rax, [rax]", &[0x48, 0x0f, 0xb2, 0x00]),
        ("div ecx", &[0xf7, 0xf1]),
        ("idiv ecx", &[0xf7, 0xf9]),
        ("fxsave [rax]", &[0x0f, 0xae, 0x00]),
        ("xrstor [rax]", &[0x0f, 0xae, 0x28]),
        ("mov ds, eax", &[0x8e, 0xd8]),
        ("mov al, [moffs]", &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("movsb", &[0xa4]),
        ("push rax", &[0x50]),
        ("syscall", &[0x0f, 0x05]),
        ("int3", &[0xcc]),
        ("ud2", &[0x0f, 0x0b]),
        ("jmp", &[0xeb, 0]),
        ("clflush [rax]", &[0x0f, 0xae, 0x38]),
        ("mfence", &[0x0f, 0xae, 0xf0]),
        ("lock add [rax], eax", &[0xf0, 0x01, 0x00]),
        ("xchg [rax], eax", &[0x87, 0x00]),
        ("cmpxchg16b [rax]", &[0x48, 0x0f, 0xc7, 0x08]),
        ("xbegin", &[0xc7, 0xf8, 0, 0, 0, 0]),
        ("vmcall", &[0x0f, 0x01, 0xc1]),
        ("lea rax, [rcx]", &[0x48, 0x8d, 0x01]),
        ("movdir64b rax, [rcx]", &[0x66, 0x0f, 0x38, 0xf8, 0x01]),
        ("aad (invalid in 64-bit mode)", &[0xd5, 0x0a]),
    ];

    #[test]
    fn what_privilege_filters_let_pass_is_never_listed() {
        for (name, bytes) in NEVER {
            assert!(!is_listed(&decode(bytes)), "{name}");
        }
    }

    #[test]
    fn bit_tests_reach_beyond_a_memory_operand_only_with_a_register_offset() {
        assert!(!is_listed(&decode(&[0x48, 0x0f, 0xa3, 0x08]))); // bt [rax], rcx
        assert!(!is_listed(&decode(&[0x0f, 0xab, 0x08]))); // bts [rax], ecx
        assert!(!is_listed(&decode(&[0x0f, 0xb3, 0x08]))); // btr [rax], ecx
        assert!(!is_listed(&decode(&[0x0f, 0xbb, 0x08]))); // btc [rax], ecx
        assert!(is_listed(&decode(&[0x0f, 0xa3, 0xc8]))); // bt eax, ecx
        assert!(is_listed(&decode(&[0x0f, 0xba, 0x20, 0x05]))); // bt dword [rax], 5
    }

    #[test]
    fn computing_instructions_are_listed() {
        for bytes in [
            &[0x0f, 0x58, 0xc1][..],         // addps xmm0, xmm1
            &[0xd9, 0xe8],                   // fld1
            &[0xd9, 0x38],                   // fnstcw [rax]
            &[0x0f, 0xae, 0x10],             // ldmxcsr [rax]
            &[0x66, 0x0f, 0xf7, 0xc1],       // maskmovdqu xmm0, xmm1
            &[0xf2, 0x0f, 0x38, 0xf0, 0xc4], // crc32 eax, ah
            &[0x0f, 0xc8],                   // bswap eax
            &[0x9b],                         // wait
        ] {
            assert!(is_listed(&decode(bytes)), "{bytes:x?}");
        }
    }
}
