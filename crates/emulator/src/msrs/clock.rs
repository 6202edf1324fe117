//! KVM's paravirtual clock: pages in the guest from which it computes the time without leaving.
//! Linux, *Documentation/virt/kvm/x86/msr.rst*, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW.
//!
//! All vCPUs of a machine share one time-stamp counter, whose zero is the machine's time zero. So the pages say the
//! same for all of them, never change, and the time that they give never goes back between vCPUs.

use engine::TimeSource;
use guest_memory::GuestMemory;

/// KVM_SYSTEM_TIME_NEW bit 0: the page is to be filled.
const ENABLED: u64 = 1;
/// The flag PVCLOCK_TSC_STABLE_BIT.
const STABLE: u8 = 1;

/// Where the guest wants the clock's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// MSR_KVM_SYSTEM_TIME_NEW as the guest wrote it.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW as the guest wrote it.
    pub wall_clock: u64,
}

/// `pvclock_vcpu_time_info`: how nanoseconds follow from the time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TimeInfo {
    /// The guest's counter at the machine's time zero.
    zero: u64,
    multiplier: u32,
    shift: i8,
}

impl TimeInfo {
    /// For a counter of `frequency` Hz: `ns = (ticks << shift) * multiplier >> 32`.
    fn new(zero: u64, frequency: u64) -> Self {
        let mut scaled = frequency.max(1);
        let mut shift = 0;
        while scaled > 2_000_000_000 {
            scaled >>= 1;
            shift -= 1;
        }
        while scaled <= 1_000_000_000 {
            scaled <<= 1;
            shift += 1;
        }
        // Between 1 and 2 GHz a tick is less than a nanosecond: the multiplier fits its 32 bits.
        let bits = 32 - i32::from(shift);
        let multiplier = if bits >= 0 {
            (1_000_000_000u128 << bits) / u128::from(frequency.max(1))
        } else {
            1_000_000_000 / (u128::from(frequency.max(1)) << -bits)
        };
        Self { zero, multiplier: u32::try_from(multiplier).unwrap_or(u32::MAX), shift }
    }

    fn bytes(&self, version: u32) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[0..4].copy_from_slice(&version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.zero.to_le_bytes());
        // System time at the machine's time zero is zero: bytes 16 to 23 stay so.
        bytes[24..28].copy_from_slice(&self.multiplier.to_le_bytes());
        bytes[28] = self.shift as u8;
        bytes[29] = STABLE;
        bytes
    }
}

impl Clock {
    /// Fills the vCPU's page, where it asked for that. `tsc_offset` is what its counter is ahead of the machine's.
    pub fn publish(&self, memory: &GuestMemory, time: &dyn TimeSource, tsc_offset: u64) {
        if self.system_time & ENABLED == 0 {
            return;
        }
        let info = TimeInfo::new(tsc_offset, time.tsc_frequency());
        publish(memory, self.system_time & !ENABLED, |version| info.bytes(version));
    }

    /// Fills the wall clock's page: the time of day at the machine's time zero.
    pub fn publish_wall_clock(&self, memory: &GuestMemory, time: &dyn TimeSource) {
        let zero = time.wall_clock().saturating_sub(time.now());
        let (seconds, rest) = ((zero / 1_000_000_000) as u32, (zero % 1_000_000_000) as u32);
        publish(memory, self.wall_clock, |version| {
            let mut bytes = [0; 12];
            bytes[0..4].copy_from_slice(&version.to_le_bytes());
            bytes[4..8].copy_from_slice(&seconds.to_le_bytes());
            bytes[8..12].copy_from_slice(&rest.to_le_bytes());
            bytes
        });
    }
}

/// Writes a structure that starts with its version, which is odd while it changes.
fn publish<const N: usize>(memory: &GuestMemory, address: u64, bytes: impl Fn(u32) -> [u8; N]) {
    let before = memory.load_physical::<u32>(address & !3).unwrap_or(0) & !1;
    write(memory, address, &before.wrapping_add(1).to_le_bytes());
    let whole = bytes(before.wrapping_add(2));
    write(memory, address.wrapping_add(4), &whole[4..]);
    write(memory, address, &whole[..4]);
}

/// Writes bytes at a guest-physical address, where RAM is.
fn write(memory: &GuestMemory, address: u64, data: &[u8]) {
    for (n, byte) in data.iter().enumerate() {
        if let Some(location) = memory.locate(address.wrapping_add(n as u64)).filter(|l| !l.read_only) {
            memory.store(location.offset, *byte);
            memory.marks().written(location.offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest computes.
    fn nanoseconds(info: &TimeInfo, tsc: u64) -> u64 {
        let delta = tsc.wrapping_sub(info.zero);
        let delta = if info.shift < 0 { delta >> -info.shift } else { delta << info.shift };
        ((u128::from(delta) * u128::from(info.multiplier)) >> 32) as u64
    }

    #[test]
    fn the_guest_computes_nanoseconds_from_the_counter() {
        for frequency in [1_000_000, 800_000_000, 1_000_000_000, 2_299_998_000, 4_000_000_000, 10_000_000_000]
        {
            let info = TimeInfo::new(77, frequency);
            for seconds in [1, 3600, 1_000_000] {
                let ns = nanoseconds(&info, 77 + seconds * frequency);
                let right = seconds * 1_000_000_000;
                assert!(ns.abs_diff(right) <= right / 1_000_000_000 + 1, "{frequency} Hz: {ns} for {right}");
            }
        }
    }

    #[test]
    fn a_page_outside_the_ram_is_not_written() {
        let region = guest_memory::Region { start: 0, len: 0x1000, read_only: false };
        let memory = GuestMemory::new(&[region]).unwrap();
        let clock = Clock { system_time: 0xff9, wall_clock: 0 };
        clock.publish(&memory, &engine::HostTime::start(), 0);
        assert_eq!(memory.load::<u8>(0xff8) & 1, 0);
        let clock = Clock { system_time: u64::MAX, wall_clock: 0 };
        clock.publish(&memory, &engine::HostTime::start(), 0);
    }
}
