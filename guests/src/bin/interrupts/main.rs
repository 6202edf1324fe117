//! Interrupts: shadows, the local APIC's registers, priorities and timer, x2APIC mode, NMI, the I/O APIC and the 8259s.
//!
//! SDM vol. 3, *Advanced Programmable Interrupt Controller (APIC)*; 82093AA and 8259A datasheets.
#![no_std]
#![no_main]

mod controllers;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guests::apic::{offset, read, write};
use guests::cpu::{flag, halt, take_interrupts, vector};
use guests::long::reg::{AX, DI};
use guests::long::{State, fault};
use guests::tables::Frame;
use guests::{apic, code, cpu, report, smp, tables};

guests::guest!(main);

const APIC_BASE: u32 = 0x1b;
const DEADLINE: u32 = 0x6e0;
/// Vectors of three classes.
const LOW: u32 = 0x45;
const MIDDLE: u32 = 0x65;
const HIGH: u32 = 0x85;
const SELF: u32 = 1 << 18;

fn main() {
    apic::enable();
    for number in [LOW, MIDDLE, HIGH] {
        tables::handle(number as usize, on_interrupt);
    }
    registers();
    self_interrupts();
    shadows();
    priorities();
    task_priority();
    errors();
    non_maskable();
    timer();
    deadline();
    controllers::io_apic();
    controllers::external();
    software_disable();
    x2apic();
}

static COUNT: AtomicU32 = AtomicU32::new(0);
static LAST: AtomicU32 = AtomicU32::new(0);
static RIP: AtomicU64 = AtomicU64::new(0);
static IN_SERVICE: AtomicU32 = AtomicU32::new(0);
static X2: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_interrupt(frame: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    LAST.store(frame[0] as u32, Ordering::SeqCst);
    RIP.store(frame[2], Ordering::SeqCst);
    if X2.load(Ordering::SeqCst) != 0 {
        unsafe { cpu::write_msr(0x80b, 0) };
        return;
    }
    IN_SERVICE.store(bit_of(offset::ISR, frame[0] as u32), Ordering::SeqCst);
    apic::eoi();
}

extern "C" fn without_eoi(frame: &mut Frame) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    LAST.store(frame[0] as u32, Ordering::SeqCst);
}

/// A vector's bit in ISR, TMR or IRR.
fn bit_of(register: u32, number: u32) -> u32 {
    read(register + (number >> 5) * 0x10) >> (number & 31) & 1
}

fn count() -> u32 {
    COUNT.load(Ordering::SeqCst)
}

/// How many interrupts `work` and a short while after it bring.
fn brought(work: impl FnOnce()) -> u32 {
    let before = count();
    work();
    take_interrupts();
    count() - before
}

fn registers() {
    let version = read(offset::VERSION);
    report::holds("the version is an integrated APIC's", (0x10..0x20).contains(&(version & 0xff)), version);
    report::holds(
        "with 6 or 7 entries of its vector table",
        [5, 6].contains(&(version >> 16 & 0xff)),
        version,
    );
    report::equal("ID is 0 on the first processor", apic::id(), cpu::cpuid(1, 0)[1] >> 24);
    for (name, register, value, kept) in [
        ("TPR", offset::TPR, 0xffff_ff5a, 0x5a),
        ("LDR", offset::LDR, 0xabff_ffff, 0xab00_0000),
        ("DFR", offset::DFR, 0x0000_0000, 0x0fff_ffff),
        ("LVT timer", offset::LVT_TIMER, 0x0001_00e1, 0x0001_00e1),
        ("LVT LINT0", offset::LVT_LINT0, 0x0001_a7e2, 0x0001_a7e2),
        ("LVT error", offset::LVT_ERROR, 0x0001_07e3, 0x0001_00e3),
        ("timer's divisor", offset::TIMER_DIVIDE, 0xffff_ffff, 0xb),
        ("ICR's upper half", offset::ICR_HIGH, 0x1200_0000, 0x1200_0000),
    ] {
        write(register, value);
        report::equal(format_args!("{name} keeps its bits"), read(register), kept);
        write(
            register,
            if register == offset::DFR {
                u32::MAX
            } else if register == offset::TPR {
                0
            } else {
                1 << 16
            },
        );
    }
    write(offset::LDR, 1 << 24);
    apic::enable();
    let id = read(offset::ID);
    write(offset::VERSION, 0);
    report::equal("the version is read-only", read(offset::VERSION), version);
    report::equal("so is the ID of the rest", read(offset::ID), id);
}

