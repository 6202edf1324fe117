//! The performance counters: exact counts of a known loop, privileges, overflow, and the interrupt through the local
//! APIC. SDM vol. 3, *Architectural Performance Monitoring Version 2*.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use guests::apic;
use guests::cpu::{self, read_msr};
use guests::report;
use guests::tables::{self, Frame};

guests::guest!(main);

const VECTOR: u32 = 0x71;
const LVT_PERFORMANCE: u32 = 0x340;
const MASKED: u32 = 1 << 16;
const SELECT_0: u32 = 0x186;
const COUNTER_0: u32 = 0xc1;
const WIDE_COUNTER_0: u32 = 0x4c1;
const FIXED_0: u32 = 0x309;
const FIXED_CONTROL: u32 = 0x38d;
const STATUS: u32 = 0x38e;
const CONTROL: u32 = 0x38f;
const CLEAR: u32 = 0x390;
const ALL_RINGS: u64 = 3 << 16;
const INTERRUPT: u64 = 1 << 20;
const ENABLE: u64 = 1 << 22;
const INSTRUCTIONS: u64 = 0xc0;
const ROUNDS: u64 = 100_000;
/// What [`measure`] counts: two instructions before the loop, ten in each round, three behind it, and the last WRMSR.
const MEASURED: u64 = 2 + 10 * ROUNDS + 3 + 1;

static COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_interrupt(_: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

fn write(msr: u32, value: u64) {
    // SAFETY: the counters have no effect on memory.
    unsafe { cpu::write_msr(msr, value) }
}

/// Enables the counters of `mask`, runs the loop, and disables them: all in one piece of code.
fn measure(mask: u64) {
    static WORDS: [u64; 8] = [0; 8];
    // SAFETY: the loop only loads.
    unsafe {
        asm!("wrmsr", "mov edi, ecx", "mov ecx, r8d", "2: mov r10, [r9]", "nop", "nop", "nop", "nop", "nop", "nop",
             "nop", "nop", "loop 2b", "mov ecx, edi", "xor eax, eax", "xor edx, edx", "wrmsr",
             inout("ecx") CONTROL => _, inout("eax") mask as u32 => _, inout("edx") (mask >> 32) as u32 => _,
             in("r8") ROUNDS, in("r9") WORDS.as_ptr(), out("r10") _, out("edi") _, options(nostack));
    }
}

fn main() {
    let [version, absent, _, fixed] = cpu::cpuid(0xa, 0);
    if version & 0xff < 2 {
        report::skip("performance counters", "the processor does not have version 2");
        return;
    }
    write(CONTROL, 0);
    let general = version >> 8 & 0xff;
    let width = version >> 16 & 0xff;
    report::equal("instructions and core cycles are there", absent & 3, 0);
    counts(general);
    fixed_counters(fixed & 0x1f);
    apic::enable();
    tables::handle(VECTOR as usize, on_interrupt);
    for n in 0..general {
        overflow(&format_args!("counter {n}"), SELECT_0 + n, WIDE_COUNTER_0 + n, u64::from(n), width);
    }
    overflow(&"fixed counter 0", FIXED_CONTROL, FIXED_0, 32, width);
    freezing(width);
}

fn counts(general: u32) {
    for n in 0..general {
        write(SELECT_0 + n, INSTRUCTIONS | ALL_RINGS | ENABLE);
        write(COUNTER_0 + n, 0);
        measure(1 << n);
        report::equal(format_args!("counter {n} counts each instruction"), read_msr(COUNTER_0 + n), MEASURED);
        write(SELECT_0 + n, INSTRUCTIONS | 1 << 16 | ENABLE);
        measure(1 << n);
        report::equal(
            format_args!("counter {n} counts no program's here"),
            read_msr(COUNTER_0 + n),
            MEASURED,
        );
        write(SELECT_0 + n, 0);
    }
    write(SELECT_0, INSTRUCTIONS | ALL_RINGS | ENABLE | 2 << 24);
    write(COUNTER_0, 0);
    measure(1);
    report::holds("a counter mask of two", read_msr(COUNTER_0) < MEASURED, read_msr(COUNTER_0));
    write(SELECT_0, 0);
}

fn fixed_counters(count: u32) {
    write(FIXED_CONTROL, 0x333 & ((1 << (4 * count)) - 1));
    for n in 0..count {
        write(FIXED_0 + n, 0);
    }
    let start = cpu::tsc();
    measure(7 << 32);
    let passed = cpu::tsc() - start;
    report::equal("fixed counter 0 counts each instruction", read_msr(FIXED_0), MEASURED);
    let cycles = read_msr(FIXED_0 + 1);
    report::holds("fixed counter 1 counts cycles", (ROUNDS..500 * ROUNDS).contains(&cycles), cycles);
    let reference = read_msr(FIXED_0 + 2);
    report::holds(
        "fixed counter 2 counts no more than the time",
        reference > 0 && reference <= passed,
        (reference, passed),
    );
    guests::println!("# {} reference cycles for 100 rounds", reference * 100 / ROUNDS);
    write(FIXED_CONTROL, 0);
}

/// An overflow is in the status until it is cleared, and interrupts once where that was asked for.
fn overflow(name: &dyn core::fmt::Display, setup: u32, counter: u32, bit: u64, width: u32) {
    for interrupts in [false, true] {
        let control = match (bit >= 32, interrupts) {
            (true, true) => 0xb,
            (true, false) => 3,
            (false, interrupts) => INSTRUCTIONS | ALL_RINGS | ENABLE | if interrupts { INTERRUPT } else { 0 },
        };
        write(setup, control);
        write(counter, (1 << width) - MEASURED + 1);
        apic::write(LVT_PERFORMANCE, VECTOR);
        COUNT.store(0, Ordering::SeqCst);
        measure(1 << bit);
        report::equal(format_args!("{name} has overflowed by one"), read_msr(counter), 1);
        report::equal(format_args!("{name}'s status"), read_msr(STATUS) >> bit & 1, 1);
        write(CLEAR, 1 << bit);
        report::equal(format_args!("{name}'s status, cleared"), read_msr(STATUS), 0);
        cpu::take_interrupts();
        report::equal(format_args!("{name}'s interrupts"), COUNT.load(Ordering::SeqCst), interrupts.into());
        let masked = apic::read(LVT_PERFORMANCE) & MASKED != 0;
        report::equal(format_args!("{name}'s interrupt masks itself"), masked, interrupts);
        write(setup, 0);
    }
}

/// With FREEZE_PERFMON_ON_PMI the counters stop where they interrupt.
fn freezing(width: u32) {
    const DEBUGCTL: u32 = 0x1d9;
    write(DEBUGCTL, 1 << 12);
    write(SELECT_0, INSTRUCTIONS | ALL_RINGS | ENABLE | INTERRUPT);
    write(SELECT_0 + 1, INSTRUCTIONS | ALL_RINGS | ENABLE);
    write(WIDE_COUNTER_0, (1 << width) - 5000);
    write(WIDE_COUNTER_0 + 1, 0);
    apic::write(LVT_PERFORMANCE, VECTOR);
    measure(3);
    cpu::take_interrupts();
    let others = read_msr(WIDE_COUNTER_0 + 1);
    report::equal("the interrupt stops all counters", others - read_msr(WIDE_COUNTER_0), 5000);
    report::holds("soon", (5000..5100).contains(&others), others);
    write(DEBUGCTL, 0);
}
