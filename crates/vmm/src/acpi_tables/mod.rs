//! The ACPI tables: what the machine tells its operating system of itself.
//!
//! Everything but the FACS is read-only to the guest and lies in one block, the RSDP first. The machine is a PC with
//! ACPI's fixed hardware (not "hardware-reduced"): power management ports, a system control interrupt, a reset port.
//! ACPI Specification, *ACPI Software Programming Model*.

mod dsdt;
mod fixed;
mod hpet;
mod loader;
mod madt;

use std::ops::Range;

use ::acpi_tables::{Aml, facs::FACS, mcfg::MCFG, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use guest_memory::GuestMemory;
pub use loader::{LoaderFiles, loader_files};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;

/// The first of the eight global system interrupts that PCI devices share.
pub const PCI_GSI_BASE: u32 = 16;
/// How many there are.
pub const PCI_GSI_COUNT: u32 = 8;

/// The global system interrupt of a PCI device's pin: `pin` is 0 for INTA. Neighbouring slots get different ones.
pub const fn pci_gsi(slot: u8, pin: u8) -> u32 {
    PCI_GSI_BASE + (slot as u32 + pin as u32) % PCI_GSI_COUNT
}

/// What the tables tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Virtual processors; their local APIC IDs are 0 to `cpus - 1`.
    pub cpus: u32,
    /// The window of the PCI configuration space, where the machine decodes it.
    pub ecam: Option<Ecam>,
    /// The window for 64-bit PCI memory.
    pub pci_mmio64: Option<Range<u64>>,
    /// Virtio devices in memory.
    pub virtio_mmio: Vec<MmioSlot>,
    /// Whether the machine can sleep with its memory kept (S3).
    pub suspend: bool,
}

/// A virtio device in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest-physical address of its window.
    pub base: u64,
    /// Its global system interrupt, level-triggered.
    pub gsi: u32,
}

/// A memory-mapped PCI configuration space that starts with bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address; a multiple of 1 MiB below 4 GiB.
    pub base: u64,
    /// Number of the last bus.
    pub last_bus: u8,
}

/// Why there are no tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// More processors than the tables can name.
    #[error("{0} processors: the ACPI tables can name 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// More than the firmware area holds.
    #[error("the ACPI tables take {bytes} bytes, there is room for {room}")]
    TooLarge {
        /// Bytes of all tables.
        bytes: u64,
        /// Bytes in the area.
        room: u64,
    },
    /// A machine without the RAM for them.
    #[error("no RAM at {0:#x} for the ACPI tables")]
    NoRam(u64),
}

/// The most processors that are named.
pub const MAX_CPUS: u32 = 1024;

/// What every table's header says of its maker.
const OEM: [u8; 6] = *b"RINGSD";
const OEM_TABLE: [u8; 8] = *b"RINGSIDE";
const OEM_REVISION: u32 = 1;

/// The tables, and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Guest-physical address of the RSDP.
    pub rsdp: u64,
    /// Guest-physical addresses and bytes, in no overlap.
    pub tables: Vec<(u64, Vec<u8>)>,
}

/// Builds the tables for their usual places: [`layout::ACPI_TABLES`] and [`layout::FACS`].
///
/// # Errors
/// [`AcpiError`] for too many processors, or none.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    let rsdp = layout::ACPI_TABLES.start;
    let first = rsdp + Rsdp::len().next_multiple_of(Block::ALIGNMENT) as u64;
    let Assembled { mut tables, end, xsdt, rsdt, .. } = Assembled::new(config, first, layout::FACS)?;
    let room = layout::ACPI_TABLES.end - rsdp;
    if end - rsdp > room {
        return Err(AcpiError::TooLarge { bytes: end - rsdp, room });
    }
    tables.push((rsdp, root_pointer(rsdt, xsdt)));
    Ok(AcpiTables { rsdp, tables })
}

/// All tables but the RSDP, one after another.
struct Assembled {
    /// Addresses and bytes.
    tables: Vec<(u64, Vec<u8>)>,
    /// The first address after them, without the FACS.
    end: u64,
    fadt: u64,
    /// What both lists name, in their order.
    listed: Vec<u64>,
    xsdt: u64,
    rsdt: u64,
}

impl Assembled {
    /// The tables from address `first` on, with the FACS at `facs`.
    fn new(config: &AcpiConfig, first: u64, facs: u64) -> Result<Self, AcpiError> {
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            return Err(AcpiError::Cpus(config.cpus));
        }
        let mut block = Block { next: first, tables: vec![(facs, bytes(&FACS::new()))] };
        let dsdt = block.add(dsdt::table(config));
        let fadt = block.add(fixed::fadt(dsdt, facs));
        let mut listed = vec![fadt, block.add(madt::table(config.cpus)), block.add(hpet::table())];
        if let Some(ecam) = config.ecam {
            listed.push(block.add(mcfg(ecam)));
        }
        let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
        for &table in &listed {
            xsdt.add_entry(table);
        }
        let xsdt = block.add(bytes(&xsdt));
        let rsdt = block.add(rsdt(&listed));
        Ok(Self { tables: block.tables, end: block.next, fadt, listed, xsdt, rsdt })
    }
}

impl AcpiTables {
    /// Writes the tables.
    ///
    /// # Errors
    /// [`AcpiError::NoRam`] where the memory is not that of [`layout::regions`].
    pub fn write(&self, memory: &GuestMemory) -> Result<(), AcpiError> {
        for (address, bytes) in &self.tables {
            memory.vm().write_slice(bytes, GuestAddress(*address)).map_err(|_| AcpiError::NoRam(*address))?;
        }
        Ok(())
    }
}

/// The list of tables for software that knows ACPI 1.0 only, with addresses of 32 bits.
fn rsdt(tables: &[u64]) -> Vec<u8> {
    const HEADER_LEN: u32 = 36;
    const REVISION: u8 = 1;
    let mut rsdt = Sdt::new(*b"RSDT", HEADER_LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    for &table in tables {
        rsdt.append_slice(&(table as u32).to_le_bytes());
    }
    rsdt.as_slice().to_vec()
}

/// The RSDP, which names both lists.
fn root_pointer(rsdt: u64, xsdt: u64) -> Vec<u8> {
    const CHECKSUM: usize = 8;
    const RSDT_ADDRESS: usize = 16;
    /// What the checksum is over: the structure of ACPI 1.0.
    const FIRST_LEN: usize = 20;
    const EXTENDED_CHECKSUM: usize = 32;
    let mut rsdp = bytes(&Rsdp::new(OEM, xsdt));
    rsdp[RSDT_ADDRESS..FIRST_LEN].copy_from_slice(&(rsdt as u32).to_le_bytes());
    for (checksum, len) in [(CHECKSUM, FIRST_LEN), (EXTENDED_CHECKSUM, rsdp.len())] {
        rsdp[checksum] = 0;
        let sum = rsdp[..len].iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        rsdp[checksum] = sum.wrapping_neg();
    }
    rsdp
}

/// Tables one after another.
struct Block {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Block {
    const ALIGNMENT: usize = 64;

    /// Places a table; gives its address.
    fn add(&mut self, bytes: Vec<u8>) -> u64 {
        let address = self.next;
        self.next += bytes.len().next_multiple_of(Self::ALIGNMENT) as u64;
        self.tables.push((address, bytes));
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The table that tells where the PCI configuration space lies. PCI Firmware Specification, *MCFG Table Description*.
fn mcfg(ecam: Ecam) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ecam.base, 0, 0, ecam.last_bus);
    bytes(&mcfg)
}

#[cfg(test)]
mod tests;
