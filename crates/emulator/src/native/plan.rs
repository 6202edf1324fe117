//! What a stub for an instruction has to load, to execute and to store.

use iced_x86::{
    CodeSize, EncodingKind, Instruction, InstructionInfo, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits, RoundingControl,
};
use x86::Flags;

use super::memory_use::{MemoryUse, is_memory};

/// Bytes of a vector register.
const ZMM: u8 = 64;

/// A vector register that an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorUse {
    /// Its number, 0 to 31.
    pub number: u8,
    /// How many of its bytes to load before; 0 for none.
    pub load: u8,
    /// Whether it is written.
    pub store: bool,
}

/// What MXCSR has to do with an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MxcsrUse {
    /// Nothing.
    None,
    /// It decides the result and collects exceptions, but none is ever raised: the complex products of AVX512-FP16,
    /// approximations, and what suppresses them (`{sae}`).
    Collects,
    /// It decides the result, collects exceptions, and has them raised.
    Raises,
}

/// Everything that the stub's emission needs to know.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The instruction in canonical form ([`canonical`]).
    pub instruction: Instruction,
    /// General registers read or written in any part, by number.
    pub gprs: u16,
    /// Those of them that are written.
    pub gprs_written: u16,
    /// Vector registers.
    pub vectors: Vec<VectorUse>,
    /// Opmask registers that are read, by number.
    pub masks_read: u8,
    /// Those that are written.
    pub masks_written: u8,
    /// Flags that must be loaded.
    pub flags_read: Flags,
    /// Flags that may change.
    pub flags_written: Flags,
    /// Whether it uses x87 or MMX state.
    pub x87: bool,
    /// Whether pending x87 exceptions are raised first.
    pub waits: bool,
    /// What MXCSR has to do with it.
    pub mxcsr: MxcsrUse,
    /// Whether it may leave the upper parts of vector registers dirty.
    pub wide: bool,
    /// The memory operand.
    pub memory: Option<MemoryUse>,
}

/// The instruction with whatever does not matter to its stub taken out: where its memory operand is, redundant
/// prefixes, the mode it came from. Instructions with equal canonical forms share a stub.
pub fn canonical(instruction: &Instruction) -> Instruction {
    let mut canonical = *instruction;
    canonical.set_code_size(CodeSize::Code64);
    canonical.set_has_rep_prefix(false);
    canonical.set_has_repne_prefix(false);
    canonical.set_has_xacquire_prefix(false);
    canonical.set_has_xrelease_prefix(false);
    canonical.set_segment_prefix(Register::None);
    for operand in 0..canonical.op_count() {
        match canonical.op_kind(operand) {
            OpKind::Memory => {
                canonical.set_memory_base(Register::None);
                canonical.set_memory_index(Register::None);
                canonical.set_memory_index_scale(1);
                canonical.set_memory_displ_size(0);
                canonical.set_memory_displacement64(0);
            }
            OpKind::MemorySegDI | OpKind::MemorySegEDI => {
                canonical.set_op_kind(operand, OpKind::MemorySegRDI);
            }
            _ => {}
        }
    }
    canonical
}

