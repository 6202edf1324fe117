//! The local APIC's timer.

use engine::TimeSource;
use x86::msr::IA32_TSC_DEADLINE;

use super::*;

const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 1 << 18;
const MASKED: u32 = 1 << 16;
const BY_1: u32 = 0b1011;

fn machine(mode: u32) -> Machine {
    let machine = Machine::enabled(1);
    machine.cpus[0].write(offset::LVT_TIMER, mode | 0xee);
    machine.cpus[0].write(offset::TIMER_DIVIDE, BY_1);
    machine
}

fn count(cpu: &Cpu) -> u32 {
    cpu.read(offset::TIMER_CURRENT_COUNT)
}

#[test]
fn a_one_shot_counts_down_once() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    machine.run(400);
    assert_eq!(count(cpu), 600);
    assert!(!machine.attention(0));
    machine.run(599);
    assert_eq!((count(cpu), cpu.take()), (1, None));
    machine.run(1);
    assert!(machine.attention(0));
    assert_eq!((count(cpu), cpu.take()), (0, Some(0xee)));
    machine.run(5000);
    assert_eq!((count(cpu), cpu.take()), (0, None));
    assert_eq!(cpu.read(offset::TIMER_INITIAL_COUNT), 1000);
}

#[test]
fn a_periodic_timer_starts_over() {
    let machine = machine(PERIODIC);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 1_000_000);
    for _ in 0..5 {
        machine.run(999_999);
        assert_eq!(cpu.take(), None);
        machine.run(1);
        assert_eq!((count(cpu), cpu.take()), (1_000_000, Some(0xee)));
    }
    cpu.write(offset::TIMER_INITIAL_COUNT, 0);
    machine.run(5_000_000);
    assert_eq!((count(cpu), cpu.take()), (0, None));
}

#[test]
fn a_short_period_wakes_the_host_seldom_and_counts_exactly() {
    let machine = machine(PERIODIC);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 7);
    let mut wakes = 0;
    while let Some(deadline) = machine.timers.next_deadline().filter(|&deadline| deadline <= 1_000_000) {
        machine.time.advance(deadline - machine.time.now());
        machine.timers.run_due();
        wakes += 1;
    }
    assert!((45..=55).contains(&wakes), "{wakes} in a millisecond");
    machine.time.advance(1_000_000 - machine.time.now());
    assert_eq!(count(cpu), 7 - (1_000_000 % 7) as u32);
}

#[test]
fn a_guest_that_keeps_up_gets_each_short_periods_interrupt() {
    let machine = machine(PERIODIC);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    machine.run(1000);
    let mut interrupts = 0;
    while machine.time.now() < 1_000_000 {
        assert_eq!(cpu.apic.acknowledge(), Some(0xee));
        interrupts += 1;
        machine.time.advance(1000);
        cpu.eoi();
    }
    assert_eq!(interrupts, 999);
}

#[test]
fn a_masked_timer_does_not_wake_the_host() {
    let machine = machine(PERIODIC | MASKED);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    assert_eq!(machine.timers.next_deadline(), None);
    machine.time.advance(5_300);
    assert_eq!(count(cpu), 700);
    cpu.write(offset::LVT_TIMER, PERIODIC | 0xee);
    assert_eq!(cpu.take(), None, "what ended while it was masked is nothing");
    machine.run(700);
    assert_eq!(cpu.take(), Some(0xee));
}

#[test]
fn the_divide_configuration_slows_the_count_and_may_change_on_the_way() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        cpu.write(offset::TIMER_DIVIDE, code);
        cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
        machine.run(100 * divisor);
        assert_eq!(count(cpu), 900, "by {divisor}");
    }
    cpu.write(offset::TIMER_DIVIDE, 0);
    assert_eq!(count(cpu), 900);
    machine.run(1800);
    assert_eq!((count(cpu), cpu.take()), (0, Some(0xee)));
}

#[test]
fn a_masked_timer_counts_without_interrupts() {
    let machine = machine(MASKED);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 100);
    machine.run(50);
    assert_eq!(count(cpu), 50);
    machine.run(60);
    cpu.write(offset::LVT_TIMER, 0xee);
    assert_eq!((count(cpu), cpu.take()), (0, None));
}

#[test]
fn one_shot_and_periodic_change_into_each_other_on_the_way() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    machine.run(700);
    cpu.write(offset::LVT_TIMER, PERIODIC | 0xee);
    assert_eq!(count(cpu), 300);
    machine.run(400);
    assert_eq!((count(cpu), cpu.take()), (900, Some(0xee)));
    cpu.write(offset::LVT_TIMER, 0xee);
    assert_eq!(count(cpu), 900);
    machine.run(900);
    assert_eq!((count(cpu), cpu.take()), (0, Some(0xee)));
    cpu.write(offset::LVT_TIMER, PERIODIC | 0xee);
    machine.run(5000);
    assert_eq!((count(cpu), cpu.take()), (0, None), "what has expired does not start again");
}

#[test]
fn an_expiry_is_seen_before_the_host_has_run_its_timer() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    cpu.write(offset::TIMER_INITIAL_COUNT, 100);
    machine.time.advance(100);
    assert_eq!(cpu.read(offset::IRR + 0x70), 1 << 14);
    assert_eq!((count(cpu), cpu.take()), (0, Some(0xee)));
    machine.run(0);
    assert_eq!(cpu.take(), None, "and only once");
}

