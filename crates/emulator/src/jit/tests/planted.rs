//! Random programs with an interrupt at every block boundary, and with a page fault at every access: translated code must
//! be in the interpreter's exact state each time.

use x86::Flags;

use super::generator::{Forms, Program, Random, program};
use super::machine::{Machine, Start, VECTOR, difference};
use super::words::{NARROW, WIDE, Words};
use crate::interpreter::Leave;
use crate::jit::Settings;
use crate::lockstep::difference::{same_state, same_system_state};
use crate::lockstep::follow::{Progress, Watch, follow};
use crate::testing::{self, TABLES, get, put};

/// Programs of each kind in `cargo test`; the environment variable `RINGSIDE_JIT_PROGRAMS` names another number.
const PROGRAMS: u64 = 2_000;
/// Slices of one program, at most.
const SLICES: usize = 3_000;
const PAGE_FAULT: u8 = 14;
/// The page-table entries of all data that programs use: the window's pages, the stack and the counter.
const ENTRIES: [(u64, u64); 3] = [(TABLES + 0x5000, 16), (TABLES + 0x4038, 1), (TABLES + 0x4400, 1)];

/// A program on both.
struct Pair<'a> {
    interpreted: &'a mut Machine,
    translated: &'a mut Machine,
    watch: Watch,
    user: bool,
}

/// How a slice ended.
#[derive(PartialEq)]
enum End {
    /// The next instruction is to be run.
    Runs,
    /// It halted, or died.
    Stopped,
}

fn machines(words: &Words, seed: u64) -> [Machine; 2] {
    let settings =
        Settings { code_bytes: 1 << 20, hot: (seed % 2) as u32, leave_early: true, ..Settings::default() };
    [Machine::new(words.bits, None), Machine::new(words.bits, Some(settings))]
}

impl Pair<'_> {
    /// What is due, and then one block of translated code.
    fn slice(&mut self) -> Result<End, String> {
        let (one, other) = (&mut self.translated.interpreter, &mut self.interpreted.interpreter);
        self.watch.start();
        let due = (one.boundary(), other.boundary());
        if due.0 != due.1 {
            return Err(format!("between blocks: {:?}, {:?}", due.0, due.1));
        }
        if due.0.is_err() {
            return self.compare().map(|()| End::Stopped);
        }
        let leave = if one.steps_alone() { Some(one.single()) } else { one.run_block() };
        let stopped = matches!(leave, Some(Leave::Exit(_)));
        let leave = follow(other, &mut self.watch, Progress::of(one))?;
        if stopped != matches!(leave, Some(Leave::Exit(_))) {
            return Err("one stops".into());
        }
        self.compare().map(|()| if stopped { End::Stopped } else { End::Runs })
    }

    /// Compares, and makes undefined flags the same: those in the registers, or in the frame that they were pushed to.
    fn compare(&mut self) -> Result<(), String> {
        let undefined = u64::from(self.watch.undefined);
        if undefined != 0 {
            if let Some((_, frame)) = self.in_handler() {
                let flags: u64 = get(&self.translated.interpreter.cpu, frame + 16);
                let own: u64 = get(&self.interpreted.interpreter.cpu, frame + 16);
                if (flags ^ own) & !undefined != 0 {
                    return Err(format!("pushed flags {own:#x}, translated {flags:#x}"));
                }
                put(&self.interpreted.interpreter.cpu, frame + 16, flags);
            }
            let flags = self.translated.interpreter.cpu.rflags();
            let cpu = &mut self.interpreted.interpreter.cpu;
            let merged = cpu.rflags() & !undefined | flags & undefined;
            cpu.set_rflags(merged, Flags::ARITHMETIC);
        }
        let (a, b) = (&self.interpreted.interpreter.cpu, &self.translated.interpreter.cpu);
        if same_state(a, b, 0, true) && same_system_state(a, b) {
            return Ok(());
        }
        let registers = a.registers.all().iter().zip(b.registers.all()).enumerate();
        let mut text = String::new();
        for (n, (x, y)) in registers.filter(|(_, (x, y))| x != y) {
            text += &format!("register {n}: {x:#x} translated {y:#x}\n");
        }
        let other = [("rip", a.rip, b.rip), ("rflags", a.rflags(), b.rflags()), ("cr2", a.cr2, b.cr2)];
        for (name, x, y) in other.into_iter().filter(|(_, x, y)| x != y) {
            text += &format!("{name}: {x:#x} translated {y:#x}\n");
        }
        Err(format!("{text}at {:#x}, {} instructions", b.rip, b.instructions))
    }

    /// The vector, and where its frame is above the error code, where a handler is about to begin.
    fn in_handler(&self) -> Option<(u8, u64)> {
        let cpu = &self.translated.interpreter.cpu;
        let vector = (0..=VECTOR).find(|&vector| cpu.rip == testing::handler(vector))?;
        let coded = matches!(vector, 8 | 10..=14 | 17);
        Some((vector, cpu.registers.get(4) + if coded { 8 } else { 0 }))
    }

    fn both(&mut self, mut work: impl FnMut(&mut Machine)) {
        work(self.interpreted);
        work(self.translated);
    }

    /// Goes back to where a handler came from.
    fn go_back(&mut self, frame: u64) {
        let user = self.user;
        self.both(|machine| {
            let rip = get(&machine.interpreter.cpu, frame);
            machine.return_to(frame, rip, user);
        });
    }

    /// Runs the instruction that faulted alone, with all of the data there: its own faults are those that it has then.
    fn over_the_fault(&mut self, frame: u64, entries: &[(u64, u64)]) -> Result<(), String> {
        self.go_back(frame);
        self.map(entries, true);
        self.watch.start();
        self.both(|machine| {
            machine.interpreter.single();
        });
        self.compare()?;
        self.map(entries, false);
        Ok(())
    }

    /// Maps the data, or takes it away.
    fn map(&mut self, entries: &[(u64, u64)], present: bool) {
        self.both(|machine| {
            let cpu = &mut machine.interpreter.cpu;
            for &(at, before) in entries.iter().filter(|(_, before)| before & 1 != 0) {
                let now: u64 = get(cpu, at);
                // The program may have made another entry of it.
                if now & !0x61 == before & !0x61 {
                    put(cpu, at, if present { now | 1 } else { now & !1 });
                }
            }
            cpu.mmu.tlb.flush_all();
        });
    }
}

