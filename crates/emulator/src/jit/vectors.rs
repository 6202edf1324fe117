//! The guest's vector and x87 state in the host's registers.
//!
//! It is loaded by the first translation that needs it and stays there until Rust code runs, whose compiler uses the same
//! registers. It is not loaded while the guest has exceptions unmasked, which would be the host's signals: then the
//! instructions are left to the interpreter.

use std::mem::offset_of;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Mnemonic, Register};

use super::assembler::{ADDRESS, Assembler, Host, RAX, RSP, SCRATCH};
use super::frame::slot;
use crate::native::{NativeInsn, StateClass, VectorRegisters};

/// What is live, and what a translation needs: XMM0 to XMM15 and MXCSR.
pub const SSE: u8 = 1;
/// All vector and opmask registers. [`SSE`] goes with it.
pub const FULL: u8 = 2;
/// x87 and MMX registers.
pub const X87: u8 = 4;

/// All exceptions masked in MXCSR, and in the x87 control word.
const MXCSR_MASKS: i32 = 0x1f80;
const X87_MASKS: i32 = 0x3f;

/// How an instruction uses vector or x87 state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// What has to be live.
    pub need: u8,
    /// The linear address of its memory operand must be a multiple of this many bytes; 1 where any will do.
    pub alignment: u16,
    /// Whether FIP points to it afterwards.
    pub is_pointed_to: bool,
}

impl Use {
    /// Of an instruction that the host executes; `None` for those that must not run on live state: they may unmask
    /// exceptions, or tell or forget where the last instruction was.
    pub fn of(instruction: &Instruction, native: &NativeInsn) -> Option<Self> {
        use Mnemonic::*;
        if matches!(
            instruction.mnemonic(),
            Fldcw | Fldenv | Frstor | Fnstenv | Fstenv | Fnsave | Fsave | Fninit | Finit | Ldmxcsr | Vldmxcsr
        ) {
            return None;
        }
        // Their operand is where RDI points, which copied code would take for the host's.
        if matches!(instruction.mnemonic(), Maskmovq | Maskmovdqu | Vmaskmovdqu) {
            return None;
        }
        let vectors = (0..instruction.op_count()).any(|n| instruction.op_register(n).is_vector_register());
        // From memory to an MMX register, by MXCSR.
        let converts = matches!(instruction.mnemonic(), Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi);
        let need = match native.class {
            StateClass::General => 0,
            StateClass::X87 | StateClass::Wait => X87,
            StateClass::Mmx if vectors || converts => X87 | SSE,
            StateClass::Mmx => X87,
            StateClass::Sse => SSE,
            StateClass::Avx | StateClass::Avx512 => FULL,
        };
        let alignment = native.memory.map_or(1, |memory| memory.alignment);
        Some(Self { need, alignment, is_pointed_to: native.is_pointed_to })
    }
}

/// Offsets in [`VectorRegisters`].
const ZMM: i32 = offset_of!(VectorRegisters, zmm) as i32;
const MASKS: i32 = offset_of!(VectorRegisters, k) as i32;
const IMAGE: i32 = VectorRegisters::X87_OFFSET as i32;
const MXCSR: i32 = VectorRegisters::MXCSR_OFFSET as i32;
/// Bytes of an FXSAVE image that are x87 state.
const IMAGE_BYTES: i32 = 160;
/// Where XSTATE_BV stands in an XSAVE area.
const XSTATE_BV: i32 = 512;

/// What of the host's registers there is.
#[derive(Clone, Copy, Debug)]
pub struct Width {
    avx: bool,
    avx512: bool,
}

impl Width {
    /// Of this host.
    pub fn of_host() -> Self {
        Self {
            avx: std::is_x86_feature_detected!("avx"),
            avx512: std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw")
                && std::is_x86_feature_detected!("avx512vl"),
        }
    }
}

