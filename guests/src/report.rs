//! One line for each check, and the end of the run.

use core::fmt::{self, Debug, Write};
use core::sync::atomic::{AtomicU32, Ordering};

use crate::port;

const COM1: u16 = 0x3f8;
const DEBUG_EXIT: u16 = 0xf4;
/// What is written to the debug-exit port: all passed, or some failed.
const PASSED: u32 = 0x10;
const FAILED: u32 = 0x11;

static CHECKS: AtomicU32 = AtomicU32::new(0);
static FAILURES: AtomicU32 = AtomicU32::new(0);

/// The serial port.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while port::read8(COM1 + 5) & 0x20 == 0 {}
            port::write8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($arguments:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::report::Serial, $($arguments)*);
    }};
}

/// A check that what came is what the manual says.
#[track_caller]
pub fn equal<T: PartialEq + Debug>(name: impl fmt::Display, got: T, expected: T) {
    CHECKS.fetch_add(1, Ordering::Relaxed);
    if got == expected {
        println!("PASS {name}");
    } else {
        FAILURES.fetch_add(1, Ordering::Relaxed);
        println!("FAIL {name}: expected {expected:x?} got {got:x?}");
    }
}

/// A check of a condition; `got` says what was found instead.
pub fn holds(name: impl fmt::Display, condition: bool, got: impl Debug) {
    CHECKS.fetch_add(1, Ordering::Relaxed);
    if condition {
        println!("PASS {name}");
    } else {
        FAILURES.fetch_add(1, Ordering::Relaxed);
        println!("FAIL {name}: got {got:x?}");
    }
}

/// Many checks under one name, which reports the first that failed.
pub struct Many {
    name: &'static str,
    count: u64,
    failures: u64,
}

impl Many {
    /// None yet.
    pub fn new(name: &'static str) -> Self {
        Self { name, count: 0, failures: 0 }
    }

    /// One of them.
    pub fn equal<T: PartialEq + Debug>(&mut self, case: impl fmt::Display, got: T, expected: T) {
        self.count += 1;
        if got != expected {
            self.failures += 1;
            if self.failures <= 8 {
                println!("# {}: {case}: expected {expected:x?} got {got:x?}", self.name);
            }
        }
    }

    /// Reports them.
    pub fn finish(self) {
        let Self { name, count, failures } = self;
        equal(name, Failures(failures), Failures(0));
        println!("# {name}: {count} cases");
    }
}

#[derive(PartialEq)]
struct Failures(u64);

impl Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failures", self.0)
    }
}

/// A check that this machine cannot make.
pub fn skip(name: impl fmt::Display, why: &str) {
    println!("SKIP {name}: {why}");
}

/// Whether this machine is QEMU's TCG, which some checks would end: those say why, and that they were not made.
pub fn ends_tcg(name: impl fmt::Display, why: &str) -> bool {
    let [_, b, c, d] = crate::cpu::cpuid(0x4000_0000, 0);
    let is_tcg = [b, c, d]
        == [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")];
    if is_tcg {
        skip(name, why);
    }
    is_tcg
}

/// Ends the run.
pub fn finish() -> ! {
    let (checks, failures) = (CHECKS.load(Ordering::Relaxed), FAILURES.load(Ordering::Relaxed));
    println!("DONE {checks} checks, {failures} failed");
    loop {
        port::write32(DEBUG_EXIT, if failures == 0 { PASSED } else { FAILED });
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_unexpected_event(frame: &[u64; 7]) -> ! {
    let [vector, error, rip, cs, flags, rsp, ss] = frame;
    let cr2 = crate::cpu::cr2();
    println!(
        "FAIL unexpected event {vector} error {error:#x} at {cs:#x}:{rip:#x} flags {flags:#x} stack {ss:#x}:{rsp:#x} cr2 {cr2:#x}"
    );
    FAILURES.fetch_add(1, Ordering::Relaxed);
    finish()
}