#[test]
fn a_deadline_fires_when_the_tsc_reaches_it() {
    let machine = machine(DEADLINE);
    let cpu = &machine.cpus[0];
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 5000).unwrap();
    machine.run(4999);
    assert_eq!((cpu.take(), cpu.apic.read_msr(IA32_TSC_DEADLINE)), (None, Ok(5000)));
    machine.run(1);
    assert_eq!((cpu.take(), cpu.apic.read_msr(IA32_TSC_DEADLINE)), (Some(0xee), Ok(0)));
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 5000).unwrap();
    assert_eq!(cpu.take(), Some(0xee), "a deadline in the past fires at once");
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 6000).unwrap();
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 0).unwrap();
    machine.run(10_000);
    assert_eq!(cpu.take(), None);
}

#[test]
fn a_deadline_may_move_both_ways() {
    let machine = machine(DEADLINE);
    let cpu = &machine.cpus[0];
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 5000).unwrap();
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 8000).unwrap();
    machine.run(6000);
    assert_eq!(cpu.take(), None);
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 7000).unwrap();
    machine.run(1000);
    assert_eq!(cpu.take(), Some(0xee));
    machine.run(5000);
    assert_eq!(cpu.take(), None);
}

#[test]
fn the_deadline_follows_the_guests_tsc() {
    let machine = machine(DEADLINE);
    let cpu = &machine.cpus[0];
    cpu.apic.set_tsc_offset(100_000);
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 101_000).unwrap();
    machine.run(1000);
    assert_eq!(cpu.take(), Some(0xee));
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 200_000).unwrap();
    cpu.apic.set_tsc_offset(0u64.wrapping_sub(500));
    machine.run(199_000);
    assert_eq!(cpu.take(), None);
    cpu.apic.set_tsc_offset(1 << 40);
    assert_eq!(cpu.take(), Some(0xee));
}

#[test]
fn the_count_registers_and_the_deadline_belong_to_their_modes() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 5000).unwrap();
    assert_eq!(cpu.apic.read_msr(IA32_TSC_DEADLINE), Ok(0));
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    cpu.write(offset::LVT_TIMER, DEADLINE | 0xee);
    assert_eq!(count(cpu), 0);
    cpu.write(offset::TIMER_INITIAL_COUNT, 1000);
    assert_eq!((count(cpu), cpu.read(offset::TIMER_INITIAL_COUNT)), (0, 0));
    cpu.apic.write_msr(IA32_TSC_DEADLINE, 5000).unwrap();
    cpu.write(offset::LVT_TIMER, 0xee);
    assert_eq!((count(cpu), cpu.apic.read_msr(IA32_TSC_DEADLINE)), (0, Ok(0)));
    machine.run(10_000);
    assert_eq!(cpu.take(), None, "changing the mode disarms");
}

#[test]
fn absurd_deadlines_are_far_away() {
    let machine = machine(DEADLINE);
    let cpu = &machine.cpus[0];
    for deadline in [u64::MAX, u64::MAX - 1, i64::MAX as u64] {
        cpu.apic.write_msr(IA32_TSC_DEADLINE, deadline).unwrap();
        machine.run(1_000_000);
        assert_eq!((cpu.take(), cpu.apic.read_msr(IA32_TSC_DEADLINE)), (None, Ok(deadline)));
    }
}

#[test]
fn a_timer_of_an_illegal_vector_is_an_error() {
    let machine = machine(0);
    let cpu = &machine.cpus[0];
    cpu.write(offset::LVT_TIMER, 0x0f);
    cpu.write(offset::TIMER_INITIAL_COUNT, 10);
    machine.run(10);
    cpu.write(offset::ESR, 0);
    assert_eq!((cpu.read(offset::ESR), cpu.take()), (0x40, None));
}

/// A clock whose TSC runs at a frequency that is no multiple of a nanosecond's.
struct Skewed(Arc<ManualTime>);

impl TimeSource for Skewed {
    fn now(&self) -> u64 {
        self.0.now()
    }
    fn tsc(&self) -> u64 {
        (u128::from(self.now()) * u128::from(self.tsc_frequency()) / 1_000_000_000) as u64
    }
    fn host_tsc_start(&self) -> Option<u64> {
        None
    }
    fn tsc_frequency(&self) -> u64 {
        2_399_999_977
    }
    fn wall_clock(&self) -> u64 {
        0
    }
}

#[test]
fn no_deadline_fires_early_or_late_by_more_than_a_tick() {
    let time = ManualTime::new();
    let skewed = Arc::new(Skewed(time.clone()));
    let timers = Timers::new(skewed.clone());
    let fabric = InterruptFabric::new(ApicFeatures::default(), &timers, &[Attention::new()]);
    let apic = fabric.local_apic(0).unwrap();
    apic.mmio_write(offset::SVR.into(), &0x1ffu32.to_le_bytes());
    apic.mmio_write(offset::LVT_TIMER.into(), &(DEADLINE | 0xee).to_le_bytes());
    for ticks in (1..2000).chain([1 << 35, 1 << 36]) {
        let deadline = skewed.tsc() + ticks;
        apic.write_msr(IA32_TSC_DEADLINE, deadline).unwrap();
        while !apic.has_interrupt() {
            let next = timers.next_deadline().expect("armed until it fires");
            time.advance(next.saturating_sub(time.now()));
            timers.run_due();
        }
        assert!((deadline..deadline + 6).contains(&skewed.tsc()), "{ticks} ticks");
        assert_eq!(apic.acknowledge(), Some(0xee));
        apic.mmio_write(offset::EOI.into(), &[0; 4]);
    }
}
