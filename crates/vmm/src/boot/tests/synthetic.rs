//! Kernels made by hand, and machines to load them into.

use std::io::Write;

use guest_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::super::{BootPayload, Protocol};
use crate::layout::{self, MIB};

/// Where the kernels here are linked to.
pub(super) const BASE: u64 = 16 * MIB;
/// Offsets of their entries.
pub(super) const ENTRY: u64 = BASE + 0x100;
pub(super) const PVH_ENTRY: u32 = BASE as u32 + 0x40;
/// Bytes of their zeroed end.
pub(super) const BSS: u64 = 0x3000;
/// What init_size says.
pub(super) const INIT_SIZE: u32 = 4 << 20;

const EHDR: usize = 64;
const PHDR: usize = 56;

/// An ELF file with one segment of `text` at [`BASE`] and [`BSS`] bytes behind it, and the PVH note where there is an
/// entry for it.
pub(super) fn elf(text: &[u8], pvh: Option<u32>) -> Vec<u8> {
    let headers = 2;
    let note_at = EHDR + headers * PHDR;
    let note = pvh.map_or(Vec::new(), |entry| {
        let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    });
    let text_at = note_at + note.len();
    let mut file = vec![0; EHDR];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 24, &ENTRY.to_le_bytes());
    put(&mut file, 32, &(EHDR as u64).to_le_bytes());
    for (at, value) in [(52, EHDR), (54, PHDR), (56, headers)] {
        put(&mut file, at, &(value as u16).to_le_bytes());
    }
    let sizes = (text.len() as u64, text.len() as u64 + BSS);
    file.extend(program_header(1, text_at, BASE, sizes));
    let len = note.len() as u64;
    file.extend(program_header(if pvh.is_some() { 4 } else { 0 }, note_at, 0, (len, len)));
    file.extend(note);
    file.extend(text);
    file
}

/// The offset of the first program header's physical address in an ELF file made here.
pub(super) const P_PADDR: usize = EHDR + 24;
/// The same of its size in the file and in memory.
pub(super) const P_FILESZ: usize = EHDR + 32;
pub(super) const P_MEMSZ: usize = EHDR + 40;

fn program_header(kind: u32, offset: usize, address: u64, sizes: (u64, u64)) -> Vec<u8> {
    let mut header = [kind, 7].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let virtual_address = address.wrapping_add(0xffff_ffff_8000_0000);
    for field in [offset as u64, virtual_address, address, sizes.0, sizes.1, 4] {
        header.extend(field.to_le_bytes());
    }
    header
}

/// Bytes that compress, but not to nothing.
pub(super) fn text() -> Vec<u8> {
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if state >> 30 == 0 { (state >> 16) as u8 } else { 0x90 }
    };
    (0..100_000).map(|_| byte()).collect()
}

/// A bzImage with that payload, to which the unpacked size is added.
pub(super) fn bzimage(compressed: &[u8], unpacked_len: usize) -> Vec<u8> {
    let setup_len = 5 * 512;
    let payload_at = 0x400;
    let mut file = vec![0; setup_len + payload_at];
    file[0x1f1] = 4;
    put(&mut file, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut file, 0x200, &[0xeb, 0x6a]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    file[0x211] = 1;
    for (at, value) in [
        (0x214, 0x10_0000u32),
        (0x22c, 0x7fff_ffff),
        (0x230, 0x20_0000),
        (0x238, 2047),
        (0x248, payload_at as u32),
        (0x24c, compressed.len() as u32 + 4),
        (0x260, INIT_SIZE),
    ] {
        put(&mut file, at, &value.to_le_bytes());
    }
    file[0x234] = 1;
    put(&mut file, 0x236, &0x7fu16.to_le_bytes());
    put(&mut file, 0x258, &BASE.to_le_bytes());
    file.extend(compressed);
    file.extend((unpacked_len as u32).to_le_bytes());
    file
}

/// A bzImage of a gzip-compressed kernel with a PVH note.
pub(super) fn usual_bzimage() -> Vec<u8> {
    let elf = elf(&text(), Some(PVH_ENTRY));
    bzimage(&gzip(&elf), elf.len())
}

pub(super) fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// RAM of that many MiB, none of it zero.
pub(super) fn memory(mib: u64) -> GuestMemory {
    let memory = GuestMemory::new(&layout::regions(mib * MIB).unwrap()).unwrap();
    for region in memory.regions() {
        let bytes = vec![0xcc; region.len as usize];
        memory.vm().write_slice(&bytes, GuestAddress(region.start)).unwrap();
    }
    memory
}

pub(super) fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.vm().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

pub(super) fn payload(kernel: &[u8], protocol: Protocol) -> BootPayload<'_> {
    BootPayload {
        kernel,
        kernel_name: "path/image",
        initrd: None,
        modules: &[],
        initrd_name: "path/module",
        cmdline: "console=ttyS0",
        protocol,
        seed: None,
    }
}
