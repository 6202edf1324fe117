//! The runtime of Ringside's bare-metal guests: what each program in `src/bin` needs to hold a machine against the
//! manual.
//!
//! A guest is a Multiboot image that is in long mode when its `main` begins: the first 4 GiB are mapped to themselves,
//! SSE is on, interrupts are off. It makes checks, each of which is one line on the serial port, and ends the run through
//! the debug-exit port.
//!
//! The heart is one idea: a few instructions (a [`code!`]) run from a state of *all* registers, in any mode, until an
//! event ends them, and what is checked is the state that the event found: [`long::State`] for 64-bit and compatibility
//! mode, [`legacy::State`] for protected, virtual-8086 and real mode. All of Rust's own code is 64-bit code.
//!
//! ```text
//! boot.s, events.s, legacy.s   the ways in, out and between the modes
//! long, legacy                 run a snippet in long mode; in all others
//! tables                       GDT, IDT and TSS of 64-bit mode
//! report                       PASS and FAIL lines
//! apic, smp, port, msr         the platform and the other processors
//! ```
#![no_std]
#![allow(clippy::missing_safety_doc)] // Bare metal: the whole machine is ours, and what is unsafe says what it does.

use core::arch::global_asm;

global_asm!(
    include_str!("macros.s"),
    include_str!("boot.s"),
    include_str!("events.s"),
    include_str!("legacy.s"),
    options(att_syntax)
);

pub mod apic;
pub mod cpu;
pub mod descriptor;
pub mod legacy;
pub mod long;
mod memory;
pub mod paging;
pub mod port;
pub mod report;
pub mod smp;
pub mod tables;

/// Instructions in a section of their own, as bytes: `code!(16; "mov ax, bx", …)`, for 16, 32 or 64 bits, in Intel's
/// syntax. They end with `int 0x30`, which reports that all of them were executed.
#[macro_export]
macro_rules! code {
    (16; $($line:expr),* $(,)?) => { $crate::code!(@ ".code16"; $($line),*) };
    (32; $($line:expr),* $(,)?) => { $crate::code!(@ ".code32"; $($line),*) };
    (64; $($line:expr),* $(,)?) => { $crate::code!(@ ".code64"; $($line),*) };
    (@ $mode:literal; $($line:expr),*) => {{
        let (start, end): (usize, usize);
        // SAFETY: loads two addresses.
        unsafe {
            core::arch::asm!(
                "lea {start}, [rip + 42f]", "lea {end}, [rip + 43f]",
                ".pushsection .snippets, \"ax\"", $mode, "42:", $($line,)* "int 0x30", "43:", ".code64",
                ".popsection",
                start = out(reg) start, end = out(reg) end, options(nomem, nostack),
            );
        }
        // SAFETY: the section's bytes between two of its labels.
        unsafe { core::slice::from_raw_parts(start as *const u8, end - start) }
    }};
}

/// What each guest's program defines: `guest!(main)`, for a function that makes its checks.
#[macro_export]
macro_rules! guest {
    ($main:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() {
            $main()
        }
    };
}

unsafe extern "C" {
    fn guest_main();
}

#[unsafe(no_mangle)]
extern "C" fn guest_start(_index: u64) -> ! {
    tables::load(0);
    // Firmware may have left the interrupt controllers open.
    port::write8(0x21, 0xff);
    port::write8(0xa1, 0xff);
    // SAFETY: defined by the program's `guest!`.
    unsafe { guest_main() };
    report::finish()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("FAIL panic: {info}");
    report::finish()
}
