//! What the firmware configuration device tells of this machine, and how it reaches the memory.

use std::time::Duration;

use devices::fw_cfg::{DmaMemory, FwCfg, FwCfgConfig};
use devices::serial;
use guest_memory::{GuestMemory, PAGE_SIZE, Region};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi_tables::{self, AcpiConfig};
use crate::boot;
use crate::config::{Boot, FirmwareConfig, FwCfgSource, MachineConfig};
use crate::error::BuildError;
use crate::layout::{self, MapEntry, RangeKind};
use crate::smbios;

/// The file with the memory map.
const MEMORY_MAP: &str = "etc/e820";
/// The serial port that firmware has its screen and keyboard on.
const SERIAL_CONSOLE: &str = "etc/sercon-port";
/// How long firmware offers its boot menu, in milliseconds.
const BOOT_MENU_WAIT: &str = "etc/boot-menu-wait";
/// From where on firmware may put devices above 4 GiB.
const ADDRESSES_END: &str = "etc/reserved-memory-end";
/// The most bytes of a file that comes from the host.
const MAX_FILE: u64 = 64 << 20;

/// What the device tells: to a kernel the memory map, to firmware all that it makes its tables from, and what the user
/// adds to either.
///
/// # Errors
/// [`BuildError::File`] for a file that cannot be read, [`BuildError::Acpi`].
pub fn contents(
    config: &MachineConfig,
    memory: &GuestMemory,
    acpi: &AcpiConfig,
) -> Result<FwCfgConfig, BuildError> {
    let mut files = match &config.boot {
        Boot::Kernel(_) => vec![file(MEMORY_MAP, memory_map(&layout::memory_map(memory.regions())))],
        Boot::Firmware(firmware) => for_firmware(config, firmware, memory, acpi)?,
    };
    for given in &config.fw_cfg {
        let bytes = match &given.source {
            FwCfgSource::File(path) => boot::read_file(path, MAX_FILE)?,
            FwCfgSource::Text(text) => text.clone().into_bytes(),
        };
        files.retain(|(name, _)| *name != given.name);
        files.push(file(&given.name, bytes));
    }
    let boot_menu = matches!(&config.boot, Boot::Firmware(firmware) if !firmware.boot_menu.is_zero());
    let cpus = u16::try_from(config.cpus).unwrap_or(u16::MAX);
    Ok(FwCfgConfig { memory: config.memory, cpus, boot_menu, files })
}

/// The device of a machine with that memory.
pub fn device(contents: &FwCfgConfig, memory: &GuestMemory) -> FwCfg {
    FwCfg::new(contents, Box::new(Ram(memory.clone())))
}

fn file(name: &str, bytes: Vec<u8>) -> (String, Vec<u8>) {
    (name.to_owned(), bytes)
}

fn for_firmware(
    config: &MachineConfig,
    firmware: &FirmwareConfig,
    memory: &GuestMemory,
    acpi: &AcpiConfig,
) -> Result<Vec<(String, Vec<u8>)>, BuildError> {
    let wait = |time: Duration| u16::try_from(time.as_millis()).unwrap_or(u16::MAX);
    let mut files = vec![
        file(MEMORY_MAP, memory_map(&firmware_map(memory.regions()))),
        file(SERIAL_CONSOLE, (serial::COM1_BASE as u16).to_le_bytes().into()),
        file(BOOT_MENU_WAIT, wait(firmware.boot_menu).to_le_bytes().into()),
    ];
    if let Some(last) = memory.all_regions().last().filter(|&last| memory.regions().last() != Some(last)) {
        files.push(file(ADDRESSES_END, (last.start + last.len).to_le_bytes().into()));
    }
    files.extend(acpi_tables::loader_files(acpi)?);
    files.extend(smbios::files(config.cpus, config.memory));
    Ok(files)
}

/// The memory map for firmware, which makes the holes below 1 MiB itself: RAM from address 0 on, without what is no RAM.
fn firmware_map(regions: impl Iterator<Item = Region>) -> Vec<MapEntry> {
    let ram = regions.filter(|region| !region.read_only && region.start != 0);
    let entry = |region: Region| {
        let start = if region.start == layout::HIGH_RAM_START { 0 } else { region.start };
        MapEntry { start, len: region.start + region.len - start, kind: RangeKind::Ram }
    };
    let ecam = layout::PCI_ECAM;
    let ecam = MapEntry { start: ecam.start, len: ecam.end - ecam.start, kind: RangeKind::Reserved };
    ram.map(entry).chain([ecam]).collect()
}

/// A memory map as a file: for each range its start, its length and its kind.
fn memory_map(map: &[MapEntry]) -> Vec<u8> {
    let entry = |entry: &MapEntry| {
        [&entry.start.to_le_bytes()[..], &entry.len.to_le_bytes(), &(entry.kind as u32).to_le_bytes()]
            .concat()
    };
    map.iter().flat_map(entry).collect()
}

struct Ram(GuestMemory);

impl Ram {
    /// Whether the guest could write all of a range itself.
    fn is_writable(&self, start: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1).and_then(|more| start.checked_add(more)) else { return len == 0 };
        let mut pages = start / PAGE_SIZE..=last / PAGE_SIZE;
        pages.all(|page| self.0.locate(page * PAGE_SIZE).is_some_and(|location| !location.read_only))
    }
}

impl DmaMemory for Ram {
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        self.0.vm().read_slice(data, GuestAddress(address)).is_ok()
    }

    fn write(&self, address: u64, data: &[u8]) -> bool {
        self.is_writable(address, data.len() as u64)
            && self.0.vm().write_slice(data, GuestAddress(address)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;

    #[test]
    fn dma_reaches_ram_and_neither_firmware_nor_holes() {
        let ram = Ram(GuestMemory::new(&layout::regions(64 * MIB).unwrap()).unwrap());
        assert!(ram.write(MIB + 4090, &[7; 20]));
        let mut data = [0; 20];
        assert!(ram.read(MIB + 4090, &mut data));
        assert_eq!(data, [7; 20]);
        assert!(ram.read(layout::ACPI_TABLES.start, &mut data));
        for address in [layout::ACPI_TABLES.start, MIB - 10, 64 * MIB - 10, 0xa_0000, u64::MAX - 5] {
            assert!(!ram.write(address, &data), "{address:#x}");
        }
    }

    #[test]
    fn the_memory_map_is_a_file_of_packed_ranges() {
        let memory = GuestMemory::new(&layout::regions(64 * MIB).unwrap()).unwrap();
        let map = memory_map(&layout::memory_map(memory.regions()));
        assert_eq!(map.len() % 20, 0);
        let high = [&MIB.to_le_bytes()[..], &(63 * MIB).to_le_bytes(), &1u32.to_le_bytes()].concat();
        assert!(map.chunks(20).any(|entry| entry == high), "{map:x?}");
    }

    #[test]
    fn firmware_is_told_of_ram_alone_and_of_what_must_not_be_touched() {
        let map = firmware_map(layout::regions(5 << 30).unwrap().into_iter());
        let ranges: Vec<_> = map.iter().map(|entry| (entry.start, entry.len, entry.kind)).collect();
        let (ram, reserved) = (RangeKind::Ram, RangeKind::Reserved);
        assert_eq!(ranges, [(0, 3 << 30, ram), (4 << 30, 2 << 30, ram), (0xe000_0000, 256 * MIB, reserved)]);
    }
}
