//! Cases by rule: every encoding of a mode, with operands that find the edges of pages and segments.

use std::sync::OnceLock;

use iced_x86::{Code, ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};

use crate::blocks;
use crate::case::{Case, LAST_WINDOW, Trap};
use crate::encode;
use crate::exclusions::{excluded, may_enter_kernel};
use crate::host;
use crate::layout::{self, ARENA, ARENA_LEN, DATA_SELECTORS, Mode, STACK_SELECTORS};
use crate::random::Random;

/// Makes cases.
pub struct Generator {
    seed: u64,
    /// By number, whether there may be an encoding: features that no model has, the host may have.
    allowed: Vec<bool>,
    /// Encodings of each mode, in the order of [`Mode::ALL`].
    codes: [Vec<Code>; 3],
    /// Encodings that programs of 64-bit code are made of, and of 32-bit code.
    programs: [Vec<Code>; 2],
}

/// A case and what the decoder makes of it.
#[derive(Clone)]
pub struct Generated {
    /// Its number.
    pub number: u64,
    /// The case.
    pub case: Case,
    /// Its instruction; invalid where the decoder knows none.
    pub instruction: Instruction,
}

impl Generator {
    /// Programs of the same seed: the case of a number.
    pub fn program(&self, number: u64, mode: Mode) -> Generated {
        let codes = &self.programs[usize::from(mode != Mode::Bits64)];
        blocks::program(codes, &self.allowed, self.seed, (number, mode))
    }

    /// The sequence of a seed. `allowed` says which encodings there may be, and `only` of which of them cases are made.
    pub fn new(seed: u64, allowed: impl Fn(Code) -> bool, only: impl Fn(Code) -> bool) -> Self {
        let allowed: Vec<bool> = Code::values().map(allowed).collect();
        let only = |code: Code| allowed[code as usize] && only(code);
        let codes: [Vec<Code>; 3] =
            Mode::ALL.map(|mode| encode::codes(mode).into_iter().filter(|&code| only(code)).collect());
        let programs = [0, 1].map(|n| {
            let has = |code: &Code| blocks::has(*code, Mode::ALL[n]);
            codes[n].iter().copied().filter(has).collect()
        });
        Self { seed, allowed, codes, programs }
    }

    /// The case of a number; `None` where it would have to be excluded.
    pub fn case(&self, number: u64, mode: Mode) -> Result<Generated, &'static str> {
        let mut random = Random::new(self.seed ^ (mode.bits() as u64) << 56, number);
        let codes = &self.codes[Mode::ALL.iter().position(|&each| each == mode).unwrap_or(0)];
        let mut bytes = [0u8; 32];
        if random.one_in(24) || codes.is_empty() {
            bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
        } else {
            bytes = encode::bytes(random.pick(codes), mode, &mut random);
            if random.one_in(64) {
                bytes[random.below(6) as usize] ^= 1 << random.below(8);
            }
        }
        self.around(number, &bytes, mode, &mut random)
    }

    fn around(
        &self,
        number: u64,
        bytes: &[u8; 32],
        mode: Mode,
        random: &mut Random,
    ) -> Result<Generated, &'static str> {
        let mut decoder = Decoder::with_ip(mode.bits(), bytes, mode.rip(), DecoderOptions::NONE);
        let instruction = decoder.decode();
        let constants = decoder.get_constant_offsets(&instruction);
        let mut case = Case { mode, ..Case::default() };
        let len = if instruction.is_invalid() { 16 } else { instruction.len() };
        case.bytes[..len].copy_from_slice(&bytes[..len]);
        case.len = len as u16;
        if !self.allowed[instruction.code() as usize] {
            return Err("is of a feature that no model has");
        }
        let another = host::has_another(&instruction, mode, &bytes[..len]);
        if let Some(reason) = excluded(&instruction).or(another) {
            return Err(reason);
        }
        state(&mut case, &instruction, random);
        aim(&mut case, &instruction, &constants, random);
        suit(&mut case, &instruction, random);
        if mode != Mode::Bits64 && layout::is_narrow_stack(case.selectors[2]) {
            let upper = u64::from(random.pick(&layout::UPPER_HALVES)) << 16;
            case.gprs[4] = case.gprs[4] & 0xffff | upper;
        }
        if may_enter_kernel(case.code()) {
            return Err("has bytes in it that could enter the kernel");
        }
        let instruction = decode(&case);
        case.trap = trap(&instruction);
        Ok(Generated { number, case, instruction })
    }
}

