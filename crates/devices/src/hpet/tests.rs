use super::*;
use crate::clock::ManualTime;
use crate::irq::RecordedLines;

struct Bench {
    hpet: Arc<Mutex<Hpet>>,
    time: Arc<ManualTime>,
    timers: Timers,
    lines: Arc<RecordedLines>,
    /// The interval timer's and the clock's ends of their lines.
    pc: [IrqLine; 2],
}

const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xf0;

const LEVEL: u64 = 1 << 1;
const ENABLED: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const BITS_32: u64 = 1 << 8;
const ROUTE_10: u64 = 10 << 9;

impl Bench {
    fn new() -> Self {
        let (time, lines) = (ManualTime::new(), RecordedLines::new());
        let timers = Timers::new(time.clone());
        let legacy = [0, 8].map(|irq| LegacyLine::new(lines.line(irq)));
        let pc = [0, 1].map(|index: usize| legacy[index].pc_end());
        let hpet = Hpet::new(ROUTES.map(|pin| lines.line(pin)), legacy, &timers);
        Self { hpet, time, timers, lines, pc }
    }

    fn read(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.hpet.lock().unwrap().read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64) {
        self.hpet.lock().unwrap().write(offset, &value.to_le_bytes());
    }

    fn write_32(&self, offset: u64, value: u32) {
        self.hpet.lock().unwrap().write(offset, &value.to_le_bytes());
    }

    fn pass(&self, ticks: u64) {
        self.time.run(&self.timers, ticks * TICK_NS);
    }
}

fn configuration(index: u64) -> u64 {
    0x100 + 0x20 * index
}

fn comparator(index: u64) -> u64 {
    0x108 + 0x20 * index
}

#[test]
fn the_counter_counts_at_100_mhz_while_it_is_enabled() {
    let bench = Bench::new();
    assert_eq!(bench.read(0), 0x0098_9680_8086_a201);
    bench.pass(100);
    assert_eq!(bench.read(COUNTER), 0);
    bench.write(CONFIGURATION, 1);
    bench.pass(100);
    assert_eq!(bench.read(COUNTER), 100);
    bench.write(CONFIGURATION, 0);
    bench.pass(100);
    bench.write_32(COUNTER + 4, 5);
    assert_eq!(bench.read(COUNTER), 5 << 32 | 100);
    bench.write(CONFIGURATION, 1);
    bench.pass(3);
    assert_eq!(bench.read(COUNTER), 5 << 32 | 103);
    let mut low = [0; 4];
    bench.hpet.lock().unwrap().read(COUNTER + 4, &mut low);
    assert_eq!(low, [5, 0, 0, 0]);
}

#[test]
fn a_one_shot_comparator_interrupts_once_at_its_value() {
    let bench = Bench::new();
    bench.write(configuration(2), ENABLED | ROUTE_10);
    bench.write(comparator(2), 10_000);
    bench.write(CONFIGURATION, 1);
    bench.pass(9_999);
    assert_eq!(bench.lines.take_edges(10), 0);
    bench.pass(1);
    assert_eq!(bench.lines.take_edges(10), 1);
    bench.pass(1 << 40);
    assert_eq!(bench.lines.take_edges(10), 0);
    // 32 bits come round again.
    bench.write(configuration(2), ENABLED | ROUTE_10 | BITS_32);
    bench.pass(1 << 32);
    assert_eq!(bench.lines.take_edges(10), 1);
}

#[test]
fn a_periodic_comparator_takes_its_value_and_then_its_period() {
    let bench = Bench::new();
    bench.write(configuration(0), ENABLED | PERIODIC | SET_VALUE | BITS_32 | ROUTE_10);
    bench.write_32(comparator(0), 50_000);
    bench.write_32(comparator(0), 10_000);
    bench.write(CONFIGURATION, 1);
    bench.pass(49_999);
    assert_eq!(bench.lines.take_edges(10), 0);
    bench.pass(1);
    assert_eq!((bench.lines.take_edges(10), bench.read(comparator(0))), (1, 60_000));
    bench.pass(100_000);
    assert_eq!((bench.lines.take_edges(10), bench.read(comparator(0))), (10, 160_000));
}

#[test]
fn a_period_of_a_tick_does_not_keep_the_host_busy() {
    let bench = Bench::new();
    bench.write(configuration(0), ENABLED | PERIODIC | SET_VALUE | ROUTE_10);
    bench.write(comparator(0), 1);
    bench.write(CONFIGURATION, 1);
    bench.pass(100_000_000);
    let edges = bench.lines.take_edges(10) as u64;
    assert!(edges <= 1_000_000_000 / LEAST_PERIOD_NS + 1, "{edges}");
    assert_eq!(bench.read(comparator(0)), bench.read(COUNTER) + 1);
}

#[test]
fn a_level_stays_until_its_status_bit_is_written() {
    let bench = Bench::new();
    bench.write(configuration(1), ENABLED | LEVEL | ROUTE_10);
    bench.write(comparator(1), 10);
    bench.write(CONFIGURATION, 1);
    bench.pass(1_000_000);
    assert!(bench.lines.level(10));
    assert_eq!(bench.read(STATUS), 0b10);
    bench.write(STATUS, 0b101);
    assert!(bench.lines.level(10));
    bench.write(STATUS, 0b10);
    assert_eq!((bench.lines.level(10), bench.read(STATUS)), (false, 0));
}

#[test]
fn legacy_replacement_takes_the_lines_of_timer_and_clock() {
    let bench = Bench::new();
    bench.pc[0].pulse();
    assert_eq!(bench.lines.take_edges(0), 1);
    for index in [0, 1] {
        bench.write(configuration(index), ENABLED);
        bench.write(comparator(index), 10_000 * (index + 1));
    }
    bench.write(CONFIGURATION, 3);
    bench.pc[0].pulse();
    bench.pc[1].set(true);
    assert_eq!(bench.lines.take_changes(), []);
    bench.pass(1_000_000);
    assert_eq!(bench.lines.take_changes(), [(0, true), (0, false), (8, true), (8, false)]);
    bench.write(CONFIGURATION, 1);
    assert_eq!(bench.lines.take_changes(), [(8, true)]);
}

#[test]
fn a_comparator_says_what_it_can_do_and_keeps_no_other_bits() {
    let bench = Bench::new();
    bench.write(configuration(0), u64::MAX);
    let routes = 1 << 5 | 1 << 10 | 1 << 11;
    assert_eq!(bench.read(configuration(0)), routes << 32 | 0x1f << 9 | 0x17e);
    assert_eq!(bench.read(configuration(3)), 0);
    bench.hpet.lock().unwrap().reset();
    assert_eq!(bench.read(configuration(0)), routes << 32 | 0x30);
}

#[test]
fn no_access_panics() {
    crate::fuzz::exercise(|timers| {
        let legacy = [0, 8].map(|_| LegacyLine::new(IrqLine::unconnected()));
        Hpet::new(ROUTES.map(|_| IrqLine::unconnected()), legacy, timers)
    });
    // The registers above those that `exercise` reaches most.
    let bench = Bench::new();
    for step in 0..20_000u64 {
        let random = step.wrapping_mul(6_364_136_223_846_793_005).rotate_left(29);
        bench.write(random % SIZE & !3, random.rotate_left(17));
        bench.write_32(random % SIZE & !3, random as u32);
        bench.pass(random >> 44);
        bench.read(random >> 20 & 0x3ff);
    }
}