/// An XSAVE area for x87 state alone.
#[repr(C, align(64))]
pub struct X87Area([u8; 576]);

impl Default for X87Area {
    fn default() -> Self {
        Self([0; 576])
    }
}

/// Offsets of the routines. Each is called, changes the scratch registers and the host's flags alone, and those that
/// load tell by the carry flag that they refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct Routines {
    pub load_sse: usize,
    pub load_full: usize,
    pub load_x87: usize,
    pub save: usize,
}

/// A called routine finds the frame behind its return address.
const CALLED: i32 = 8;

/// Generates the routines at the end of `a`; their offsets are relative to it.
pub fn routines(a: &mut Assembler, width: Width) -> Routines {
    let mut routines = Routines { load_sse: a.here(), ..Routines::default() };
    load_sse(a);
    routines.load_full = a.here();
    load_full(a, width);
    routines.load_x87 = a.here();
    load_x87(a);
    routines.save = a.here();
    save(a, width);
    routines
}

/// A vector register's move from or to its place: [`SCRATCH`] points to the guest's registers.
fn vector(a: &mut Assembler, code: Code, register: Register, number: u32, store: bool) {
    let memory = MemoryOperand::with_base_displ(Register::R15, i64::from(ZMM) + i64::from(number) * 64);
    let insn = if store {
        Instruction::with2(code, memory, register)
    } else {
        Instruction::with2(code, register, memory)
    };
    encode(a, insn);
}

/// Instructions of fixed form: the encoder knows them all.
fn encode(a: &mut Assembler, insn: Result<Instruction, iced_x86::IcedError>) {
    let mut encoder = Encoder::new(64);
    encoder.set_buffer(std::mem::take(&mut a.bytes));
    let done = insn.and_then(|insn| encoder.encode(&insn, 0));
    debug_assert!(done.is_ok(), "{done:?}");
    a.bytes = encoder.take_buffer();
}

fn xmm(a: &mut Assembler, store: bool) {
    let code = if store { Code::Movaps_xmmm128_xmm } else { Code::Movaps_xmm_xmmm128 };
    (0..16).for_each(|n| vector(a, code, Register::XMM0 + n, n, store));
}

fn registers(a: &mut Assembler) {
    a.load(SCRATCH, RSP, CALLED + slot::VECTOR);
}

/// `or dword [live], bits; clc; ret`.
fn done(a: &mut Assembler, bits: u8) {
    a.memory(false, &[0x83], 1, RSP, CALLED + slot::LIVE);
    a.bytes.push(bits);
    a.bytes.extend_from_slice(&[0xf8, 0xc3]);
}

fn refuse(a: &mut Assembler) {
    a.bytes.extend_from_slice(&[0xf9, 0xc3]); // stc; ret
}

/// Leaves where the guest has SIMD exceptions unmasked; else loads MXCSR.
fn load_mxcsr(a: &mut Assembler) {
    a.memory(false, &[0x8b], ADDRESS, SCRATCH, MXCSR);
    a.alu_immediate(false, 4, ADDRESS, MXCSR_MASKS);
    a.alu_immediate(false, 7, ADDRESS, MXCSR_MASKS);
    let masked = a.jump_if(4);
    refuse(a);
    let here = a.here();
    a.land(masked, here);
    a.memory(false, &[0x0f, 0xae], 2, SCRATCH, MXCSR);
}

fn load_sse(a: &mut Assembler) {
    registers(a);
    load_mxcsr(a);
    xmm(a, false);
    done(a, SSE);
}

/// `test byte [live], bits`.
fn test_live(a: &mut Assembler, bits: u8) {
    a.memory(false, &[0xf6], 0, RSP, CALLED + slot::LIVE);
    a.bytes.push(bits);
}

