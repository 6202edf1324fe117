//! What a guest finds when it is entered.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};
use x86::descriptor::{Attributes, Descriptor};
use x86::{Cr0, Cr4, Efer, Flags, Gpr, SegmentRegister};

use super::super::{BootPayload, Loaded, Protocol, load};
use super::synthetic::*;
use crate::layout::{self, MIB};

const RSDP: u64 = 0xe_0000;

fn loaded(payload: &BootPayload<'_>) -> (guest_memory::GuestMemory, Loaded) {
    let memory = memory(32);
    let loaded = load(&memory, payload, RSDP).unwrap();
    (memory, loaded)
}

fn cmdline(memory: &guest_memory::GuestMemory, address: u64) -> String {
    let bytes = read(memory, address, 100);
    String::from_utf8(bytes.into_iter().take_while(|&b| b != 0).collect()).unwrap()
}

/// Checks that the segment registers hold what their selectors name in the GDT.
fn check_segments(memory: &guest_memory::GuestMemory, loaded: &Loaded) {
    let state = &loaded.state;
    for segment in state.segments.iter().chain([&state.tr]) {
        let offset = u64::from(segment.selector.offset());
        assert!(offset + 7 <= state.gdtr.limit.into());
        let descriptor: u64 = memory.vm().read_obj(GuestAddress(state.gdtr.base + offset)).unwrap();
        assert_eq!(Descriptor(descriptor).segment(segment.selector), *segment);
    }
    assert_eq!(state.rflags, Flags::FIXED);
}

#[test]
fn a_bzimage_is_entered_by_its_pvh_note() {
    let kernel = usual_bzimage();
    let initrd = vec![0x77; 10_000];
    let payload = BootPayload { initrd: Some(&initrd), ..payload(&kernel, Protocol::Auto) };
    let (memory, loaded) = loaded(&payload);
    let state = &loaded.state;
    assert_eq!((loaded.protocol, state.rip), (Protocol::Pvh, PVH_ENTRY.into()));
    assert_eq!((state.cr0, state.cr4, state.efer), (Cr0::PE | Cr0::ET, Cr4::empty(), Efer::empty()));
    let code = state.segments[SegmentRegister::Cs as usize];
    assert!(code.attributes.contains(Attributes::DB) && !code.attributes.contains(Attributes::L));
    assert_eq!((code.base, code.limit, state.tr.limit), (0, u32::MAX, 0x67));
    check_segments(&memory, &loaded);

    let info: hvm_start_info = memory.vm().read_obj(GuestAddress(state.gprs[Gpr::Rbx as usize])).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!(info.rsdp_paddr, RSDP);
    assert_eq!(cmdline(&memory, info.cmdline_paddr), "console=ttyS0");
    let module: hvm_modlist_entry = memory.vm().read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr..module.paddr + module.size, module.size), (loaded.initrd.clone(), 10_000));
    assert_eq!(read(&memory, module.paddr, 10_000), initrd);
    let map: Vec<(u64, u64, u32)> = (0..u64::from(info.memmap_entries))
        .map(|i| memory.vm().read_obj(GuestAddress(info.memmap_paddr + 24 * i)).unwrap())
        .map(|entry: hvm_memmap_table_entry| (entry.addr, entry.size, entry.type_))
        .collect();
    assert!(map.contains(&(MIB, 31 * MIB, 1)) && map.contains(&(0xc_0000, 0x4_0000, 2)), "{map:x?}");
}

#[test]
fn segments_are_copied_and_their_end_is_zeroed_in_used_memory() {
    let kernel = elf(&text(), Some(PVH_ENTRY));
    let (memory, loaded) = loaded(&payload(&kernel, Protocol::Pvh));
    let len = text().len();
    assert_eq!(loaded.kernel, BASE..BASE + len as u64 + BSS);
    assert_eq!(read(&memory, BASE, len), text());
    assert_eq!(
        read(&memory, BASE + len as u64, BSS as usize + 1)[..],
        [vec![0; BSS as usize], vec![0xcc]].concat()
    );
    assert!(loaded.initrd.is_empty());
}

#[test]
fn a_kernel_without_a_note_is_entered_in_64_bit_mode() {
    let kernel = elf(&text(), None);
    let (memory, loaded) = loaded(&payload(&kernel, Protocol::Auto));
    let state = &loaded.state;
    assert_eq!((loaded.protocol, state.rip), (Protocol::Linux64, ENTRY));
    assert!(state.cr0.contains(Cr0::PE | Cr0::PG) && state.cr4.contains(Cr4::PAE));
    assert_eq!(state.efer, Efer::LME | Efer::LMA);
    let code = state.segments[SegmentRegister::Cs as usize];
    assert!(code.attributes.contains(Attributes::L) && !code.attributes.contains(Attributes::DB));
    assert_eq!((code.selector.0, state.segments[SegmentRegister::Ds as usize].selector.0), (0x10, 0x18));
    check_segments(&memory, &loaded);
}

