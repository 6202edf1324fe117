//! Emission of stubs: the host code that runs one guest instruction.
//!
//! A stub is a function of four pointers (general registers, vector registers, memory operand, RFLAGS). It loads what
//! the instruction reads, each register into the host's register of the same name, executes the instruction with its
//! memory operand rebased, and stores what it wrote. Guest RSP lives in another register, because the host needs its
//! own. Nothing in a stub depends on where it lies.

use std::mem::offset_of;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, EncodingKind, IcedError, Instruction, MemoryOperand, OpKind,
    Register,
};

use super::features::Host;
use super::plan::{MxcsrUse, Plan, VectorUse, has_memory};
use super::state::{MXCSR_RESET, VectorRegisters};

/// Why a stub could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoStub;

impl From<IcedError> for NoStub {
    fn from(_: IcedError) -> Self {
        Self
    }
}

const RSP: u32 = 4;
/// Registers that a function may change, in the order in which they are given out.
const SCRATCH: [Register; 9] = [
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RSI,
    Register::RDI,
];
/// Registers that a function must keep.
const PRESERVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// Which host registers hold what.
#[derive(Clone, Copy, Debug)]
struct Allocation {
    /// Host registers that hold guest registers, by number.
    guest: u16,
    /// Where guest RSP lives, if the instruction uses it.
    rsp: Option<Register>,
    gprs: Register,
    vectors: Register,
    memory: Register,
    flags: Register,
    /// Free before the guest's registers are loaded and after they are stored.
    scratch: Register,
}

/// Generates the stub's code.
///
/// # Errors
/// The registers do not suffice, or the rewritten instruction does not decode to what it should be.
pub fn generate(plan: &Plan, host: Host) -> Result<Vec<u8>, NoStub> {
    let allocation = Allocation::new(plan).ok_or(NoStub)?;
    let mut stub = Stub { encoder: Encoder::new(64), plan, host, at: allocation };
    stub.prologue()?;
    stub.load()?;
    stub.execute()?;
    stub.store()?;
    stub.epilogue()?;
    Ok(stub.encoder.take_buffer())
}

impl Allocation {
    fn new(plan: &Plan) -> Option<Self> {
        let mut guest = plan.gprs & !(1 << RSP);
        let rsp = if plan.gprs & 1 << RSP == 0 {
            None
        } else {
            // A register whose low byte needs no REX prefix, should the other operand be a high byte.
            let free = [Register::RAX, Register::RCX, Register::RDX, Register::RBX];
            let chosen = *free.iter().find(|r| guest & 1 << r.number() == 0)?;
            guest |= 1 << chosen.number();
            Some(chosen)
        };
        let mut taken = guest;
        let mut choose = |preferred: &[Register]| {
            let chosen = *preferred.iter().find(|r| taken & 1 << r.number() == 0)?;
            taken |= 1 << chosen.number();
            Some(chosen)
        };
        // Arguments stay where they arrive, or move to a register in which none arrives: RAX, R8 to R11.
        let elsewhere = &SCRATCH[..5];
        let mut place = |own: Register, first: Register| {
            let mut order = vec![own, first];
            order.extend_from_slice(elsewhere);
            choose(&order)
        };
        let memory = if plan.memory_at_rdi() {
            Register::RDI
        } else if plan.has_high_byte() {
            place(Register::RDX, Register::RAX)?
        } else {
            place(Register::RDX, Register::R8)?
        };
        let gprs = if plan.memory_at_rdi() { Register::R8 } else { place(Register::RDI, Register::R8)? };
        let vectors = place(Register::RSI, Register::R9)?;
        let flags = place(Register::RCX, Register::R10)?;
        let pointers = [gprs, vectors, memory, flags];
        let scratch = *SCRATCH.iter().find(|r| !pointers.contains(r))?;
        Some(Self { guest, rsp, gprs, vectors, memory, flags, scratch })
    }

    fn holds_pointer(&self, register: Register) -> bool {
        [self.gprs, self.vectors, self.memory, self.flags].contains(&register)
    }

