//! What it costs to put an exit into the ledger: nanoseconds an exit, by what the exit is at.
//!
//! `cargo bench --bench ledger`. An exit of the software CPU costs two readings of the time-stamp counter and one call
//! of `Recorder::record`.

mod timing;

use std::hint::black_box;

use exits::{Detail, Exit, Ledger, MAX_DETAILS, ticks};
use timing::nanoseconds_each;
use x86::ExitReason;

fn port(port: u16) -> Exit {
    Exit::at(ExitReason::IoInstruction, Detail::Port { port, size: 1, write: true })
}

fn main() {
    println!("{:<58}{:>10}", "", "ns/exit");
    let print = |what: &str, nanoseconds: f64| println!("{what:<58}{nanoseconds:>10.1}");
    let reading = |count| (0..count).for_each(|_| _ = black_box(ticks()));
    print("one reading of the time-stamp counter", nanoseconds_each(reading));
    print("a reason alone", recording(&|_| Exit::new(ExitReason::Cpuid)));
    print("the same port again", recording(&|_| port(0x3f8)));
    print("two ports in turn", recording(&|n| port(0x3f8 + (n % 2) as u16)));
    print("64 ports in turn", recording(&|n| port(0x300 + (n % 64) as u16)));
    let beyond = 4 * MAX_DETAILS as u64;
    print("ports in turn, more than are told apart", recording(&move |n| port((n % beyond) as u16)));
    let memory = |n: u64| {
        let detail = Detail::Memory { address: 0xfee0_0000 + n % 8 * 16, size: 4, write: true };
        Exit::at(ExitReason::EptViolation, detail)
    };
    print("8 device registers in memory in turn", recording(&memory));
    print("the same port again, timed as a vCPU does it", timed());
}

/// Into a ledger of its own.
fn recording(exit: &dyn Fn(u64) -> Exit) -> f64 {
    let recorder = Ledger::new().recorder(0);
    nanoseconds_each(|count| (0..count).for_each(|n| recorder.record(black_box(exit(n)), n & 0xfff)))
}

fn timed() -> f64 {
    let recorder = Ledger::new().recorder(0);
    nanoseconds_each(|count| {
        for _ in 0..count {
            let start = ticks();
            recorder.record(black_box(port(0x3f8)), ticks().wrapping_sub(start));
        }
    })
}
