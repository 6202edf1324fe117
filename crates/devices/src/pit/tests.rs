use super::*;
use crate::clock::ManualTime;
use crate::irq::RecordedLines;

struct Bench {
    pit: Arc<Mutex<Pit>>,
    lines: Arc<RecordedLines>,
    time: Arc<ManualTime>,
    timers: Timers,
    passed: i64,
}

fn bench() -> Bench {
    let (lines, time) = (RecordedLines::new(), ManualTime::new());
    let timers = Timers::new(time.clone());
    Bench { pit: Pit::new(lines.line(IRQ), &timers), lines, time, timers, passed: 0 }
}

impl Bench {
    fn read(&self, offset: u64) -> u8 {
        self.pit.lock().unwrap().read_register(offset)
    }
    fn write(&self, offset: u64, value: u8) {
        self.pit.lock().unwrap().write_register(offset, value);
    }
    fn control(&self, counter: u8, mode: u8, count: u16) {
        self.write(3, counter << 6 | 0x30 | mode << 1);
        self.write(counter.into(), count as u8);
        self.write(counter.into(), (count >> 8) as u8);
    }
    /// Lets clocks of the i8254 pass.
    fn pass(&mut self, clocks: i64) {
        self.passed += clocks;
        let ns = nanoseconds(self.passed) - self.timers.now();
        self.time.run(&self.timers, ns);
    }
    /// Latches and reads a count of two bytes.
    fn count(&self, counter: u8) -> u16 {
        self.write(3, counter << 6);
        u16::from_le_bytes([self.read(counter.into()), self.read(counter.into())])
    }
    /// The output, from the status that the read-back command gives.
    fn out(&self, counter: u8) -> bool {
        self.write(3, 0xe0 | 2 << counter);
        self.read(counter.into()) & 0x80 != 0
    }
    fn outs(&mut self, counter: u8, clocks: usize) -> String {
        let one = |bench: &mut Self| {
            let out = bench.out(counter);
            bench.pass(1);
            if out { 'H' } else { 'L' }
        };
        (0..clocks).map(|_| one(self)).collect()
    }
    fn gate(&self, high: bool) {
        self.write(SPEAKER_OFFSET, high.into());
    }
}

#[test]
fn mode_0_rises_at_the_terminal_count_and_counts_on() {
    let mut bench = bench();
    bench.control(0, 0, 4);
    bench.pass(1); // The count is loaded.
    assert_eq!(bench.count(0), 4);
    assert_eq!(bench.outs(0, 6), "LLLLHH");
    assert_eq!(bench.lines.take_edges(IRQ), 1);
    assert_eq!(bench.count(0), 0xfffe);
}

#[test]
fn mode_2_is_low_for_the_last_clock_of_each_period() {
    let mut bench = bench();
    bench.control(0, 2, 3);
    bench.pass(1);
    assert_eq!(bench.outs(0, 7), "HHLHHLH");
    bench.control(0, 2, 1000);
    bench.pass(1);
    bench.lines.take_changes();
    bench.pass(10_000);
    assert_eq!(bench.lines.take_edges(IRQ), 10);
    bench.pass(999);
    assert_eq!(bench.count(0), 1);
}

#[test]
fn mode_3_is_high_for_the_longer_half() {
    let mut bench = bench();
    bench.gate(true);
    bench.control(2, 3, 5);
    bench.pass(1);
    assert_eq!(bench.outs(2, 10), "HHHLLHHHLL");
    bench.control(2, 3, 4);
    bench.pass(1);
    let counts: Vec<u16> = (0..5)
        .map(|_| {
            let count = bench.count(2);
            bench.pass(1);
            count
        })
        .collect();
    assert_eq!(counts, [4, 2, 4, 2, 4]);
}

#[test]
fn mode_4_strobes_once() {
    let mut bench = bench();
    bench.control(0, 4, 3);
    bench.pass(1);
    bench.lines.take_changes();
    assert_eq!(bench.outs(0, 8), "HHHLHHHH");
    assert_eq!(bench.lines.take_edges(IRQ), 1);
}

#[test]
fn modes_1_and_5_wait_for_the_gate_and_start_again_with_it() {
    let mut bench = bench();
    bench.control(2, 1, 3);
    bench.pass(5);
    assert!(bench.out(2), "not triggered yet");
    bench.gate(true);
    bench.pass(1);
    assert_eq!(bench.outs(2, 2), "LL");
    bench.gate(false);
    bench.gate(true);
    bench.pass(1);
    assert_eq!(bench.outs(2, 5), "LLLHH");
    bench.gate(false);
    bench.control(2, 5, 2);
    bench.gate(true);
    bench.pass(1);
    assert_eq!(bench.outs(2, 5), "HHLHH");
}