impl Plan {
    /// Plans the stub of an instruction in canonical form.
    pub fn new(instruction: Instruction, factory: &mut InstructionInfoFactory) -> Self {
        let info = factory.info(&instruction);
        let mut plan = Self {
            instruction,
            gprs: 0,
            gprs_written: 0,
            vectors: Vec::new(),
            masks_read: 0,
            masks_written: 0,
            flags_read: flags(instruction.rflags_read()),
            flags_written: flags(instruction.rflags_modified()),
            x87: is_x87(&instruction),
            waits: false,
            mxcsr: mxcsr_use(&instruction),
            wide: false,
            memory: MemoryUse::of(&instruction, info),
        };
        plan.add_registers(info);
        let wait = instruction.mnemonic() == Mnemonic::Wait;
        plan.waits = wait || plan.x87 && !instruction.op_code().is_fpu_no_wait();
        let operands = (0..instruction.op_count()).map(|i| instruction.op_register(i));
        plan.wide = instruction.code().encoding() != EncodingKind::Legacy
            && (operands.into_iter().any(|r| r.is_ymm() || r.is_zmm())
                || plan.vectors.iter().any(|v| v.load > 16));
        if matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
            // AMD's processors set OF after whole turns too.
            plan.flags_written |= Flags::CF | Flags::OF;
        }
        if keeps_undefined_flags(&instruction) {
            plan.flags_read |= plan.flags_written;
        }
        plan
    }

    /// Whether the instruction's memory operand is at RDI, which its encoding does not let one choose.
    pub fn memory_at_rdi(&self) -> bool {
        (0..self.instruction.op_count()).any(|i| self.instruction.op_kind(i) == OpKind::MemorySegRDI)
    }

    /// Whether an operand is AH, CH, DH or BH, which no instruction with a REX prefix can name.
    pub fn has_high_byte(&self) -> bool {
        (0..self.instruction.op_count()).any(|i| {
            matches!(
                self.instruction.op_register(i),
                Register::AH | Register::CH | Register::DH | Register::BH
            )
        })
    }

    fn add_registers(&mut self, info: &InstructionInfo) {
        let implied_rdi = self.memory_at_rdi();
        for used in info.used_registers() {
            let (register, access) = (used.register(), used.access());
            if register.is_gpr() {
                let number = register.full_register().number();
                if implied_rdi && number == 7 {
                    continue;
                }
                self.gprs |= 1 << number;
                self.gprs_written |= u16::from(writes(access)) << number;
            } else if register.is_vector_register() {
                self.add_vector(register, access);
            } else if register.is_k() {
                let number = register.number();
                self.masks_read |= u8::from(access != OpAccess::Write) << number;
                self.masks_written |= u8::from(writes(access)) << number;
            } else if register.is_st() || register.is_mm() {
                self.x87 = true;
            }
        }
    }

    /// Whatever is not simply overwritten is loaded, as wide as it is used; a conditional write keeps all of it.
    fn add_vector(&mut self, register: Register, access: OpAccess) {
        let load = match access {
            OpAccess::Write => 0,
            OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite => register.size() as u8,
            _ => ZMM.min(register.size() as u8),
        };
        let number = register.number() as u8;
        let store = writes(access);
        match self.vectors.iter_mut().find(|used| used.number == number) {
            Some(used) => {
                used.load = used.load.max(load);
                used.store |= store;
            }
            None => self.vectors.push(VectorUse { number, load, store }),
        }
    }
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// From the decoder's flag bits to those of RFLAGS; x87 condition codes and the rest are dropped.
fn flags(bits: u32) -> Flags {
    [
        (RflagsBits::OF, Flags::OF),
        (RflagsBits::SF, Flags::SF),
        (RflagsBits::ZF, Flags::ZF),
        (RflagsBits::AF, Flags::AF),
        (RflagsBits::CF, Flags::CF),
        (RflagsBits::PF, Flags::PF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(Flags::empty(), |all, (_, flag)| all | flag)
}

/// Flags that are undefined may keep their values, and a shift by zero keeps them all.
fn keeps_undefined_flags(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let arithmetic =
        RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;
    instruction.rflags_undefined() & arithmetic != 0
        || matches!(instruction.mnemonic(), Rcl | Rcr | Rol | Ror | Sal | Sar | Shl | Shr | Shld | Shrd)
}

/// x87 instructions name no register where they only use the environment or the top of the stack.
fn is_x87(instruction: &Instruction) -> bool {
    let mnemonic = instruction.mnemonic();
    instruction.code().encoding() == EncodingKind::Legacy
        && (mnemonic == Mnemonic::Emms || format!("{mnemonic:?}").starts_with('F'))
}

fn mxcsr_use(instruction: &Instruction) -> MxcsrUse {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Vfmaddcph | Vfcmaddcph | Vfmulcph | Vfcmulcph | Vfmaddcsh | Vfcmaddcsh | Vfmulcsh | Vfcmulcsh => {
            MxcsrUse::Collects
        }
        _ if instruction.suppress_all_exceptions()
            || instruction.rounding_control() != RoundingControl::None =>
        {
            MxcsrUse::Collects
        }
        // Approximations raise nothing, and are flushed to zero whatever is masked.
        Vrcp14pd | Vrcp14ps | Vrcp14sd | Vrcp14ss | Vrsqrt14pd | Vrsqrt14ps | Vrsqrt14sd | Vrsqrt14ss => {
            MxcsrUse::Collects
        }
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss => MxcsrUse::Collects,
        _ if depends_on_mxcsr(instruction) => MxcsrUse::Raises,
        _ => MxcsrUse::None,
    }
}

/// Whether MXCSR decides the result or collects exceptions: every vector instruction but those that are known to move
/// bits or compute with integers.
fn depends_on_mxcsr(instruction: &Instruction) -> bool {
    let name = format!("{:?}", instruction.mnemonic());
    let stem = name.strip_prefix('V').unwrap_or(&name).to_ascii_lowercase();
    let mut registers = (0..instruction.op_count()).map(|i| instruction.op_register(i));
    if !registers.any(|register| register.is_vector_register() || register.is_mm()) {
        // From memory to a general register or to an opmask.
        return stem.starts_with("cvt") || stem.starts_with("fpclass");
    }
    const BITWISE: [&str; 24] = [
        "p",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "insert",
        "extract",
        "broadcast",
        "align",
        "aes",
        "sha",
        "gf2p8",
        "test",
        "expand",
        "compress",
        "lddqu",
        "mask",
        "dbpsadbw",
        "dpbf16ps",
        "zero",
        "k",
    ];
    !BITWISE.iter().any(|prefix| stem.starts_with(prefix))
}

/// Whether the canonical form has a memory operand.
pub fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|i| is_memory(instruction.op_kind(i)))
}
