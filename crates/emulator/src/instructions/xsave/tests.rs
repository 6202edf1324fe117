#![allow(unsafe_code)] // The host's own XSAVE and XRSTOR, to compare with.

use std::arch::asm;

use engine::{HostXsave, XSAVE_AREA_SIZE};
use x86::{Cr0, Cr4, Exception, Vector};

use super::*;
use crate::cpuid::feature;
use crate::native::VectorRegisters;
use crate::testing::*;

/// Where the area is; RBX points there.
const AREA: u64 = 0x6000;
const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT: [u8; 4] = [0x48, 0x0f, 0xae, 0x33];
const XSAVEC: [u8; 4] = [0x48, 0x0f, 0xc7, 0x23];
const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2b];
const FXSAVE: [u8; 3] = [0x0f, 0xae, 0x03];
const FXRSTOR: [u8; 3] = [0x0f, 0xae, 0x0b];

fn prepared() -> Cpu {
    let mut cpu = long();
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXSAVE;
    // The host that all of it is compared with may have no protection keys; they have a test of their own.
    let states = cpu.wires.model.xsave_states() - Xcr0::PKRU;
    cpu.write_xcr0(states.bits()).unwrap();
    request(&mut cpu, u64::MAX);
    cpu.registers.set(3, AREA);
    cpu
}

/// Sets EDX:EAX.
fn request(cpu: &mut Cpu, mask: u64) {
    cpu.registers.set(0, mask & 0xffff_ffff);
    cpu.registers.set(2, mask >> 32);
}

/// A processor with something in every register.
fn filled() -> Cpu {
    let mut cpu = prepared();
    let mut seed = 1u8;
    let mut next = || {
        seed = seed.wrapping_mul(5).wrapping_add(3);
        seed
    };
    let mut x87 = [0; 160];
    x87[..2].copy_from_slice(&0x037fu16.to_le_bytes());
    x87[4] = 0xff;
    for register in x87[32..].chunks_exact_mut(16) {
        register[..10].fill_with(&mut next);
    }
    cpu.vector.load_component(Component::X87, &x87);
    for component in
        [Component::Sse, Component::Avx, Component::Opmask, Component::ZmmHi256, Component::Hi16Zmm]
    {
        if cpu.xcr0 & component.bit().bits() != 0 {
            let bytes: Vec<u8> = (0..component.size()).map(|_| next()).collect();
            cpu.vector.load_component(component, &bytes);
        }
    }
    cpu.vector.set_mxcsr(0x1fa0).unwrap();
    cpu
}

#[repr(C, align(64))]
#[derive(Clone)]
struct HostArea([u8; 16384]);

impl HostArea {
    fn new() -> Box<Self> {
        Box::new(Self([0; 16384]))
    }
}

/// What the host saves, in our standard format, after it has restored from `area`.
fn through_the_host(area: &[u8], components: u64) -> Vec<u8> {
    let (mut from, mut to, mut own) = (HostArea::new(), HostArea::new(), HostArea::new());
    from.0[..area.len()].copy_from_slice(area);
    if bytes_at(area, LEGACY + 8) & COMPACTED == 0 {
        let standard = HostXsave::get().to_host(from.0.first_chunk().unwrap());
        from.0[..XSAVE_AREA_SIZE].copy_from_slice(&standard);
    }
    // SAFETY: the areas are aligned and larger than any processor's; the state in use is put back before Rust goes on.
    unsafe {
        asm!(
            "xsave64 [{own}]", "xrstor64 [{from}]", "xsave64 [{to}]", "xrstor64 [{own}]",
            own = in(reg) own.0.as_mut_ptr(), from = in(reg) from.0.as_ptr(), to = in(reg) to.0.as_mut_ptr(),
            in("eax") components as u32, in("edx") (components >> 32) as u32, options(nostack),
        );
    }
    HostXsave::get().from_host(to.0.first_chunk().unwrap())[..LARGEST].to_vec()
}

