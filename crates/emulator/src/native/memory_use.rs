//! How a native instruction uses its memory operand, and which bytes of it a mask leaves alone.

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfo, MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

use super::state::VectorRegisters;

/// The memory operand of a native instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Its size in bytes, at most 108.
    pub size: u16,
    /// The linear address must be a multiple of this many bytes, or #GP; 1 where any address will do.
    pub alignment: u16,
    /// Whether the instruction reads it.
    pub reads: bool,
    /// Whether the instruction writes it.
    pub writes: bool,
    /// Whether it raises #AC where it is not aligned, if alignment is checked: all but the conversions of half-precision
    /// numbers do.
    pub checks_alignment: bool,
    /// What part of it the instruction touches.
    pub kind: MemoryKind,
}

/// Which bytes of a memory operand an instruction touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// All of them.
    Whole,
    /// By an opmask register: bit i stands for the bytes of element i. With more mask bits than elements (broadcasts)
    /// they go round.
    Masked {
        /// The opmask register's number.
        mask: u8,
        /// Bytes of an element.
        element: u8,
        /// Bits of the mask that count.
        bits: u8,
    },
    /// As many elements from the first as the opmask has bits set: VEXPAND and VCOMPRESS.
    Packed {
        /// The opmask register's number.
        mask: u8,
        /// Bytes of an element.
        element: u8,
        /// Bits of the mask that count.
        bits: u8,
    },
    /// By the sign bits of a vector register's elements: VMASKMOV, VPMASKMOV and MASKMOVDQU.
    Signs {
        /// The vector register's number.
        register: u8,
        /// Bytes of an element.
        element: u8,
    },
    /// By the sign bits of an MMX register's bytes: MASKMOVQ.
    MmxSigns {
        /// The MMX register's number.
        register: u8,
    },
}

impl MemoryUse {
    /// Of an instruction that has one memory operand, or none.
    pub(super) fn of(instruction: &Instruction, info: &InstructionInfo) -> Option<Self> {
        let operand = (0..instruction.op_count()).find(|&i| is_memory(instruction.op_kind(i)))?;
        let access = info.op_access(operand);
        let size = instruction.memory_size().size() as u16;
        let kind = kind(instruction, operand);
        let converts = matches!(instruction.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph);
        let checks_alignment = !converts;
        // A masked store that touches its whole operand (VEXTRACTF32X4) keeps what the mask leaves alone.
        let keeps = kind == MemoryKind::Whole && instruction.op_mask() != Register::None;
        Some(Self {
            checks_alignment,
            size,
            alignment: if needs_alignment(instruction) { size } else { 1 },
            reads: keeps
                || matches!(
                    access,
                    OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                ),
            writes: matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ),
            kind,
        })
    }

    /// The bytes that the instruction touches: bit i stands for byte i. The others may be unmapped; they must neither
    /// fault nor be written. With [`MemoryKind::Whole`] every bit is set.
    pub fn touched(&self, registers: &VectorRegisters) -> u64 {
        match self.kind {
            MemoryKind::Whole => u64::MAX,
            MemoryKind::Masked { mask, element, bits } => {
                let elements = u32::from(self.size) / u32::from(element);
                let mut folded = registers.k[usize::from(mask & 7)] & low_bits(u32::from(bits));
                let mut width = u32::from(bits);
                while width > elements {
                    width /= 2;
                    folded = (folded | folded >> width) & low_bits(width);
                }
                spread(folded, u32::from(element))
            }
            MemoryKind::Packed { mask, element, bits } => {
                let set = (registers.k[usize::from(mask & 7)] & low_bits(u32::from(bits))).count_ones();
                low_bits(set * u32::from(element))
            }
            MemoryKind::Signs { register, element } => {
                let bytes = &registers.zmm[usize::from(register & 31)][..usize::from(self.size).min(64)];
                spread(signs(bytes, usize::from(element)), u32::from(element))
            }
            MemoryKind::MmxSigns { register } => {
                // The image has the stack's order.
                let top = registers.x87_status() >> 11 & 7;
                let at = 32 + 16 * usize::from(u16::from(register).wrapping_sub(top) & 7);
                signs(&registers.x87[at..at + 8], 1)
            }
        }
    }

    /// Whether the instruction raises #GP for the alignment of its operand, which is at `address` (guest-linear). One
    /// that touches nothing does not.
    #[inline]
    pub fn is_misaligned(&self, address: u64, registers: &VectorRegisters) -> bool {
        self.alignment > 1
            && address & (u64::from(self.alignment) - 1) != 0
            && self.touched(registers) & self.all_bytes() != 0
    }

    /// What [`MemoryUse::touched`] gives when every byte of the operand is touched.
    pub fn all_bytes(&self) -> u64 {
        match self.kind {
            MemoryKind::Whole => u64::MAX,
            _ => low_bits(u32::from(self.size)),
        }
    }
}