fn self_interrupts() {
    report::equal(
        "a self-IPI",
        (brought(|| apic::send(0, SELF | LOW)), LAST.load(Ordering::SeqCst)),
        (1, LOW),
    );
    report::equal("is in service in its handler", IN_SERVICE.load(Ordering::SeqCst), 1);
    report::equal("and not after it", bit_of(offset::ISR, LOW), 0);
    apic::send(0, SELF | MIDDLE);
    report::equal(
        "it waits in IRR while IF is clear",
        (bit_of(offset::IRR, MIDDLE), bit_of(offset::TMR, MIDDLE)),
        (1, 0),
    );
    report::equal("sent twice, it comes once", brought(|| apic::send(0, SELF | MIDDLE)), 1);
    report::equal("to the physical ID", brought(|| apic::send(apic::id(), LOW)), 1);
    report::equal("to everybody", brought(|| apic::send(0, 2 << 18 | LOW)), 1);
    report::equal("to another ID", brought(|| apic::send(0x33, LOW)), 0);
    write(offset::LDR, 0x4 << 24);
    write(offset::DFR, u32::MAX);
    let logical = 1 << 11 | LOW;
    report::equal("to a flat logical ID", brought(|| apic::send(0x6, logical)), 1);
    report::equal("to another flat logical ID", brought(|| apic::send(0xb, logical)), 0);
    write(offset::DFR, 0x0fff_ffff);
    write(offset::LDR, 0x32 << 24);
    report::equal("to a cluster", brought(|| apic::send(0x33, logical)), 1);
    report::equal("to another of the cluster", brought(|| apic::send(0x31, logical)), 0);
    report::equal("to another cluster", brought(|| apic::send(0x22, logical)), 0);
    report::equal("to all clusters", brought(|| apic::send(0xff, logical)), 1);
    write(offset::DFR, u32::MAX);
    write(offset::LDR, 1 << 24);
    report::equal("of lowest priority", brought(|| apic::send(1, 1 << 8 | logical)), 1);
    report::equal(
        "halting waits for it",
        {
            let before = count();
            apic::send(0, SELF | LOW);
            halt();
            count() - before
        },
        1,
    );
}

fn shadows() {
    let run = |code: &[u8], name: &str, expected: u64| {
        apic::send(0, SELF | LOW);
        let out = State::kernel(code).with(AX, 0x10).run();
        report::equal(
            name,
            (out.vector, RIP.load(Ordering::SeqCst).wrapping_sub(out.start)),
            (vector::END, expected),
        );
    };
    run(code!(64; "sti", "nop", "nop", "cli"), "STI holds interrupts off for one instruction", 2);
    run(code!(64; "sti", "hlt", "cli"), "STI, HLT wakes behind HLT", 2);
    run(code!(64; "pushfq", "or dword ptr [rsp], 0x200", "popfq", "nop", "cli"), "POPF has no shadow", 9);
    let waits = code!(64; "sti", "cli", "nop");
    RIP.store(0, Ordering::SeqCst);
    apic::send(0, SELF | LOW);
    State::kernel(waits).run();
    report::equal("STI, CLI lets nothing in", (RIP.load(Ordering::SeqCst), brought(|| ())), (0, 1));
    apic::send(0, SELF | LOW);
    let out = State::user(code!(64; "nop", "nop")).flags(flag::IF).run();
    report::equal("IRET lets it in at once", RIP.load(Ordering::SeqCst), out.start);
    apic::send(0, SELF | LOW);
    let out =
        State::kernel(code!(64; "mov cr8, rax", "sti", "nop", "nop", "cli", "xor eax, eax", "mov cr8, rax"))
            .with(AX, 4)
            .run();
    report::equal("CR8 of its class holds it off", (out.vector, bit_of(offset::IRR, LOW)), (vector::END, 1));
    take_interrupts();
}

static ORDER: [AtomicU32; 4] = [const { AtomicU32::new(0) }; 4];

