//! From guest bytes to [`Insn`]s.

use iced_x86::{Decoder, DecoderError, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::Cpu;
use crate::insn::{FLAT, Insn, flag};
use crate::instructions::{self, shape::Shape, shape::is_immediate};
use crate::registers::NONE;
use crate::width::HIGH_BYTE;

/// Instructions in a block, at most.
pub const MOST: usize = 64;

/// Bytes of an instruction, at most.
pub const LONGEST: usize = 15;

/// What decoding a run of bytes gave.
pub struct Decoded {
    /// The bytes that the instructions take.
    pub len: usize,
    /// Whether the bytes ended in the middle of the first instruction.
    pub truncated: bool,
}

impl Cpu {
    /// Decodes instructions at `rip` from `bytes` until one ends the block, the bytes end, or there are `most`.
    pub fn decode(&mut self, rip: u64, bytes: &[u8], most: usize, insns: &mut Vec<Insn>) -> Decoded {
        let code_size = self.mode.code_size();
        let mut decoder = Decoder::with_ip(code_size, bytes, rip, self.wires.model.decoder_options());
        let mut instruction = Instruction::default();
        let first = insns.len();
        let mut len = 0;
        while insns.len() - first < most && decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid()
                && decoder.last_error() == DecoderError::NoMoreBytes
                && bytes.len() - len < LONGEST
            {
                return Decoded { len, truncated: insns.len() == first };
            }
            let end = decoder.position();
            let row = if instruction.is_invalid() && end - len >= LONGEST {
                instructions::too_long()
            } else {
                instructions::row(self, &instruction)
            };
            let mut insn = translate(&instruction, code_size, &row);
            insn.offset = len as u16;
            insn.len = (end - len) as u8;
            insn.number = (insns.len() - first) as u8;
            insns.push(insn);
            len = end;
            if row.ends_block {
                break;
            }
        }
        Decoded { len, truncated: false }
    }
}

/// Fills in the operands.
fn translate(instruction: &Instruction, code_size: u32, row: &instructions::Chosen) -> Insn {
    let mut insn = Insn::new(row.run);
    insn.aux = row.aux;
    insn.size = row.size;
    insn.mnemonic = instruction.mnemonic() as u16;
    insn.flags = prefixes(instruction);
    if instruction.is_stack_instruction() {
        insn.flags |= flag::STACK;
    }
    if code_size != 64 {
        insn.flags |= flag::CHECKED;
    }
    insn.address_shift = address_shift(instruction, code_size);
    let mut numbers = [0u8; 3];
    for n in 0..instruction.op_count().min(3) {
        match instruction.op_kind(n) {
            OpKind::Register => numbers[n as usize] = number(instruction.op_register(n)),
            OpKind::Memory => memory(instruction, code_size, &mut insn),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                insn.imm = instruction.near_branch_target();
                // With four levels, the smallest canonical addresses; the handler knows how many there are.
                if !x86::paging::is_canonical(insn.imm, 48) {
                    insn.flags |= flag::CHECKED;
                }
            }
            OpKind::FarBranch16 => {
                insn.imm = u64::from(instruction.far_branch16());
                insn.aux = u32::from(instruction.far_branch_selector());
            }
            OpKind::FarBranch32 => {
                insn.imm = u64::from(instruction.far_branch32());
                insn.aux = u32::from(instruction.far_branch_selector());
            }
            OpKind::Immediate8_2nd => insn.aux = u32::from(instruction.immediate8_2nd()),
            kind if is_immediate(kind) => insn.imm = instruction.immediate(n),
            _ => string_segment(instruction, code_size, &mut insn),
        }
    }
    [insn.r1, insn.r2, insn.r3] = numbers;
    if instruction.mnemonic() == Mnemonic::Xlatb {
        string_segment(instruction, code_size, &mut insn);
    }
    insn
}

fn prefixes(instruction: &Instruction) -> u8 {
    let flag = |set: bool, bit: u8| if set { bit } else { 0 };
    flag(instruction.has_lock_prefix(), flag::LOCK)
        | flag(instruction.has_rep_prefix(), flag::REP)
        | flag(instruction.has_repne_prefix(), flag::REPNE)
}

/// The memory operand of a string instruction: only its segment is told.
fn string_segment(instruction: &Instruction, code_size: u32, insn: &mut Insn) {
    insn.segment = segment(instruction.memory_segment(), code_size);
    if matches!(instruction.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
        insn.base = 7;
    }
}

fn memory(instruction: &Instruction, code_size: u32, insn: &mut Insn) {
    insn.disp = instruction.memory_displacement64();
    // iced folds RIP into the displacement.
    insn.base = match instruction.memory_base() {
        Register::None | Register::RIP | Register::EIP => NONE,
        base => number(base),
    };
    insn.index = match instruction.memory_index() {
        Register::None => NONE,
        index => number(index),
    };
    insn.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    insn.segment = segment(instruction.memory_segment(), code_size);
}

