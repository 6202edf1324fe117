//! What the operands of an instruction look like: by this a table row picks the instance of its handler.

use iced_x86::{Instruction, OpKind, Register};

/// Registers, memory and immediates in the order of the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// No explicit operand, or one that is implied.
    None,
    /// One register.
    Reg,
    /// One memory operand.
    Mem,
    /// One immediate.
    Imm,
    /// Register, register.
    RegReg,
    /// Register, memory.
    RegMem,
    /// Memory, register.
    MemReg,
    /// Register, immediate.
    RegImm,
    /// Memory, immediate.
    MemImm,
}

/// An instruction's operands as a handler is chosen by them.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Which kinds of operands.
    pub form: Form,
    /// The operand size in bytes: the first operand's, or the instruction's.
    pub size: u8,
    /// The size of the second operand where it differs (MOVZX, shifts by CL).
    pub source_size: u8,
    /// LOCK, or an XCHG with memory, which is locked always.
    pub lock: bool,
    /// Whether the second operand is the register CL.
    pub by_cl: bool,
    /// Whether there is a third operand that is an immediate.
    pub third_immediate: bool,
}

impl Shape {
    /// Of a decoded instruction. `code_size` is 16, 32 or 64.
    pub fn of(insn: &Instruction, code_size: u32) -> Self {
        let kind = |n: u32| (n < insn.op_count()).then(|| insn.op_kind(n));
        let form = match (kind(0), kind(1)) {
            (None, _) => Form::None,
            (Some(OpKind::Register), None) => Form::Reg,
            (Some(OpKind::Memory), None) => Form::Mem,
            (Some(k), None) if is_immediate(k) => Form::Imm,
            (Some(OpKind::Register), Some(OpKind::Register)) => Form::RegReg,
            (Some(OpKind::Register), Some(OpKind::Memory)) => Form::RegMem,
            (Some(OpKind::Memory), Some(OpKind::Register)) => Form::MemReg,
            (Some(OpKind::Register), Some(k)) if is_immediate(k) => Form::RegImm,
            (Some(OpKind::Memory), Some(k)) if is_immediate(k) => Form::MemImm,
            _ => Form::None,
        };
        let memory_size = insn.memory_size().size() as u8;
        let size_of = |n: u32| match kind(n) {
            Some(OpKind::Register) => insn.op_register(n).size() as u8,
            Some(OpKind::Memory) => memory_size,
            Some(k) if is_string(k) => memory_size,
            _ => 0,
        };
        Self {
            form,
            size: match size_of(0) {
                0 => (code_size / 8) as u8,
                size => size,
            },
            source_size: size_of(1),
            lock: insn.has_lock_prefix(),
            by_cl: kind(1) == Some(OpKind::Register) && insn.op_register(1) == Register::CL
                || insn.op_count() == 3
                    && kind(2) == Some(OpKind::Register)
                    && insn.op_register(2) == Register::CL,
            third_immediate: kind(2).is_some_and(is_immediate),
        }
    }
}

/// Whether an operand is an immediate.
pub fn is_immediate(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        Immediate8
            | Immediate16
            | Immediate32
            | Immediate64
            | Immediate8to16
            | Immediate8to32
            | Immediate8to64
            | Immediate32to64
            | Immediate8_2nd
    )
}

/// Whether an operand is a string instruction's memory.
fn is_string(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        MemorySegSI
            | MemorySegESI
            | MemorySegRSI
            | MemorySegDI
            | MemorySegEDI
            | MemorySegRDI
            | MemoryESDI
            | MemoryESEDI
            | MemoryESRDI
    )
}

/// Picks a generic handler's instance by the operand size: `by_size!(size, name, Parameter)`.
macro_rules! by_size {
    ($size:expr, $name:ident $(, $arg:ty)?) => {
        match $size {
            1 => $name::<$($arg,)? u8> as $crate::insn::Handler,
            2 => $name::<$($arg,)? u16>,
            4 => $name::<$($arg,)? u32>,
            _ => $name::<$($arg,)? u64>,
        }
    };
}
/// The same without bytes.
macro_rules! by_size_from_16 {
    ($size:expr, $name:ident $(, $arg:ty)?) => {
        match $size {
            2 => $name::<$($arg,)? u16> as $crate::insn::Handler,
            4 => $name::<$($arg,)? u32>,
            _ => $name::<$($arg,)? u64>,
        }
    };
}
pub(super) use {by_size, by_size_from_16};