/// The sign bits of elements of `element` bytes.
fn signs(bytes: &[u8], element: usize) -> u64 {
    let negative = bytes.chunks_exact(element).map(|chunk| u64::from(chunk[element - 1] >> 7));
    negative.enumerate().fold(0, |all, (i, sign)| all | sign << i)
}

/// From a bit for an element to a bit for a byte.
fn spread(elements: u64, size: u32) -> u64 {
    if size == 1 {
        return elements;
    }
    (0..64 / size).filter(|i| elements >> i & 1 != 0).fold(0, |all, i| all | low_bits(size) << (i * size))
}

fn low_bits(count: u32) -> u64 {
    1u64.checked_shl(count).map_or(u64::MAX, |bit| bit - 1)
}

/// A memory operand, be it implied by a register ([`Mnemonic::Maskmovdqu`]).
pub(super) fn is_memory(kind: OpKind) -> bool {
    matches!(kind, OpKind::Memory | OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI)
}

fn kind(instruction: &Instruction, operand: u32) -> MemoryKind {
    use Mnemonic::*;
    let code = instruction.code();
    let element = instruction.memory_size().element_size().clamp(1, 64) as u8;
    match instruction.mnemonic() {
        Maskmovq => return MemoryKind::MmxSigns { register: number(instruction.op2_register()) },
        Maskmovdqu | Vmaskmovdqu => {
            return MemoryKind::Signs { register: number(instruction.op2_register()), element: 1 };
        }
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => {
            let mask = instruction.op_register(if operand == 0 { 1 } else { operand - 1 });
            return MemoryKind::Signs { register: number(mask), element };
        }
        _ => {}
    }
    let mask = instruction.op_mask();
    if code.encoding() != EncodingKind::EVEX || mask == Register::None || touches_all(instruction) {
        return MemoryKind::Whole;
    }
    let complex = matches!(instruction.mnemonic(), Vfmaddcsh | Vfcmaddcsh | Vfmulcsh | Vfcmulcsh);
    let element = if complex { 4 } else { masked_element(code, instruction.memory_size()) };
    let mask = number(mask);
    let bits = mask_bits(instruction, element);
    match instruction.mnemonic() {
        Vexpandps | Vexpandpd | Vpexpandb | Vpexpandw | Vpexpandd | Vpexpandq | Vcompressps | Vcompresspd
        | Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq => MemoryKind::Packed { mask, element, bits },
        _ => MemoryKind::Masked { mask, element, bits },
    }
}

fn number(register: Register) -> u8 {
    register.number() as u8
}

/// Bytes of memory that one mask bit stands for. Where an instruction could broadcast, the broadcast element says it:
/// VPDPBUSD sums four bytes of memory into one element.
fn masked_element(code: Code, size: MemorySize) -> u8 {
    let broadcast = code.op_code().broadcast_memory_size();
    let element = if broadcast == MemorySize::Unknown { size.element_size() } else { broadcast.size() };
    element.clamp(1, size.size().clamp(1, 64)) as u8
}

/// How many bits of the mask count: one for each element of the memory operand, or of the vector that it is broadcast to.
fn mask_bits(instruction: &Instruction, element: u8) -> u8 {
    let size = instruction.memory_size();
    let own = size.size().max(1) / usize::from(element).max(1);
    let bits = if size.is_broadcast() || is_broadcast(instruction.mnemonic()) {
        let to = (0..instruction.op_count())
            .filter(|&i| instruction.op_kind(i) == OpKind::Register)
            .map(|i| instruction.op_register(i).size())
            .max()
            .unwrap_or(64);
        broadcast_bits(instruction, to, element)
    } else {
        own
    };
    bits.clamp(1, 64) as u8
}

/// Conversions that narrow or widen have as many elements as the wider of both sides has.
fn broadcast_bits(instruction: &Instruction, vector: usize, element: u8) -> usize {
    let size = instruction.memory_size();
    match instruction.op_code().memory_size() {
        full if size.is_broadcast() && full.size() > 0 => full.size() / usize::from(element).max(1),
        _ => vector / usize::from(element).max(1),
    }
}

