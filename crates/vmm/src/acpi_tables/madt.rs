//! The MADT: processors and interrupt controllers.
//! ACPI Specification, *Multiple APIC Description Table (MADT)*.

use ::acpi_tables::sdt::Sdt;
use devices::acpi_pm::SCI_IRQ;
use x86::apic;

use super::{OEM, OEM_REVISION, OEM_TABLE};

const REVISION: u8 = 5;
/// Bytes of the header with the two fields after it.
const HEADER_LEN: u32 = 44;
const LOCAL_APIC_ADDRESS: usize = 36;
const FLAGS: usize = 40;
/// The machine has two 8259s as well.
const PCAT_COMPAT: u32 = 1;
/// The largest ID that a local APIC entry can have; above, x2APIC entries are needed.
const MAX_XAPIC_ID: u32 = 254;
const ENABLED: u32 = 1;
/// Interrupt 0, the timer, comes in at the I/O APIC's pin 2.
const TIMER_GSI: u32 = 2;
/// Which local interrupt pin is the NMI.
const NMI_LINT: u8 = 1;

/// Trigger and polarity of an interrupt source, as the MADT has them.
#[repr(u16)]
enum Signal {
    /// As the bus has it; ISA: edge-triggered, active high.
    Bus = 0,
    /// Level-triggered, active high.
    LevelHigh = 0xd,
}

/// The table for `cpus` processors, whose IDs count from 0.
pub(super) fn table(cpus: u32) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(LOCAL_APIC_ADDRESS, apic::DEFAULT_BASE as u32);
    madt.write_u32(FLAGS, PCAT_COMPAT);
    let mut entries = Vec::new();
    for id in 0..cpus {
        entries.extend(if id <= MAX_XAPIC_ID { local_apic(id as u8) } else { local_x2apic(id) });
    }
    entries.extend(io_apic());
    entries.extend(source_override(0, TIMER_GSI, Signal::Bus));
    entries.extend(source_override(SCI_IRQ as u8, SCI_IRQ, Signal::LevelHigh));
    entries.extend(local_apic_nmi());
    if cpus > MAX_XAPIC_ID + 1 {
        entries.extend(local_x2apic_nmi());
    }
    madt.append_slice(&entries);
    madt.as_slice().to_vec()
}

/// Processor Local APIC Structure.
fn local_apic(id: u8) -> Vec<u8> {
    entry(0, &[&[id, id], &ENABLED.to_le_bytes()])
}

/// Processor Local x2APIC Structure.
fn local_x2apic(id: u32) -> Vec<u8> {
    entry(9, &[&[0; 2], &id.to_le_bytes(), &ENABLED.to_le_bytes(), &id.to_le_bytes()])
}

/// I/O APIC Structure: one of ID 0, for all global system interrupts.
fn io_apic() -> Vec<u8> {
    entry(1, &[&[0; 2], &(apic::IOAPIC_BASE as u32).to_le_bytes(), &[0; 4]])
}

/// Interrupt Source Override Structure.
fn source_override(isa_irq: u8, gsi: u32, signal: Signal) -> Vec<u8> {
    entry(2, &[&[0, isa_irq], &gsi.to_le_bytes(), &(signal as u16).to_le_bytes()])
}

/// Local APIC NMI Structure for all processors.
fn local_apic_nmi() -> Vec<u8> {
    entry(4, &[&[0xff], &(Signal::Bus as u16).to_le_bytes(), &[NMI_LINT]])
}

/// Local x2APIC NMI Structure for all processors.
fn local_x2apic_nmi() -> Vec<u8> {
    entry(10, &[&(Signal::Bus as u16).to_le_bytes(), &[0xff; 4], &[NMI_LINT, 0, 0, 0]])
}

fn entry(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let fields = fields.concat();
    let mut entry = vec![kind, fields.len() as u8 + 2];
    entry.extend(fields);
    entry
}