#[test]
fn the_gate_of_counter_2_stops_and_resumes_its_count() {
    let mut bench = bench();
    bench.gate(true);
    bench.control(2, 0, 100);
    bench.pass(41);
    bench.gate(false);
    bench.pass(1000);
    assert_eq!(bench.count(2), 60);
    assert_eq!(bench.read(SPEAKER_OFFSET) & 0x20, 0);
    bench.gate(true);
    bench.pass(59);
    assert_eq!(bench.read(SPEAKER_OFFSET) & 0x21, 0x01);
    bench.pass(1);
    assert_eq!(bench.read(SPEAKER_OFFSET) & 0x21, 0x21);
}

#[test]
fn a_calibration_loop_measures_the_input_clock() {
    // Linux's pit_calibrate_tsc: counter 2 in mode 0, the output read at port 0x61.
    let bench = bench();
    bench.gate(true);
    let latch = 11_932; // 10 ms
    bench.control(2, 0, latch);
    let start = bench.timers.now();
    while bench.read(SPEAKER_OFFSET) & 0x20 == 0 {
        bench.time.advance(500);
    }
    let passed = bench.timers.now() - start;
    assert!(passed.abs_diff(10_000_000) < 2_000, "{passed}");
}

#[test]
fn bcd_counters_count_in_decimal() {
    let mut bench = bench();
    bench.write(3, 0x31);
    bench.write(0, 0x00);
    bench.write(0, 0x10); // 1000
    bench.pass(2);
    assert_eq!(bench.count(0), 0x0999);
    bench.pass(1000);
    assert_eq!(bench.count(0), 0x9999);
    bench.write(3, 0x35);
    bench.write(0, 0);
    bench.write(0, 0);
    bench.lines.take_changes();
    bench.pass(20_001);
    assert_eq!(bench.lines.take_edges(IRQ), 2, "zero is 10,000");
}

#[test]
fn a_latched_count_waits_for_its_reader() {
    let mut bench = bench();
    bench.control(0, 2, 1000);
    bench.pass(11);
    bench.write(3, 0x00);
    bench.pass(100);
    bench.write(3, 0x00);
    assert_eq!([bench.read(0), bench.read(0)], 990u16.to_le_bytes());
    assert_eq!([bench.read(0), bench.read(0)], 890u16.to_le_bytes(), "not latched");
}

#[test]
fn the_read_back_command_latches_status_and_count_of_several_counters() {
    let mut bench = bench();
    bench.control(0, 2, 1000);
    bench.write(3, 0x50 | 3 << 1); // Counter 1, low byte only, square wave.
    bench.pass(1);
    bench.write(3, 0xc0 | 0x06);
    assert_eq!(bench.read(0), 0x80 | 0x30 | 2 << 1);
    assert_eq!([bench.read(0), bench.read(0)], 1000u16.to_le_bytes());
    assert_eq!(bench.read(1), 0x80 | 0x40 | 0x10 | 3 << 1, "no count yet: null");
}

#[test]
fn a_new_count_of_the_rate_generator_begins_with_the_next_period() {
    let mut bench = bench();
    bench.control(0, 2, 1000);
    bench.pass(501);
    bench.write(0, 200);
    bench.write(0, 0);
    bench.lines.take_changes();
    assert_eq!(bench.count(0), 500);
    bench.pass(500);
    assert_eq!(bench.lines.take_edges(IRQ), 1);
    bench.pass(400);
    assert_eq!(bench.lines.take_edges(IRQ), 2);
}

#[test]
fn a_new_count_of_the_square_wave_begins_with_the_next_half() {
    let mut bench = bench();
    bench.gate(true);
    bench.control(2, 3, 8);
    bench.pass(2);
    bench.write(2, 4);
    bench.write(2, 0);
    assert_eq!(bench.outs(2, 9), "HHHLLHHLL");
}

#[test]
fn a_storm_of_interrupts_is_held_to_what_a_host_can_give() {
    let mut bench = bench();
    bench.control(0, 2, 2);
    bench.lines.take_changes();
    bench.pass(FREQUENCY as i64 / 100);
    let edges = bench.lines.take_edges(IRQ);
    assert!((100..=201).contains(&edges), "{edges} in 10 ms");
}

#[test]
fn late_ticks_come_once() {
    let bench = bench();
    bench.control(0, 2, 1193);
    bench.lines.take_changes();
    bench.time.advance(50_000_000);
    bench.timers.run_due();
    assert_eq!(bench.lines.take_edges(IRQ), 1);
}

#[test]
fn reprogramming_ends_the_old_interrupts() {
    let mut bench = bench();
    bench.control(0, 2, 1193);
    bench.write(3, 0x30);
    bench.lines.take_changes();
    bench.pass(10_000);
    assert_eq!(bench.lines.take_edges(IRQ), 0);
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn the_refresh_bit_toggles() {
    let mut bench = bench();
    let before = bench.read(SPEAKER_OFFSET);
    bench.pass(REFRESH_TICKS);
    assert_eq!((before ^ bench.read(SPEAKER_OFFSET)) & 0x10, 0x10);
}

#[test]
fn no_access_panics() {
    crate::fuzz::exercise(|timers| Pit::new(IrqLine::unconnected(), timers));
}
