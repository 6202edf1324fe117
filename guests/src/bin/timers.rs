//! The platform's clocks: the 8254, the MC146818's periodic interrupt, the HPET, and that they agree with each other.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering};

use guests::apic;
use guests::cpu;
use guests::report;
use guests::tables::{self, Frame};
use guests::{port, smp};

guests::guest!(main);

const VECTOR: u32 = 0x66;
/// Hz of the 8254.
const PIT_RATE: u64 = 1_193_182;
const IO_APIC: u64 = 0xfec0_0000;
const MASKED: u32 = 1 << 16;

static COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_interrupt(_: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // The clock's interrupt stands until its register C is read.
    port::write8(0x70, 0xc);
    port::read8(0x71);
    apic::eoi();
}

fn main() {
    apic::enable();
    tables::handle(VECTOR as usize, on_interrupt);
    counts();
    gate_and_speaker();
    interrupts();
    clock();
    hpet();
}

fn route(line: u32, low: u32) {
    // SAFETY: the I/O APIC's window.
    unsafe {
        (IO_APIC as *mut u32).write_volatile(0x11 + 2 * line);
        ((IO_APIC + 0x10) as *mut u32).write_volatile(apic::id() << 24);
        (IO_APIC as *mut u32).write_volatile(0x10 + 2 * line);
        ((IO_APIC + 0x10) as *mut u32).write_volatile(low);
    }
}

fn wait_for(expected: u32) -> bool {
    smp::wait(20_000_000_000, || {
        cpu::take_interrupts();
        COUNT.load(Ordering::SeqCst) >= expected
    })
}

/// A counter's value, latched.
fn latched(channel: u16) -> u32 {
    port::write8(0x43, (channel as u8) << 6);
    let low = port::read8(0x40 + channel);
    u32::from(port::read8(0x40 + channel)) << 8 | u32::from(low)
}

/// Loads a counter, low byte and high byte.
fn load(channel: u16, mode: u8, value: u16) {
    port::write8(0x43, (channel as u8) << 6 | 0x30 | mode << 1);
    port::write8(0x40 + channel, value as u8);
    port::write8(0x40 + channel, (value >> 8) as u8);
}

/// A counter's status byte.
fn status(channel: u16) -> u8 {
    port::write8(0x43, 0xe0 | 2 << channel);
    port::read8(0x40 + channel)
}

fn counts() {
    load(0, 2, 0xffff);
    let first = latched(0);
    smp::wait(20_000_000_000, || latched(0) != first);
    let second = latched(0);
    report::holds("mode 2 counts down", second < first, (first, second));
    report::equal("its status has the mode and the access", status(0) & 0x3f, 0x34);
    load(0, 0, 100);
    report::equal(
        "mode 0 ends with its output high",
        smp::wait(20_000_000_000, || status(0) & 0x80 != 0),
        true,
    );
    load(0, 0, 0xffff);
    report::equal("and begins with it low", status(0) & 0x80, 0);
    load(0, 4, 0x8000);
    port::write8(0x43, 0);
    port::read8(0x40);
    port::read8(0x40);
    report::equal("mode 4's status", status(0) & 0x3f, 0x38);
    // BCD.
    port::write8(0x43, 0x31);
    port::write8(0x40, 0x99);
    port::write8(0x40, 0x99);
    let value = latched(0);
    let decimal = (0..4).all(|digit| value >> (4 * digit) & 0xf < 10);
    report::holds("BCD counts in digits", decimal, value);
    // Only the low byte.
    port::write8(0x43, 0x10);
    port::write8(0x40, 0x50);
    report::equal("a count of the low byte alone", smp::wait(20_000_000_000, || status(0) & 0x80 != 0), true);
}

fn gate_and_speaker() {
    port::write8(0x61, port::read8(0x61) & !3);
    load(2, 0, 0xffff);
    let first = latched(2);
    smp::pause(2_000_000);
    report::equal("without its gate channel 2 stands", latched(2), first);
    port::write8(0x61, port::read8(0x61) & !2 | 1);
    report::equal("with it, it runs", smp::wait(20_000_000_000, || latched(2) != first), true);
    load(2, 0, 200);
    report::equal(
        "its output is port 0x61's bit 5",
        smp::wait(20_000_000_000, || port::read8(0x61) & 0x20 != 0),
        true,
    );
}