fn area_of(cpu: &Cpu) -> Vec<u8> {
    let mut area = vec![0; LARGEST];
    cpu.memory.read_bytes(AREA, &mut area);
    area
}

/// Without what processors differ in: the last x87 instruction's addresses, MXCSR's mask, reserved bytes.
fn comparable(mut area: Vec<u8>) -> Vec<u8> {
    area[6..24].fill(0);
    area[28..32].fill(0);
    area[AVAILABLE..LEGACY].fill(0);
    area[LEGACY + 8..EXTENDED].fill(0);
    area
}

#[test]
fn a_standard_area_is_what_the_host_makes_of_it() {
    let mut cpu = filled();
    run(&mut cpu, &XSAVE).unwrap();
    let area = area_of(&cpu);
    let host = through_the_host(&area, cpu.xcr0);
    assert!(comparable(area.clone()) == comparable(host));
    let mut other = prepared();
    other.memory.write_bytes(AREA, &area);
    run(&mut other, &XRSTOR).unwrap();
    assert!(other.vector == cpu.vector);
}

#[test]
fn the_rights_of_protection_keys_are_saved_and_restored() {
    let mut cpu = prepared();
    cpu.cr4.insert(Cr4::PKE);
    cpu.update_paging();
    let states = cpu.wires.model.xsave_states();
    cpu.write_xcr0(states.bits()).unwrap();
    let (rights, bit) = (0x5555_5554, 1u64 << 9);
    for (save, at) in [(&XSAVE, 2688), (&XSAVEOPT, 2688), (&XSAVEC, 576)] {
        cpu.memory.write_bytes(AREA, &[0xff; LARGEST]);
        cpu.memory.write_bytes(AREA + 512, &[0; 64]);
        cpu.write_pkru(rights);
        request(&mut cpu, bit);
        run(&mut cpu, save).unwrap();
        assert_eq!((get::<u64>(&cpu, AREA + at), get::<u64>(&cpu, AREA + 512)), (u64::from(rights), bit));
        cpu.write_pkru(0);
        run(&mut cpu, &XRSTOR).unwrap();
        assert_eq!((cpu.vector.pkru, cpu.mmu.paging.keys.user), (rights, Some(rights)), "they count at once");
    }
    // In its initial configuration it is not in the area, and restoring it from there clears it.
    cpu.write_pkru(0);
    run(&mut cpu, &XSAVEC).unwrap();
    assert_eq!(get::<u64>(&cpu, AREA + 512), 0);
    cpu.write_pkru(rights);
    run(&mut cpu, &XRSTOR).unwrap();
    assert_eq!(cpu.vector.pkru, 0);
}

#[test]
fn a_compacted_area_is_one_for_the_host_and_for_us() {
    let mut cpu = filled();
    run(&mut cpu, &XSAVE).unwrap();
    let standard = area_of(&cpu);
    cpu.memory.write_bytes(AREA, &[0; LARGEST]);
    // Leave the component in the middle out, so that what follows moves up.
    let mask = cpu.xcr0 & !Xcr0::AVX.bits();
    request(&mut cpu, mask);
    run(&mut cpu, &XSAVEC).unwrap();
    let area = area_of(&cpu);
    assert_eq!(bytes_at(&area, LEGACY + 8), COMPACTED | mask);
    if cpu.wires.model.has(crate::cpuid::feature::XSAVEC)
        && std::arch::x86_64::__cpuid_count(0xd, 1).eax & 2 != 0
    {
        let host = through_the_host(&area, mask);
        let mut expected = comparable(standard);
        expected[Component::Avx.offset()..][..256].fill(0);
        expected[LEGACY] &= !4;
        assert!(comparable(host) == expected);
    }
    let mut other = prepared();
    other.memory.write_bytes(AREA, &area);
    run(&mut other, &XRSTOR).unwrap();
    cpu.vector.init_component(Component::Avx);
    assert!(other.vector == cpu.vector);
}

