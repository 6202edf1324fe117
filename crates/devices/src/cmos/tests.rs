use super::*;
use crate::clock::ManualTime;
use crate::irq::RecordedLines;

/// Tuesday, 14 November 2023, 22:13:20 UTC.
const START: u64 = 1_700_000_000_000_000_000;
const MS: u64 = 1_000_000;

struct Bench {
    cmos: Arc<Mutex<Cmos>>,
    lines: Arc<RecordedLines>,
    time: Arc<ManualTime>,
    timers: Timers,
}

fn bench() -> Bench {
    let (lines, time) = (RecordedLines::new(), ManualTime::new());
    time.set_wall_start(START);
    let timers = Timers::new(time.clone());
    let config = CmosConfig { memory_below_4g: 512 << 20, memory_above_4g: 3 << 30, cpus: 3 };
    Bench { cmos: Cmos::new(&config, lines.line(IRQ), &timers), lines, time, timers }
}

impl Bench {
    fn read(&self, index: u8) -> u8 {
        let mut cmos = self.cmos.lock().unwrap();
        cmos.write_register(0, index);
        cmos.read_register(1)
    }
    fn write(&self, index: u8, value: u8) {
        let mut cmos = self.cmos.lock().unwrap();
        cmos.write_register(0, index);
        cmos.write_register(1, value);
    }
    fn wait(&self, ns: u64) {
        self.time.run(&self.timers, ns);
    }
    /// Century, year, month, day, hour, minute, second, weekday as the registers have them.
    fn date(&self) -> [u8; 8] {
        [CENTURY, 9, 8, 7, 4, 2, 0, 6].map(|index| self.read(index))
    }
    fn irq(&self) -> bool {
        self.lines.level(IRQ)
    }
}

#[test]
fn it_shows_the_wall_clock_in_bcd() {
    let bench = bench();
    assert_eq!(bench.date(), [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 0x03]);
    bench.wait(3_600_000 * MS * 2);
    assert_eq!(bench.date(), [0x20, 0x23, 0x11, 0x15, 0x00, 0x13, 0x20, 0x04]);
}

#[test]
fn binary_and_twelve_hours_are_register_bs_choice() {
    let bench = bench();
    bench.write(REGISTER_B, 0x04);
    assert_eq!(bench.date(), [20, 23, 11, 14, 0x80 | 10, 13, 20, 3]);
    bench.write(REGISTER_B, 0x00);
    assert_eq!(bench.read(4), 0x90);
}

#[test]
fn setting_the_time_freezes_it_and_then_it_runs_on() {
    let bench = bench();
    bench.write(REGISTER_B, 0x82);
    bench.wait(5_000 * MS);
    assert_eq!(bench.read(SECONDS), 0x20, "frozen");
    for (index, value) in [(CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)]
    {
        bench.write(index, value);
    }
    bench.write(REGISTER_B, 0x02);
    bench.wait(1_000 * MS);
    assert_eq!(bench.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 0x06]);
    bench.wait(1_000 * MS);
    assert_eq!(bench.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 0x07]);
}

#[test]
fn after_a_divider_reset_the_first_update_comes_in_half_a_second() {
    let bench = bench();
    bench.wait(300 * MS);
    bench.write(REGISTER_A, 0x76);
    bench.wait(5_000 * MS);
    bench.write(REGISTER_A, 0x26);
    assert_eq!(bench.read(SECONDS), 0x20);
    bench.wait(499 * MS);
    assert_eq!(bench.read(SECONDS), 0x20);
    bench.wait(2 * MS);
    assert_eq!(bench.read(SECONDS), 0x21);
}

#[test]
fn update_in_progress_announces_the_update() {
    let bench = bench();
    assert_eq!(bench.read(REGISTER_A), 0x26);
    bench.wait(1_000 * MS - 200_000);
    assert_eq!(bench.read(REGISTER_A), 0xa6);
    bench.wait(200_000);
    assert_eq!(bench.read(REGISTER_A), 0x26);
    assert_eq!(bench.read(SECONDS), 0x21);
}

