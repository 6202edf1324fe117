//! The guest-physical address space: where RAM, the firmware area and the windows of devices lie.
//!
//! ```text
//! 0x0000_0000  RAM: the loader's structures, then free for the guest
//! 0x0009_f000  one page of RAM for the ACPI FACS, which the guest may write
//! 0x000a_0000  nothing (the VGA window of a PC)
//! 0x000c_0000  firmware area, read-only to the guest: the ACPI tables from 0xe_0000
//! 0x0010_0000  RAM up to 3 GiB
//! 0xc000_0000  32-bit PCI window
//! 0xe000_0000  PCI configuration space (ECAM), reserved even where it is off
//! 0xf000_0000  more of the 32-bit PCI window
//! 0xfec0_0000  I/O APIC; 0xfec1_0000 virtio devices in memory; 0xfed0_0000 HPET; 0xfee0_0000 local APIC
//! 4 GiB        the rest of the RAM
//! a GiB above  files that are persistent memory; then the 64-bit PCI window
//! ```

use std::ops::Range;

use guest_memory::{PAGE_SIZE, Region};

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes in a GiB.
pub const GIB: u64 = 1 << 30;

/// The least RAM a machine can have, in bytes.
pub const MIN_MEMORY: u64 = 16 * MIB;
/// The most RAM a machine can have, in bytes.
pub const MAX_MEMORY: u64 = 1024 * GIB;

/// First guest-physical address above conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// The page of conventional memory that the ACPI FACS has to itself.
pub const FACS: u64 = 0x9_f000;
/// The firmware area: RAM that the guest can only read.
pub const FIRMWARE: Range<u64> = 0xc_0000..0x10_0000;
/// The ACPI tables, the RSDP first; also where an operating system scans for the RSDP.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Where RAM goes on above the firmware area.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// Where the RAM below 4 GiB ends at the latest, and the windows of devices begin.
pub const MMIO_HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// The window for 32-bit PCI memory.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// More of it above the configuration space, where firmware puts what it finds.
pub const PCI_MMIO32_HIGH: Range<u64> = 0xf000_0000..0xfec0_0000;
/// The window of the PCI configuration space: 256 buses of 1 MiB.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The windows of virtio devices that are not on the PCI bus, a page each.
pub const VIRTIO_MMIO: Range<u64> = 0xfec1_0000..0xfec5_0000;
/// The HPET's registers.
pub const HPET: u64 = 0xfed0_0000;
/// Bytes in the 64-bit PCI window where the processor's address width leaves as much.
pub const PCI_MMIO64_LEN: u64 = 64 * GIB;

/// Why a machine cannot have that much RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Less than Linux or its loader can do with.
    #[error("{bytes} bytes of memory are too few: a machine needs at least {} MiB", MIN_MEMORY / MIB)]
    TooSmall {
        /// Bytes asked for.
        bytes: u64,
    },
    /// More than the address space is laid out for.
    #[error("{bytes} bytes of memory are too many: a machine has at most {} GiB", MAX_MEMORY / GIB)]
    TooLarge {
        /// Bytes asked for.
        bytes: u64,
    },
    /// More than the host could ever give.
    #[error("{bytes} bytes of memory are too many: the host has {host} bytes of memory and swap")]
    MoreThanHost {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that the host has.
        host: u64,
    },
}

/// Refuses more memory than the host has, swap included: such a guest would be killed as soon as it uses it, since
/// guest memory is mapped without reserving it. Where the host does not tell, nothing is refused.
///
/// # Errors
/// [`LayoutError::MoreThanHost`].
pub fn check_host(memory_bytes: u64) -> Result<(), LayoutError> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match host_memory(&meminfo) {
        Some(host) if memory_bytes > host => Err(LayoutError::MoreThanHost { bytes: memory_bytes, host }),
        _ => Ok(()),
    }
}

