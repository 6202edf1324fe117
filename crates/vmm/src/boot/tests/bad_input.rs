//! Files that are no kernels, kernels that do not fit, and what is said of them.

use guest_memory::GuestMemory;
use proptest::prelude::*;

use super::super::{BootPayload, Protocol, load, unpack_kernel};
use super::synthetic::*;
use crate::layout::{self, MIB};

/// The error of loading into 32 MiB.
fn error(kernel: &[u8], protocol: Protocol) -> String {
    load_error(&payload(kernel, protocol), 32)
}

fn load_error(payload: &BootPayload<'_>, mib: u64) -> String {
    let memory = GuestMemory::new(&layout::regions(mib * MIB).unwrap()).unwrap();
    load(&memory, payload, 0).unwrap_err().to_string()
}

/// The error of an ELF file with these bytes changed.
fn elf_error(changes: &[(usize, &[u8])]) -> String {
    let mut kernel = elf(&text(), Some(PVH_ENTRY));
    for (at, bytes) in changes {
        put(&mut kernel, *at, bytes);
    }
    error(&kernel, Protocol::Auto)
}

/// The error of a bzImage with these bytes changed.
fn bzimage_error(protocol: Protocol, changes: &[(usize, &[u8])]) -> String {
    let mut kernel = usual_bzimage();
    for (at, bytes) in changes {
        put(&mut kernel, *at, bytes);
    }
    error(&kernel, protocol)
}

#[test]
fn what_is_not_a_kernel_is_told_so() {
    assert_eq!(error(b"", Protocol::Auto), "the kernel is empty");
    assert_eq!(
        error(b"#!/bin/sh\necho\n", Protocol::Auto),
        "neither a bzImage nor an ELF file: it starts with 23 21 2f 62 69 6e 2f 73"
    );
    assert!(error(&[0; 4096], Protocol::Auto).starts_with("neither a bzImage nor an ELF file"));
    // A boot sector of something else.
    let mut sector = vec![0; 4096];
    put(&mut sector, 510, &[0x55, 0xaa]);
    assert!(error(&sector, Protocol::Auto).starts_with("neither a bzImage nor an ELF file"));
}

#[test]
fn kernels_for_other_processors_are_named() {
    let mut arm64 = vec![0; 4096];
    put(&mut arm64, 0, b"MZ");
    put(&mut arm64, 56, b"ARM\x64");
    assert_eq!(error(&arm64, Protocol::Auto), "the kernel is for AArch64 (an arm64 Image), not for x86-64");
    assert_eq!(elf_error(&[(18, &[183])]), "the kernel is for AArch64, not for x86-64");
    assert_eq!(elf_error(&[(4, &[1]), (18, &[3])]), "the kernel is for 32-bit x86 (i386), not for x86-64");
    assert_eq!(elf_error(&[(5, &[2]), (18, &[0, 21])]), "the kernel is for PowerPC64, not for x86-64");
}

#[test]
fn a_bzimage_cut_anywhere_is_truncated() {
    let kernel = usual_bzimage();
    for len in [0x202, 0x210, 0x240, 0x300, 5 * 512, 5 * 512 + 100, kernel.len() - 1] {
        for protocol in [Protocol::Auto, Protocol::Stub] {
            let text = error(&kernel[..len], protocol);
            assert!(text.starts_with("the kernel is truncated: "), "{len}: {text}");
        }
    }
    let text = error(&kernel[..kernel.len() - 1], Protocol::Auto);
    let (needs, has) = (kernel.len(), kernel.len() - 1);
    assert_eq!(
        text,
        format!(
            "the kernel is truncated: the compressed kernel ends at byte {needs} but the file has {has} bytes"
        )
    );
}

#[test]
fn an_elf_file_cut_anywhere_is_refused() {
    let kernel = elf(&text(), Some(PVH_ENTRY));
    for len in [4, 19, 63, 64, 100, 175, 200, 1000, kernel.len() - 1] {
        let text = error(&kernel[..len], Protocol::Auto);
        assert!(text.contains("truncated") || text.contains("bad ELF file"), "{len}: {text}");
    }
    assert!(error(&kernel[..kernel.len() - 1], Protocol::Auto).contains("its segment 0 takes 0x186a0 bytes"));
}

