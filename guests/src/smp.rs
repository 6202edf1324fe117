//! The other processors.

use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::tables::MAX_CPUS;
use crate::{apic, cpu, port, tables};

type Work = fn(usize);

static READY: AtomicUsize = AtomicUsize::new(0);
static WORK: [AtomicPtr<()>; MAX_CPUS] = [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CPUS];

unsafe extern "C" {
    static ap_entry: [u8; 0];
}

/// How many processors the machine has, as its firmware configuration device tells.
pub fn count() -> usize {
    port::write16(0x510, 5);
    let low = port::read8(0x511);
    let high = port::read8(0x511);
    (usize::from(high) << 8 | usize::from(low)).clamp(1, MAX_CPUS)
}

/// Starts all others; gives how many processors run.
pub fn start() -> usize {
    apic::enable();
    let vector = (&raw const ap_entry) as u32 >> 12;
    let all_but_self = 3 << 18;
    apic::send(0, all_but_self | 5 << 8 | 1 << 14);
    pause(20_000_000);
    let others = count() - 1;
    for _ in 0..2 {
        apic::send(0, all_but_self | 6 << 8 | 1 << 14 | vector);
        wait(1_000_000_000, || READY.load(Ordering::SeqCst) == others);
    }
    READY.load(Ordering::SeqCst) + 1
}

#[unsafe(no_mangle)]
extern "C" fn guest_ap_start(index: usize) -> ! {
    tables::load(index);
    apic::enable();
    READY.fetch_add(1, Ordering::SeqCst);
    loop {
        let work = WORK[index].load(Ordering::SeqCst);
        if work.is_null() {
            core::hint::spin_loop();
            continue;
        }
        // SAFETY: only `run_on` writes there, and only functions of this type.
        let work: Work = unsafe { core::mem::transmute(work) };
        work(index);
        WORK[index].store(core::ptr::null_mut(), Ordering::SeqCst);
    }
}

/// Has another processor execute a function; does not wait.
pub fn run_on(index: usize, work: Work) {
    WORK[index].store(work as *mut (), Ordering::SeqCst);
}

/// Waits until a processor has done its work; false where it takes too long.
pub fn finished(index: usize) -> bool {
    wait(20_000_000_000, || WORK[index].load(Ordering::SeqCst).is_null())
}

/// Waits for a condition, for at most so many cycles.
pub fn wait(cycles: u64, mut condition: impl FnMut() -> bool) -> bool {
    let start = cpu::tsc();
    while !condition() {
        if cpu::tsc().wrapping_sub(start) > cycles {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Waits for so many cycles.
pub fn pause(cycles: u64) {
    wait(cycles, || false);
}