#[test]
fn initial_components_are_not_written_and_restored_as_initial() {
    let mut cpu = prepared();
    cpu.memory.write_bytes(AREA, &[0xaa; 512]);
    run(&mut cpu, &XSAVEOPT).unwrap();
    assert_eq!(bytes_at(&area_of(&cpu), LEGACY), 0);
    assert_eq!(get::<u64>(&cpu, AREA + 160), 0xaaaa_aaaa_aaaa_aaaa);
    assert_eq!(get::<u32>(&cpu, AREA + 24), 0x1f80, "MXCSR is always written");
    let mut other = filled();
    other.memory.write_bytes(AREA, &area_of(&cpu));
    run(&mut other, &XRSTOR).unwrap();
    assert!(*other.vector == VectorRegisters::reset());
}

#[test]
fn what_was_not_asked_for_stays_on_both_sides() {
    let mut cpu = filled();
    request(&mut cpu, Xcr0::SSE.bits());
    cpu.memory.write_bytes(AREA + LEGACY as u64, &4u64.to_le_bytes());
    run(&mut cpu, &XSAVE).unwrap();
    assert_eq!(bytes_at(&area_of(&cpu), LEGACY), 4 | 2);
    assert_eq!(get::<u64>(&cpu, AREA + 32), 0, "x87 was not asked for");
    let mut other = prepared();
    other.memory.write_bytes(AREA, &area_of(&cpu));
    request(&mut other, Xcr0::SSE.bits());
    run(&mut other, &XRSTOR).unwrap();
    assert_eq!(other.vector.in_use(), Xcr0::SSE);
}

#[test]
fn bad_headers_are_general_protection_faults_and_change_nothing() {
    let (state, layout) = (LEGACY as u64, LEGACY as u64 + 8);
    let bad: [(u64, u64); 6] = [
        (state, 1 << 62),
        (state, 1 << 3),
        (layout, 1),
        (layout + 8, 1),
        (layout, COMPACTED | 1 << 3),
        (24, 0x1_0000),
    ];
    for (at, value) in bad {
        let mut cpu = filled();
        let before = cpu.vector.clone();
        cpu.memory.write_bytes(AREA, &[0; LARGEST]);
        put(&cpu, AREA + at, value);
        assert_eq!(run(&mut cpu, &XRSTOR), Err(Exception::gp(0)), "{value:#x} at {at}");
        assert!(cpu.vector == before);
    }
}

#[test]
fn areas_are_aligned_and_states_enabled() {
    let mut cpu = prepared();
    cpu.registers.set(3, AREA + 32);
    for bytes in [XSAVE, XSAVEC, XSAVEOPT, XRSTOR] {
        assert_eq!(run(&mut cpu, &bytes), Err(Exception::gp(0)));
    }
    cpu.registers.set(3, AREA + 8);
    assert_eq!(run(&mut cpu, &FXSAVE), Err(Exception::gp(0)));
    cpu.cr0.insert(Cr0::TS);
    let absent = Exception::new(Vector::DeviceNotAvailable);
    for bytes in [XSAVE, XRSTOR] {
        assert_eq!(run(&mut cpu, &bytes), Err(absent));
    }
    cpu.cr4.remove(Cr4::OSXSAVE);
    assert_eq!(run(&mut cpu, &XSAVE), Err(Exception::ud()));
}

#[test]
fn fxsave_and_fxrstor_keep_the_legacy_state() {
    let mut cpu = filled();
    run(&mut cpu, &FXSAVE).unwrap();
    let mut other = prepared();
    other.memory.write_bytes(AREA, &area_of(&cpu));
    run(&mut other, &FXRSTOR).unwrap();
    assert_eq!(other.vector.mxcsr(), 0x1fa0);
    assert_eq!(other.vector.in_use(), Xcr0::X87 | Xcr0::SSE);
    assert!((0..16).all(|n| other.vector.zmm[n][..16] == cpu.vector.zmm[n][..16]));
}

