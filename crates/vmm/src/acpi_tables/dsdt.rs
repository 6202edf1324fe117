//! The DSDT: the devices that cannot be found by probing.
//! ACPI Specification, *Differentiated System Description Table (DSDT)*.

use std::ops::Range;

use ::acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package,
    PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use ::acpi_tables::{Aml, sdt::Sdt};

use devices::{acpi_pm, cmos, hpet, i8042, pit, serial};

use super::{AcpiConfig, Ecam, MmioSlot, OEM, OEM_REVISION, OEM_TABLE, pci_gsi};
use crate::layout;

/// From this revision on integers have 64 bits.
const REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;
const PCI_SLOTS: u8 = 32;
const PCI_PINS: u8 = 4;

/// The table.
pub(super) fn table(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    for cpu in 0..config.cpus {
        scope(&cpu_device(cpu), &mut aml);
    }
    scope(&pci_root(config), &mut aml);
    scope(&motherboard(config.ecam), &mut aml);
    for device in legacy_devices() {
        scope(&device, &mut aml);
    }
    for (number, slot) in (0u8..).zip(&config.virtio_mmio) {
        scope(&virtio_mmio(number, *slot), &mut aml);
    }
    sleep_state("_S5_", acpi_pm::SLP_TYP_S5, &mut aml);
    if config.suspend {
        sleep_state("_S3_", acpi_pm::SLP_TYP_S3, &mut aml);
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

/// What a sleep state takes: the sleep types of PM1a and PM1b, and two reserved elements.
fn sleep_state(name: &str, sleep_type: u8, aml: &mut Vec<u8>) {
    let types = Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]);
    Name::new(name.into(), &types).to_aml_bytes(aml);
}

/// Puts a device under `\_SB`.
fn scope(device: &dyn Aml, aml: &mut Vec<u8>) {
    Scope::new(Path::new("\\_SB_"), vec![device]).to_aml_bytes(aml);
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn ::acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device with its objects.
fn device(name: &str, objects: &[&dyn Aml]) -> Raw {
    let mut bytes = Vec::new();
    Device::new(Path::new(name), objects.to_vec()).to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn hardware_id(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn resources(descriptors: &[&dyn Aml]) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(descriptors.to_vec()))
}

/// A processor; its number is the MADT's processor UID.
fn cpu_device(cpu: u32) -> Raw {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    device(&format!("C{cpu:03X}"), &[&hid, &Name::new("_UID".into(), &cpu)])
}

/// The PCI root bridge: its windows and its interrupt lines.
fn pci_root(config: &AcpiConfig) -> Raw {
    let hid = if config.ecam.is_some() { "PNP0A08" } else { "PNP0A03" };
    let last_bus = config.ecam.map_or(0xff, |ecam| u16::from(ecam.last_bus));
    let (mmio32, high) = (&layout::PCI_MMIO32, &layout::PCI_MMIO32_HIGH);
    let mut windows: Vec<Box<dyn Aml>> = vec![
        Box::new(AddressSpace::new_bus_number(0u16, last_bus)),
        // The configuration ports are the bridge's own; the rest of the port space is passed on.
        Box::new(IO::new(0xcf8, 0xcf8, 1, 8)),
        Box::new(AddressSpace::new_io(0u16, 0xcf7, None)),
        Box::new(AddressSpace::new_io(0xd00u16, 0xffff, None)),
        Box::new(memory_window(mmio32.start as u32, (mmio32.end - 1) as u32)),
        Box::new(memory_window(high.start as u32, (high.end - 1) as u32)),
    ];
    if let Some(Range { start, end }) = config.pci_mmio64.clone().filter(|window| !window.is_empty()) {
        windows.push(Box::new(memory_window(start, end - 1)));
    }
    let windows: Vec<&dyn Aml> = windows.iter().map(|window| &**window as &dyn Aml).collect();
    device(
        "PCI0",
        &[
            &hardware_id(hid),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &resources(&windows),
            &Name::new("_PRT".into(), &interrupt_routing()),
        ],
    )
}

fn memory_window<T: Default>(first: T, last: T) -> AddressSpace<T> {
    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
}

/// For each slot and pin its global system interrupt.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        for pin in 0..PCI_PINS {
            let address = u32::from(slot) << 16 | 0xffff;
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &pci_gsi(slot, pin)]));
        }
    }
    table
}

/// What belongs to the board and to no driver: the power management ports, the configuration space.
fn motherboard(ecam: Option<Ecam>) -> Raw {
    let pm = IO::new(
        acpi_pm::PM1A_EVT,
        acpi_pm::PM1A_EVT,
        1,
        (acpi_pm::GPE0 - acpi_pm::PM1A_EVT) as u8 + acpi_pm::GPE0_LEN,
    );
    let smi = IO::new(acpi_pm::SMI_CMD, acpi_pm::SMI_CMD, 1, 2);
    let window = ecam.map(|ecam| {
        let bytes = (u32::from(ecam.last_bus) + 1) << 20;
        Memory32Fixed::new(true, ecam.base as u32, bytes)
    });
    let mut descriptors: Vec<&dyn Aml> = vec![&pm, &smi];
    descriptors.extend(window.as_ref().map(|window| window as &dyn Aml));
    device("MBRD", &[&hardware_id("PNP0C02"), &Name::new("_UID".into(), &ZERO), &resources(&descriptors)])
}

/// A virtio device in memory: the id is the one that its drivers know.
fn virtio_mmio(number: u8, slot: MmioSlot) -> Raw {
    let window = Memory32Fixed::new(true, slot.base as u32, virtio::transport::mmio::WINDOW as u32);
    let interrupt = Interrupt::new(true, false, false, true, slot.gsi);
    device(
        &format!("VR{number:02X}"),
        &[
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &ONE),
            &resources(&[&window, &interrupt]),
        ],
    )
}

/// A PC's own devices: serial ports, keyboard, mouse, clock, timers.
fn legacy_devices() -> [Raw; 7] {
    let ports = |first: u64, count: u64| IO::new(first as u16, first as u16, 1, count as u8);
    let irq = |number: u32| Interrupt::new(true, true, false, false, number);
    let serial_port = |name: &str, uid: u8, base: u64, number: u32| {
        let resources = resources(&[&ports(base, serial::PORTS), &irq(number)]);
        device(name, &[&hardware_id("PNP0501"), &Name::new("_UID".into(), &uid), &resources])
    };
    let simple = |name: &str, id: &str, descriptors: &[&dyn Aml]| {
        device(name, &[&hardware_id(id), &resources(descriptors)])
    };
    [
        serial_port("COM1", 1, serial::COM1_BASE, serial::COM1_IRQ),
        serial_port("COM2", 2, serial::COM2_BASE, serial::COM2_IRQ),
        simple("KBD_", "PNP0303", &[&ports(0x60, 1), &ports(0x64, 1), &irq(i8042::KEYBOARD_IRQ)]),
        simple("MOU_", "PNP0F13", &[&irq(i8042::MOUSE_IRQ)]),
        simple("RTC_", "PNP0B00", &[&ports(cmos::BASE, cmos::PORTS), &irq(cmos::IRQ)]),
        simple("TIMR", "PNP0100", &[&ports(pit::BASE, pit::PORTS), &irq(pit::IRQ)]),
        simple("HPET", "PNP0103", &[&Memory32Fixed::new(false, layout::HPET as u32, hpet::SIZE as u32)]),
    ]
}