fn is_broadcast(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vbroadcastss
            | Vbroadcastsd
            | Vbroadcastf32x2
            | Vbroadcastf32x4
            | Vbroadcastf32x8
            | Vbroadcastf64x2
            | Vbroadcastf64x4
            | Vbroadcasti32x2
            | Vbroadcasti32x4
            | Vbroadcasti32x8
            | Vbroadcasti64x2
            | Vbroadcasti64x4
            | Vpbroadcastb
            | Vpbroadcastw
            | Vpbroadcastd
            | Vpbroadcastq
    )
}

/// EVEX instructions whose mask does not suppress the faults of their memory operand.
/// SDM vol. 2, *Exceptions of EVEX-Encoded Instructions* (the types with the suffix NF).
fn touches_all(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let mnemonic = instruction.mnemonic();
    let shift_by_memory =
        matches!(mnemonic, Vpslld | Vpsllq | Vpsllw | Vpsrad | Vpsraq | Vpsraw | Vpsrld | Vpsrlq | Vpsrlw)
            && instruction.op_kind(2) == OpKind::Memory;
    let narrowing = matches!(
        mnemonic,
        Vcvtne2ps2bf16 | Vpackssdw | Vpacksswb | Vpackusdw | Vpackuswb | Vpmaddubsw | Vpmaddwd | Vdbpsadbw
    );
    let whole =
        matches!(mnemonic, Vgf2p8affineinvqb | Vgf2p8affineqb | Vpconflictd | Vpconflictq | Vpmultishiftqb);
    shift_by_memory
        || narrowing
        || whole
        || moves_lanes(mnemonic)
        || is_shuffle(mnemonic)
        || is_permutation(mnemonic)
}

fn moves_lanes(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let extract = matches!(
        mnemonic,
        Vextractf32x4
            | Vextractf32x8
            | Vextractf64x2
            | Vextractf64x4
            | Vextracti32x4
            | Vextracti32x8
            | Vextracti64x2
            | Vextracti64x4
    );
    let insert = matches!(
        mnemonic,
        Vinsertf32x4
            | Vinsertf32x8
            | Vinsertf64x2
            | Vinsertf64x4
            | Vinserti32x4
            | Vinserti32x8
            | Vinserti64x2
            | Vinserti64x4
    );
    extract || insert || matches!(mnemonic, Valignd | Valignq | Vpalignr)
}

fn is_shuffle(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let shuffle = matches!(
        mnemonic,
        Vpshufb
            | Vpshufd
            | Vpshufhw
            | Vpshuflw
            | Vshuff32x4
            | Vshuff64x2
            | Vshufi32x4
            | Vshufi64x2
            | Vshufpd
            | Vshufps
    );
    let unpack = matches!(
        mnemonic,
        Vpunpckhbw
            | Vpunpckhdq
            | Vpunpckhqdq
            | Vpunpckhwd
            | Vpunpcklbw
            | Vpunpckldq
            | Vpunpcklqdq
            | Vpunpcklwd
    ) || matches!(mnemonic, Vunpckhpd | Vunpckhps | Vunpcklpd | Vunpcklps);
    shuffle || unpack || matches!(mnemonic, Vmovddup | Vmovshdup | Vmovsldup)
}

fn is_permutation(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let one_source =
        matches!(mnemonic, Vpermb | Vpermd | Vpermilpd | Vpermilps | Vpermpd | Vpermps | Vpermq | Vpermw);
    let two_sources = matches!(
        mnemonic,
        Vpermi2b | Vpermi2d | Vpermi2pd | Vpermi2ps | Vpermi2q | Vpermi2w | Vpermt2b | Vpermt2d | Vpermt2pd
    ) || matches!(mnemonic, Vpermt2ps | Vpermt2q | Vpermt2w);
    one_source || two_sources
}

/// Whether a misaligned operand is #GP: 16-byte operands of the legacy encoding but for a few, and the aligned and
/// non-temporal moves of the others. SDM vol. 2, *SIMD Exceptions*.
fn needs_alignment(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let aligned_move = matches!(
        instruction.mnemonic(),
        Vmovaps | Vmovapd | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
    );
    let any_address = matches!(
        instruction.mnemonic(),
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Maskmovdqu
            | Pcmpestri64
            | Pcmpestrm64
            | Pcmpestri
            | Pcmpestrm
            | Pcmpistri
            | Pcmpistrm
    );
    let legacy = instruction.code().encoding() == EncodingKind::Legacy;
    let vector = (0..instruction.op_count()).any(|i| instruction.op_register(i).is_xmm())
        || instruction.mnemonic() == Cvtpd2pi
        || instruction.mnemonic() == Cvttpd2pi;
    aligned_move || legacy && vector && instruction.memory_size().size() == 16 && !any_address
}
