use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The machine's time, passed in so that tests and replays can own it.
pub trait TimeSource: Send + Sync {
    /// Nanoseconds since the machine started; never goes back.
    fn now(&self) -> u64;
    /// The time-stamp counter of a vCPU whose TSC was never written.
    fn tsc(&self) -> u64;
    /// What `tsc()` subtracts from the host's time-stamp counter, where it does nothing else: then that may be read instead.
    fn host_tsc_start(&self) -> Option<u64>;
    /// Its frequency, in Hz: `tsc() == now() * tsc_frequency() / 10^9` up to rounding.
    fn tsc_frequency(&self) -> u64;
    /// Nanoseconds since the Unix epoch.
    fn wall_clock(&self) -> u64;
}

/// The host's time: its time-stamp counter, from zero at the machine's start.
#[derive(Debug)]
pub struct HostTime {
    start: u64,
    wall_start: u64,
    frequency: u64,
    /// Nanoseconds per tick, times 2^32.
    multiplier: u64,
}

impl HostTime {
    /// Starts at zero now. The first call in a process measures the counter's frequency for 10 ms where the
    /// processor does not tell it.
    pub fn start() -> Self {
        static FREQUENCY: OnceLock<u64> = OnceLock::new();
        let frequency = *FREQUENCY.get_or_init(|| cpuid_frequency().unwrap_or_else(measured_frequency));
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            start: host_tsc(),
            wall_start: wall.as_nanos() as u64,
            frequency,
            multiplier: ((1_000_000_000u128 << 32) / u128::from(frequency)) as u64,
        }
    }
}

impl TimeSource for HostTime {
    fn now(&self) -> u64 {
        (u128::from(self.tsc()) * u128::from(self.multiplier) >> 32) as u64
    }
    #[inline]
    fn tsc(&self) -> u64 {
        host_tsc().wrapping_sub(self.start)
    }
    fn host_tsc_start(&self) -> Option<u64> {
        Some(self.start)
    }
    fn tsc_frequency(&self) -> u64 {
        self.frequency
    }
    fn wall_clock(&self) -> u64 {
        self.wall_start + self.now()
    }
}

#[inline]
#[allow(unsafe_code)] // One intrinsic.
fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no effect but its result; Linux leaves it enabled in user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The frequency that CPUID leaf 15H enumerates, in Hz, where the crystal's is given.
fn cpuid_frequency() -> Option<u64> {
    #[allow(unused_unsafe, unsafe_code)]
    // SAFETY: CPUID exists on every x86-64 processor.
    let (max, leaf) = unsafe { (core::arch::x86_64::__cpuid(0).eax, core::arch::x86_64::__cpuid(0x15)) };
    if max < 0x15 || leaf.eax == 0 || leaf.ebx == 0 || leaf.ecx == 0 {
        return None;
    }
    Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax))
}

/// Measures the counter against the monotonic clock for 10 ms.
fn measured_frequency() -> u64 {
    let (clock, counter) = (Instant::now(), host_tsc());
    std::thread::sleep(Duration::from_millis(10));
    let (elapsed, ticks) = (clock.elapsed(), host_tsc() - counter);
    (u128::from(ticks) * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_follow_the_monotonic_clock() {
        let time = HostTime::start();
        let clock = Instant::now();
        let before = time.now();
        std::thread::sleep(Duration::from_millis(30));
        let (passed, real) = (time.now() - before, clock.elapsed().as_nanos() as u64);
        assert!(passed.abs_diff(real) < real / 50, "{passed} ns against {real} ns");
    }
}