extern "C" fn nested(frame: &mut Frame) {
    let at = COUNT.fetch_add(1, Ordering::SeqCst) as usize;
    ORDER[at.min(3)].store(frame[0] as u32, Ordering::SeqCst);
    if frame[0] as u32 == MIDDLE {
        apic::send(0, SELF | LOW);
        apic::send(0, SELF | HIGH);
        PRIORITY.store(read(offset::PPR), Ordering::SeqCst);
        take_interrupts();
    }
    apic::eoi();
}

static PRIORITY: AtomicU32 = AtomicU32::new(0);

fn priorities() {
    let numbers = [LOW, MIDDLE, HIGH];
    for number in numbers {
        tables::handle(number as usize, nested);
    }
    COUNT.store(0, Ordering::SeqCst);
    apic::send(0, SELF | MIDDLE);
    take_interrupts();
    take_interrupts();
    let order = [0, 1, 2].map(|index| ORDER[index as usize].load(Ordering::SeqCst));
    report::equal("a higher class interrupts, a lower one waits for EOI", order, [MIDDLE, HIGH, LOW]);
    report::equal("PPR is the class in service", PRIORITY.load(Ordering::SeqCst), MIDDLE & 0xf0);
    report::equal("PPR is 0 after it", read(offset::PPR), 0);
    COUNT.store(0, Ordering::SeqCst);
    apic::send(0, SELF | LOW);
    apic::send(0, SELF | HIGH);
    take_interrupts();
    take_interrupts();
    let order = [0, 1].map(|index| ORDER[index as usize].load(Ordering::SeqCst));
    report::equal("of two that wait the higher comes first", order, [HIGH, LOW]);
    for number in numbers {
        tables::handle(number as usize, without_eoi);
    }
    COUNT.store(0, Ordering::SeqCst);
    apic::send(0, SELF | HIGH);
    take_interrupts();
    apic::send(0, SELF | MIDDLE);
    take_interrupts();
    report::equal("one in service holds lower ones off", count(), 1);
    report::equal("one of its own class too", brought(|| apic::send(0, SELF | (HIGH + 1))), 0);
    apic::eoi();
    tables::handle(HIGH as usize + 1, without_eoi);
    report::equal("EOI lets the next in", brought(|| ()), 1);
    apic::eoi();
    report::equal("and the next", brought(|| ()), 1);
    apic::eoi();
    apic::eoi();
    report::equal("EOI with none in service is nothing", (read(offset::PPR), brought(|| ())), (0, 0));
    for number in numbers {
        tables::handle(number as usize, on_interrupt);
    }
}

fn task_priority() {
    for (name, priority, expected) in [("below", 0x3f, 1), ("of its class", 0x40, 0), ("above", 0x50, 0)] {
        write(offset::TPR, priority);
        report::equal(format_args!("TPR {name}"), brought(|| apic::send(0, SELF | LOW)), expected);
        report::equal(format_args!("TPR {name} is in CR8"), cpu::cr8(), u64::from(priority >> 4));
        report::equal(format_args!("TPR {name} is in PPR"), read(offset::PPR), priority);
        write(offset::TPR, 0);
        report::equal(format_args!("TPR {name} that goes"), brought(|| ()), 1 - expected);
    }
    unsafe { cpu::set_cr8(9) };
    report::equal("CR8 is TPR's upper half", read(offset::TPR), 0x90);
    unsafe { cpu::set_cr8(0) };
}

fn errors() {
    if report::ends_tcg("illegal vectors", "TCG delivers them, as if they were exceptions") {
        return;
    }
    write(offset::LVT_ERROR, MIDDLE);
    write(offset::ESR, 0);
    report::equal("an illegal vector that is sent is an error", brought(|| apic::send(0, SELF | 3)), 1);
    write(offset::ESR, 0);
    let status = read(offset::ESR);
    report::holds("ESR says sent, or received", status & 0x60 != 0, status);
    write(offset::ESR, 0);
    report::equal("ESR is cleared by the next write", read(offset::ESR), 0);
    write(offset::LVT_ERROR, 1 << 16 | MIDDLE);
    report::equal("masked, it does not interrupt", brought(|| apic::send(0, SELF | 3)), 0);
    write(offset::ESR, 0);
    write(offset::ESR, 0);
}

static NMIS: AtomicU32 = AtomicU32::new(0);
static WITHIN: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_nmi(_: &mut Frame) {
    if NMIS.fetch_add(1, Ordering::SeqCst) == 0 && WITHIN.load(Ordering::SeqCst) == 1 {
        // Another waits for the IRET, and is one, however often it is sent.
        apic::send(apic::id(), NMI);
        apic::send(apic::id(), NMI);
        WITHIN.store(NMIS.load(Ordering::SeqCst) + 0x10, Ordering::SeqCst);
    }
}

