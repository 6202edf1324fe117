#![allow(unsafe_code)] // The host's own XSAVE and XRSTOR, to compare with.

use std::arch::asm;

use x86::{Cr0, Cr4, Exception, Vector};

use super::*;
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

/// What the host saves, in the standard format, after it has restored from `area`.
fn through_the_host(area: &[u8], components: u64) -> Vec<u8> {
    let (mut from, mut to, mut own) = (HostArea::new(), HostArea::new(), HostArea::new());
    from.0[..area.len()].copy_from_slice(area);
    // SAFETY: the areas are aligned and larger than any processor's; the state in use is put back before Rust goes on.
    unsafe {
        asm!(
            "xsave64 [{own}]", "xrstor64 [{from}]", "xsave64 [{to}]", "xrstor64 [{own}]",
            own = in(reg) own.0.as_mut_ptr(), from = in(reg) from.0.as_ptr(), to = in(reg) to.0.as_mut_ptr(),
            in("eax") components as u32, in("edx") (components >> 32) as u32, options(nostack),
        );
    }
    to.0[..LARGEST].to_vec()
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