/// Bytes of memory and swap by `/proc/meminfo`.
fn host_memory(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    kib("MemTotal")?.checked_add(kib("SwapTotal").unwrap_or(0))?.checked_mul(1024)
}

/// The RAM regions of a machine with `memory_bytes` of RAM, rounded down to whole pages.
///
/// As on a PC the memory between 640 KiB and 1 MiB counts but is not all there.
///
/// # Errors
/// [`LayoutError`] below [`MIN_MEMORY`] and above [`MAX_MEMORY`].
pub fn regions(memory_bytes: u64) -> Result<Vec<Region>, LayoutError> {
    let bytes = memory_bytes / PAGE_SIZE * PAGE_SIZE;
    if bytes < MIN_MEMORY {
        return Err(LayoutError::TooSmall { bytes: memory_bytes });
    }
    if bytes > MAX_MEMORY {
        return Err(LayoutError::TooLarge { bytes: memory_bytes });
    }
    let ram =
        |range: Range<u64>| Region { start: range.start, len: range.end - range.start, read_only: false };
    let mut regions = vec![
        ram(0..LOW_RAM_END),
        Region { read_only: true, ..ram(FIRMWARE) },
        ram(HIGH_RAM_START..bytes.min(MMIO_HOLE.start)),
    ];
    if bytes > MMIO_HOLE.start {
        regions.push(ram(MMIO_HOLE.end..ram_end(bytes)));
    }
    Ok(regions)
}

/// The first guest-physical address above all RAM of a machine with `memory_bytes`.
pub fn ram_end(memory_bytes: u64) -> u64 {
    match memory_bytes.checked_sub(MMIO_HOLE.start) {
        None | Some(0) => memory_bytes,
        Some(high) => MMIO_HOLE.end.saturating_add(high),
    }
}

/// Where persistent memory begins: above all RAM of a machine with `memory_bytes`, at a multiple of a GiB.
pub fn pmem_start(memory_bytes: u64) -> u64 {
    let end = ram_end(memory_bytes).max(MMIO_HOLE.end);
    end.checked_next_multiple_of(GIB).unwrap_or(u64::MAX)
}

/// The window for 64-bit PCI memory above the RAM; `None` where an address of `physical_bits` has no room for it.
pub fn pci_mmio64(memory_bytes: u64, physical_bits: u32) -> Option<Range<u64>> {
    let start = ram_end(memory_bytes).max(MMIO_HOLE.end).checked_next_multiple_of(GIB)?;
    let end = start.checked_add(PCI_MMIO64_LEN)?.min(1u64.checked_shl(physical_bits)?);
    (start < end).then_some(start..end)
}

/// What the operating system may do with a range of addresses. ACPI Specification, *Address Range Types*;
/// the discriminants are also those of the PVH protocol's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Free to use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI structures that must be preserved.
    AcpiNvs = 4,
}