/// What is planted.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plant {
    Interrupts,
    Faults,
}

/// Runs a program; gives how often something planted was taken.
fn planted(
    machines: &mut [Machine; 2],
    program: &Program,
    start: &Start,
    plant: Plant,
) -> Result<usize, String> {
    let [interpreted, translated] = machines;
    interpreted.prepare(program, start);
    translated.prepare(program, start);
    let mut pair = Pair { interpreted, translated, watch: Watch::default(), user: start.user };
    let entry = |at: u64| (at, get::<u64>(&pair.translated.interpreter.cpu, at));
    let entries = ENTRIES.iter().flat_map(|&(first, count)| (0..count).map(move |n| first + 8 * n));
    let entries: Vec<(u64, u64)> = entries.map(entry).collect();
    if plant == Plant::Faults {
        pair.map(&entries, false);
    }
    let (mut taken, mut armed) = (0, true);
    for _ in 0..SLICES {
        let inside =
            |pair: &Pair<'_>| (program.rip..program.end).contains(&pair.translated.interpreter.cpu.rip);
        let enabled = pair.translated.interpreter.cpu.system_flags.contains(Flags::IF);
        if plant == Plant::Interrupts && armed && enabled && inside(&pair) {
            pair.both(|machine| machine.interrupt());
            armed = false;
        }
        if pair.slice()? == End::Stopped {
            // What strays from the program ends with it.
            if !pair.translated.is_in(program) || !pair.translated.holds(program) {
                return Ok(taken);
            }
            let interrupted = pair.translated.interpreter.cpu.rip.wrapping_sub(1) == testing::handler(VECTOR);
            taken += usize::from(plant == Plant::Interrupts && interrupted);
            let user = pair.user;
            if !(pair.interpreted.resume(program, user) & pair.translated.resume(program, user)) {
                break;
            }
            // A block comes first, or it would never go on.
            armed = !interrupted;
            continue;
        }
        armed |= inside(&pair);
        if let Some((PAGE_FAULT, frame)) = pair.in_handler().filter(|_| plant == Plant::Faults) {
            let rip = get(&pair.translated.interpreter.cpu, frame);
            if !(program.rip..program.end).contains(&rip) {
                return Ok(taken);
            }
            taken += 1;
            pair.over_the_fault(frame, &entries)?;
        }
    }
    match difference(pair.interpreted, pair.translated) {
        Some(at) if pair.translated.holds(program) => Err(format!("memory at {at:#x}")),
        _ => Ok(taken),
    }
}

fn programs_with(plant: Plant, words: &'static Words) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, programs) = match number("RINGSIDE_JIT_SEED") {
        Some(seed) => (seed, number("RINGSIDE_JIT_PROGRAMS").unwrap_or(1)),
        None => (0, number("RINGSIDE_JIT_PROGRAMS").unwrap_or(PROGRAMS)),
    };
    let forms = Forms::new(words);
    let mut machines = machines(words, first);
    let (mut taken, mut failures) = (0, 0);
    for seed in first..first + programs {
        let mut random = Random(seed.wrapping_mul(0x5678_1234_9abc_def1));
        let program = program(&mut random, &forms);
        let start = Start { flags: Flags::IF.bits(), ..Start::new(&mut random) };
        match planted(&mut machines, &program, &start, plant) {
            Ok(more) => taken += more,
            Err(text) => {
                failures += 1;
                if failures <= 5 {
                    let mode = if start.user { "user" } else { "kernel" };
                    eprintln!("seed {seed}, {mode}: {text}\n{}", super::blocks::describe(&program));
                }
            }
        }
        if seed % 500 == 499 || failures != 0 {
            machines = self::machines(words, seed / 500);
        }
    }
    println!("{plant:?}: {programs} programs, {taken} taken");
    assert_eq!(failures, 0, "programs differ");
    assert!(taken as u64 > 5 * programs, "only {taken}");
}

#[test]
fn an_interrupt_at_every_block_boundary_finds_the_interpreters_state() {
    programs_with(Plant::Interrupts, &WIDE);
}

#[test]
fn an_interrupt_at_every_block_boundary_of_flat_code_finds_the_interpreters_state() {
    programs_with(Plant::Interrupts, &NARROW);
}

#[test]
fn a_page_fault_at_every_access_finds_the_interpreters_state() {
    programs_with(Plant::Faults, &WIDE);
}

#[test]
fn a_page_fault_at_every_access_of_flat_code_finds_the_interpreters_state() {
    programs_with(Plant::Faults, &NARROW);
}
