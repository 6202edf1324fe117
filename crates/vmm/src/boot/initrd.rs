//! Where the initrd goes: as high as the kernel and the RAM allow, so that it is out of the way of the kernel's early
//! allocations.

use std::ops::Range;

use guest_memory::{GuestMemory, PAGE_SIZE};

use super::error::BootError;
use super::low_memory;
use crate::layout::MIB;

/// The highest address of an initrd for kernels that do not tell: what every 64-bit Linux tells.
pub(super) const DEFAULT_ADDRESS_MAX: u64 = 0x7fff_ffff;

/// Loads the initrd above the kernel and at most up to `address_max`; an empty range where there is none.
pub(super) fn load(
    memory: &GuestMemory,
    initrd: Option<&[u8]>,
    kernel: &Range<u64>,
    address_max: u64,
) -> Result<Range<u64>, BootError> {
    let Some(bytes) = initrd.filter(|bytes| !bytes.is_empty()) else { return Ok(0..0) };
    let range = place(bytes.len() as u64, low_memory::ram_end_below_4_gib(memory), kernel.end, address_max)?;
    low_memory::write(memory, range.start, bytes)?;
    Ok(range)
}

fn place(len: u64, ram_end: u64, kernel_end: u64, address_max: u64) -> Result<Range<u64>, BootError> {
    let limit = address_max.saturating_add(1);
    let lowest = kernel_end.next_multiple_of(PAGE_SIZE);
    let room = |end: u64| {
        let start = end.checked_sub(len)? / PAGE_SIZE * PAGE_SIZE;
        (start >= lowest).then_some(start..start + len)
    };
    if let Some(range) = room(ram_end.min(limit)) {
        return Ok(range);
    }
    let needs = lowest.saturating_add(len).saturating_add(PAGE_SIZE).div_ceil(MIB).saturating_mul(MIB);
    match room(limit) {
        Some(_) => Err(BootError::InitrdTooBig { bytes: len, needs }),
        None => Err(BootError::InitrdTooBigForKernel { bytes: len, limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initrd_lies_as_high_as_allowed_on_a_page() {
        let max = DEFAULT_ADDRESS_MAX;
        assert_eq!(place(5000, 64 * MIB, 32 * MIB, max).unwrap(), 64 * MIB - 8192..64 * MIB - 8192 + 5000);
        assert_eq!(place(4096, 3 << 30, 32 * MIB, max).unwrap(), 0x7fff_f000..0x8000_0000);
        assert_eq!(place(32 * MIB, 64 * MIB, 32 * MIB, max).unwrap(), 32 * MIB..64 * MIB);
    }

    #[test]
    fn an_initrd_that_does_not_fit_says_how_much_memory_would_do() {
        let error = place(32 * MIB + 1, 64 * MIB, 32 * MIB, DEFAULT_ADDRESS_MAX).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the initrd of 33554433 bytes is too big for the memory: the machine needs at least 65 MiB"
        );
        assert!(place(32 * MIB + 1, 65 * MIB, 32 * MIB, DEFAULT_ADDRESS_MAX).is_ok());
        let error = place(2 << 30, 64 * MIB, 32 * MIB, DEFAULT_ADDRESS_MAX).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooBigForKernel { .. }), "{error}");
        assert!(place(u64::MAX, u64::MAX, u64::MAX - 8192, u64::MAX).is_err());
    }
}