/// An entry of the memory map handed to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map (e820) of these regions, in ascending order.
pub fn memory_map(regions: impl IntoIterator<Item = Region>) -> Vec<MapEntry> {
    let mut map = Vec::new();
    let mut push = |range: Range<u64>, kind| {
        if range.start < range.end {
            map.push(MapEntry { start: range.start, len: range.end - range.start, kind });
        }
    };
    for region in regions {
        let range = region.start..region.start.saturating_add(region.len);
        if region.read_only {
            push(range, RangeKind::Reserved);
        } else if range.contains(&FACS) {
            push(range.start..FACS, RangeKind::Ram);
            push(FACS..FACS + PAGE_SIZE, RangeKind::AcpiNvs);
            push(FACS + PAGE_SIZE..range.end, RangeKind::Ram);
        } else {
            push(range, RangeKind::Ram);
        }
    }
    let after = map.iter().position(|e| e.start >= MMIO_HOLE.end).unwrap_or(map.len());
    let ecam =
        MapEntry { start: PCI_ECAM.start, len: PCI_ECAM.end - PCI_ECAM.start, kind: RangeKind::Reserved };
    map.insert(after, ecam);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(memory: u64) -> Vec<(u64, u64)> {
        regions(memory).unwrap().iter().map(|r| (r.start, r.start + r.len)).collect()
    }

    #[test]
    fn ram_stops_at_3_gib_and_goes_on_at_4_gib() {
        assert_eq!(ranges(512 * MIB)[2..], [(MIB, 512 * MIB)]);
        assert_eq!(ranges(3 * GIB)[2..], [(MIB, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + PAGE_SIZE)[2..], [(MIB, 3 * GIB), (4 * GIB, 4 * GIB + PAGE_SIZE)]);
        assert_eq!(ranges(5 * GIB)[2..], [(MIB, 3 * GIB), (4 * GIB, 6 * GIB)]);
    }

    #[test]
    fn every_size_that_is_allowed_can_be_mapped() {
        for memory in [MIN_MEMORY, MIN_MEMORY + 1, 64 * MIB, GIB + 12345] {
            guest_memory::GuestMemory::new(&regions(memory).unwrap()).unwrap();
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_refused_by_name() {
        for bytes in [0, 1, MIN_MEMORY - 1] {
            assert_eq!(regions(bytes), Err(LayoutError::TooSmall { bytes }));
        }
        for bytes in [MAX_MEMORY + PAGE_SIZE, u64::MAX] {
            assert_eq!(regions(bytes), Err(LayoutError::TooLarge { bytes }));
        }
        assert_eq!(
            regions(4096).unwrap_err().to_string(),
            "4096 bytes of memory are too few: a machine needs at least 16 MiB"
        );
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        assert_eq!(host_memory("MemTotal:  8 kB\nMemFree: 1 kB\nSwapTotal: 2 kB\n"), Some(10 * 1024));
        assert_eq!(host_memory("MemTotal:  8 kB\n"), Some(8 * 1024));
        assert_eq!(host_memory("SwapTotal: x"), None);
        assert!(check_host(MIN_MEMORY).is_ok());
        assert!(check_host(u64::MAX).is_err());
    }

    #[test]
    fn the_memory_map_is_ascending_and_keeps_the_firmware_to_itself() {
        let map = memory_map(regions(5 * GIB).unwrap());
        assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start), "{map:x?}");
        let at = |address| map.iter().find(|e| (e.start..e.start + e.len).contains(&address)).map(|e| e.kind);
        assert_eq!(at(0), Some(RangeKind::Ram));
        assert_eq!(at(FACS), Some(RangeKind::AcpiNvs));
        assert_eq!(at(LOW_RAM_END), None);
        assert_eq!(at(ACPI_TABLES.start), Some(RangeKind::Reserved));
        assert_eq!(at(MIB), Some(RangeKind::Ram));
        assert_eq!(at(3 * GIB), None);
        assert_eq!(at(PCI_ECAM.start), Some(RangeKind::Reserved));
        assert_eq!(at(5 * GIB), Some(RangeKind::Ram));
        assert_eq!(at(6 * GIB), None);
    }

    #[test]
    fn persistent_memory_begins_above_the_ram_and_the_windows_of_devices() {
        let starts = [GIB, 3 * GIB, 3 * GIB + PAGE_SIZE, 5 * GIB].map(pmem_start);
        assert_eq!(starts, [4 * GIB, 4 * GIB, 5 * GIB, 6 * GIB]);
    }

    #[test]
    fn the_64_bit_window_lies_above_the_ram_and_within_the_address_width() {
        assert_eq!(pci_mmio64(GIB, 46), Some(4 * GIB..68 * GIB));
        assert_eq!(pci_mmio64(5 * GIB + 1, 46), Some(7 * GIB..71 * GIB));
        assert_eq!(pci_mmio64(GIB, 36), Some(4 * GIB..64 * GIB));
        assert_eq!(pci_mmio64(GIB, 32), None);
        assert_eq!(pci_mmio64(u64::MAX, 64), None);
    }
}