#[test]
fn the_update_interrupt_comes_each_second_that_register_c_is_read() {
    let bench = bench();
    bench.write(REGISTER_B, 0x12);
    bench.wait(999 * MS);
    assert!(!bench.irq());
    bench.wait(MS);
    assert!(bench.irq());
    bench.wait(5_000 * MS);
    assert_eq!(bench.lines.take_edges(IRQ), 1, "not read: no more edges");
    assert_eq!(bench.read(REGISTER_C) & 0x90, 0x90);
    assert!(!bench.irq());
    bench.wait(1_000 * MS);
    assert!(bench.irq());
}

#[test]
fn the_periodic_interrupt_comes_at_its_rate() {
    let bench = bench();
    bench.write(REGISTER_A, 0x26); // 1,024 Hz
    bench.write(REGISTER_B, 0x42);
    let mut ticks = 0;
    for _ in 0..20_000 {
        bench.wait(MS / 20);
        if bench.irq() {
            assert_eq!(bench.read(REGISTER_C) & 0xc0, 0xc0);
            ticks += 1;
        }
    }
    assert_eq!(ticks, 1024);
    for (rate, shift) in [(1, 7), (2, 8), (3, 2), (15, 14)] {
        bench.write(REGISTER_A, 0x20 | rate);
        assert_eq!(bench.cmos.lock().unwrap().periodic_shift(), Some(shift));
    }
}

#[test]
fn the_alarm_matches_and_its_wildcards_match_all() {
    let bench = bench();
    for (index, value) in [(SECONDS_ALARM, 0x00), (MINUTES_ALARM, 0x15), (HOURS_ALARM, 0xff)] {
        bench.write(index, value);
    }
    bench.write(REGISTER_B, 0x22);
    bench.wait(99_999 * MS);
    assert!(!bench.irq());
    bench.wait(MS);
    assert!(bench.irq(), "22:15:00");
    assert_eq!(bench.read(REGISTER_C) & 0xa0, 0xa0);
    bench.wait(3_600_000 * MS);
    assert!(bench.irq(), "23:15:00");
    bench.read(REGISTER_C);
    bench.write(MINUTES_ALARM, 0x75);
    assert_eq!(bench.timers.next_deadline(), None, "no such minute");
}

#[test]
fn flags_tell_of_events_whose_interrupt_is_off() {
    let bench = bench();
    bench.read(REGISTER_C);
    bench.time.advance(1_500 * MS);
    assert_eq!(bench.read(REGISTER_C), 0x50);
    assert!(!bench.irq());
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn the_memory_bytes_tell_the_sizes() {
    let bench = bench();
    let read16 = |index| u16::from_le_bytes([bench.read(index), bench.read(index + 1)]);
    assert_eq!(read16(0x15), 640);
    assert_eq!(read16(0x17), 0xffff, "511 MiB do not fit");
    assert_eq!(read16(0x30), 0xffff);
    assert_eq!(read16(0x34), (512 - 16) * 16);
    assert_eq!([0x5b, 0x5c, 0x5d].map(|index| bench.read(index)), [0x00, 0xc0, 0x00]);
    assert_eq!(bench.read(REGISTER_D), 0x80);
    assert_eq!(bench.read(0x5f), 2, "the processors besides the first");
}

#[test]
fn the_memory_survives_a_reset_and_interrupts_do_not() {
    let bench = bench();
    bench.write(SHUTDOWN_STATUS, 0x0a);
    bench.write(REGISTER_B, 0x12);
    bench.wait(1_000 * MS);
    bench.cmos.lock().unwrap().reset();
    assert!(!bench.irq());
    assert_eq!(bench.read(SHUTDOWN_STATUS), 0x0a);
    assert_eq!(bench.read(REGISTER_B), 0x02);
}

#[test]
fn the_index_ports_high_bit_masks_nmis() {
    let bench = bench();
    bench.write(0x80 | 0x40, 0x77);
    assert!(bench.cmos.lock().unwrap().masks_nmi());
    assert_eq!(bench.read(0x40), 0x77);
    assert!(!bench.cmos.lock().unwrap().masks_nmi());
}

#[test]
fn no_access_panics() {
    crate::fuzz::exercise(|timers| Cmos::new(&CmosConfig::default(), IrqLine::unconnected(), timers));
}
