use std::arch::asm;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::Random;
use super::differential::{random_machine, through_stub};
use super::truth::Machine;
use crate::native::features::Host;
use crate::native::{
    Component, MemoryKind, NativeFault, NativeInsn, NativeUnit, StateClass, VectorRegisters,
};

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::new(bitness, bytes, DecoderOptions::NONE).decode()
}

fn prepare(unit: &mut NativeUnit, bytes: &[u8]) -> NativeInsn {
    unit.prepare(&decode(64, bytes)).unwrap()
}

/// A machine in its reset state, with zeroes in memory.
fn machine() -> Machine {
    let mut machine = random_machine(&mut Random::new(5));
    machine.vector = VectorRegisters::reset();
    machine.memory.fill(0);
    machine
}

fn run(bytes: &[u8], machine: &mut Machine) -> Result<(), NativeFault> {
    let mut unit = NativeUnit::new().unwrap();
    let (result, after) = through_stub(&mut unit, &decode(64, bytes), machine).unwrap();
    *machine = after;
    result
}

const ADDPS: &[u8] = &[0x0f, 0x58, 0xc1];

#[test]
fn the_mode_and_the_operands_place_do_not_change_a_stub() {
    let mut unit = NativeUnit::new().unwrap();
    let first = prepare(&mut unit, &[0x66, 0x0f, 0xfe, 0x00]); // paddd xmm0, [rax]
    for (bitness, bytes) in [
        (64, &[0x66, 0x41, 0x0f, 0xfe, 0x84, 0xc8, 1, 2, 3, 4][..]), // [r8 + rcx*8 + 04030201h]
        (64, &[0x66, 0x0f, 0xfe, 0x05, 1, 2, 3, 4]),                 // [rip + 04030201h]
        (64, &[0x65, 0x66, 0x0f, 0xfe, 0x00]),                       // gs:[rax]
        (64, &[0x67, 0x66, 0x0f, 0xfe, 0x00]),                       // [eax]
        (32, &[0x66, 0x0f, 0xfe, 0x40, 0x08]),                       // [eax + 8]
        (16, &[0x66, 0x0f, 0xfe, 0x00]),                             // [bx + si]
    ] {
        assert_eq!(unit.prepare(&decode(bitness, bytes)), Ok(first), "{bytes:x?}");
    }
    let at_rdi = prepare(&mut unit, &[0x66, 0x0f, 0xf7, 0xc1]); // maskmovdqu xmm0, xmm1
    assert_eq!(unit.prepare(&decode(32, &[0x66, 0x0f, 0xf7, 0xc1])), Ok(at_rdi));
    assert_eq!(unit.prepare(&decode(64, &[0x67, 0x66, 0x0f, 0xf7, 0xc1])), Ok(at_rdi));
}

#[test]
fn full_code_memory_forgets_all_stubs_and_says_so() {
    let mut unit = NativeUnit::with(4096, Host::get()).unwrap();
    let first = prepare(&mut unit, ADDPS);
    let generation = unit.generation();
    // pshufd xmm0, xmm1, imm8: a stub for each immediate.
    let immediates: Vec<_> = (0..=255).map(|i| prepare(&mut unit, &[0x66, 0x0f, 0x70, 0xc1, i])).collect();
    assert_ne!(unit.generation(), generation);
    assert!(unit.stubs.len() < 128);
    let mut machine = machine();
    let Machine { gprs, rflags, vector, .. } = &mut machine;
    let mut attempt = |unit: &NativeUnit, insn: &NativeInsn| {
        // SAFETY: no memory operand.
        unsafe { unit.run(insn, gprs, rflags, vector, std::ptr::null_mut()) }
    };
    assert_eq!(attempt(&unit, &first), Err(NativeFault::Stale));
    assert_eq!(attempt(&unit, &immediates[0]), Err(NativeFault::Stale));
    assert_eq!(attempt(&unit, &immediates[255]), Ok(()));
    let other = NativeUnit::new().unwrap();
    assert_eq!(attempt(&other, &immediates[255]), Err(NativeFault::Stale));
}

