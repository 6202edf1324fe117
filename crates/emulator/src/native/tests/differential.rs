use std::collections::BTreeSet;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic};

use super::Random;
use super::samples::{Form, has_form, sample};
use super::truth::{Machine, OPERAND, Truth};
use crate::native::allow_list::runs_here;
use crate::native::features::Host;
use crate::native::{Component, NativeFault, NativeUnit, Unsupported, VectorRegisters, is_listed};

/// A vector element that arithmetic finds interesting, as wide as `T`'s bits allow.
fn element(random: &mut Random) -> [u8; 8] {
    let single = |random: &mut Random| match random.below(8) {
        0 => 0f32,
        1 => -0f32,
        2 => f32::INFINITY,
        3 => f32::from_bits(0x7fa0_0001),
        4 => f32::from_bits(random.next() as u32 & 0x807f_ffff),
        5 => f32::from_bits(random.next() as u32),
        _ => random.below(2000) as f32 / 16.0 - 60.0,
    };
    let double = |random: &mut Random| match random.below(8) {
        0 => 0f64,
        1 => f64::NEG_INFINITY,
        2 => f64::NAN,
        3 => f64::from_bits(random.next() & 0x800f_ffff_ffff_ffff),
        4 => f64::from_bits(random.next()),
        _ => random.below(2000) as f64 / 16.0 - 60.0,
    };
    match random.below(4) {
        0 => random.next().to_le_bytes(),
        1 => double(random).to_le_bytes(),
        _ => {
            let (low, high) = (single(random).to_bits(), single(random).to_bits());
            (u64::from(high) << 32 | u64::from(low)).to_le_bytes()
        }
    }
}

fn fill(bytes: &mut [u8], random: &mut Random) {
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&element(random)));
}

/// Random x87 state, mostly with all exceptions masked.
fn x87(random: &mut Random) -> [u8; 160] {
    let mut image = [0u8; 160];
    let masks = if random.chance(3) { random.next() as u16 & 0x3f | 0x40 } else { 0x7f };
    let control = (random.next() as u16 & 0x0f00 | masks).to_le_bytes();
    let status = (random.next() as u16 & 0x7f7f).to_le_bytes();
    image[..2].copy_from_slice(&control);
    image[2..4].copy_from_slice(&status);
    image[4] = if random.chance(2) { 0xff } else { random.next() as u8 };
    for register in image[32..].chunks_exact_mut(16) {
        register[..8].copy_from_slice(&(random.next() | 1 << 63).to_le_bytes());
        let exponent = match random.below(6) {
            0 => 0x7fff,
            1 => 0,
            _ => 0x3ff0 + random.below(0x40) as u16,
        };
        register[8..10].copy_from_slice(&(exponent | (random.next() as u16 & 0x8000)).to_le_bytes());
    }
    image
}

pub fn random_machine(random: &mut Random) -> Machine {
    let mut vector = VectorRegisters::reset();
    vector.zmm.iter_mut().for_each(|zmm| fill(zmm, random));
    vector.k = std::array::from_fn(|_| random.next());
    vector.load_component(Component::X87, &x87(random));
    let masks = if random.chance(3) { 0 } else { 0x1f80 };
    vector.set_mxcsr(random.next() as u32 & 0xffff | masks).unwrap();
    let mut memory = [0; OPERAND];
    fill(&mut memory, random);
    let gprs = std::array::from_fn(|_| if random.chance(3) { random.below(100) } else { random.next() });
    Machine { gprs, rflags: random.next() & 0x8d5, vector, memory }
}

/// Registers that a host does not have stay as they are reset.
fn limit(host: Host, vector: &mut VectorRegisters) {
    if !host.avx512 {
        for component in [Component::Opmask, Component::ZmmHi256, Component::Hi16Zmm] {
            vector.init_component(component);
        }
    }
    if !host.avx {
        vector.init_component(Component::Avx);
    }
}

/// Gives instructions with implied or restricted operands what they want.
pub fn constrain(code: Code, machine: &mut Machine, address: u64) {
    match code.mnemonic() {
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => machine.gprs[7] = address,
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            let value = u32::from(machine.memory[0]) << 8 | 0x1f80;
            machine.memory[..4].copy_from_slice(&value.to_le_bytes());
        }
        _ => {}
    }
    if code.cpuid_features().contains(&CpuidFeature::AVX512_FP16) {
        // Exact tiny results, which unmasked raise underflow, do not show masked, nor are they ever flushed.
        let masked = machine.vector.mxcsr() | 1 << 11;
        machine.vector.set_mxcsr(masked).unwrap();
    }
}

