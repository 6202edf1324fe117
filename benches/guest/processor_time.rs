//! How much processor time another process has used, exactly: what /proc shows is a timer tick old.
#![allow(unsafe_code)] // Two system calls that no safe wrapper offers.

use std::time::Duration;

/// User and system time of all threads of a running process; `None` where it is not there.
pub fn of_process(id: u32) -> Option<Duration> {
    let id = libc::pid_t::try_from(id).ok()?;
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to locals of the right types.
    let failed = unsafe {
        libc::clock_getcpuclockid(id, &mut clock) != 0 || libc::clock_gettime(clock, &mut time) != 0
    };
    if failed {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}