/// What the decoder makes of a case.
pub fn decode(case: &Case) -> Instruction {
    Decoder::with_ip(case.mode.bits(), case.code(), case.mode.rip(), DecoderOptions::NONE).decode()
}

/// Most come back by the jump behind them; those that may go elsewhere, or that change TF, by the trap.
fn trap(instruction: &Instruction) -> Trap {
    use iced_x86::Mnemonic::{Popf, Popfd, Popfq};
    let straight = instruction.flow_control() == FlowControl::Next && !instruction.is_invalid();
    let traced = matches!(instruction.mnemonic(), Popf | Popfd | Popfq);
    if straight && !traced { Trap::Exit } else { Trap::Step }
}

/// Whether an instruction may have to do with x87 or vector registers.
pub fn uses_vector(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature::*;
    instruction.mnemonic() == iced_x86::Mnemonic::Wait
        || !instruction.cpuid_features().iter().all(|feature| {
            matches!(
                feature,
                INTEL8086
                    | INTEL186
                    | INTEL286
                    | INTEL386
                    | INTEL486
                    | X64
                    | CMOV
                    | CX8
                    | CMPXCHG16B
                    | BMI1
                    | BMI2
                    | ADX
                    | POPCNT
                    | LZCNT
                    | MOVBE
                    | MULTIBYTENOP
                    | FSGSBASE
            )
        })
}

/// Registers, flags and data that have nothing to do with the instruction's operand.
pub(crate) fn state(case: &mut Case, instruction: &Instruction, random: &mut Random) {
    case.uses_vector = uses_vector(instruction) || instruction.is_invalid();
    let wide = case.mode == Mode::Bits64;
    let similar = random.operand();
    for gpr in &mut case.gprs {
        *gpr = match random.below(16) {
            0 => similar,
            1..=2 => u64::from(random.pick(&layout::ANY_SELECTORS)),
            _ => random.operand(),
        };
        if !wide {
            *gpr &= 0xffff_ffff;
        }
    }
    case.rflags = random.next() & if random.one_in(8) { 0xcd5 } else { 0x8d5 };
    if random.one_in(12) {
        // Alignment checks: Linux has CR0.AM set.
        case.rflags |= 1 << 18;
    }
    let selectors = &mut case.selectors;
    for selector in selectors.iter_mut() {
        *selector = if wide && !random.one_in(8) { 0 } else { random.pick(&DATA_SELECTORS) };
    }
    selectors[2] = if wide && !random.one_in(8) { layout::USER_DATA } else { random.pick(&STACK_SELECTORS) };
    case.bases = std::array::from_fn(|_| match random.below(4) {
        0 => 0,
        1 => random.next() as i32 as u64,
        _ => ARENA + random.below(ARENA_LEN as u64),
    });
    case.window_at = (random.below(u64::from(LAST_WINDOW)) as u32) & if random.one_in(2) { !63 } else { !0 };
    fill_window(case, random);
    if case.uses_vector {
        fill_vectors(case, random);
        if instruction.cpuid_features().contains(&iced_x86::CpuidFeature::AVX512_FP16) {
            // Exact tiny results of half precision, which unmasked raise underflow, do not show where it is masked.
            case.area.0[25] |= 8;
        }
    }
}