/// The same instruction through its stub: what it raised, and the state after it. The operand is copied to an aligned
/// place.
pub fn through_stub(
    unit: &mut NativeUnit,
    instruction: &Instruction,
    before: &Machine,
) -> Result<(Result<(), NativeFault>, Machine), Unsupported> {
    #[repr(align(64))]
    struct Aligned([u8; OPERAND]);
    let mut after = before.clone();
    let mut memory = Aligned(before.memory);
    let insn = unit.prepare(instruction)?;
    // SAFETY: the operand is as long as any and aligned.
    let result = unsafe {
        unit.run(&insn, &mut after.gprs, &mut after.rflags, &mut after.vector, memory.0.as_mut_ptr())
    };
    after.memory = memory.0;
    // What the image holds beyond the x87 state is of no meaning, and where the last instruction was the truth does not
    // tell.
    after.vector.set_x87_pointers((0, 0, 0));
    after.vector = VectorRegisters::from_state(&after.vector.to_state());
    Ok((result, after))
}

/// The same through the host: whether it raised an exception, and the state after it.
fn through_host(truth: &mut Truth, instruction: &Instruction, before: &Machine) -> (bool, Machine) {
    let (signal, after) = truth.run(instruction, before);
    assert!(matches!(signal, None | Some(libc::SIGFPE)), "{:?}: {signal:?}", instruction.code());
    (signal.is_some(), after)
}

fn uses_mmx(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|i| instruction.op_register(i).is_mm())
}

fn difference(truth: &Machine, stub: &Machine) -> Option<String> {
    if truth == stub {
        return None;
    }
    let mut text = String::new();
    for i in 0..16 {
        if truth.gprs[i] != stub.gprs[i] {
            text += &format!("\n  gpr {i}: {:x} is {:x}", truth.gprs[i], stub.gprs[i]);
        }
    }
    for i in 0..32 {
        if truth.vector.zmm[i] != stub.vector.zmm[i] {
            text += &format!("\n  zmm {i}:\n   {:x?}\n   {:x?}", truth.vector.zmm[i], stub.vector.zmm[i]);
        }
    }
    if truth.vector.k != stub.vector.k {
        text += &format!("\n  k: {:x?} is {:x?}", truth.vector.k, stub.vector.k);
    }
    if truth.vector.x87[..160] != stub.vector.x87[..160] {
        text += &format!("\n  x87:\n   {:x?}\n   {:x?}", &truth.vector.x87[..160], &stub.vector.x87[..160]);
    }
    if truth.memory != stub.memory {
        text += &format!("\n  memory:\n   {:x?}\n   {:x?}", truth.memory, stub.memory);
    }
    text += &format!("\n  rflags {:x} is {:x}", truth.rflags, stub.rflags);
    text += &format!("\n  mxcsr {:x} is {:x}", truth.vector.mxcsr(), stub.vector.mxcsr());
    Some(text)
}

/// Runs an instruction both ways and says what differs.
fn compare(
    truth: &mut Truth,
    unit: &mut NativeUnit,
    instruction: &Instruction,
    before: &Machine,
) -> Option<String> {
    let (raised, expected) = through_host(truth, instruction, before);
    let Ok((result, mut got)) = through_stub(unit, instruction, before) else {
        return Some("not supported".into());
    };
    if result == Err(NativeFault::SimdException) && uses_mmx(instruction) {
        // The processor turns to MMX state before it finds the exception.
        got.vector.x87 = expected.vector.x87;
    }
    if result == Err(NativeFault::SimdException) {
        // Which of overflow, underflow and inexactness are flagged beside an unmasked one of them is not told apart.
        let after = expected.vector.mxcsr() & 0x38 | got.vector.mxcsr() & !0x38;
        got.vector.set_mxcsr(after).unwrap();
    }
    let (from, to) = (before.vector.mxcsr(), expected.vector.mxcsr());
    if raised != result.is_err() {
        return Some(format!("raised {raised}, not {result:?}, mxcsr {from:x} to {to:x}"));
    }
    difference(&expected, &got).map(|text| format!("{result:?}, mxcsr was {from:x}{text}"))
}

