//! Random programs from the same state on the interpreter alone and with the translator forced: the same registers,
//! flags, faults, memory and instruction count at every stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use engine::{Attention, Signals};

use super::generator::{Forms, Program, Random, program};
use super::machine::{Machine, Start, difference};
use super::words::{NARROW, WIDE, Words};
use crate::jit::Settings;

/// Programs in `cargo test`; the environment variable `RINGSIDE_JIT_PROGRAMS` names another number.
const PROGRAMS: u64 = 20_000;
/// Stops of one program, at most.
const STOPS: usize = 60;

/// Raises signals at random moments while it lives: EXIT now and then, INTERRUPT (with none to deliver) often.
struct Disturbance {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Disturbance {
    fn new(attentions: Vec<Arc<Attention>>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let thread = std::thread::spawn(move || {
            for round in 0u64.. {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(Duration::from_micros(200));
                let signal = if round % 100 == 0 { Signals::EXIT } else { Signals::INTERRUPT };
                attentions.iter().for_each(|attention| attention.raise(signal));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where two machines stand, as text where they differ.
fn compare(one: &Machine, other: &Machine) -> Option<String> {
    let (a, b) = (&one.interpreter.cpu, &other.interpreter.cpu);
    let (x, y) = (a.state(), b.state());
    if x == y && a.instructions == b.instructions {
        return None;
    }
    let mut text = String::new();
    for n in (0..16).filter(|&n| x.gprs[n] != y.gprs[n]) {
        text += &format!("register {n}: {:#x} translated {:#x}\n", x.gprs[n], y.gprs[n]);
    }
    for (name, x, y) in [
        ("rip", x.rip, y.rip),
        ("rflags", x.rflags.bits(), y.rflags.bits()),
        ("cr2", x.cr2, y.cr2),
        ("instructions", a.instructions, b.instructions),
    ] {
        if x != y {
            text += &format!("{name}: {x:#x} translated {y:#x}\n");
        }
    }
    Some(if text.is_empty() { "other state".into() } else { text })
}

/// Runs a program on both. Gives how often it stopped; `None` where it does not end or has left its code.
fn same(machines: &mut [Machine; 2], program: &Program, start: &Start) -> Result<Option<usize>, String> {
    let [interpreted, translated] = machines;
    interpreted.prepare(program, start);
    translated.prepare(program, start);
    let mut stops = 0;
    while stops < STOPS {
        let (Some(one), Some(other)) = (interpreted.run(), translated.run()) else { return Ok(None) };
        stops += 1;
        let strays = !interpreted.is_in(program);
        if strays && (one != other || compare(interpreted, translated).is_some()) {
            return Ok(None);
        }
        if one != other {
            return Err(format!("stop {stops}: {one}, translated {other}"));
        }
        if let Some(text) = compare(interpreted, translated) {
            // It has overwritten what would have defined the flags.
            if !interpreted.holds(program) && text.starts_with("rflags") && text.lines().count() == 1 {
                return Ok(None);
            }
            return Err(format!("stop {stops} ({one}):\n{text}"));
        }
        if !(interpreted.resume(program, start.user) & translated.resume(program, start.user)) {
            break;
        }
    }
    if let Some(at) = difference(interpreted, translated) {
        if !interpreted.is_in(program) {
            return Ok(None);
        }
        return Err(format!("memory at {at:#x} after {stops} stops\n"));
    }
    Ok(Some(stops))
}

pub fn describe(program: &Program) -> String {
    let line = |n: usize| {
        let from = (program.starts[n] - program.rip) as usize;
        let to = program.starts.get(n + 1).map_or(program.bytes.len(), |next| (next - program.rip) as usize);
        let bytes: String = program.bytes[from..to].iter().map(|byte| format!(" {byte:02x}")).collect();
        format!("{:#x}:{bytes}\n", program.starts[n])
    };
    (0..program.starts.len()).map(line).collect()
}

fn programs_are_the_same(words: &'static Words, least: usize) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, programs) = match number("RINGSIDE_JIT_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("RINGSIDE_JIT_PROGRAMS").unwrap_or(PROGRAMS)),
    };
    let forms = Forms::new(words);
    // One program in 1000 brings new machines, which translate at once or what is run again.
    let both = |seed: u64| {
        let (hot, regions) = ((seed / 1000 % 2) as u32, seed / 2000 % 2 == 1);
        let region = if regions { Settings::default().region } else { 1 };
        let settings = Settings { code_bytes: 1 << 20, hot, region, ..Settings::default() };
        let mut machines = [Machine::new(words.bits, None), Machine::new(words.bits, Some(settings))];
        if regions {
            machines = machines.map(Machine::quiet);
        }
        let attentions = machines.iter().map(|m| m.attention.clone()).collect();
        (machines, Disturbance::new(attentions))
    };
    let (mut machines, mut disturbance) = both(first);
    let (mut stops, mut endless, mut failures, mut blocks) = (0, 0, 0, 0);
    let translated = |machines: &[Machine; 2]| machines[1].interpreter.jit_statistics().unwrap().blocks;
    for seed in first..first + programs {
        let mut random = Random(seed.wrapping_mul(0x1234_5678_9abc_def1));
        let program = program(&mut random, &forms);
        let mut over = seed % 1000 == 999;
        let start = Start::new(&mut random);
        match same(&mut machines, &program, &start) {
            Ok(Some(more)) => stops += more,
            Ok(None) => {
                // Who knows how far each came.
                endless += 1;
                over = true;
            }
            Err(text) => {
                failures += 1;
                if failures <= 5 {
                    let mode = if start.user { "user" } else { "kernel" };
                    eprintln!("seed {seed}, {mode}: {text}{}", describe(&program));
                }
                over = true;
            }
        }
        if over {
            blocks += translated(&machines);
            (machines, disturbance) = both(seed + 1);
        }
    }
    drop(disturbance);
    blocks += translated(&machines);
    println!(
        "{programs} programs of {} copied forms, {stops} stops, {endless} endless or astray, {blocks} blocks translated",
        forms.copied.len()
    );
    assert!(forms.copied.len() > least, "only {}", forms.copied.len());
    assert!(blocks > programs, "only {blocks} blocks of {programs} programs are translated");
    assert_eq!(failures, 0, "programs differ");
}

#[test]
fn translated_programs_do_what_interpreted_ones_do() {
    programs_are_the_same(&WIDE, 400);
}

#[test]
fn translated_programs_of_flat_code_do_what_interpreted_ones_do() {
    programs_are_the_same(&NARROW, 250);
}