/// In 64-bit mode only FS and GS have a base.
fn segment(register: Register, code_size: u32) -> u8 {
    match (code_size, register) {
        (64, Register::FS) => 4,
        (64, Register::GS) => 5,
        (64, _) => FLAT,
        (_, Register::ES) => 0,
        (_, Register::CS) => 1,
        (_, Register::SS) => 2,
        (_, Register::FS) => 4,
        (_, Register::GS) => 5,
        _ => 3,
    }
}

fn address_shift(instruction: &Instruction, code_size: u32) -> u8 {
    use OpKind::*;
    for n in 0..instruction.op_count() {
        match instruction.op_kind(n) {
            Memory => return explicit_shift(instruction, code_size),
            MemorySegSI | MemorySegDI | MemoryESDI => return 48,
            MemorySegESI | MemorySegEDI | MemoryESEDI => return 32,
            MemorySegRSI | MemorySegRDI | MemoryESRDI => return 0,
            _ => {}
        }
    }
    // LOOP, JCXZ and XLATB: by the address-size prefix, which the code tells.
    use iced_x86::Code::*;
    match instruction.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX
        | Loope_rel8_32_CX | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 48,
        Jecxz_rel8_16 | Jecxz_rel8_32 | Jecxz_rel8_64 | Loop_rel8_16_ECX | Loop_rel8_32_ECX
        | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX | Loope_rel8_64_ECX
        | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX => 32,
        _ => 0,
    }
}

fn explicit_shift(instruction: &Instruction, code_size: u32) -> u8 {
    let of_size = |bytes: usize| match bytes {
        2 => 48,
        4 => 32,
        _ => 0,
    };
    let registers = [instruction.memory_base(), instruction.memory_index()];
    match registers.iter().find(|&&r| r != Register::None && !r.is_vector_register()) {
        Some(Register::EIP) => 32,
        Some(Register::RIP) => 0,
        Some(register) => of_size(register.size()),
        // A bare displacement: 2 bytes of it mean 16-bit addresses; 8 or a sign-extended 4 mean 64.
        None => match (code_size, instruction.memory_displ_size()) {
            (_, 2) => 48,
            (64, 4) => 32,
            (64, _) => 0,
            _ => 32,
        },
    }
}

/// A register's number in its class; from 32 on AH, CH, DH, BH.
pub fn number(register: Register) -> u8 {
    match register {
        Register::AH => HIGH_BYTE,
        Register::CH => HIGH_BYTE + 1,
        Register::DH => HIGH_BYTE + 2,
        Register::BH => HIGH_BYTE + 3,
        // iced numbers the byte registers as they are encoded: SPL to DIL after AH to BH.
        Register::SPL | Register::BPL | Register::SIL | Register::DIL => {
            4 + (register as u8 - Register::SPL as u8)
        }
        register if register.is_gpr8() && register as u8 >= Register::R8L as u8 => {
            8 + (register as u8 - Register::R8L as u8)
        }
        register => register.number() as u8,
    }
}

/// The operand size in bytes as handlers want it: of the data, of what goes on the stack, or of a far pointer's offset.
pub fn operand_size(instruction: &Instruction, shape: &Shape) -> u8 {
    use Mnemonic::*;
    let by_code = (instruction.op_code().operand_size() / 8) as u8;
    let memory = instruction.memory_size().size() as u8;
    let has_memory = instruction.op_kind(0) == OpKind::Memory && instruction.op_count() > 0;
    match instruction.mnemonic() {
        Sysret | Sysexit => 4,
        Sysretq | Sysexitq => 8,
        Enter | Leave | Retf | Ret | Iret | Iretd | Iretq | Pusha | Pushad | Popa | Popad | Lgdt | Lidt
            if by_code != 0 =>
        {
            by_code
        }
        Call | Jmp if instruction.is_call_far_indirect() || instruction.is_jmp_far_indirect() => {
            memory.saturating_sub(2)
        }
        Call | Jmp if instruction.op_kind(0) == OpKind::FarBranch16 => 2,
        Call | Jmp if instruction.op_kind(0) == OpKind::FarBranch32 => 4,
        _ => match instruction.stack_pointer_increment().unsigned_abs() as u8 {
            size @ (2 | 4 | 8) if instruction.is_stack_instruction() => size,
            _ if by_code != 0 && !has_memory && no_sized_operand(instruction) => by_code,
            _ => shape.size,
        },
    }
}

/// Whether neither a register nor memory tells the size.
fn no_sized_operand(instruction: &Instruction) -> bool {
    use OpKind::*;
    (0..instruction.op_count()).all(|n| {
        is_immediate(instruction.op_kind(n))
            || matches!(instruction.op_kind(n), NearBranch16 | NearBranch32 | NearBranch64)
    })
}