#[test]
fn an_instruction_says_what_the_checks_before_it_need() {
    let mut unit = NativeUnit::new().unwrap();
    for (bytes, class) in [
        (ADDPS, StateClass::Sse),
        (&[0xf3, 0x0f, 0xb8, 0xc1], StateClass::General), // popcnt
        (&[0x0f, 0xae, 0x10], StateClass::Sse),           // ldmxcsr
        (&[0x0f, 0x6f, 0xc1], StateClass::Mmx),           // movq mm0, mm1
        (&[0x0f, 0x77], StateClass::Mmx),                 // emms
        (&[0x0f, 0x2a, 0x00], StateClass::Sse),           // cvtpi2ps xmm0, [rax]
        (&[0x0f, 0x2a, 0xc1], StateClass::Mmx),           // cvtpi2ps xmm0, mm1
        (&[0xd9, 0xe8], StateClass::X87),                 // fld1
        (&[0xdf, 0xe0], StateClass::X87),                 // fnstsw ax
        (&[0x9b], StateClass::Wait),
    ] {
        assert_eq!(prepare(&mut unit, bytes).class, class, "{bytes:x?}");
    }
    if Host::get().avx512 {
        assert_eq!(prepare(&mut unit, &[0xc5, 0xf8, 0x77]).class, StateClass::Avx); // vzeroupper
        assert_eq!(prepare(&mut unit, &[0xc4, 0xe2, 0x78, 0xf2, 0xc1]).class, StateClass::General); // andn
        assert_eq!(prepare(&mut unit, &[0xc4, 0xe1, 0xfb, 0x92, 0xc8]).class, StateClass::Avx512); // kmovq k1, rax
        assert_eq!(prepare(&mut unit, &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2]).class, StateClass::Avx512); // vaddps
    }
}

#[test]
fn ldmxcsr_refuses_reserved_bits_and_stmxcsr_stores() {
    let mut machine = machine();
    machine.memory[..4].copy_from_slice(&0x1_1f80u32.to_le_bytes());
    assert_eq!(run(&[0x0f, 0xae, 0x10], &mut machine), Err(NativeFault::GeneralProtection));
    assert_eq!(machine.vector.mxcsr(), 0x1f80);
    machine.memory[..4].copy_from_slice(&0xffbfu32.to_le_bytes());
    assert_eq!(run(&[0x0f, 0xae, 0x10], &mut machine), Ok(()));
    machine.memory.fill(0);
    assert_eq!(run(&[0x0f, 0xae, 0x18], &mut machine), Ok(()));
    assert_eq!(machine.memory[..4], 0xffbfu32.to_le_bytes());
}

#[test]
fn an_unmasked_simd_exception_leaves_the_destination() {
    let mut machine = machine();
    machine.vector.zmm[0][..4].copy_from_slice(&1f32.to_le_bytes());
    machine.vector.set_mxcsr(0x1f80 & !(1 << 9)).unwrap();
    // divss xmm0, xmm1: one by zero.
    assert_eq!(run(&[0xf3, 0x0f, 0x5e, 0xc1], &mut machine), Err(NativeFault::SimdException));
    assert_eq!(machine.vector.zmm[0][..4], 1f32.to_le_bytes());
    assert_eq!(machine.vector.mxcsr() & 0x3f, 1 << 2);
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let mut machine = machine();
    machine.vector.load_component(Component::X87, &{
        let mut image = [0; 160];
        image[..2].copy_from_slice(&0x037bu16.to_le_bytes()); // zero-divide unmasked
        image
    });
    assert_eq!(run(&[0xd9, 0xe8], &mut machine), Ok(())); // fld1
    assert_eq!(run(&[0xd9, 0xee], &mut machine), Ok(())); // fldz
    assert_eq!(run(&[0xde, 0xf9], &mut machine), Ok(())); // fdivp: one by zero
    assert_eq!(machine.vector.x87_status() & 0x84, 0x84);
    assert_eq!(run(&[0xd9, 0xe8], &mut machine), Err(NativeFault::X87Exception));
    assert_eq!(run(&[0x9b], &mut machine), Err(NativeFault::X87Exception)); // fwait
    assert_eq!(run(&[0x0f, 0xfc, 0xc1], &mut machine), Err(NativeFault::X87Exception)); // paddb mm0, mm1
    assert_eq!(run(&[0xdf, 0xe0], &mut machine), Ok(())); // fnstsw ax
    assert_eq!(machine.gprs[0] as u16, machine.vector.x87_status());
    assert_eq!(run(&[0xdb, 0xe2], &mut machine), Ok(())); // fnclex
    assert_eq!(run(&[0x9b], &mut machine), Ok(()));
}

