//! Random instances of an encoding, made by rule from its operand kinds.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register,
    RoundingControl,
};

use super::Random;
use crate::native::allow_list::is_memory_operand;

/// Whether the operand that may be memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Register,
    Memory,
}

/// Whether an encoding has a form.
pub fn has_form(code: Code, form: Form) -> bool {
    use OpCodeOperandKind::*;
    let kinds = code.op_code().op_kinds();
    match form {
        Form::Memory => kinds.iter().any(|&kind| is_memory_operand(kind)),
        Form::Register => !kinds.iter().any(|kind| matches!(kind, mem | seg_rDI)),
    }
}

/// A random instance. Its memory operand is at `address`, which the encoder must reach relative to RIP `rip`.
pub fn sample(code: Code, form: Form, random: &mut Random, address: u64, rip: u64) -> Option<Instruction> {
    (0..64).find_map(|_| {
        let instruction = attempt(code, form, random, address)?;
        let mut encoder = Encoder::new(64);
        encoder.encode(&instruction, rip).ok()?;
        let bytes = encoder.take_buffer();
        let decoded = Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE).decode();
        (decoded.code() == code).then_some(decoded)
    })
}

fn attempt(code: Code, form: Form, random: &mut Random, address: u64) -> Option<Instruction> {
    let op_code = code.op_code();
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let mut in_memory = false;
    for (i, &kind) in op_code.op_kinds().iter().enumerate() {
        let i = i as u32;
        if kind == OpCodeOperandKind::seg_rDI {
            instruction.set_op_kind(i, OpKind::MemorySegRDI);
        } else if is_memory_operand(kind) && form == Form::Memory {
            in_memory = true;
            instruction.set_op_kind(i, OpKind::Memory);
            instruction.set_memory_base(Register::RIP);
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(address);
        } else if let Some((kind, value)) = immediate(kind, random) {
            instruction.set_op_kind(i, kind);
            instruction.try_set_immediate_u64(i, value).ok()?;
        } else {
            instruction.set_op_kind(i, OpKind::Register);
            instruction.set_op_register(i, register(kind, code.encoding(), random)?);
        }
    }
    if op_code.can_use_op_mask_register() && (op_code.require_op_mask_register() || !random.chance(4)) {
        instruction.set_op_mask(Register::K1 + random.below(7) as u32);
        instruction.set_zeroing_masking(op_code.can_use_zeroing_masking() && random.chance(2));
    }
    if in_memory {
        instruction.set_is_broadcast(op_code.can_broadcast() && random.chance(2));
    } else if op_code.can_use_rounding_control() && random.chance(2) {
        instruction.set_rounding_control(random.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]));
    } else if op_code.can_suppress_all_exceptions() && random.chance(2) {
        instruction.set_suppress_all_exceptions(true);
    }
    Some(instruction)
}

fn immediate(kind: OpCodeOperandKind, random: &mut Random) -> Option<(OpKind, u64)> {
    use OpCodeOperandKind as Kind;
    let byte = random.next() as i8;
    let signed = i64::from(byte) as u64;
    Some(match kind {
        Kind::imm8 => (OpKind::Immediate8, u64::from(byte as u8)),
        Kind::imm8_const_1 => (OpKind::Immediate8, 1),
        Kind::imm8sex16 => (OpKind::Immediate8to16, signed),
        Kind::imm8sex32 => (OpKind::Immediate8to32, signed),
        Kind::imm8sex64 => (OpKind::Immediate8to64, signed),
        Kind::imm16 => (OpKind::Immediate16, random.next() & 0xffff),
        Kind::imm32 => (OpKind::Immediate32, random.next() & 0xffff_ffff),
        Kind::imm32sex64 => (OpKind::Immediate32to64, random.next() as i32 as i64 as u64),
        Kind::imm64 => (OpKind::Immediate64, random.next()),
        _ => return None,
    })
}

fn register(kind: OpCodeOperandKind, encoding: EncodingKind, random: &mut Random) -> Option<Register> {
    use OpCodeOperandKind::*;
    let vectors = if encoding == EncodingKind::EVEX { 32 } else { 16 };
    let (first, count) = match kind {
        r8_or_mem | r8_reg | r8_opcode => {
            let registers: Vec<_> = Register::values().filter(|register| register.is_gpr8()).collect();
            return Some(random.pick(&registers));
        }
        r16_or_mem | r16_reg | r16_rm | r16_opcode => (Register::AX, 16),
        r32_or_mem | r32_reg | r32_rm | r32_opcode | r32_vvvv => (Register::EAX, 16),
        r64_or_mem | r64_reg | r64_rm | r64_opcode | r64_vvvv => (Register::RAX, 16),
        mm_or_mem | mm_reg | mm_rm => (Register::MM0, 8),
        xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 => (Register::XMM0, vectors),
        ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 => (Register::YMM0, vectors),
        zmm_or_mem | zmm_reg | zmm_rm | zmm_vvvv => (Register::ZMM0, vectors),
        k_or_mem | k_reg | k_rm | k_vvvv => (Register::K0, 8),
        sti_opcode => (Register::ST0, 8),
        st0 => (Register::ST0, 1),
        al => (Register::AL, 1),
        cl => (Register::CL, 1),
        ax => (Register::AX, 1),
        eax => (Register::EAX, 1),
        rax => (Register::RAX, 1),
        _ => return Option::None,
    };
    Some(first + random.below(count) as u32)
}