const XSAVES: [u8; 4] = [0x48, 0x0f, 0xc7, 0x2b];
const XRSTORS: [u8; 4] = [0x48, 0x0f, 0xc7, 0x1b];

#[test]
fn the_supervisors_forms_are_compacted_and_the_kernels_alone() {
    let mut cpu = filled();
    assert!(cpu.wires.model.has(feature::XSAVES));
    run(&mut cpu, &XSAVES).unwrap();
    let area = area_of(&cpu);
    assert_eq!(bytes_at(&area, LEGACY + 8), COMPACTED | cpu.xcr0);
    let mut other = prepared();
    other.memory.write_bytes(AREA, &area);
    run(&mut other, &XRSTORS).unwrap();
    assert!(other.vector == cpu.vector);
    run(&mut cpu, &XSAVE).unwrap();
    put(&cpu, AREA + LEGACY as u64 + 8, 0u64);
    assert_eq!(run(&mut cpu, &XRSTORS), Err(Exception::gp(0)), "a standard area");
    to_user(&mut cpu);
    for bytes in [XSAVES, XRSTORS] {
        assert_eq!(run(&mut cpu, &bytes), Err(Exception::gp(0)));
        cpu.cr4.remove(Cr4::OSXSAVE);
        assert_eq!(run(&mut cpu, &bytes), Err(Exception::ud()));
        cpu.cr4.insert(Cr4::OSXSAVE);
    }
}

#[test]
fn the_supervisors_states_are_none() {
    let mut cpu = prepared();
    cpu.write_msr(x86::msr::IA32_XSS, 0).unwrap();
    for bit in 0..64 {
        assert!(cpu.write_msr(x86::msr::IA32_XSS, 1 << bit).is_err(), "{bit}");
    }
    assert_eq!(cpu.read_msr(x86::msr::IA32_XSS), Ok(0));
    let context = cpu.cpuid_context();
    let [_, size, low, high] = cpu.wires.model.cpuid(&context, 0xd, 1);
    assert_eq!((size as usize, low, high), (compacted_len(cpu.xcr0), 0, 0));
    cpu.wires = wires_for("host,-xsaves");
    assert!(cpu.read_msr(x86::msr::IA32_XSS).is_err());
    assert_eq!(run(&mut cpu, &XSAVES), Err(Exception::ud()));
}

/// [`filled`] in 32-bit mode.
fn filled_narrow() -> Cpu {
    let (mut cpu, long) = (protected(), filled());
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXSAVE;
    cpu.write_xcr0(long.xcr0).unwrap();
    request(&mut cpu, u64::MAX);
    cpu.registers.set(3, AREA);
    cpu.vector = long.vector;
    cpu
}

#[test]
fn outside_64_bit_mode_the_upper_registers_stay_on_both_sides() {
    let mut cpu = filled_narrow();
    let before = cpu.vector.clone();
    cpu.memory.write_bytes(AREA, &[0xaa; LARGEST]);
    run(&mut cpu, &XSAVE[1..]).unwrap();
    let area = area_of(&cpu);
    for component in [Component::Sse, Component::Avx, Component::ZmmHi256, Component::Hi16Zmm] {
        if cpu.xcr0 & component.bit().bits() == 0 {
            continue;
        }
        let (hidden, bytes) =
            (out_of_reach(&cpu, component), &area[component.offset()..][..component.size()]);
        assert!(bytes[hidden.clone()].iter().all(|&byte| byte == 0xaa), "{component:?}");
        assert!(bytes[..hidden.start].iter().any(|&byte| byte != 0xaa) || hidden.start == 0, "{component:?}");
    }
    // Everything goes to its initial value that can be reached.
    cpu.memory.write_bytes(AREA + LEGACY as u64, &[0; 64]);
    run(&mut cpu, &[0x0f, 0xae, 0x2b]).unwrap();
    assert!(cpu.vector.zmm[..8].iter().all(|zmm| *zmm == [0; 64]));
    assert!(cpu.vector.zmm[8..] == before.zmm[8..]);
}