fn fill_window(case: &mut Case, random: &mut Random) {
    for chunk in case.window.as_chunks_mut::<8>().0 {
        let at = random.below(POOL as u64 / 8) as usize;
        *chunk = if case.uses_vector { elements().as_chunks().0[at] } else { random.operand().to_le_bytes() };
    }
    if random.one_in(3) {
        // Far pointers and frames: offsets into the code, and selectors.
        for chunk in case.window.chunks_exact_mut(4) {
            let value = match random.below(3) {
                0 => layout::CODE as u32 + random.below(4096) as u32,
                1 => random.next() as u32 & 0x3_0fd7,
                _ => u32::from(random.pick(&layout::ANY_SELECTORS)),
            };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn fill_vectors(case: &mut Case, random: &mut Random) {
    let area = &mut case.area.0;
    let masks = if random.one_in(3) { random.next() as u16 & 0x3f | 0x40 } else { 0x7f };
    let control = random.next() as u16 & 0x0f00 | masks;
    let status = if random.one_in(2) { random.next() as u16 & 0x7f7f } else { random.next() as u16 & 0x3800 };
    area[..2].copy_from_slice(&control.to_le_bytes());
    // A set summary would have to fit the masks.
    let pending = status & !control & 0x3f != 0;
    let status = if pending && !random.one_in(4) { status & !0x3f } else { status };
    let summary = if status & !control & 0x3f != 0 { 0x8080 } else { 0 };
    area[2..4].copy_from_slice(&(status & !0x8080 | summary).to_le_bytes());
    area[4] = if random.one_in(2) { 0xff } else { random.next() as u8 };
    // Opcode, instruction and operand of the last exception.
    area[6..8].copy_from_slice(&(random.next() as u16 & 0x7ff).to_le_bytes());
    area[8..16].copy_from_slice(&(random.next() & 0x7fff_ffff_ffff).to_le_bytes());
    area[16..24].copy_from_slice(&(random.next() & 0x7fff_ffff_ffff).to_le_bytes());
    for register in area[32..160].chunks_exact_mut(16) {
        let exponent = match random.below(6) {
            0 => 0x7fff,
            1 => 0,
            _ => 0x3ff0 + random.below(0x40) as u16,
        };
        let integer = if random.one_in(12) { 0 } else { 1 << 63 };
        let fraction = if random.one_in(4) { 0 } else { random.next() };
        register[..8].copy_from_slice(&(fraction & !(1 << 63) | integer).to_le_bytes());
        register[8..10].copy_from_slice(&(exponent | random.next() as u16 & 0x8000).to_le_bytes());
    }
    let masks = if random.one_in(3) { random.next() as u32 & 0x1f80 } else { 0x1f80 };
    let mxcsr = random.next() as u32 & 0xe07f | masks;
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    let pool = elements();
    for (first, last, piece) in
        [(160, 416, 16), (576, 832, 16), (1088, 1152, 8), (1152, 1664, 32), (1664, 2688, 64)]
    {
        for part in area[first..last].chunks_exact_mut(piece) {
            let at = random.below((POOL - 64) as u64) as usize & !7;
            part.copy_from_slice(&pool[at..at + piece]);
        }
    }
}

/// Bytes of [`elements`].
const POOL: usize = 1 << 19;

/// Many elements of vectors, to take registers from: making each anew takes most of a case's time.
fn elements() -> &'static [u8; POOL] {
    static POOL_OF_ALL: OnceLock<Box<[u8; POOL]>> = OnceLock::new();
    POOL_OF_ALL.get_or_init(|| {
        let (mut random, mut pool) = (Random::new(0, 0), Box::new([0; POOL]));
        pool.as_chunks_mut::<8>().0.iter_mut().for_each(|chunk| *chunk = random.element().to_le_bytes());
        pool
    })
}

/// An address in or at the edge of the data; most of the time within the window.
fn target(case: &Case, random: &mut Random) -> u64 {
    let window = ARENA + u64::from(case.window_at);
    let page = layout::PAGE as u64;
    match random.below(16) {
        0 => ARENA + random.below(5) * page - page / 2 * random.below(2) - random.below(70),
        1 => ARENA + 2 * page - random.below(70),
        2 => ARENA + ARENA_LEN as u64 - random.below(70),
        3 => ARENA - random.below(70),
        4 => ARENA + random.below(ARENA_LEN as u64) & !63,
        5..=7 => window + random.below(192),
        _ => (window + 63 & !63) + 8 * random.below(16) & !(random.pick(&[0u64, 7, 15, 15, 63])),
    }
}

/// Makes the instruction's memory operand lie where something is.
fn aim(case: &mut Case, instruction: &Instruction, constants: &ConstantOffsets, random: &mut Random) {
    if random.one_in(24) {
        return;
    }
    let at = target(case, random);
    let stack_base = if case.mode == Mode::Bits64 { 0 } else { layout::base_of(case.selectors[2]) };
    set(case, 4, 8, (target(case, random) & !7).wrapping_sub(stack_base));
    if instruction.is_stack_instruction() && random.one_in(2) {
        set(case, 5, 8, (target(case, random) & !7).wrapping_sub(stack_base));
    }
    for n in 0..instruction.op_count() {
        match instruction.op_kind(n) {
            OpKind::Memory => aim_explicit(case, instruction, constants, at, random),
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => {
                let base = segment_base(case, instruction.memory_segment());
                set(case, 6, 8, at.wrapping_sub(base));
                repeat(case, instruction, random);
            }
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => {
                let base = segment_base(case, instruction.memory_segment());
                set(case, 7, 8, at.wrapping_sub(base));
            }
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
                let other = target(case, random);
                let base = segment_base(case, Register::ES);
                set(case, 7, 8, other.wrapping_sub(base));
                repeat(case, instruction, random);
            }
            _ => {}
        }
    }
    if instruction.mnemonic() == iced_x86::Mnemonic::Xlatb {
        let base = segment_base(case, instruction.memory_segment());
        set(case, 3, 8, at.wrapping_sub(base));
    }
}

/// What single instructions need besides.
fn suit(case: &mut Case, instruction: &Instruction, random: &mut Random) {
    use iced_x86::Mnemonic::*;
    match instruction.mnemonic() {
        // Its event would be delivered.
        Into => case.rflags &= !0x800,
        // Register 1 tells what is in use, which the processor may not know exactly.
        Xgetbv => case.gprs[1] = if random.one_in(4) { case.gprs[1] & !1 } else { 0 },
        Xrstor | Xrstor64 if random.one_in(2) => {
            // The header in the window, so that some areas are good ones.
            let at = (case.window_at as usize).next_multiple_of(64) - case.window_at as usize;
            let states = random.next() as u8 & random.pick(&[0xe7, 0xe7, 0xff]);
            if let Some(header) = case.window.get_mut(at..at + 64) {
                header.fill(0);
                header[0] = states;
            }
            if random.one_in(2) {
                // Without MXCSR, which is anything.
                case.gprs[0] &= !6;
            }
        }
        _ => {}
    }
}

fn repeat(case: &mut Case, instruction: &Instruction, random: &mut Random) {
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        let count = if random.one_in(20) { random.operand() } else { random.below(70) };
        set(case, 1, 8, count);
    }
}