fn load_full(a: &mut Assembler, width: Width) {
    registers(a);
    test_live(a, SSE);
    let none = a.jump_if(4);
    xmm(a, true);
    // The live MXCSR goes with them.
    a.memory(false, &[0x0f, 0xae], 3, SCRATCH, MXCSR);
    let here = a.here();
    a.land(none, here);
    load_mxcsr(a);
    if width.avx512 {
        load_zmm(a);
    } else if width.avx {
        (0..16).for_each(|n| vector(a, Code::VEX_Vmovdqa_ymm_ymmm256, Register::YMM0 + n, n, false));
    } else {
        xmm(a, false);
    }
    done(a, SSE | FULL);
}

/// Where the upper parts of the first sixteen are zero, they are left in that state: legacy SSE instructions are slower
/// otherwise.
fn load_zmm(a: &mut Assembler) {
    let (zmm, or) = (Code::EVEX_Vmovdqa64_zmm_k1z_zmmm512, Code::EVEX_Vporq_zmm_k1z_zmm_zmmm512b64);
    vector(a, zmm, Register::ZMM0, 0, false);
    for n in 1..16 {
        let memory = MemoryOperand::with_base_displ(Register::R15, i64::from(ZMM) + n * 64);
        encode(a, Instruction::with3(or, Register::ZMM0, Register::ZMM0, memory));
    }
    let test = Code::EVEX_Vptestmq_kr_k1_zmm_zmmm512b64;
    encode(a, Instruction::with3(test, Register::K1, Register::ZMM0, Register::ZMM0));
    encode(a, Instruction::with2(Code::VEX_Kmovd_r32_kr, Register::R14D, Register::K1));
    a.alu_immediate(false, 4, ADDRESS, 0xfc);
    let used = a.jump_if(5);
    encode(a, Ok(Instruction::with(Code::VEX_Vzeroupper)));
    (0..16).for_each(|n| vector(a, Code::VEX_Vmovdqa_xmm_xmmm128, Register::XMM0 + n, n, false));
    let rest = a.jump();
    let here = a.here();
    a.land(used, here);
    (0..16).for_each(|n| vector(a, zmm, Register::ZMM0 + n, n, false));
    let here = a.here();
    a.land(rest, here);
    (16..32).for_each(|n| vector(a, zmm, Register::ZMM0 + n, n, false));
    opmasks(a, false);
}

fn opmasks(a: &mut Assembler, store: bool) {
    for n in 0..8u32 {
        let memory = MemoryOperand::with_base_displ(Register::R15, i64::from(MASKS) + i64::from(n) * 8);
        let insn = if store {
            Instruction::with2(Code::VEX_Kmovq_m64_kr, memory, Register::K0 + n)
        } else {
            Instruction::with2(Code::VEX_Kmovq_kr_km64, Register::K0 + n, memory)
        };
        encode(a, insn);
    }
}

/// XRSTOR and XSAVE of the area at [`SCRATCH`], x87 state alone; the guest's RAX and RDX are kept.
fn x87_area(a: &mut Assembler, extension: Host) {
    const RDX: Host = 2;
    a.mov(ADDRESS, RAX);
    a.store(RDX, RSP, CALLED + slot::KEPT);
    a.mov_immediate(RAX, 1);
    a.mov_immediate(RDX, 0);
    a.memory(true, &[0x0f, 0xae], extension, SCRATCH, 0);
    a.load(RDX, RSP, CALLED + slot::KEPT);
    a.mov(RAX, ADDRESS);
}

fn load_x87(a: &mut Assembler) {
    registers(a);
    // Exceptions that are unmasked, or that wait.
    a.memory(false, &[0x8b], ADDRESS, SCRATCH, IMAGE);
    a.alu_immediate(false, 4, ADDRESS, X87_MASKS | 0x80 << 16);
    a.alu_immediate(false, 7, ADDRESS, X87_MASKS);
    let masked = a.jump_if(4);
    refuse(a);
    let here = a.here();
    a.land(masked, here);
    copy_image(a, true);
    a.load(SCRATCH, RSP, CALLED + slot::X87_AREA);
    // mov qword [r15 + XSTATE_BV], 1
    a.memory(true, &[0xc7], 0, SCRATCH, XSTATE_BV);
    a.bytes.extend_from_slice(&1u32.to_le_bytes());
    x87_area(a, 5);
    done(a, X87);
}

