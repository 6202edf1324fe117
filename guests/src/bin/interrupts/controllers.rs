//! The I/O APIC and the 8259s.

use core::sync::atomic::{AtomicU32, Ordering};

use guests::apic::{offset, write};
use guests::cpu::vector;
use guests::tables::Frame;
use guests::{apic, port, report, smp, tables};

use super::{
    COUNT, LAST, LOW, MIDDLE, NMIS, bit_of, brought, count, on_interrupt, on_nmi, wait_for, without_eoi,
};

const IO_APIC: u64 = 0xfec0_0000;

fn io_read(register: u32) -> u32 {
    // SAFETY: the I/O APIC's window.
    unsafe {
        (IO_APIC as *mut u32).write_volatile(register);
        ((IO_APIC + 0x10) as *const u32).read_volatile()
    }
}

fn io_write(register: u32, value: u32) {
    // SAFETY: as above.
    unsafe {
        (IO_APIC as *mut u32).write_volatile(register);
        ((IO_APIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// Sets a line's redirection entry to this processor.
fn route(line: u32, low: u32) {
    io_write(0x11 + 2 * line, apic::id() << 24);
    io_write(0x10 + 2 * line, low);
}

/// Drives a line.
fn drive(line: u32, level: bool) {
    port::write8(0x2000 + line as u16, level.into());
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE: u32 = 1 << 14;

pub fn io_apic() {
    report::equal("24 entries", io_read(1) >> 16 & 0xff, 23);
    io_write(0, 0x0a00_0000);
    report::equal("its ID can be written", io_read(0), 0x0a00_0000);
    io_write(0, 0);
    let line = 0x0e;
    io_write(0x10 + 2 * line, !(REMOTE | 1 << 12));
    report::equal("an entry's bits", io_read(0x10 + 2 * line) & !(REMOTE | 1 << 12), 0x1_afff);
    route(line, LOW);
    drive(line, false);
    report::equal("an edge", brought(|| drive(line, true)), 1);
    report::equal("no edge, no interrupt", brought(|| drive(line, true)), 0);
    report::equal("nor when it falls", brought(|| drive(line, false)), 0);
    route(line, LOW | MASKED);
    report::equal("masked", brought(|| drive(line, true)), 0);
    drive(line, false);
    report::equal(
        "two edges while it waits are one",
        {
            drive_edges(line);
            brought(|| ())
        },
        1,
    );
    // Level: until the line falls.
    tables::handle(MIDDLE as usize, level_handler);
    route(line, MIDDLE | LEVEL);
    LOWER.store(1, Ordering::SeqCst);
    report::equal("a level", brought(|| drive(line, true)), 1);
    report::equal("had its remote IRR and TMR set", SEEN.load(Ordering::SeqCst), 3);
    report::equal("until EOI", io_read(0x10 + 2 * line) & REMOTE, 0);
    LOWER.store(3, Ordering::SeqCst);
    let before = count();
    drive(line, true);
    report::equal(
        "a level that stays comes again after EOI",
        {
            wait_for(before + 3);
            count() - before
        },
        3,
    );
    tables::handle(MIDDLE as usize, without_eoi);
    report::equal("without EOI it comes once", brought(|| drive(line, true)), 1);
    drive(line, false);
    drive(line, true);
    report::equal("remote IRR holds the next back", brought(|| ()), 0);
    apic::eoi();
    report::equal("until EOI, which sends it", brought(|| ()), 1);
    drive(line, false);
    apic::eoi();
    report::equal("and no more when the line is low", brought(|| ()), 0);
    tables::handle(MIDDLE as usize, on_interrupt);
    route(line, 1 << 11 | LOW);
    io_write(0x11 + 2 * line, 1 << 24);
    report::equal(
        "a logical destination",
        brought(|| {
            drive(line, false);
            drive(line, true)
        }),
        1,
    );
    drive(line, false);
    route(line, MASKED);
    tables::handle(vector::NMI as usize, on_nmi);
    NMIS.store(0, Ordering::SeqCst);
    route(line, 4 << 8);
    drive(line, true);
    report::equal("an NMI", NMIS.load(Ordering::SeqCst), 1);
    drive(line, false);
    route(line, MASKED);
    tables::unhandle(vector::NMI as usize);
}

fn drive_edges(line: u32) {
    route(line, LOW);
    drive(line, true);
    drive(line, false);
    drive(line, true);
    drive(line, false);
}

static LOWER: AtomicU32 = AtomicU32::new(0);
static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn level_handler(frame: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    let remote = io_read(0x10 + 2 * 0x0e) >> 14 & 1;
    SEEN.store(remote | bit_of(offset::TMR, frame[0] as u32) << 1, Ordering::SeqCst);
    if LOWER.fetch_sub(1, Ordering::SeqCst) == 1 {
        drive(0x0e, false);
    }
    apic::eoi();
}

/// The 8259s through LINT0, with the 8254 behind them.
pub fn external() {
    for (port, value) in
        [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x48), (0xa1, 2), (0xa1, 1)]
    {
        port::write8(port, value);
    }
    port::write8(0x21, 0xff);
    port::write8(0xa1, 0xff);
    report::equal("the mask is read back", port::read8(0x21), 0xff);
    tables::handle(0x40, pic_handler);
    write(offset::LVT_LINT0, 7 << 8);
    port::write8(0x21, 0xfe);
    port::write8(0x43, 0x34);
    port::write8(0x40, 0);
    port::write8(0x40, 0x10);
    let before = count();
    report::equal(
        "ExtINT brings the 8259's vector",
        (wait_for(before + 3), LAST.load(Ordering::SeqCst)),
        (true, 0x40),
    );
    write(offset::LVT_LINT0, 1 << 16 | 7 << 8);
    port::write8(0x20, 0x0a);
    let waits = smp::wait(20_000_000_000, || port::read8(0x20) & 1 == 1);
    report::equal("it is in the 8259's IRR", waits, true);
    report::equal("masked at LINT0, it does not come", brought(|| ()), 0);
    port::write8(0x21, 0xff);
    port::write8(0x43, 0x30);
    port::write8(0x40, 1);
    port::write8(0x40, 0);
    tables::unhandle(0x40);
}

extern "C" fn pic_handler(frame: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    LAST.store(frame[0] as u32, Ordering::SeqCst);
    port::write8(0x20, 0x20);
}