#[test]
fn the_first_4_gib_are_mapped_one_to_one() {
    let kernel = elf(&text(), None);
    let (memory, loaded) = loaded(&payload(&kernel, Protocol::Linux64));
    let entry = |table: u64, index: u64| -> u64 {
        memory.vm().read_obj(GuestAddress((table & x86::paging::ADDRESS_MASK) + 8 * index)).unwrap()
    };
    for address in [0, 0x1234, ENTRY, 0xbfff_ffff, 0xfee0_0000, 0xffff_ffff] {
        let pdpt = entry(entry(loaded.state.cr3, 0), address >> 30);
        let page = entry(pdpt, address >> 21 & 511);
        assert_eq!(page & 0x83, 0x83);
        assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
    }
    assert_eq!(entry(entry(loaded.state.cr3, 0), 4), 0);
    assert_eq!(entry(loaded.state.cr3, 1), 0);
}

#[test]
fn linux_finds_its_boot_params() {
    let kernel = usual_bzimage();
    let initrd = vec![1; 5000];
    let seed = Some([0x5a; 32]);
    let payload = BootPayload { initrd: Some(&initrd), seed, ..payload(&kernel, Protocol::Linux64) };
    let (memory, loaded) = loaded(&payload);
    let at = loaded.state.gprs[Gpr::Rsi as usize];
    let params: boot_params = memory.vm().read_obj(GuestAddress(at)).unwrap();
    let header = params.hdr;
    assert_eq!(({ header.header }, { header.version }), (u32::from_le_bytes(*b"HdrS"), 0x20f));
    assert_eq!((header.type_of_loader, params.sentinel), (0xff, 0));
    assert_eq!({ params.acpi_rsdp_addr }, RSDP);
    assert_eq!(cmdline(&memory, header.cmd_line_ptr.into()), "console=ttyS0");
    let start = u64::from(header.ramdisk_image);
    assert_eq!(start..start + u64::from(header.ramdisk_size), loaded.initrd);
    assert_eq!(read(&memory, start, 5000), initrd);
    assert_eq!(loaded.kernel, BASE..BASE + u64::from(INIT_SIZE));
    let seed = read(&memory, header.setup_data, 48);
    assert_eq!(seed, [&[0; 8][..], &[9, 0, 0, 0, 32, 0, 0, 0], &[0x5a; 32]].concat());
    let table = params.e820_table;
    let map: Vec<_> = layout::memory_map(memory.regions())
        .iter()
        .map(|e| boot_e820_entry { addr: e.start, size: e.len, r#type: e.kind as u32 })
        .collect();
    assert_eq!(table[..params.e820_entries.into()], map[..]);
}

#[test]
fn the_stub_is_loaded_whole_where_the_kernel_prefers_to_run() {
    let kernel = usual_bzimage();
    let (memory, loaded) = loaded(&payload(&kernel, Protocol::Stub));
    assert_eq!((loaded.protocol, loaded.state.rip), (Protocol::Stub, BASE + 0x200));
    assert_eq!(read(&memory, BASE, kernel.len() - 5 * 512), kernel[5 * 512..]);
    assert_eq!(loaded.kernel, BASE..BASE + u64::from(INIT_SIZE));
    let params: boot_params =
        memory.vm().read_obj(GuestAddress(loaded.state.gprs[Gpr::Rsi as usize])).unwrap();
    assert_eq!({ params.hdr.code32_start }, BASE as u32);
    assert_eq!(params.hdr.as_slice()[..9], kernel[0x1f1..0x1fa]);
}

#[test]
fn a_stub_that_is_not_relocatable_is_loaded_at_1_mib() {
    let mut kernel = usual_bzimage();
    kernel[0x234] = 0;
    let (_, loaded) = loaded(&payload(&kernel, Protocol::Stub));
    assert_eq!(loaded.state.rip, MIB + 0x200);
    assert_eq!(loaded.kernel, MIB..BASE + u64::from(INIT_SIZE));
}

#[test]
fn an_entry_linked_to_its_virtual_address_is_found() {
    let mut kernel = elf(&text(), None);
    put(&mut kernel, 24, &(ENTRY.wrapping_add(0xffff_ffff_8000_0000)).to_le_bytes());
    let (_, loaded) = loaded(&payload(&kernel, Protocol::Auto));
    assert_eq!(loaded.state.rip, ENTRY);
}