const NMI: u32 = 4 << 8;

fn non_maskable() {
    tables::handle(vector::NMI as usize, on_nmi);
    let nmi = || apic::send(apic::id(), NMI);
    nmi();
    report::equal("an NMI comes while IF is clear", NMIS.load(Ordering::SeqCst), 1);
    NMIS.store(0, Ordering::SeqCst);
    WITHIN.store(1, Ordering::SeqCst);
    nmi();
    report::equal("in its handler no other comes", WITHIN.load(Ordering::SeqCst), 0x11);
    report::equal("after its IRET one does", NMIS.load(Ordering::SeqCst), 2);
    // A fault in the handler, whose IRET unblocks.
    WITHIN.store(0, Ordering::SeqCst);
    NMIS.store(0, Ordering::SeqCst);
    tables::handle(vector::NMI as usize, nmi_with_iret);
    // The inner one must not take the outer one's stack.
    tables::set_gate(vector::NMI as usize, 0x8e, 0);
    nmi();
    tables::reset_idt();
    report::equal("any IRET unblocks NMIs", NMIS.load(Ordering::SeqCst), 0x12);
    tables::unhandle(vector::NMI as usize);
    let out = State::kernel(code!(64; "mov dword ptr [rdi], 0x400", "nop", "nop"))
        .with(DI, u64::from(apic::BASE + offset::ICR_LOW))
        .run();
    report::equal("an NMI's frame", (out.vector, out.error), (vector::NMI, 0));
    // The snippet's handler does not IRET by itself.
    State::kernel(code!(64; "nop")).run();
    unblock();
    let out = State::kernel(code!(64; "mov dword ptr [rdi], 0x400", "hlt"))
        .with(DI, u64::from(apic::BASE + offset::ICR_LOW))
        .run();
    report::equal("an NMI ends HLT", out.vector, vector::NMI);
    unblock();
}

extern "C" fn nmi_with_iret(_: &mut Frame) {
    if NMIS.fetch_add(1, Ordering::SeqCst) == 0 {
        tables::handle(vector::NMI as usize, inner_nmi);
        apic::send(apic::id(), NMI);
        unblock();
    }
}

extern "C" fn inner_nmi(_: &mut Frame) {
    NMIS.fetch_add(0x11, Ordering::SeqCst);
}

/// An IRET to the next instruction.
fn unblock() {
    unsafe {
        core::arch::asm!(
            "mov {sp}, rsp", "push 0x10", "push {sp}", "pushfq", "push 8", "lea {ip}, [rip + 50f]", "push {ip}",
            "iretq", "50:", sp = out(reg) _, ip = out(reg) _,
        );
    }
}

fn timer() {
    write(offset::TIMER_DIVIDE, 0xb);
    write(offset::LVT_TIMER, LOW);
    let before = count();
    write(offset::TIMER_INITIAL, 100_000);
    report::holds("the count runs", read(offset::TIMER_CURRENT) <= 100_000, read(offset::TIMER_CURRENT));
    let came = wait_for(before + 1);
    report::equal("one-shot", (came, read(offset::TIMER_CURRENT)), (true, 0));
    smp::pause(2_000_000);
    report::equal("comes once", brought(|| ()), 0);
    write(offset::LVT_TIMER, LOW | 1 << 17);
    let before = count();
    write(offset::TIMER_INITIAL, 100_000);
    report::equal("periodic", wait_for(before + 5), true);
    write(offset::TIMER_INITIAL, 0);
    take_interrupts();
    smp::pause(2_000_000);
    report::equal("an initial count of 0 stops it", (brought(|| ()), read(offset::TIMER_CURRENT)), (0, 0));
    write(offset::LVT_TIMER, LOW | 1 << 16);
    write(offset::TIMER_INITIAL, 1_000);
    smp::pause(2_000_000);
    report::equal(
        "masked, it counts and does not interrupt",
        (brought(|| ()), read(offset::TIMER_CURRENT)),
        (0, 0),
    );
    // The divisor: cycles for each count, in thousandths, over a while that a busy host may stretch.
    let cycles = |divisor: u32| {
        write(offset::TIMER_DIVIDE, divisor);
        write(offset::LVT_TIMER, LOW | 1 << 16);
        write(offset::TIMER_INITIAL, u32::MAX);
        let (start, first) = (cpu::tsc(), read(offset::TIMER_CURRENT));
        smp::pause(20_000_000);
        let (end, last) = (cpu::tsc(), read(offset::TIMER_CURRENT));
        (end - start) * 1_000 / u64::from(first - last).max(1)
    };
    let (one, four) = (cycles(0xb), cycles(0x1));
    report::holds(
        "a divisor of 4 makes it four times as slow",
        (one * 3..one * 5).contains(&four),
        (one, four),
    );
    write(offset::TIMER_INITIAL, 0);
    write(offset::LVT_TIMER, 1 << 16);
}

