use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::clock::ManualTime;
use crate::irq::RecordedLines;

const RBR: u64 = 0;
const THR: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

/// An output of a limited size, shared with the test.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

impl SerialOutput for Sink {
    fn accept(&mut self, bytes: &[u8]) -> usize {
        let mut sink = self.0.lock().unwrap();
        let accepted = bytes.len().min(sink.1);
        sink.0.extend_from_slice(&bytes[..accepted]);
        sink.1 -= accepted;
        accepted
    }
}

impl Sink {
    fn give_room(&self, bytes: usize) {
        self.0.lock().unwrap().1 = bytes;
    }
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
    }
}

struct Bench {
    serial: Arc<Mutex<Serial>>,
    lines: Arc<RecordedLines>,
    sink: Sink,
    time: Arc<ManualTime>,
    timers: Timers,
}

fn bench() -> Bench {
    let (lines, sink, time) = (RecordedLines::new(), Sink::default(), ManualTime::new());
    sink.give_room(usize::MAX);
    let timers = Timers::new(time.clone());
    let serial = Serial::new(lines.line(COM1_IRQ), Box::new(sink.clone()), &timers);
    Bench { serial, lines, sink, time, timers }
}

impl Bench {
    fn read(&self, offset: u64) -> u8 {
        self.serial.lock().unwrap().read_register(offset)
    }
    fn write(&self, offset: u64, value: u8) {
        self.serial.lock().unwrap().write_register(offset, value);
    }
    fn push(&self, bytes: &[u8]) -> usize {
        self.serial.lock().unwrap().push_input(bytes)
    }
    fn irq(&self) -> bool {
        self.lines.level(COM1_IRQ)
    }
}

#[test]
fn what_is_written_to_the_transmitter_comes_out() {
    let bench = bench();
    for byte in b"hello\n" {
        assert_eq!(bench.read(LSR), 0x60);
        bench.write(THR, *byte);
    }
    assert_eq!(bench.sink.text(), "hello\n");
}

#[test]
fn linux_finds_a_16550a() {
    // The steps of the 8250 driver's detection, as its source's comments name them.
    let bench = bench();
    bench.write(IER, 0);
    assert_eq!(bench.read(IER), 0);
    bench.write(IER, 0x0f);
    assert_eq!(bench.read(IER) & 0x0f, 0x0f);
    bench.write(IER, 0);
    bench.write(MCR, 0x10 | 0x0a);
    assert_eq!(bench.read(MSR) & 0xf0, 0x90, "loopback: RTS is CTS, OUT2 is DCD");
    bench.write(MCR, 0);
    bench.write(FCR, 1);
    assert_eq!(bench.read(IIR) >> 6, 3, "working FIFOs");
    bench.write(LCR, 0xbf);
    assert_ne!(bench.read(FCR), 0, "no enhanced features");
    bench.write(LCR, 0);
    bench.write(IER, 0x40);
    assert_eq!(bench.read(IER), 0, "no UART unit enable");
    bench.write(IER, 0);
    // THRE test: enabling the interrupt raises it each time.
    for _ in 0..2 {
        bench.write(IER, 2);
        assert_eq!(bench.read(IIR) & 0x0f, 2);
        bench.write(IER, 0);
    }
}

#[test]
fn the_divisor_latch_covers_the_first_two_registers() {
    let bench = bench();
    bench.write(IER, 5);
    bench.write(LCR, 0x83);
    bench.write(0, 0x34);
    bench.write(1, 0x12);
    assert_eq!((bench.read(0), bench.read(1)), (0x34, 0x12));
    assert_eq!(bench.serial.lock().unwrap().register_name(0, true), "DLL");
    bench.write(LCR, 0x03);
    assert_eq!(bench.read(IER), 5);
    assert_eq!(bench.sink.text(), "");
    bench.write(SCR, 0x5a);
    assert_eq!(bench.read(SCR), 0x5a);
}

#[test]
fn the_transmitter_interrupt_ends_with_its_identification() {
    let bench = bench();
    bench.write(MCR, 0x08);
    bench.write(IER, 2);
    assert!(bench.irq());
    assert_eq!(bench.read(IIR), 2);
    assert!(!bench.irq());
    assert_eq!(bench.read(IIR), 1);
    bench.write(THR, b'x');
    assert!(bench.irq(), "empty again");
}

#[test]
fn without_out2_no_interrupt_leaves_the_port() {
    let bench = bench();
    bench.write(IER, 1);
    bench.push(b"x");
    assert!(!bench.irq());
    bench.write(MCR, 0x08);
    assert!(bench.irq());
}

#[test]
fn input_below_the_trigger_level_is_a_character_timeout() {
    let bench = bench();
    bench.write(FCR, 0x81);
    bench.write(MCR, 0x08);
    bench.write(IER, 1);
    assert_eq!(bench.push(b"1234567"), 7);
    assert_eq!(bench.read(IIR), 0xcc);
    bench.push(b"8");
    assert_eq!(bench.read(IIR), 0xc4);
    let mut got = Vec::new();
    while bench.read(LSR) & 1 != 0 {
        got.push(bench.read(RBR));
    }
    assert_eq!(got, b"12345678");
    assert!(!bench.irq());
    assert_eq!(bench.read(IIR), 0xc1);
}

