//! What the firmware configuration device tells of this machine, and how it reaches the memory.

use devices::fw_cfg::{DmaMemory, FwCfg, FwCfgConfig};
use guest_memory::{GuestMemory, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::layout;

/// The file with the memory map.
const MEMORY_MAP: &str = "etc/e820";

/// The device of a machine with that memory and so many vCPUs.
pub fn device(memory: &GuestMemory, memory_bytes: u64, cpus: u32) -> FwCfg {
    let config = FwCfgConfig {
        memory: memory_bytes,
        cpus: u16::try_from(cpus).unwrap_or(u16::MAX),
        files: vec![(MEMORY_MAP.to_owned(), memory_map(memory))],
    };
    FwCfg::new(&config, Box::new(Ram(memory.clone())))
}

/// The memory map: for each range its start, its length and its kind.
fn memory_map(memory: &GuestMemory) -> Vec<u8> {
    let map = layout::memory_map(memory.regions());
    let entry = |entry: &layout::MapEntry| {
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
        let map = memory_map(&memory);
        assert_eq!(map.len() % 20, 0);
        let high = [&MIB.to_le_bytes()[..], &(63 * MIB).to_le_bytes(), &1u32.to_le_bytes()].concat();
        assert!(map.chunks(20).any(|entry| entry == high), "{map:x?}");
    }
}
