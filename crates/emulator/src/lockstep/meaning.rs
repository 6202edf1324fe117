//! What the manual says of an instruction's effects, as far as a comparison has to know: which flags it leaves undefined,
//! and where it stores.

use iced_x86::{
    Decoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};
use x86::Flags;

use crate::mode::Mode;

/// Bits of [`Meaning::kind`].
pub mod kind {
    /// It stores to its memory operand.
    pub const OPERAND: u8 = 1;
    /// It stores below the stack pointer.
    pub const STACK: u8 = 2;
    /// It stores where RDI points.
    pub const STRING: u8 = 4;
    /// It uses x87 or vector registers.
    pub const VECTOR: u8 = 8;
    /// It may leave all flags alone, by its count.
    pub const BY_COUNT: u8 = 16;
}

/// An instruction's effects.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meaning {
    /// Arithmetic flags that it changes, undefined ones too.
    pub modified: u16,
    /// Arithmetic flags that are undefined after it.
    pub undefined: u16,
    /// [`kind`].
    pub kind: u8,
    /// Bytes that it stores to its operand, 64 at most.
    pub len: u8,
}

impl Meaning {
    /// The flags that are undefined after it where `before` were before it.
    #[inline]
    pub fn undefined_after(self, before: u16) -> u16 {
        let kept = if self.kind & kind::BY_COUNT != 0 { before } else { before & !self.modified };
        kept | self.undefined
    }
}

/// Appends the meanings of `count` instructions that stand in a row.
pub fn meanings(mode: Mode, rip: u64, bytes: &[u8], count: u32, options: u32, to: &mut Vec<Meaning>) {
    let mut decoder = Decoder::with_ip(mode.code_size(), bytes, rip, options);
    let mut factory = InstructionInfoFactory::new();
    let mut instruction = Instruction::default();
    for _ in 0..count {
        decoder.decode_out(&mut instruction);
        to.push(meaning(&instruction, &mut factory));
    }
}

fn meaning(i: &Instruction, factory: &mut InstructionInfoFactory) -> Meaning {
    let info = factory.info(i);
    let writes = |access: OpAccess| !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead);
    let mut kind = 0;
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory && writes(info.op_access(n))) {
        kind |= kind::OPERAND;
    }
    for memory in info.used_memory().iter().filter(|memory| writes(memory.access())) {
        match memory.base().full_register() {
            Register::RSP if i.is_stack_instruction() => kind |= kind::STACK,
            Register::RDI if i.is_string_instruction() => kind |= kind::STRING,
            _ => {}
        }
    }
    let general = |register: Register| {
        register.is_gpr() || register.is_segment_register() || register.is_ip() || register == Register::None
    };
    if info.used_registers().iter().any(|used| !general(used.register())) || i.op_count() == 0 {
        kind |= kind::VECTOR;
    }
    let fixed = (0..i.op_count()).any(|n| matches!(i.op_kind(n), OpKind::Immediate8));
    if is_counted(i.mnemonic()) && !fixed {
        kind |= kind::BY_COUNT;
    }
    let len = match i.memory_size().size() {
        0 => 64,
        size => size.min(64) as u8,
    };
    Meaning { modified: flags(i.rflags_modified()), undefined: flags(i.rflags_undefined()), kind, len }
}

fn is_counted(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd)
}

/// iced's names for the flags as bits of RFLAGS.
fn flags(bits: u32) -> u16 {
    let names = [
        (RflagsBits::CF, Flags::CF),
        (RflagsBits::PF, Flags::PF),
        (RflagsBits::AF, Flags::AF),
        (RflagsBits::ZF, Flags::ZF),
        (RflagsBits::SF, Flags::SF),
        (RflagsBits::OF, Flags::OF),
    ];
    let named = names.iter().filter(|(name, _)| bits & name != 0);
    named.fold(0, |all, (_, flag)| all | flag.bits() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::VectorMode;

    fn of(bytes: &[u8]) -> Meaning {
        let mode = Mode::new(64, true, true, false, 0, VectorMode(0));
        let mut all = Vec::new();
        meanings(mode, 0, bytes, 1, 0, &mut all);
        all[0]
    }

    #[test]
    fn stores_are_told_from_loads_and_by_what_points_at_them() {
        let stores = |bytes: &[u8]| of(bytes).kind & (kind::OPERAND | kind::STACK | kind::STRING);
        assert_eq!(stores(&[0x48, 0x89, 0x03]), kind::OPERAND); // mov %rax, (%rbx)
        assert_eq!(stores(&[0x48, 0x8b, 0x03]), 0); // mov (%rbx), %rax
        assert_eq!(stores(&[0x3b, 0x03]), 0); // cmp (%rbx), %eax
        assert_eq!(stores(&[0x50]), kind::STACK); // push %rax
        assert_eq!(stores(&[0x58]), 0); // pop %rax
        assert_eq!(stores(&[0xe8, 0, 0, 0, 0]), kind::STACK); // call
        assert_eq!(stores(&[0xf3, 0xa4]), kind::STRING); // rep movsb
        assert_eq!(of(&[0x0f, 0x29, 0x03]).len, 16); // movaps %xmm0, (%rbx)
    }

    #[test]
    fn a_multiplication_leaves_flags_undefined_until_another_instruction_defines_them() {
        let multiply = of(&[0xf7, 0xe1]); // mul %ecx
        let undefined = multiply.undefined_after(0);
        assert_eq!(undefined, (Flags::SF | Flags::ZF | Flags::AF | Flags::PF).bits() as u16);
        assert_eq!(of(&[0x01, 0xc8]).undefined_after(undefined), 0); // add %ecx, %eax
        assert_eq!(of(&[0x89, 0xc8]).undefined_after(undefined), undefined); // mov %ecx, %eax
        // shl %cl, %eax may have a count of 0, which defines nothing.
        assert_eq!(of(&[0xd3, 0xe0]).undefined_after(undefined) & undefined, undefined);
    }

    #[test]
    fn vector_and_x87_instructions_are_known() {
        let vector = |bytes: &[u8]| of(bytes).kind & kind::VECTOR != 0;
        assert!(vector(&[0x0f, 0x28, 0xc1]) && vector(&[0xd9, 0xe8]) && vector(&[0xd8, 0xc1]));
        assert!(!vector(&[0x01, 0xc8]) && !vector(&[0x48, 0x89, 0x03]) && !vector(&[0x75, 0x00]));
    }
}
