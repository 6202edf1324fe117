//! The HPET table: where the event timer is. *IA-PC HPET Specification*, *The ACPI 2.0 HPET Description Table*.

use ::acpi_tables::sdt::Sdt;
use devices::hpet::EVENT_TIMER_BLOCK_ID;

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout;

const REVISION: u8 = 1;
const LEN: u32 = 56;
const BLOCK_ID: usize = 36;
/// A generic address: its space is 0, memory; its width is 64 bits.
const ADDRESS_WIDTH: usize = 41;
const ADDRESS: usize = 44;
/// The least period in ticks that a comparator keeps up with.
const MINIMUM_TICK: usize = 53;

/// Ticks of the device's least period, 20 µs.
const LEAST_TICKS: u16 = 2000;

/// The table.
pub(super) fn table() -> Vec<u8> {
    let mut hpet = Sdt::new(*b"HPET", LEN, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    hpet.write_u32(BLOCK_ID, EVENT_TIMER_BLOCK_ID);
    hpet.write_u8(ADDRESS_WIDTH, 64);
    hpet.write_u64(ADDRESS, layout::HPET);
    hpet.write_u16(MINIMUM_TICK, LEAST_TICKS);
    hpet.as_slice().to_vec()
}