fn interrupts() {
    route(2, VECTOR);
    let before = COUNT.load(Ordering::SeqCst);
    load(0, 2, 1193);
    report::equal("mode 2 interrupts again and again", wait_for(before + 5), true);
    load(0, 0, 1193);
    cpu::take_interrupts();
    let before = COUNT.load(Ordering::SeqCst);
    report::equal("mode 0 interrupts", wait_for(before + 1), true);
    smp::pause(10_000_000);
    cpu::take_interrupts();
    report::equal("once", COUNT.load(Ordering::SeqCst), before + 1);
    route(2, MASKED);
}

fn rtc(index: u8) -> u8 {
    port::write8(0x70, index);
    port::read8(0x71)
}

fn set_rtc(index: u8, value: u8) {
    port::write8(0x70, index);
    port::write8(0x71, value);
}

fn clock() {
    let date = [rtc(0), rtc(2), rtc(4), rtc(7), rtc(8)];
    let binary = rtc(0xb) & 4 != 0;
    let value = |byte: u8| if binary { byte } else { (byte >> 4) * 10 + (byte & 15) };
    let [seconds, minutes, _, day, month] = date.map(value);
    let fine = seconds < 60 && minutes < 60 && (1..=31).contains(&day) && (1..=12).contains(&month);
    report::holds("the clock has a time and a date", fine, date);
    report::equal(
        "its RAM keeps bytes",
        {
            set_rtc(0x50, 0xa5);
            rtc(0x50)
        },
        0xa5,
    );
    report::equal("it has power", rtc(0xd) & 0x80, 0x80);
    // 1,024 interrupts a second.
    set_rtc(0xa, 0x26);
    route(8, VECTOR);
    rtc(0xc);
    let before = COUNT.load(Ordering::SeqCst);
    set_rtc(0xb, rtc(0xb) | 0x40);
    report::equal("its periodic interrupt", wait_for(before + 5), true);
    set_rtc(0xb, rtc(0xb) & !0x40);
    route(8, MASKED);
    rtc(0xc);
    report::equal("register C is cleared by its reading", rtc(0xc) & 0x80, 0);
}

const HPET: u64 = 0xfed0_0000;

fn hpet_read(register: u64) -> u64 {
    // SAFETY: the HPET's page.
    unsafe { ((HPET + register) as *const u64).read_volatile() }
}

fn hpet_write(register: u64, value: u64) {
    // SAFETY: as above.
    unsafe { ((HPET + register) as *mut u64).write_volatile(value) }
}

fn hpet() {
    let capabilities = hpet_read(0);
    let period = capabilities >> 32;
    report::holds("the HPET's period is at most 100 ns", period > 0 && period <= 100_000_000, period);
    hpet_write(0x10, 0);
    hpet_write(0xf0, 0);
    report::equal(
        "its counter stands while it is off",
        {
            let first = hpet_read(0xf0);
            smp::pause(1_000_000);
            hpet_read(0xf0) - first
        },
        0,
    );
    hpet_write(0x10, 1);
    report::equal("and runs while it is on", smp::wait(20_000_000_000, || hpet_read(0xf0) != 0), true);
    // Against the 8254, over 20 ms.
    port::write8(0x61, port::read8(0x61) & !3);
    load(2, 0, (PIT_RATE / 50) as u16);
    let (start, cycles) = (hpet_read(0xf0), cpu::tsc());
    port::write8(0x61, port::read8(0x61) & !2 | 1);
    smp::wait(20_000_000_000, || port::read8(0x61) & 0x20 != 0);
    let (ticks, cycles) = (hpet_read(0xf0) - start, cpu::tsc() - cycles);
    let nanoseconds = u128::from(ticks) * u128::from(period) / 1_000_000;
    report::holds("20 ms of the 8254 are at least that of the HPET", nanoseconds >= 19_900_000, nanoseconds);
    report::holds("and the time-stamp counter ran too", cycles > 1_000_000, cycles);
    // A comparator.
    let routes = hpet_read(0x100) >> 32;
    let line = routes.trailing_zeros().min(23);
    route(line, VECTOR);
    let before = COUNT.load(Ordering::SeqCst);
    hpet_write(0x108, hpet_read(0xf0) + 1_000_000_000_000 / period);
    hpet_write(0x100, u64::from(line) << 9 | 4);
    report::equal("a comparator interrupts", wait_for(before + 1), true);
    hpet_write(0x100, 0);
    route(line, MASKED);
}
