//! Multiboot images in memory; what they see when they run is tested with the whole command.

use vm_memory::{Bytes, GuestAddress};
use x86::Gpr;

use super::super::{BootPayload, Module, Protocol, load};
use super::synthetic::*;
use crate::layout::{self, MIB};

const HEADER_AT: usize = 0x40;

/// A flat image of `len` bytes for `base`, entered right after its header.
fn image(base: u32, len: usize, bss: u32) -> Vec<u8> {
    let mut file = vec![0x90; len];
    let (magic, flags) = (0x1bad_b002u32, 0x1_0000u32);
    let header = base + HEADER_AT as u32;
    let bss_end = if bss == 0 { 0 } else { base + len as u32 + bss };
    let words = [magic, flags, 0u32.wrapping_sub(magic + flags), header, base, 0, bss_end, header + 32];
    for (index, word) in words.into_iter().enumerate() {
        put(&mut file, HEADER_AT + 4 * index, &word.to_le_bytes());
    }
    file
}

#[test]
fn a_flat_image_is_loaded_with_its_zeros_and_its_module_after_it() {
    let file = image(MIB as u32, 5000, 10_000);
    let module = vec![0x77; 300];
    let payload = BootPayload { initrd: Some(&module), ..payload(&file, Protocol::Auto) };
    let memory = memory(32);
    let loaded = load(&memory, &payload, 0).unwrap();
    assert_eq!((loaded.protocol, loaded.kernel.clone()), (Protocol::Multiboot, MIB..MIB + 15_000));
    assert_eq!(loaded.state.rip, MIB + HEADER_AT as u64 + 32);
    assert_eq!(read(&memory, MIB, 5000), file);
    assert_eq!(read(&memory, MIB + 5000, 10_001)[..], [vec![0; 10_000], vec![0xcc]].concat());
    assert_eq!(loaded.initrd, MIB + 0x4000..MIB + 0x4000 + 300);
    assert_eq!(read(&memory, MIB + 0x4000, 300), module);
}

#[test]
fn the_information_is_where_the_image_is_not() {
    for (base, len, expected) in [
        (MIB, 0x1000, 0x1_0000),
        (0x4000, 0x1000, 0x1_0000),
        (0x4000, 0x1_0000, 0x9_e000),
        (0x1_0000, 0x8_f000, MIB),
    ] {
        let file = image(base as u32, len, 0);
        let memory = memory(32);
        let state = load(&memory, &payload(&file, Protocol::Multiboot), 0).unwrap().state;
        let at = state.gprs[Gpr::Rbx as usize];
        assert_eq!((at, state.gprs[Gpr::Rax as usize]), (expected, 0x2bad_b002), "{base:#x}");
        assert_eq!(read(&memory, base, len), file);
        let field = |offset: u64| -> u32 { memory.vm().read_obj(GuestAddress(at + offset)).unwrap() };
        let cmdline = read(&memory, field(16).into(), 24);
        assert_eq!(&cmdline, b"path/image console=ttyS0");
        assert_eq!([field(4), field(8), field(20)], [636, 31 << 10, 0]);
        assert_eq!(field(44) as usize, 24 * layout::memory_map(memory.regions()).len());
    }
}

#[test]
fn linux_and_pvh_come_before_a_multiboot_header() {
    for (kernel, protocol) in [
        (usual_bzimage(), Protocol::Pvh),
        (elf(&text(), Some(PVH_ENTRY)), Protocol::Pvh),
        (elf(&text(), None), Protocol::Linux64),
    ] {
        let load = |kernel: &[u8]| load(&memory(32), &payload(kernel, Protocol::Auto), 0).unwrap().protocol;
        assert_eq!(load(&kernel), protocol);
    }
    // A header in the text of an ELF file of 64 bits: Multiboot without the note, PVH with it.
    let (magic, flags) = (0x1bad_b002u32, 3u32);
    let header = [magic, flags, 0u32.wrapping_sub(magic + flags)].map(u32::to_le_bytes).concat();
    for (pvh, protocol) in [(Some(PVH_ENTRY), Protocol::Pvh), (None, Protocol::Multiboot)] {
        let mut kernel = elf(&text(), pvh);
        put(&mut kernel, 0x400, &header);
        let loaded = load(&memory(32), &payload(&kernel, Protocol::Auto), 0).unwrap();
        assert_eq!(loaded.protocol, protocol);
    }
}

#[test]
fn several_modules_lie_on_pages_of_their_own_with_their_arguments() {
    let file = image(MIB as u32, 5000, 0);
    let (first, second) = (vec![0x11; 5000], vec![0x22; 10]);
    let modules =
        [Module { bytes: &second, text: "second with arguments" }, Module { bytes: &[], text: "empty" }];
    let usual = payload(&file, Protocol::Auto);
    let payload = BootPayload { initrd: Some(&first), initrd_name: "first", modules: &modules, ..usual };
    let memory = memory(32);
    let loaded = load(&memory, &payload, 0).unwrap();
    let word = |at: u32| -> u32 { memory.vm().read_obj(GuestAddress(at.into())).unwrap() };
    let information = loaded.state.gprs[Gpr::Rbx as usize] as u32;
    assert_eq!((word(information) & 8, word(information + 20)), (8, 3));
    let list = word(information + 24);
    let start = MIB as u32 + 0x2000;
    for (index, (bytes, text, at)) in [
        (&first[..], "first\0", start),
        (&second, "second with arguments\0", start + 0x2000),
        (&[], "empty\0", start + 0x3000),
    ]
    .into_iter()
    .enumerate()
    {
        let entry = list + 16 * index as u32;
        assert_eq!((word(entry), word(entry + 4)), (at, at + bytes.len() as u32), "{text}");
        assert_eq!(read(&memory, at.into(), bytes.len()), bytes);
        assert_eq!(read(&memory, word(entry + 8).into(), text.len()), text.as_bytes());
    }
    assert_eq!(loaded.initrd, start.into()..u64::from(start) + 0x3000);
}

#[test]
fn modules_are_for_multiboot_images() {
    let modules = [Module { bytes: &[1], text: "m" }];
    let kernel = usual_bzimage();
    let with = |protocol| BootPayload { modules: &modules, ..payload(&kernel, protocol) };
    let error = load(&memory(32), &with(Protocol::Auto), 0).unwrap_err().to_string();
    assert!(error.contains("no modules"), "{error}");
    let file = image(MIB as u32, 0x1000, 0);
    let modules = [Module { bytes: &[1], text: "a\0b" }];
    let nul = BootPayload { modules: &modules, ..payload(&file, Protocol::Auto) };
    assert!(load(&memory(32), &nul, 0).unwrap_err().to_string().contains("NUL at byte 1"));
}

#[test]
fn a_module_that_does_not_fit_is_refused_with_what_would_do() {
    let file = image(MIB as u32, 0x1000, 0);
    let module = vec![1; 31 * MIB as usize];
    let payload = BootPayload { initrd: Some(&module), ..payload(&file, Protocol::Auto) };
    let error = load(&memory(32), &payload, 0).unwrap_err().to_string();
    assert!(error.contains("needs at least 33 MiB"), "{error}");
}