/// Runs instances of every encoding on a unit, and reports what differs.
fn check(unit: &mut NativeUnit, codes: impl Iterator<Item = Code>, instances: u32) {
    let (mut truth, mut random) = (Truth::new(), Random::new(1));
    let (mut forms, mut mnemonics, mut failures) = (0, BTreeSet::new(), Vec::new());
    for code in codes {
        for form in [Form::Register, Form::Memory].into_iter().filter(|&form| has_form(code, form)) {
            for _ in 0..instances {
                let (address, rip) = (truth.address(), truth.rip());
                let Some(instruction) = sample(code, form, &mut random, address, rip) else {
                    failures.push(format!("{code:?} {form:?}: no instance"));
                    break;
                };
                if !is_listed(&instruction) {
                    break; // bt m,r
                }
                let mut before = random_machine(&mut random);
                limit(unit.host, &mut before.vector);
                constrain(code, &mut before, address);
                let differs = compare(&mut truth, unit, &instruction, &before);
                failures.extend(differs.map(|text| format!("{code:?} {form:?}: {text}")));
            }
            forms += 1;
            mnemonics.insert(format!("{:?}", code.mnemonic()));
        }
    }
    println!("{forms} forms of {} mnemonics, {} failures", mnemonics.len(), failures.len());
    failures.truncate(40);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_listed_encoding_gives_what_the_host_gives() {
    check(&mut NativeUnit::new().unwrap(), Code::values().filter(|&code| runs_here(code)), 12);
}

#[test]
fn stubs_for_hosts_without_wide_registers_give_the_same() {
    let listed =
        |encoding| Code::values().filter(move |&code| runs_here(code) && code.encoding() == encoding);
    let mut unit = NativeUnit::with(4 << 20, Host { avx: true, avx512: false }).unwrap();
    let without_opmasks = listed(EncodingKind::VEX).filter(|code| {
        !code.cpuid_features().iter().any(|feature| format!("{feature:?}").contains("AVX512"))
    });
    check(&mut unit, without_opmasks, 4);
    let mut unit = NativeUnit::with(4 << 20, Host { avx: false, avx512: false }).unwrap();
    check(&mut unit, listed(EncodingKind::Legacy), 2);
}

/// Prints what an instruction costs: `cargo test -p ringside-emulator native_costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn native_costs() {
    let (mut unit, mut random) = (NativeUnit::new().unwrap(), Random::new(3));
    let mut machine = random_machine(&mut random);
    machine.vector = VectorRegisters::reset();
    let cases: &[(&str, &[u8])] = &[
        ("pxor xmm0, xmm1", &[0x66, 0x0f, 0xef, 0xc1]),
        ("movdqu xmm0, [rax]", &[0xf3, 0x0f, 0x6f, 0x00]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("ucomisd xmm0, xmm1", &[0x66, 0x0f, 0x2e, 0xc1]),
        ("vpaddd ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xfe, 0xc2]),
        ("vpcmpeqb k1, ymm16, [rax]", &[0x62, 0xf1, 0x7d, 0x20, 0x74, 0x08]),
        ("popcnt rax, rcx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc1]),
        ("tzcnt eax, ecx", &[0xf3, 0x0f, 0xbc, 0xc1]),
        ("adcx rax, rcx", &[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc1]),
        ("mulx rax, rbx, rcx", &[0xc4, 0xe2, 0xe3, 0xf6, 0xc1]),
        ("fld1", &[0xd9, 0xe8]),
        ("fninit", &[0xdb, 0xe3]),
    ];
    for (name, bytes) in cases {
        let instruction = iced_x86::Decoder::new(64, bytes, 0).decode();
        let Ok(insn) = unit.prepare(&instruction) else { continue };
        let memory = machine.memory.as_mut_ptr();
        let start = std::time::Instant::now();
        const RUNS: u32 = 1_000_000;
        for _ in 0..RUNS {
            // SAFETY: none of these needs alignment, and the operand is longer than any.
            let _ = unsafe {
                unit.run(&insn, &mut machine.gprs, &mut machine.rflags, &mut machine.vector, memory)
            };
        }
        println!("{name:28} {:.1} ns", start.elapsed().as_nanos() as f64 / f64::from(RUNS));
        let start = std::time::Instant::now();
        for _ in 0..RUNS / 10 {
            std::hint::black_box(unit.prepare(std::hint::black_box(&instruction)).is_ok());
        }
        println!("{:28} {:.1} ns", "  prepare", start.elapsed().as_nanos() as f64 / f64::from(RUNS / 10));
    }
}