#[test]
fn input_is_bounded_and_the_feeder_learns_of_room() {
    let bench = bench();
    let wakes = Arc::new(AtomicUsize::new(0));
    let count = wakes.clone();
    bench.serial.lock().unwrap().set_input_wake(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let accepted = bench.push(&[b'x'; 1000]);
    assert_eq!(accepted, INPUT);
    assert_eq!(bench.push(b"y"), 0);
    assert_eq!(wakes.load(Ordering::SeqCst), 0);
    for _ in 0..INPUT {
        bench.read(RBR);
    }
    assert_eq!(wakes.load(Ordering::SeqCst), 1, "once per refusal");
    assert_eq!(bench.push(b"y"), 1);
}

#[test]
fn a_driver_that_opens_the_port_wakes_the_feeder() {
    let bench = bench();
    let wakes = Arc::new(AtomicUsize::new(0));
    let count = wakes.clone();
    bench.serial.lock().unwrap().set_input_wake(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    bench.write(IER, 1);
    assert!(!bench.serial.lock().unwrap().wants_input(), "a probe, not a driver");
    bench.write(MCR, 0x08);
    assert!(!bench.serial.lock().unwrap().wants_input(), "a driver that has not emptied the receiver yet");
    bench.write(MCR, 0x0b);
    assert!(bench.serial.lock().unwrap().wants_input());
    assert_eq!(wakes.load(Ordering::SeqCst), 1);
}

#[test]
fn an_output_without_room_holds_the_guest_back_and_loses_nothing() {
    let bench = bench();
    bench.sink.give_room(3);
    bench.write(FCR, 1);
    bench.write(MCR, 0x08);
    bench.write(IER, 2);
    bench.read(IIR);
    for byte in b"0123456789abcdef" {
        bench.write(THR, *byte);
    }
    assert_eq!(bench.sink.text(), "012");
    assert_eq!(bench.read(LSR) & 0x60, 0);
    bench.read(IIR);
    assert!(!bench.irq());
    // The line status tries again.
    bench.sink.give_room(4);
    assert_eq!(bench.read(LSR) & 0x60, 0);
    assert_eq!(bench.sink.text(), "0123456");
    // So does time; and then the interrupt tells.
    bench.sink.give_room(100);
    bench.time.run(&bench.timers, RETRY_NS);
    assert_eq!(bench.sink.text(), "0123456789abcdef");
    assert!(bench.irq());
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn a_flood_without_waiting_stays_bounded() {
    let bench = bench();
    bench.sink.give_room(0);
    bench.write(FCR, 1);
    for _ in 0..10_000 {
        bench.write(THR, b'x');
    }
    assert_eq!(bench.serial.lock().unwrap().transmitter.fifo.len(), FIFO);
    bench.sink.give_room(usize::MAX);
    bench.serial.lock().unwrap().output_ready();
    assert_eq!(bench.sink.text().len(), FIFO);
}

#[test]
fn loopback_receives_what_it_sends_and_overruns_at_the_fifos_end() {
    let bench = bench();
    bench.write(FCR, 1);
    bench.write(MCR, 0x10);
    for byte in 0..17 {
        bench.write(THR, byte);
    }
    assert_eq!(bench.read(LSR) & 0x03, 0x03);
    assert_eq!(bench.read(LSR) & 0x02, 0, "reading ends the overrun");
    for byte in 0..16 {
        assert_eq!(bench.read(RBR), byte);
    }
    assert_eq!(bench.read(LSR) & 0x01, 0);
    assert_eq!(bench.sink.text(), "");
}

#[test]
fn a_break_is_a_line_status_interrupt_with_a_zero() {
    let bench = bench();
    bench.write(FCR, 1);
    bench.write(MCR, 0x08);
    bench.write(IER, 5);
    assert!(bench.serial.lock().unwrap().push_break());
    bench.push(b"h");
    assert_eq!(bench.read(IIR) & 0x0f, 6);
    assert_eq!(bench.read(LSR) & 0x91, 0x91);
    assert_eq!(bench.read(LSR) & 0x90, 0);
    assert_eq!((bench.read(RBR), bench.read(RBR)), (0, b'h'));
}

#[test]
fn the_modem_status_reports_changes_once() {
    let bench = bench();
    assert_eq!(bench.read(MSR), 0xb0);
    bench.write(MCR, 0x14);
    bench.write(MCR, 0x10);
    assert_eq!(bench.read(MSR), 0x0f);
    assert_eq!(bench.read(MSR), 0x00);
}

#[test]
fn clearing_the_fifos_discards_what_waits() {
    let bench = bench();
    bench.sink.give_room(0);
    bench.write(FCR, 1);
    bench.push(b"abc");
    bench.write(THR, b'x');
    bench.write(FCR, 7);
    assert_eq!(bench.read(LSR), 0x60);
}

#[test]
fn no_access_panics() {
    crate::fuzz::exercise(|timers| {
        let mut room = 0usize;
        let output = move |bytes: &[u8]| {
            room = (room + 7) % 23;
            room.min(bytes.len())
        };
        let serial = Serial::new(IrqLine::unconnected(), Box::new(output), timers);
        serial.lock().unwrap().push_input(b"some input");
        serial
    });
}