/// Sets a register, as wide as the mode's.
fn set(case: &mut Case, number: usize, bytes: u32, value: u64) {
    let mask = if case.mode == Mode::Bits64 && bytes == 8 { u64::MAX } else { 0xffff_ffff };
    case.gprs[number] = value & mask;
}

fn segment_base(case: &Case, register: Register) -> u64 {
    let index = match register {
        Register::ES => 0,
        Register::CS => return if case.mode == Mode::Bits16 { layout::CODE } else { 0 },
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    };
    match (case.mode, index) {
        (Mode::Bits64, 4) => case.bases[0],
        (Mode::Bits64, 5) => case.bases[1],
        (Mode::Bits64, _) => 0,
        _ => layout::base_of(case.selectors[index]),
    }
}

/// An operand with base, index and displacement: one of them is made to fit.
/// Where the operand of an instruction goes whose operand is much larger than the window.
fn target_of(case: &Case, instruction: &Instruction, at: u64) -> u64 {
    use iced_x86::Mnemonic::*;
    let window = (ARENA + u64::from(case.window_at)).next_multiple_of(64);
    match instruction.mnemonic() {
        Xrstor | Xrstor64 => window - 512,
        Fxrstor | Fxrstor64 => window,
        _ => at,
    }
}

fn aim_explicit(
    case: &mut Case,
    instruction: &Instruction,
    constants: &ConstantOffsets,
    at: u64,
    random: &mut Random,
) {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let at = target_of(case, instruction, at);
    let mut wanted = at.wrapping_sub(segment_base(case, instruction.memory_segment()));
    if index.is_vector_register() {
        return aim_vector(case, instruction, wanted, random);
    }
    let value = |register: Register| case.gprs[register.full_register().number()];
    let scale = u64::from(instruction.memory_index_scale());
    let relative = matches!(base, Register::RIP | Register::EIP);
    if base == Register::None || relative {
        if index != Register::None {
            wanted = wanted.wrapping_sub(value(index).wrapping_mul(scale));
        }
        let displacement = if relative { wanted.wrapping_sub(instruction.next_ip()) } else { wanted };
        patch(case, constants, displacement);
        return;
    }
    // iced folds RIP into the displacement, where there is no other base.
    wanted = wanted.wrapping_sub(instruction.memory_displacement64());
    if index != Register::None && index.full_register() != base.full_register() {
        if random.one_in(2) {
            let small = random.below(256);
            set(case, index.full_register().number(), 8, small);
        }
        let index = case.gprs[index.full_register().number()];
        wanted = wanted.wrapping_sub(index.wrapping_mul(scale));
    }
    set(case, base.full_register().number(), 8, wanted);
}

