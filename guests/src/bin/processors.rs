//! Several processors: their start-up, interprocessor interrupts of every kind, locked instructions, and shutdown of
//! what others cache.
//!
//! SDM vol. 3, *Multiple-Processor Management*; *Advanced Programmable Interrupt Controller (APIC)*.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guests::apic::{self, offset};
use guests::cpu::{self, vector};
use guests::paging::{self, address, bit};
use guests::report;
use guests::smp;
use guests::tables::{self, Frame, MAX_CPUS};

guests::guest!(main);

const VECTOR: u32 = 0x61;
const ALL: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

static IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(u32::MAX) }; MAX_CPUS];
static TAKEN: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
static STOP: AtomicU32 = AtomicU32::new(0);
static COUNTER: AtomicU64 = AtomicU64::new(0);
static PLAIN: AtomicU64 = AtomicU64::new(0);

fn main() {
    let expected = smp::count();
    let count = smp::start();
    report::equal("all processors start", count, expected);
    if count < 2 {
        report::skip("the rest", "there is one processor");
        return;
    }
    paging::open();
    on_all(count, |index| IDS[index].store(apic::id(), Ordering::SeqCst));
    identities(count);
    start_state(count);
    interrupts(count);
    non_maskable(count);
    locked(count);
    shoot_down();
    started_again(count);
}

/// Has all other processors do something, and waits for them.
fn on_all(count: usize, work: fn(usize)) -> bool {
    (1..count).for_each(|index| smp::run_on(index, work));
    (1..count).all(smp::finished)
}

fn identities(count: usize) {
    IDS[0].store(apic::id(), Ordering::SeqCst);
    let ids = || IDS[..count].iter().map(|id| id.load(Ordering::SeqCst));
    let distinct = ids().enumerate().all(|(index, id)| ids().skip(index + 1).all(|other| other != id));
    report::holds("each has an ID of its own", distinct && ids().all(|id| id != u32::MAX), ids().last());
    let boot = cpu::read_msr(0x1b) >> 8 & 1;
    static BOOT: AtomicU32 = AtomicU32::new(0);
    on_all(count, |_| {
        BOOT.fetch_add((cpu::read_msr(0x1b) >> 8 & 1) as u32, Ordering::SeqCst);
    });
    report::equal("one is the boot processor", (boot, BOOT.load(Ordering::SeqCst)), (1, 0));
}

/// What is a processor's own.
fn start_state(count: usize) {
    static SAME: AtomicU32 = AtomicU32::new(0);
    unsafe {
        cpu::set_dr0(0x1234);
        cpu::write_msr(0xc000_0102, 0x5678);
    }
    on_all(count, |_| {
        if cpu::dr0() == 0x1234 || cpu::read_msr(0xc000_0102) == 0x5678 {
            SAME.fetch_add(1, Ordering::SeqCst);
        }
    });
    report::equal("debug registers and MSRs are each one's own", SAME.load(Ordering::SeqCst), 0);
    unsafe { cpu::set_dr0(0) };
}