#[test]
fn setup_headers_that_make_no_sense_name_the_field() {
    let auto = |changes: &[(usize, &[u8])]| bzimage_error(Protocol::Auto, changes);
    assert_eq!(
        auto(&[(0x206, &[0x07, 0x02])]),
        "bad bzImage: version is 0x207, older than 2.08 (Linux 2.6.26)"
    );
    assert_eq!(auto(&[(0x211, &[0])]), "bad bzImage: loadflags is 0x0, a zImage that is loaded low");
    assert_eq!(auto(&[(0x230, &[3, 0, 0, 0])]), "bad bzImage: kernel_alignment is 0x3, not a power of two");
    assert!(auto(&[(0x24c, &[0xff; 4])]).starts_with("the kernel is truncated: the compressed kernel"));
    assert!(auto(&[(0x248, &[0xff; 4])]).starts_with("the kernel is truncated: the compressed kernel"));
    let stub = |changes: &[(usize, &[u8])]| bzimage_error(Protocol::Stub, changes);
    assert_eq!(stub(&[(0x236, &[0x7e])]), "the bzImage has no 64-bit entry: xloadflags is 0x7e");
    assert!(stub(&[(0x258, &[0xff; 8])]).starts_with("bad bzImage: pref_address is 0xffffffffffffffff"));
    assert!(stub(&[(0x260, &[0xff; 4])]).starts_with("bad bzImage: pref_address is 0x1000000, not between"));
    assert!(
        stub(&[(0x260, &[0, 0, 0, 0x7f])])
            .starts_with("the kernel is too big for the memory: it takes 0x1000000")
    );
}

#[test]
fn elf_segments_must_lie_in_free_ram() {
    let at = |address: u64| elf_error(&[(P_PADDR, &address.to_le_bytes()), (24, &address.to_le_bytes())]);
    for address in [0, 0x1000, 0x2_0000, 0x9_0000, 0xc_0000, 0xe_0000, 0xfee0_0000, 1 << 40] {
        // The note's entry lies in the segment no more; that is no matter here.
        let text = at(address);
        assert!(
            text.contains("which is not free RAM") || text.contains("lies in none"),
            "{address:#x}: {text}"
        );
    }
    let kernel = |address: u64| {
        let mut kernel = elf(&text(), None);
        put(&mut kernel, P_PADDR, &address.to_le_bytes());
        put(&mut kernel, 24, &address.to_le_bytes());
        error(&kernel, Protocol::Auto)
    };
    for address in [0, 0x1000, 0x2_0000, 0x9_0000, 0xc_0000, 0xe_0000, 0xfee0_0000, 1 << 40] {
        let end = address + text().len() as u64 + BSS;
        assert_eq!(
            kernel(address),
            format!("the kernel is linked to {address:#x} to {end:#x}, which is not free RAM")
        );
    }
    assert!(kernel(u64::MAX).starts_with("bad ELF file: its segment 0 at 0xffffffffffffffff"));
    assert_eq!(
        kernel(32 * MIB - 0x1000),
        "the kernel is too big for the memory: it takes 0x1fff000 to 0x201a6a0, the RAM below 4 GiB ends at \
         0x2000000"
    );
}

#[test]
fn elf_headers_that_make_no_sense_say_why() {
    let all_ones = u64::MAX.to_le_bytes();
    assert!(elf_error(&[(P_MEMSZ, &1u64.to_le_bytes())]).contains("bytes in the file and 1 in memory"));
    assert!(elf_error(&[(P_MEMSZ, &all_ones)]).starts_with("bad ELF file: its segment 0"));
    assert!(elf_error(&[(P_FILESZ, &all_ones)]).starts_with("bad ELF file: its segment 0"));
    assert!(elf_error(&[(16, &[1])]).contains("its type is 1, not an executable"));
    assert!(elf_error(&[(24, &all_ones)]).contains("entry 0xffffffffffffffff lies in none of its segments"));
    assert!(elf_error(&[(32, &all_ones)]).starts_with("bad ELF file"));
    assert!(elf_error(&[(54, &[1])]).starts_with("bad ELF file"));
    assert_eq!(elf_error(&[(56, &[0])]), "the ELF file has no segment to load");
    // The note's name and descriptor sizes.
    assert!(elf_error(&[(64 + 112, &[0xff; 4])]).starts_with("bad ELF file"));
    assert!(elf_error(&[(64 + 116, &[2, 0, 0, 0])]).contains("its PVH note has 2 bytes"));
    assert!(elf_error(&[(64 + 128, &[0; 4])]).contains("entry 0x0 lies in none"));
}