    /// The host register that holds a guest register, by number.
    fn host(&self, number: u32) -> Register {
        match self.rsp {
            Some(register) if number == RSP => register,
            _ => Register::RAX + number,
        }
    }
}

/// A stub in the making.
struct Stub<'a> {
    encoder: Encoder,
    plan: &'a Plan,
    host: Host,
    at: Allocation,
}

impl Stub<'_> {
    fn emit(&mut self, instruction: Result<Instruction, IcedError>) -> Result<(), NoStub> {
        self.encoder.encode(&instruction?, 0)?;
        Ok(())
    }

    fn prologue(&mut self) -> Result<(), NoStub> {
        for register in PRESERVED {
            if self.at.guest & 1 << register.number() != 0 {
                self.emit(Instruction::with1(Code::Push_r64, register))?;
            }
        }
        let at = self.at;
        // RDI goes first: the memory operand may have to move there.
        for (to, from) in [
            (at.gprs, Register::RDI),
            (at.vectors, Register::RSI),
            (at.memory, Register::RDX),
            (at.flags, Register::RCX),
        ] {
            if to != from {
                self.emit(Instruction::with2(Code::Mov_r64_rm64, to, from))?;
            }
        }
        Ok(())
    }

    fn load(&mut self) -> Result<(), NoStub> {
        if self.plan.x87 {
            // The image's MXCSR is loaded too, and must not fault.
            let mxcsr = vector_field(&self.at, x87_at(24));
            self.emit(Instruction::with2(Code::Mov_rm32_imm32, mxcsr, MXCSR_RESET))?;
            self.emit(Instruction::with1(Code::Fxrstor64_m512byte, vector_field(&self.at, x87_at(0))))?;
        }
        for vector in self.plan.vectors.iter().filter(|vector| vector.load > 0) {
            let code = self.load_code(vector);
            let from = vector_field(&self.at, zmm_at(vector));
            self.emit(Instruction::with2(code, sized(vector.number, vector.load), from))?;
        }
        for mask in bits(u16::from(self.plan.masks_read)) {
            let from = vector_field(&self.at, k_at(mask));
            self.emit(Instruction::with2(Code::VEX_Kmovq_kr_km64, Register::K0 + mask, from))?;
        }
        if self.plan.mxcsr != MxcsrUse::None {
            let from = vector_field(&self.at, offset_of!(VectorRegisters, mxcsr));
            self.emit(Instruction::with1(Code::Ldmxcsr_m32, from))?;
        }
        self.load_flags()?;
        for number in bits(self.plan.gprs) {
            let from = field(self.at.gprs, 8 * number as usize);
            self.emit(Instruction::with2(Code::Mov_r64_rm64, self.at.host(number), from))?;
        }
        Ok(())
    }

    fn load_flags(&mut self) -> Result<(), NoStub> {
        let from = field(self.at.flags, 0);
        if self.plan.flags_read.is_empty() {
            return Ok(());
        } else if self.plan.flags_read == x86::Flags::CF {
            return self.emit(Instruction::with2(Code::Bt_rm32_imm8, from, 0));
        } else if self.at.holds_pointer(Register::RAX) {
            return self.load_flags_by_stack();
        }
        // SAHF does not load OF, but adding 78h to a byte overflows if the byte is 8: OF is bit 3 of the second byte.
        self.emit(Instruction::with2(Code::Mov_r32_rm32, Register::EAX, from))?;
        self.emit(Instruction::with2(Code::Xchg_rm8_r8, Register::AL, Register::AH))?;
        self.emit(Instruction::with2(Code::And_AL_imm8, Register::AL, 8))?;
        self.emit(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x78))?;
        self.emit(Ok(Instruction::with(Code::Sahf)))
    }

    /// POPF takes ten times as long as SAHF.
    fn load_flags_by_stack(&mut self) -> Result<(), NoStub> {
        let scratch = self.at.scratch;
        let narrow = Register::EAX + scratch.number() as u32;
        let arithmetic = x86::Flags::ARITHMETIC.bits() as u32;
        self.emit(Instruction::with2(Code::Mov_r32_rm32, narrow, field(self.at.flags, 0)))?;
        self.emit(Instruction::with2(Code::And_rm32_imm32, narrow, arithmetic))?;
        self.emit(Instruction::with1(Code::Push_r64, scratch))?;
        self.emit(Ok(Instruction::with(Code::Popfq)))
    }

    /// The guest's instruction itself, with other registers and another memory operand. It is decoded again, so that
    /// nothing the guest wrote can become anything but what is on the allow-list.
    fn execute(&mut self) -> Result<(), NoStub> {
        let mut instruction = self.plan.instruction;
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Register => {
                    let register = instruction.op_register(operand);
                    if let (true, Some(to)) =
                        (register.is_gpr() && register.full_register() == Register::RSP, self.at.rsp)
                    {
                        instruction.set_op_register(operand, same_size(register, to));
                    }
                }
                OpKind::Memory => {
                    instruction.set_memory_base(self.at.memory);
                    instruction.set_memory_displ_size(0);
                }
                _ => {}
            }
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&instruction, 0)?;
        let bytes = encoder.take_buffer();
        if !decodes_to(&bytes, &instruction) {
            return Err(NoStub);
        }
        bytes.iter().for_each(|&byte| self.encoder.write_u8(byte));
        Ok(())
    }

    fn store(&mut self) -> Result<(), NoStub> {
        for number in bits(self.plan.gprs_written) {
            let to = field(self.at.gprs, 8 * number as usize);
            self.emit(Instruction::with2(Code::Mov_rm64_r64, to, self.at.host(number)))?;
        }
        self.store_flags()?;
        for vector in self.plan.vectors.iter().filter(|vector| vector.store) {
            let (code, size) = self.store_code(vector);
            let to = vector_field(&self.at, zmm_at(vector));
            self.emit(Instruction::with2(code, to, sized(vector.number, size)))?;
        }
        for mask in bits(u16::from(self.plan.masks_written)) {
            let to = vector_field(&self.at, k_at(mask));
            self.emit(Instruction::with2(Code::VEX_Kmovq_m64_kr, to, Register::K0 + mask))?;
        }
        if self.plan.mxcsr != MxcsrUse::None {
            let to = vector_field(&self.at, offset_of!(VectorRegisters, mxcsr));
            self.emit(Instruction::with1(Code::Stmxcsr_m32, to))?;
        }
        Ok(())
    }

    fn store_flags(&mut self) -> Result<(), NoStub> {
        if self.plan.flags_written.is_empty() {
            return Ok(());
        }
        let (to, written) = (field(self.at.flags, 0), self.plan.flags_written.bits() as u32);
        let flags = if self.at.holds_pointer(Register::RAX) {
            self.emit(Ok(Instruction::with(Code::Pushfq)))?;
            self.emit(Instruction::with1(Code::Pop_r64, self.at.scratch))?;
            self.at.scratch
        } else {
            self.emit(Instruction::with1(Code::Seto_rm8, Register::AL))?;
            self.emit(Ok(Instruction::with(Code::Lahf)))?;
            self.emit(Instruction::with2(Code::Xchg_rm8_r8, Register::AL, Register::AH))?;
            self.emit(Instruction::with2(Code::Shl_rm8_imm8, Register::AH, 3))?;
            Register::RAX
        };
        let narrow = Register::EAX + flags.number() as u32;
        self.emit(Instruction::with2(Code::And_rm32_imm32, narrow, written))?;
        self.emit(Instruction::with2(Code::And_rm64_imm32, to, !(written as i32)))?;
        self.emit(Instruction::with2(Code::Or_rm64_r64, to, flags))
    }

    /// Stores the x87 state and leaves the host's units as Rust code expects them.
    fn epilogue(&mut self) -> Result<(), NoStub> {
        if self.plan.x87 {
            self.emit(Instruction::with1(Code::Fxsave64_m512byte, vector_field(&self.at, x87_at(0))))?;
            self.emit(Ok(Instruction::with(Code::Fninit)))?;
        }
        if self.plan.mxcsr != MxcsrUse::None {
            let from = vector_field(&self.at, offset_of!(VectorRegisters, host_mxcsr));
            self.emit(Instruction::with1(Code::Ldmxcsr_m32, from))?;
        }
        if self.plan.wide {
            self.emit(Ok(Instruction::with(Code::VEX_Vzeroupper)))?;
        }
        for register in PRESERVED.into_iter().rev() {
            if self.at.guest & 1 << register.number() != 0 {
                self.emit(Instruction::with1(Code::Pop_r64, register))?;
            }
        }
        self.emit(Ok(Instruction::with(Code::Retnq)))
    }

    fn load_code(&self, vector: &VectorUse) -> Code {
        let legacy = self.plan.instruction.code().encoding() == EncodingKind::Legacy;
        match (vector.load, vector.number >= 16) {
            (..=16, _) if legacy => Code::Movups_xmm_xmmm128,
            (..=16, false) => Code::VEX_Vmovups_xmm_xmmm128,
            (..=16, true) => Code::EVEX_Vmovups_xmm_k1z_xmmm128,
            (17..=32, false) => Code::VEX_Vmovups_ymm_ymmm256,
            (17..=32, true) => Code::EVEX_Vmovups_ymm_k1z_ymmm256,
            _ => Code::EVEX_Vmovups_zmm_k1z_zmmm512,
        }
    }

    /// A legacy instruction keeps the upper part of a register: only the low part is stored. All others zero it: as much
    /// is stored as the host has.
    fn store_code(&self, _vector: &VectorUse) -> (Code, u8) {
        if self.plan.instruction.code().encoding() == EncodingKind::Legacy {
            (Code::Movups_xmmm128_xmm, 16)
        } else if self.host.avx512 {
            (Code::EVEX_Vmovups_zmmm512_k1z_zmm, 64)
        } else {
            (Code::VEX_Vmovups_ymmm256_ymm, 32)
        }
    }
}