extern "C" fn on_interrupt(_: &mut Frame) {
    TAKEN[apic::id() as usize].fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

extern "C" fn on_nmi(_: &mut Frame) {
    TAKEN[apic::id() as usize].fetch_add(1, Ordering::SeqCst);
}

fn serve(_: usize) {
    while STOP.load(Ordering::SeqCst) == 0 {
        cpu::take_interrupts();
    }
}

fn halt_and_serve(_: usize) {
    while STOP.load(Ordering::SeqCst) == 0 {
        cpu::halt();
    }
}

/// What each processor took since the last time, the first of them first; 0 in the rest.
fn taken(count: usize) -> [u32; 4] {
    let mut all = [0; 4];
    for (index, taken) in all.iter_mut().enumerate().take(count) {
        *taken = TAKEN[IDS[index].load(Ordering::SeqCst) as usize].swap(0, Ordering::SeqCst);
    }
    all
}

/// Waits until so many were taken by all, and a while for more.
fn settle(expected: u32) {
    let sum = || TAKEN.iter().map(|taken| taken.load(Ordering::SeqCst)).sum::<u32>();
    smp::wait(20_000_000_000, || {
        cpu::take_interrupts();
        sum() >= expected
    });
    smp::wait(2_000_000, || {
        cpu::take_interrupts();
        false
    });
}

fn interrupts(count: usize) {
    tables::handle(VECTOR as usize, on_interrupt);
    for (name, work) in [("that run", serve as fn(usize)), ("that halt", halt_and_serve)] {
        STOP.store(0, Ordering::SeqCst);
        (1..count).for_each(|index| smp::run_on(index, work));
        let mut expected = [0; 4];
        apic::send(0, OTHERS | VECTOR);
        settle(count as u32 - 1);
        expected[1..count.min(4)].fill(1);
        report::equal(format_args!("to all others {name}"), taken(count), expected);
        apic::send(0, ALL | VECTOR);
        settle(count as u32);
        expected[0] = 1;
        report::equal(format_args!("to all {name}"), taken(count), expected);
        apic::send(IDS[count - 1].load(Ordering::SeqCst), VECTOR);
        settle(1);
        let mut expected = [0; 4];
        expected[(count - 1).min(3)] = 1;
        report::equal(format_args!("to the last one's ID {name}"), taken(count), expected);
        for round in 0..200 {
            apic::send(IDS[1 + round % (count - 1)].load(Ordering::SeqCst), VECTOR);
            settle(round as u32 + 1);
        }
        let sum: u32 = taken(count).iter().sum();
        report::equal(format_args!("200 one after another {name}"), sum, 200);
        STOP.store(1, Ordering::SeqCst);
        apic::send(0, OTHERS | VECTOR);
        report::equal(format_args!("those {name} stop"), (1..count).all(smp::finished), true);
        // One that saw it before the interrupt came has not taken that.
        on_all(count, |_| (0..100).for_each(|_| cpu::take_interrupts()));
        settle(0);
        taken(count);
    }
    logical(count);
}

fn logical(count: usize) {
    on_all(count, |index| {
        apic::write(offset::DFR, u32::MAX);
        apic::write(offset::LDR, 1 << (24 + index % 8));
    });
    apic::write(offset::DFR, u32::MAX);
    apic::write(offset::LDR, 1 << 24);
    STOP.store(0, Ordering::SeqCst);
    (1..count).for_each(|index| smp::run_on(index, serve));
    apic::send(0b11, 1 << 11 | VECTOR);
    settle(2);
    report::equal("to two flat logical IDs", taken(count), [1, 1, 0, 0]);
    apic::send(0b10, 1 << 11 | VECTOR);
    settle(1);
    report::equal("to one", taken(count), [0, 1, 0, 0]);
    apic::send(0b11, 1 << 11 | 1 << 8 | VECTOR);
    settle(1);
    report::equal("of lowest priority, to one of two", taken(count).iter().sum::<u32>(), 1);
    STOP.store(1, Ordering::SeqCst);
    (1..count).for_each(|index| {
        smp::finished(index);
    });
}

fn non_maskable(count: usize) {
    tables::handle(vector::NMI as usize, on_nmi);
    taken(count);
    apic::send(0, OTHERS | 4 << 8);
    settle(count as u32 - 1);
    let mut expected = [0; 4];
    expected[1..count.min(4)].fill(1);
    report::equal("an NMI to all others, with interrupts off", taken(count), expected);
}

const ROUNDS: u64 = 20_000;

fn count_up() {
    for _ in 0..ROUNDS {
        COUNTER.fetch_add(1, Ordering::SeqCst);
        // A compare-exchange loop, and a bit that is taken and given.
        let mut now = PLAIN.load(Ordering::SeqCst);
        while let Err(other) = PLAIN.compare_exchange(now, now + 3, Ordering::SeqCst, Ordering::SeqCst) {
            now = other;
        }
    }
}

fn locked(count: usize) {
    (1..count).for_each(|index| smp::run_on(index, |_| count_up()));
    count_up();
    report::equal("all finish", (1..count).all(smp::finished), true);
    let all = ROUNDS * count as u64;
    report::equal(
        "LOCK XADD and CMPXCHG lose nothing",
        (COUNTER.load(Ordering::SeqCst), PLAIN.load(Ordering::SeqCst)),
        (all, 3 * all),
    );
    // Over two cache lines, and over two pages.
    for offset in [62u64, paging::PAGE - 4] {
        paging::write(offset, 0u64);
        static AT: AtomicU64 = AtomicU64::new(0);
        AT.store(address(0) + offset, Ordering::SeqCst);
        fn split() {
            for _ in 0..2_000 {
                unsafe { core::arch::asm!("lock inc qword ptr [{}]", in(reg) AT.load(Ordering::SeqCst)) };
            }
        }
        (1..count).for_each(|index| smp::run_on(index, |_| split()));
        split();
        (1..count).for_each(|index| {
            smp::finished(index);
        });
        report::equal(
            format_args!("LOCK INC at {offset:#x} of a page"),
            paging::read::<u64>(offset),
            2_000 * count as u64,
        );
    }
}

extern "C" fn on_flush(_: &mut Frame) {
    paging::flush(address(9));
    TAKEN[apic::id() as usize].fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

static OLD: AtomicU32 = AtomicU32::new(0);
static FLUSHED: AtomicU32 = AtomicU32::new(0);

/// A page is remapped; after the other processor's INVLPG it sees the new one alone.
fn shoot_down() {
    paging::write(9 * paging::PAGE, 0x11u32);
    paging::write(10 * paging::PAGE, 0x22u32);
    paging::set(9, bit::ALL);
    tables::handle(0x62, on_flush);
    STOP.store(0, Ordering::SeqCst);
    smp::run_on(1, |_| {
        while STOP.load(Ordering::SeqCst) == 0 {
            let flushed = FLUSHED.load(Ordering::SeqCst);
            // SAFETY: the window is mapped.
            let value = unsafe { (address(9) as *const u32).read_volatile() };
            if flushed == 1 && value != 0x22 {
                OLD.fetch_add(1, Ordering::SeqCst);
            }
            cpu::take_interrupts();
        }
    });
    smp::pause(2_000_000);
    let id = IDS[1].load(Ordering::SeqCst);
    TAKEN[id as usize].store(0, Ordering::SeqCst);
    // SAFETY: the window's table.
    unsafe {
        (paging::entry_address(9) as *mut u64).write_volatile(paging::FRAMES + 10 * paging::PAGE | bit::ALL);
    }
    apic::send(id, 0x62);
    let flushed = smp::wait(20_000_000_000, || TAKEN[id as usize].load(Ordering::SeqCst) == 1);
    FLUSHED.store(1, Ordering::SeqCst);
    smp::pause(2_000_000);
    STOP.store(1, Ordering::SeqCst);
    report::equal("the other one flushes its translation", (flushed, smp::finished(1)), (true, true));
    report::equal("and sees the new page alone", OLD.load(Ordering::SeqCst), 0);
}

/// INIT and SIPI again, through a page of real-mode code.
fn started_again(count: usize) {
    // xor ax, ax; mov ds, ax; inc byte [0x7f00]; cli; hlt
    let code = [0x31u8, 0xc0, 0x8e, 0xd8, 0xfe, 0x06, 0x00, 0x7f, 0xfa, 0xf4];
    let page = 0x9000u64;
    for (index, byte) in code.iter().enumerate() {
        // SAFETY: conventional memory, which nothing else uses.
        unsafe { ((page + index as u64) as *mut u8).write_volatile(*byte) };
    }
    let told = 0x7f00 as *mut u8;
    // SAFETY: as above.
    unsafe { told.write_volatile(0) };
    let id = IDS[count - 1].load(Ordering::SeqCst);
    let told = || unsafe { (0x7f00 as *const u8).read_volatile() };
    apic::send(id, 6 << 8 | 1 << 14 | 9);
    smp::pause(5_000_000);
    report::equal("a SIPI without INIT is ignored", told(), 0);
    apic::send(id, 5 << 8 | 1 << 14 | 1 << 15);
    apic::send(id, 5 << 8 | 1 << 15);
    smp::pause(20_000_000);
    apic::send(id, 6 << 8 | 1 << 14 | 9);
    report::equal(
        "INIT and SIPI start it at the vector's page",
        smp::wait(20_000_000_000, || told() == 1),
        true,
    );
    apic::send(id, 6 << 8 | 1 << 14 | 9);
    smp::pause(5_000_000);
    report::equal("a second SIPI is ignored", told(), 1);
    apic::send(id, 5 << 8 | 1 << 14 | 1 << 15);
    smp::pause(20_000_000);
    apic::send(id, 6 << 8 | 1 << 14 | 9);
    report::equal("and again", smp::wait(20_000_000_000, || told() == 2), true);
}