fn patch(case: &mut Case, constants: &ConstantOffsets, displacement: u64) {
    let (offset, size) = (constants.displacement_offset(), constants.displacement_size());
    if constants.has_displacement()
        && size >= 2
        && let Some(field) = case.bytes.get_mut(offset..offset + size)
    {
        field.copy_from_slice(&displacement.to_le_bytes()[..size]);
    }
}

/// Gathers and scatters: the base at the operand, small indices, and masks with few bits.
fn aim_vector(case: &mut Case, instruction: &Instruction, wanted: u64, random: &mut Random) {
    let index = instruction.memory_index().number();
    let base = instruction.memory_base();
    if base != Register::None {
        let displacement = instruction.memory_displacement64();
        set(case, base.full_register().number(), 8, wanted.wrapping_sub(displacement));
    }
    if random.one_in(12) {
        return;
    }
    let mut put = |at: usize, bytes: usize, area: &mut [u8]| {
        let Some(part) = area.get_mut(at..at + bytes) else { return };
        let quads = random.one_in(2);
        for chunk in part.chunks_exact_mut(4).enumerate().map(|(n, chunk)| (n & 1 == 0 || !quads, chunk)) {
            let value = (random.below(512) as i32 - 64).to_le_bytes();
            chunk.1.copy_from_slice(if chunk.0 { &value } else { &[0; 4] });
        }
    };
    let area = &mut case.area.0[..];
    if index < 16 {
        put(160 + 16 * index, 16, area);
        put(576 + 16 * index, 16, area);
        put(1152 + 32 * index, 32, area);
    } else {
        put(1664 + 64 * (index - 16), 64, area);
    }
}