const FXSAVE64: [u8; 4] = [0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x0b];
const FNOP: [u8; 2] = [0xd9, 0xd0];
const FLDZ: [u8; 2] = [0xd9, 0xee];
const FLD1: [u8; 2] = [0xd9, 0xe8];
/// `fdiv 8(%rsi)` of 64 bits.
const FDIV: [u8; 3] = [0xdc, 0x76, 0x08];
const FNSTENV: [u8; 2] = [0xd9, 0x33];

#[test]
fn the_last_x87_instruction_is_pointed_to() {
    let mut cpu = prepared();
    for (bytes, noted) in [
        (&FNOP[..], true),
        (&FLD1, true),
        (&[0xd9, 0xf7], true),  // fincstp
        (&[0xdb, 0xe2], false), // fnclex
        (&[0xdf, 0xe0], false), // fnstsw
        (&[0x0f, 0x77], false), // emms
    ] {
        cpu.vector.set_x87_pointers((0x123, 0x1234_5678_9abc, 0xdef0));
        let rip = cpu.rip;
        run(&mut cpu, bytes).unwrap();
        let expected = if noted { rip } else { 0x1234_5678_9abc };
        assert_eq!(cpu.vector.x87_pointers(), (0x123, expected, 0xdef0), "{bytes:x?}");
    }
    run(&mut cpu, &[0xdb, 0xe3]).unwrap(); // fninit
    assert_eq!(cpu.vector.x87_pointers(), (0, 0, 0));
}

#[test]
fn opcode_and_operand_are_noted_by_exceptions_that_are_not_masked() {
    for unmasked in [false, true] {
        let mut cpu = prepared();
        put(&cpu, AREA, if unmasked { 0x037bu16 } else { 0x037f });
        run(&mut cpu, &[0xd9, 0x2b]).unwrap(); // fldcw
        run(&mut cpu, &FLD1).unwrap();
        cpu.registers.set(6, 0x7000);
        let rip = cpu.rip;
        cpu.memory.write_bytes(rip, &FDIV);
        run(&mut cpu, &FDIV).unwrap();
        let expected = if unmasked { (0x476, rip, 0x7008) } else { (0, rip, 0) };
        assert_eq!(cpu.vector.x87_pointers(), expected);
        run(&mut cpu, &FNSTENV).unwrap();
        let fields = [12, 18, 20].map(|at| get::<u32>(&cpu, AREA + at));
        assert_eq!(
            (fields[0], fields[1] & 0x7ff, fields[2]),
            (rip as u32, expected.0.into(), expected.2 as u32)
        );
        assert_eq!(run(&mut cpu, &FLDZ), Ok(()), "FNSTENV masks all exceptions");
    }
}

#[test]
fn pointers_have_64_bits_with_rex_w_and_32_without() {
    let pointers = (0x7ff, 0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321);
    let mut cpu = prepared();
    cpu.vector.set_x87_pointers(pointers);
    run(&mut cpu, &FXSAVE64).unwrap();
    assert_eq!([8, 16].map(|at| get::<u64>(&cpu, AREA + at)), [pointers.1, pointers.2]);
    run(&mut cpu, &FXSAVE).unwrap();
    let low = [pointers.1, pointers.2].map(|pointer| pointer & 0xffff_ffff);
    assert_eq!([8, 16].map(|at| get::<u64>(&cpu, AREA + at)), low);
    put(&cpu, AREA + 8, pointers.1);
    run(&mut cpu, &FXRSTOR).unwrap();
    assert_eq!(cpu.vector.x87_pointers().1, pointers.1 & 0xffff_ffff);
    run(&mut cpu, &FXRSTOR64).unwrap();
    assert_eq!(cpu.vector.x87_pointers().1, pointers.1);
}