/// Waits with interrupts on for a count.
fn wait_for(expected: u32) -> bool {
    smp::wait(20_000_000_000, || {
        take_interrupts();
        count() >= expected
    })
}

fn deadline() {
    if cpu::cpuid(1, 0)[2] & 1 << 24 == 0 {
        report::skip("TSC deadline", "the processor does not have it");
        return;
    }
    write(offset::LVT_TIMER, LOW | 2 << 17);
    let before = count();
    unsafe { cpu::write_msr(DEADLINE, cpu::tsc() + 1_000_000) };
    report::holds("a deadline is kept", cpu::read_msr(DEADLINE) != 0, 0);
    report::equal("a deadline interrupts", wait_for(before + 1), true);
    report::equal("and is 0 then", cpu::read_msr(DEADLINE), 0);
    report::equal(
        "one that has passed interrupts at once",
        brought(|| unsafe { cpu::write_msr(DEADLINE, 1) }),
        1,
    );
    unsafe {
        cpu::write_msr(DEADLINE, cpu::tsc() + 3_000_000);
        cpu::write_msr(DEADLINE, 0);
    }
    smp::pause(6_000_000);
    report::equal("0 takes it back", brought(|| ()), 0);
    write(offset::LVT_TIMER, LOW);
    unsafe { cpu::write_msr(DEADLINE, cpu::tsc() + 1_000) };
    report::equal("in another mode it stays 0", cpu::read_msr(DEADLINE), 0);
    write(offset::LVT_TIMER, LOW | 2 << 17);
    write(offset::TIMER_INITIAL, 1_000);
    report::equal("and the initial count does nothing", read(offset::TIMER_CURRENT), 0);
    write(offset::LVT_TIMER, 1 << 16);
}

fn software_disable() {
    write(offset::LVT_TIMER, LOW);
    write(offset::SVR, 0xff);
    report::equal("disabling masks the vector table", read(offset::LVT_TIMER) & 1 << 16, 1 << 16);
    write(offset::LVT_TIMER, LOW);
    report::equal("and keeps it masked", read(offset::LVT_TIMER) & 1 << 16, 1 << 16);
    report::equal("self-IPIs are not accepted", brought(|| apic::send(0, SELF | LOW)), 0);
    write(offset::SVR, 0x1ff);
    report::equal("nor kept", brought(|| ()), 0);
    // Globally.
    let base = cpu::read_msr(APIC_BASE);
    report::equal("the base, enabled, of the boot processor", base & 0xffff_f900, 0xfee0_0900);
    unsafe { cpu::write_msr(APIC_BASE, base & !0x800) };
    report::equal("CPUID has no APIC then", cpu::cpuid(1, 0)[3] >> 9 & 1, 0);
    unsafe { cpu::write_msr(APIC_BASE, base) };
    report::equal("and has it again", cpu::cpuid(1, 0)[3] >> 9 & 1, 1);
    report::equal("software-disabled", read(offset::SVR), 0xff);
    apic::enable();
    report::equal("and works", brought(|| apic::send(0, SELF | LOW)), 1);
    let write_base = State::kernel(code!(64; "wrmsr")).with(guests::long::reg::CX, APIC_BASE.into());
    let value =
        |value: u64| write_base.with(AX, value & 0xffff_ffff).with(guests::long::reg::DX, value >> 32);
    value(base | 1).run().check("its reserved bits", fault(vector::GP, 0));
    value(base & !0x800 | 0x400).run().check("x2APIC mode without the enable bit", fault(vector::GP, 0));
}