/// Copies the x87 state to its area, or back. FIP is in the frame meanwhile, and the other pointers to the last instruction
/// stay as they are: they only follow unmasked exceptions.
fn copy_image(a: &mut Assembler, load: bool) {
    const FIP: i32 = 8;
    let (from, to) = if load { (slot::VECTOR, slot::X87_AREA) } else { (slot::X87_AREA, slot::VECTOR) };
    let (source, target) = if load { (IMAGE, 0) } else { (0, IMAGE) };
    let mut copy = |at: i32, wide: bool| {
        a.load(SCRATCH, RSP, CALLED + from);
        a.memory(wide, &[0x8b], ADDRESS, SCRATCH, source + at);
        a.load(SCRATCH, RSP, CALLED + to);
        a.memory(wide, &[0x89], ADDRESS, SCRATCH, target + at);
    };
    // Control and status; the tags, with the last opcode; the registers.
    copy(0, false);
    (32..IMAGE_BYTES).step_by(8).for_each(|at| copy(at, true));
    a.load(SCRATCH, RSP, CALLED + from);
    a.memory(false, &[0x0f, 0xb7], ADDRESS, SCRATCH, source + 4);
    a.load(SCRATCH, RSP, CALLED + to);
    a.bytes.push(0x66);
    a.memory(false, &[0x89], ADDRESS, SCRATCH, target + 4);
    a.load(SCRATCH, RSP, CALLED + slot::VECTOR);
    if load {
        a.load(ADDRESS, SCRATCH, IMAGE + FIP);
        a.store(ADDRESS, RSP, CALLED + slot::X87_RIP);
    } else {
        a.load(ADDRESS, RSP, CALLED + slot::X87_RIP);
        a.store(ADDRESS, SCRATCH, IMAGE + FIP);
    }
}

fn save(a: &mut Assembler, width: Width) {
    test_live(a, X87);
    let no_x87 = a.jump_if(4);
    a.load(SCRATCH, RSP, CALLED + slot::X87_AREA);
    x87_area(a, 4);
    a.bytes.extend_from_slice(&[0xdb, 0xe3]); // fninit
    copy_image(a, false);
    let here = a.here();
    a.land(no_x87, here);
    registers(a);
    test_live(a, FULL);
    let not_full = a.jump_if(4);
    if width.avx512 {
        let code = Code::EVEX_Vmovdqa64_zmmm512_k1z_zmm;
        (0..32).for_each(|n| vector(a, code, Register::ZMM0 + n, n, true));
        opmasks(a, true);
    } else if width.avx {
        (0..16).for_each(|n| vector(a, Code::VEX_Vmovdqa_ymmm256_ymm, Register::YMM0 + n, n, true));
    } else {
        xmm(a, true);
    }
    if width.avx {
        encode(a, Ok(Instruction::with(Code::VEX_Vzeroupper)));
    }
    let saved = a.jump();
    let here = a.here();
    a.land(not_full, here);
    test_live(a, SSE);
    let no_sse = a.jump_if(4);
    xmm(a, true);
    let here = a.here();
    a.land(saved, here);
    a.memory(false, &[0x0f, 0xae], 3, SCRATCH, MXCSR);
    a.memory(false, &[0x0f, 0xae], 2, RSP, CALLED + slot::HOST_MXCSR);
    let here = a.here();
    a.land(no_sse, here);
    // mov dword [live], 0; ret
    a.memory(false, &[0xc7], 0, RSP, CALLED + slot::LIVE);
    a.bytes.extend_from_slice(&[0, 0, 0, 0, 0xc3]);
}