/// Whether code decodes to exactly one instruction, the expected one.
fn decodes_to(bytes: &[u8], expected: &Instruction) -> bool {
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    let decoded = decoder.decode();
    let operands = |i: &Instruction| -> Vec<_> {
        (0..i.op_count())
            .map(|n| match i.op_kind(n) {
                OpKind::Register => (OpKind::Register, u64::from(i.op_register(n) as u32)),
                OpKind::Memory => (OpKind::Memory, u64::from(i.memory_base() as u32)),
                kind => (kind, i.try_immediate(n).unwrap_or(0)),
            })
            .collect()
    };
    let memory = !has_memory(expected)
        || decoded.memory_index() == Register::None
            && decoded.memory_displacement64() == 0
            && decoded.is_broadcast() == expected.is_broadcast();
    !decoded.is_invalid()
        && decoder.position() == bytes.len()
        && decoded.code() == expected.code()
        && operands(&decoded) == operands(expected)
        && memory
        && decoded.op_mask() == expected.op_mask()
        && decoded.zeroing_masking() == expected.zeroing_masking()
        && decoded.rounding_control() == expected.rounding_control()
        && decoded.suppress_all_exceptions() == expected.suppress_all_exceptions()
        && !decoded.has_lock_prefix()
}

/// The numbers of the bits that are set.
fn bits(set: u16) -> impl Iterator<Item = u32> {
    (0..16).filter(move |bit| set & 1 << bit != 0)
}

/// The part of the 64-bit register `to` that `like` is of its own.
fn same_size(like: Register, to: Register) -> Register {
    let first = match like.size() {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + to.number() as u32
}

/// The vector register of `size` bytes with this number.
fn sized(number: u8, size: u8) -> Register {
    let first = match size {
        ..=16 => Register::XMM0,
        17..=32 => Register::YMM0,
        _ => Register::ZMM0,
    };
    first + u32::from(number)
}

fn field(base: Register, offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, offset as i64)
}

fn vector_field(at: &Allocation, offset: usize) -> MemoryOperand {
    field(at.vectors, offset)
}

fn zmm_at(vector: &VectorUse) -> usize {
    offset_of!(VectorRegisters, zmm) + 64 * usize::from(vector.number)
}

fn k_at(number: u32) -> usize {
    offset_of!(VectorRegisters, k) + 8 * number as usize
}

fn x87_at(offset: usize) -> usize {
    offset_of!(VectorRegisters, x87) + offset
}