#[test]
fn protocols_that_the_kernel_does_not_have_are_refused() {
    let plain = elf(&text(), None);
    assert!(error(&plain, Protocol::Pvh).starts_with("the kernel has no PVH entry"));
    assert_eq!(
        error(&plain, Protocol::Stub),
        "an ELF file has no decompressor stub; --boot stub needs a bzImage"
    );
    let names = ["auto", "pvh", "linux64", "stub"];
    for name in names {
        assert_eq!(name.parse::<Protocol>().unwrap().to_string(), name);
    }
    assert!("grub".parse::<Protocol>().unwrap_err().to_string().contains("\"grub\""));
}

#[test]
fn command_lines_that_the_kernel_would_cut_are_refused() {
    let kernel = usual_bzimage();
    let load_with =
        |cmdline: &str, protocol| load_error(&BootPayload { cmdline, ..payload(&kernel, protocol) }, 32);
    for protocol in [Protocol::Pvh, Protocol::Linux64, Protocol::Stub] {
        assert_eq!(
            load_with(&"x".repeat(2048), protocol),
            "the command line has 2048 bytes, the kernel takes 2047"
        );
        assert_eq!(load_with("quiet\0 debug", protocol), "the command line has a NUL at byte 5");
    }
    let memory = memory(32);
    let cmdline = &"x".repeat(2047);
    load(&memory, &BootPayload { cmdline, ..payload(&kernel, Protocol::Auto) }, 0).unwrap();
}

#[test]
fn an_initrd_that_does_not_fit_says_what_it_needs() {
    let kernel = usual_bzimage();
    let initrd = vec![0; 20 << 20];
    for protocol in [Protocol::Pvh, Protocol::Linux64, Protocol::Stub] {
        let payload = BootPayload { initrd: Some(&initrd), ..payload(&kernel, protocol) };
        let text = load_error(&payload, 32);
        let Some((_, needs)) = text.split_once("the machine needs at least ") else { panic!("{text}") };
        let mib: u64 = needs.trim_end_matches(" MiB").parse().unwrap();
        let memory = GuestMemory::new(&layout::regions(mib * MIB).unwrap()).unwrap();
        load(&memory, &payload, 0).unwrap();
    }
}

#[test]
fn a_kernel_that_unpacks_to_more_than_the_memory_is_stopped() {
    let bomb = [elf(&text(), None), vec![0; 40 << 20]].concat();
    let kernel = bzimage(&gzip(&bomb), bomb.len());
    assert!(error(&kernel, Protocol::Auto).starts_with("the bzImage's payload unpacks to more than"));
    assert_eq!(unpack_kernel(&kernel).unwrap().len(), bomb.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_change_of_a_header_panics(
        from_elf in any::<bool>(),
        protocol in prop::sample::select(vec![Protocol::Auto, Protocol::Pvh, Protocol::Linux64, Protocol::Stub]),
        changes in prop::collection::vec((0usize..0x280, prop_oneof![Just(0xffu8), Just(0), any::<u8>()]), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let text = &text()[..2000];
        let elf = elf(text, Some(PVH_ENTRY));
        let mut kernel = if from_elf { elf } else { bzimage(&gzip(&elf), elf.len()) };
        for (at, byte) in changes {
            // The interesting bytes of a bzImage begin with its setup header.
            kernel[if from_elf { at % 200 } else { 0x1f0 + at % 0x90 }] = byte;
        }
        if let Some(cut) = cut {
            kernel.truncate(cut.index(kernel.len()));
        }
        let memory = GuestMemory::new(&layout::regions(32 * MIB).unwrap()).unwrap();
        if let Ok(loaded) = load(&memory, &payload(&kernel, protocol), 0) {
            prop_assert!(loaded.kernel.end <= 32 * MIB);
        }
    }
}
