use super::*;
use crate::layout::MIB;

fn config(cpus: u32) -> AcpiConfig {
    AcpiConfig { cpus, ..AcpiConfig::default() }
}

fn written(config: &AcpiConfig) -> (GuestMemory, u64) {
    let memory = GuestMemory::new(&layout::regions(64 * MIB).unwrap()).unwrap();
    let tables = build(config).unwrap();
    tables.write(&memory).unwrap();
    (memory, tables.rsdp)
}

fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.vm().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Reads a table by its header, as the guest does.
fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
    let len = u32_at(&read(memory, address, 8), 4);
    let table = read(memory, address, len as usize);
    assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
    table
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The tables that the XSDT lists, found from the RSDP.
fn listed(memory: &GuestMemory, rsdp: u64) -> Vec<Vec<u8>> {
    let rsdp = read(memory, rsdp, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(memory, u64_at(&rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    xsdt[36..].chunks(8).map(|entry| table(memory, u64_at(entry, 0))).collect()
}

fn signatures(tables: &[Vec<u8>]) -> Vec<&str> {
    tables.iter().map(|table| std::str::from_utf8(&table[..4]).unwrap()).collect()
}

/// The MADT's entries: type and bytes.
fn madt_entries(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let (mut entries, mut rest) = (Vec::new(), &madt[44..]);
    while let [kind, len, ..] = *rest {
        entries.push((kind, rest[..usize::from(len)].to_vec()));
        rest = &rest[usize::from(len)..];
    }
    entries
}

#[test]
fn a_guest_finds_every_table_from_the_rsdp_with_its_checksum() {
    let (memory, rsdp) = written(&config(2));
    assert_eq!(rsdp, 0xe_0000);
    let tables = listed(&memory, rsdp);
    assert_eq!(signatures(&tables), ["FACP", "APIC", "HPET"]);
    let fadt = &tables[0];
    assert_eq!(fadt.len(), 276);
    assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
    assert_eq!(&table(&memory, u64_at(fadt, 140))[..4], b"DSDT");
    assert_eq!(&read(&memory, u32_at(fadt, 36).into(), 4), b"FACS");
    assert!(!memory.locate(u32_at(fadt, 36).into()).unwrap().read_only);
    assert!(memory.locate(rsdp).unwrap().read_only);
}

#[test]
fn software_of_acpi_1_0_finds_the_same_tables() {
    let (memory, rsdp) = written(&config(2));
    let rsdt = table(&memory, u32_at(&read(&memory, rsdp, 36), 16).into());
    assert_eq!(&rsdt[..4], b"RSDT");
    let tables: Vec<_> = rsdt[36..].chunks(4).map(|entry| table(&memory, u32_at(entry, 0).into())).collect();
    assert_eq!(tables, listed(&memory, rsdp));
}

#[test]
fn the_hpet_table_names_its_registers() {
    let (memory, rsdp) = written(&config(1));
    let hpet = &listed(&memory, rsdp)[2];
    assert_eq!((hpet.len(), u32_at(hpet, 36)), (56, 0x8086_a201));
    assert_eq!((u32_at(hpet, 40), u64_at(hpet, 44), hpet[52]), (0x4000, layout::HPET, 0));
}

#[test]
fn the_fadt_names_the_fixed_hardware() {
    let (memory, rsdp) = written(&config(1));
    let fadt = &listed(&memory, rsdp)[0];
    assert_eq!([46, 48, 52, 53].map(|at| u32::from(fadt[at])), [9, 0xb2, 0xa0, 0xa1]);
    assert_eq!([56, 64, 76, 80].map(|at| u32_at(fadt, at)), [0x600, 0x604, 0x608, 0x620]);
    assert_eq!(fadt[88..93], [4, 2, 0, 4, 4]);
    let flags = u32_at(fadt, 112);
    assert_eq!((flags >> 10 & 1, flags >> 4 & 1, flags >> 20 & 1), (1, 0, 0));
    assert_eq!(flags >> 6 & 1, 0, "the clock's alarm is a fixed event");
    assert_eq!(flags >> 8 & 1, 1, "the timer has 32 bits");
    assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 6));
    assert_eq!((fadt[108], u16::from_le_bytes([fadt[109], fadt[110]])), (0x32, 0b111));
}

#[test]
fn the_madt_lists_every_processor_once() {
    let (memory, rsdp) = written(&config(3));
    let entries = madt_entries(&listed(&memory, rsdp)[1]);
    let apics: Vec<_> = entries.iter().filter(|e| e.0 == 0).map(|e| (e.1[2], e.1[3], e.1[4])).collect();
    assert_eq!(apics, [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
    assert!(entries.contains(&(1, vec![1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0])));
    assert!(entries.contains(&(2, vec![2, 10, 0, 0, 2, 0, 0, 0, 0, 0])));
    assert!(entries.contains(&(2, vec![2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0])));
    assert!(entries.contains(&(4, vec![4, 6, 0xff, 0, 0, 1])));
    assert_eq!(u32_at(&listed(&memory, rsdp)[1], 40), 1);
}

#[test]
fn processors_above_254_are_x2apics() {
    let (memory, rsdp) = written(&config(300));
    let entries = madt_entries(&listed(&memory, rsdp)[1]);
    let x2apics: Vec<u32> = entries.iter().filter(|e| e.0 == 9).map(|e| u32_at(&e.1, 4)).collect();
    assert_eq!(x2apics, (255..300).collect::<Vec<_>>());
    assert_eq!(entries.iter().filter(|e| e.0 == 0).count(), 255);
    assert_eq!(entries.iter().filter(|e| e.0 == 10).count(), 1);
}

#[test]
fn the_configuration_space_is_named_only_where_it_is_decoded() {
    let ecam = Some(Ecam { base: layout::PCI_ECAM.start, last_bus: 255 });
    let (memory, rsdp) = written(&AcpiConfig { ecam, ..config(1) });
    let tables = listed(&memory, rsdp);
    assert_eq!(signatures(&tables), ["FACP", "APIC", "HPET", "MCFG"]);
    assert_eq!((u64_at(&tables[3], 44), tables[3][55]), (layout::PCI_ECAM.start, 255));
}

#[test]
fn the_sleep_states_are_those_that_the_machine_can_enter() {
    let has = |suspend: bool, name: &[u8]| {
        let dsdt = dsdt::table(&AcpiConfig { suspend, ..config(1) });
        dsdt.windows(name.len()).any(|bytes| bytes == name)
    };
    assert!(has(true, b"_S3_\x12") && has(true, b"_S5_\x12"));
    assert!(!has(false, b"_S3_") && has(false, b"_S5_\x12"));
}

#[test]
fn impossible_numbers_of_processors_are_refused() {
    for cpus in [0, MAX_CPUS + 1, u32::MAX] {
        assert_eq!(build(&config(cpus)), Err(AcpiError::Cpus(cpus)));
    }
    build(&AcpiConfig { pci_mmio64: Some(1 << 32..1 << 36), ..config(MAX_CPUS) }).unwrap();
}

#[test]
fn pins_of_neighbouring_slots_get_different_interrupts() {
    assert_eq!([0, 1, 2, 3].map(|pin| pci_gsi(0, pin)), [16, 17, 18, 19]);
    assert_eq!([0, 1, 2, 3].map(|pin| pci_gsi(31, pin)), [23, 16, 17, 18]);
}

#[test]
fn devices_in_memory_are_told_of_by_the_id_that_their_drivers_know() {
    let virtio_mmio = vec![MmioSlot { base: 0xfec1_0000, gsi: 16 }, MmioSlot { base: 0xfec1_1000, gsi: 17 }];
    let dsdt = dsdt::table(&AcpiConfig { virtio_mmio, ..config(1) });
    assert_eq!(dsdt.windows(8).filter(|bytes| bytes == b"LNRO0005").count(), 2);
    // A fixed range of memory that may be written, of 0x200 bytes.
    let window = [0x86, 9, 0, 1, 0, 0x10, 0xc1, 0xfe, 0, 2, 0, 0];
    assert_eq!(dsdt.windows(window.len()).filter(|bytes| *bytes == window).count(), 1);
    // A level-triggered, active high, shared interrupt.
    let interrupt = [0x89, 6, 0, 0b1001, 1, 17, 0, 0, 0];
    assert_eq!(dsdt.windows(interrupt.len()).filter(|bytes| *bytes == interrupt).count(), 1);
}