#[test]
fn the_hosts_addresses_never_show_in_the_x87_state() {
    let mut machine = machine();
    for bytes in [&[0xd9, 0xe8][..], &[0xd8, 0x00]] {
        // fld1; fadd dword [rax]: they leave opcode, instruction pointer and operand pointer.
        assert_eq!(run(bytes, &mut machine), Ok(()));
        assert_eq!(machine.vector.x87[6..24], [0; 18]);
    }
    assert_eq!(run(&[0xd9, 0x30], &mut machine), Ok(())); // fnstenv [rax]
    assert_eq!(machine.memory[12..24], [0; 12]);
}

#[test]
fn the_hosts_units_are_left_as_rust_expects_them() {
    let mut machine = random_machine(&mut Random::new(6));
    machine.vector.init_component(Component::X87);
    machine.vector.set_mxcsr(0xffc0 & !0x1f80 | 0x1f80).unwrap();
    let (mut mxcsr, mut environment) = (0u32, [0u32; 7]);
    for bytes in
        [&[0xd9, 0xe8][..], &[0x0f, 0x6f, 0xc1], &[0x0f, 0x2a, 0xc1], ADDPS, &[0x66, 0x0f, 0x5e, 0xc1]]
    {
        assert_eq!(run(bytes, &mut machine), Ok(()));
        // SAFETY: stores both units' state; FNSTENV masks exceptions, which they are already.
        unsafe {
            asm!("stmxcsr [{}]", "fnstenv [{}]", in(reg) &mut mxcsr, in(reg) &mut environment, options(nostack));
        }
        assert_eq!(mxcsr & !0x3f, 0x1f80);
        assert_eq!((environment[0] as u16, environment[2] as u16), (0x037f, 0xffff)); // control, tags
    }
}

#[test]
fn masked_operands_name_their_touched_bytes() {
    if !Host::get().avx512 {
        return;
    }
    let mut unit = NativeUnit::new().unwrap();
    let mut vector = VectorRegisters::reset();
    vector.k[1] = 0b101;
    let usage = prepare(&mut unit, &[0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x00]).memory.unwrap(); // vmovdqu8 [rax]{k1}, zmm0
    assert_eq!((usage.size, usage.reads, usage.writes, usage.touched(&vector)), (64, false, true, 0b101));
    let usage = prepare(&mut unit, &[0x62, 0xf1, 0x7c, 0x49, 0x10, 0x00]).memory.unwrap(); // vmovups zmm0{k1}, [rax]
    assert_eq!(usage.touched(&vector), 0x0f0f);
    let usage = prepare(&mut unit, &[0x62, 0xf1, 0x74, 0x59, 0x58, 0x00]).memory.unwrap(); // vaddps {1to16}
    assert_eq!((usage.size, usage.touched(&vector)), (4, 0xf));
    let usage = prepare(&mut unit, &[0x62, 0xf2, 0x7d, 0x49, 0x8a, 0x00]).memory.unwrap(); // vcompressps
    assert_eq!(usage.touched(&vector), 0xff);
    let usage = prepare(&mut unit, &[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x00]).memory.unwrap(); // no mask
    assert_eq!((usage.kind, usage.touched(&vector)), (MemoryKind::Whole, u64::MAX));
    vector.zmm[0][7] = 0x80;
    let usage = prepare(&mut unit, &[0xc4, 0xe2, 0x7d, 0x2c, 0x08]).memory.unwrap(); // vmaskmovps ymm1, ymm0, [rax]
    assert_eq!(usage.touched(&vector), 0xf0);
}

#[test]
fn register_choices_that_the_processor_refuses_are_refused() {
    let mut unit = NativeUnit::new().unwrap();
    let decoded = |bytes| Decoder::new(64, bytes, DecoderOptions::NO_INVALID_CHECK).decode();
    // vfmulcph zmm1, zmm1, zmm2: the destination must not be a source.
    assert!(unit.prepare(&decoded(&[0x62, 0xf6, 0x76, 0x48, 0xd6, 0xca])).is_err());
    // vaddps zmm0{z}, zmm1, zmm2: zeroing without a mask.
    assert!(unit.prepare(&decoded(&[0x62, 0xf1, 0x74, 0xc8, 0x58, 0xc2])).is_err());
    // lock addps xmm0, [rax]
    assert!(unit.prepare(&decoded(&[0xf0, 0x0f, 0x58, 0x00])).is_err());
}