fn x2apic() {
    if cpu::cpuid(1, 0)[2] & 1 << 21 == 0 {
        report::skip("x2APIC", "the processor does not have it");
        return;
    }
    let base = cpu::read_msr(APIC_BASE);
    let read_msr = |msr: u64| State::kernel(code!(64; "rdmsr")).with(guests::long::reg::CX, msr).run();
    let write_msr = |msr: u64, low: u64, high: u64| {
        State::kernel(code!(64; "wrmsr"))
            .with(guests::long::reg::CX, msr)
            .with(AX, low)
            .with(guests::long::reg::DX, high)
            .run()
    };
    read_msr(0x802).check("its registers are not there in xAPIC mode", fault(vector::GP, 0));
    unsafe { cpu::write_msr(APIC_BASE, base | 0x400) };
    X2.store(1, Ordering::SeqCst);
    report::equal("x2APIC mode", cpu::read_msr(APIC_BASE), base | 0x400);
    report::equal("the ID has 32 bits", cpu::read_msr(0x802), u64::from(cpu::cpuid(1, 0)[1] >> 24));
    let logical = cpu::read_msr(0x80d);
    report::equal(
        "the logical ID comes from it",
        logical,
        1 << (cpu::read_msr(0x802) & 15) | (cpu::read_msr(0x802) >> 4) << 16,
    );
    let send = |value: u64| unsafe { cpu::write_msr(0x830, value) };
    report::equal("ICR of 64 bits", brought(|| send(u64::from(SELF | LOW))), 1);
    report::equal("to the ID", brought(|| send(cpu::read_msr(0x802) << 32 | u64::from(LOW))), 1);
    report::equal("to the logical ID", brought(|| send(logical << 32 | 1 << 11 | u64::from(LOW))), 1);
    report::equal("to everybody", brought(|| send(0xffff_ffff << 32 | u64::from(LOW))), 1);
    report::equal("the self-IPI register", brought(|| unsafe { cpu::write_msr(0x83f, MIDDLE.into()) }), 1);
    for (name, msr, low, high, fine) in [
        ("EOI of 0", 0x80b, 0, 0, true),
        ("EOI of another value", 0x80b, 1, 0, false),
        ("the ID", 0x802, 0, 0, false),
        ("the version", 0x803, 0, 0, false),
        ("the logical ID", 0x80d, 0, 0, false),
        ("DFR, which is not there", 0x80e, 0, 0, false),
        ("ICR's upper half, which is not there", 0x831, 0, 0, false),
        ("TPR of 8 bits", 0x808, 0x0f, 0, true),
        ("TPR of 9 bits", 0x808, 0x100, 0, false),
        ("TPR above 32 bits", 0x808, 0, 1, false),
        ("SVR's reserved bits", 0x80f, 0x1_01ff, 0, false),
        ("ESR of 0", 0x828, 0, 0, true),
        ("ESR of another value", 0x828, 1, 0, false),
        ("the self-IPI register's reserved bits", 0x83f, 0x100, 0, false),
        ("ISR", 0x810, 0, 0, false),
    ] {
        let out = write_msr(msr, low, high);
        let expected = if fine { guests::long::END } else { fault(vector::GP, 0) };
        out.check(format_args!("a write of {name}"), expected);
    }
    unsafe { cpu::write_msr(0x808, 0) };
    for (name, msr) in [
        ("EOI", 0x80b),
        ("the self-IPI register", 0x83f),
        ("DFR", 0x80e),
        ("register 0x840", 0x840),
        ("register 0x8ff", 0x8ff),
    ] {
        read_msr(msr).check(format_args!("a read of {name}"), fault(vector::GP, 0));
    }
    write_msr(APIC_BASE.into(), base & 0xffff_ffff, base >> 32)
        .check("back to xAPIC mode at once", fault(vector::GP, 0));
    unsafe {
        cpu::write_msr(APIC_BASE, base & !0xc00);
    }
    write_msr(APIC_BASE.into(), base & 0xffff_ffff | 0x400, base >> 32)
        .check("from off to x2APIC mode at once", fault(vector::GP, 0));
    unsafe { cpu::write_msr(APIC_BASE, base) };
    X2.store(0, Ordering::SeqCst);
    apic::enable();
    report::equal("xAPIC mode through off", brought(|| apic::send(0, SELF | LOW)), 1);
}
