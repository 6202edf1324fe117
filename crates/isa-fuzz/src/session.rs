//! Many cases: the host and the software CPU run at the same time, and what differs is collected.

use std::collections::BTreeMap;

use emulator::insn::Handler;
use iced_x86::{Code, Instruction, Mnemonic};

use crate::blocks::instruction_at;
use crate::case::{COMPLETED, Outcome, TIMED_OUT};
use crate::compare::difference;
use crate::coverage::Coverage;
use crate::exclusions::endless;
use crate::generate::{Generated, Generator};
use crate::interpreter::{Executor, Subject, model};
use crate::layout::Mode;
use crate::machine::Machine;
use crate::oracle::{BATCH, Oracle, OracleError};

/// What cases are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Single instructions, of all modes.
    Instructions,
    /// Whole programs of 64-bit or flat 32-bit code, interpreted and translated.
    Programs,
}

/// What to run.
pub struct Config {
    /// Where the cases come from.
    pub seed: u64,
    /// What they are made of.
    pub kind: Kind,
    /// The sizes of code, in turn.
    pub modes: Vec<Mode>,
    /// Which encodings.
    pub only: Box<dyn Fn(Code) -> bool>,
    /// A handler to use for a mnemonic instead of its own.
    pub replaced: Option<(Mnemonic, Handler)>,
    /// How many mismatches of one encoding are kept.
    pub mismatches_of_each: u32,
}

impl Config {
    /// Single instructions, all modes and encodings.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            kind: Kind::Instructions,
            modes: Mode::ALL.to_vec(),
            only: Box::new(|_| true),
            replaced: None,
            mismatches_of_each: 1,
        }
    }

    /// Programs of a size of code other than 16.
    pub fn programs(seed: u64, mode: Mode) -> Self {
        Self { kind: Kind::Programs, modes: vec![mode], ..Self::new(seed) }
    }
}

/// A case in which both sides differ.
pub struct Mismatch {
    /// Its number and state.
    pub generated: Generated,
    /// What differs.
    pub difference: String,
}

/// What came of the cases.
#[derive(Default)]
pub struct Report {
    /// Cases that all sides ran.
    pub cases: u64,
    /// Those that raised an exception, on the host.
    pub exceptions: u64,
    /// By vector.
    pub by_vector: BTreeMap<u8, u64>,
    /// Which encodings were executed.
    pub coverage: Coverage,
    /// Cases that differ.
    pub different: u64,
    /// The first of those for each encoding.
    pub mismatches: Vec<Mismatch>,
    /// How many cases were excluded for which reason.
    pub excluded: BTreeMap<&'static str, u64>,
}

/// All sides.
pub struct Session {
    config: Config,
    generator: Generator,
    oracle: Oracle,
    executors: Vec<Box<dyn Executor>>,
    /// What came out so far.
    pub report: Report,
    seen: BTreeMap<(Code, Mode), u32>,
}

impl Session {
    /// Starts the oracle and sets the software CPU up.
    ///
    /// # Errors
    /// [`OracleError`].
    pub fn new(config: Config) -> Result<Self, OracleError> {
        let oracle = Oracle::start()?;
        let executors = executors(&config)
            .map_err(|source| OracleError::Host { what: "setting the software CPU up", source })?;
        let model = model();
        let allowed = |code: Code| code == Code::INVALID || model.allows(code.cpuid_features());
        let generator = Generator::new(config.seed, allowed, &config.only);
        let report = Report::default();
        Ok(Self { config, generator, oracle, executors, report, seen: BTreeMap::new() })
    }

    /// Runs the cases of these numbers.
    ///
    /// # Errors
    /// The oracle cannot be started again after one of them took it along.
    pub fn run(&mut self, numbers: std::ops::Range<u64>) -> Result<(), OracleError> {
        let mut waiting: Option<(usize, Vec<Generated>)> = None;
        let mut numbers = numbers.peekable();
        while numbers.peek().is_some() {
            let batch = self.generate(&mut numbers);
            let ticket = self.submit(&batch);
            if let Some((before, finished)) = waiting.replace((ticket, batch))
                && !self.finish(before, &finished)?
                && let Some((ticket, batch)) = &mut waiting
            {
                // It went to the oracle that is gone.
                *ticket = self.submit(batch);
            }
        }
        if let Some((ticket, batch)) = waiting {
            self.finish(ticket, &batch)?;
        }
        Ok(())
    }

    fn submit(&mut self, batch: &[Generated]) -> usize {
        self.oracle.submit(batch.iter().map(|generated| &generated.case))
    }

    fn generate(&mut self, numbers: &mut impl Iterator<Item = u64>) -> Vec<Generated> {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH {
            let Some(number) = numbers.next() else { break };
            let mode = self.config.modes[number as usize % self.config.modes.len()];
            if self.config.kind == Kind::Programs {
                batch.push(self.generator.program(number, mode));
                continue;
            }
            match self.generator.case(number, mode) {
                Ok(generated) => batch.push(generated),
                Err(reason) => *self.report.excluded.entry(reason).or_default() += 1,
            }
        }
        batch
    }

    /// Waits for a batch and compares it. Gives false where the oracle did not survive it, and is a new one.
    fn finish(&mut self, ticket: usize, batch: &[Generated]) -> Result<bool, OracleError> {
        let programs = self.config.kind == Kind::Programs;
        // What does not end on the host is not run here.
        let mut run = |cases: &[Generated]| -> Vec<Vec<Outcome>> {
            let each =
                |executor: &mut Box<dyn Executor>| cases.iter().map(|one| executor.run(&one.case)).collect();
            self.executors.iter_mut().map(each).collect()
        };
        let ours = if programs { Vec::new() } else { run(batch) };
        let host = match self.oracle.wait(ticket) {
            Ok(host) => host,
            Err(OracleError::Lost { case, status }) => {
                if let Some(generated) = batch.get(case) {
                    let difference = format!("  {}\n", OracleError::Lost { case, status });
                    self.report.mismatches.push(Mismatch { generated: generated.clone(), difference });
                }
                self.oracle = Oracle::start()?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        for (n, (generated, host)) in batch.iter().zip(host).enumerate() {
            let instruction = instruction(generated, host, programs);
            if let Some(reason) = undecided(&instruction, generated, host, programs) {
                *self.report.excluded.entry(reason).or_default() += 1;
                continue;
            }
            count(&mut self.report, &instruction, host);
            for (side, executor) in self.executors.iter_mut().enumerate() {
                let own = if programs { executor.run(&generated.case) } else { ours[side][n] };
                let text = difference(&generated.case, &instruction, host, &own);
                if text.is_empty() {
                    continue;
                }
                self.report.different += 1;
                let seen = self.seen.entry((instruction.code(), generated.case.mode)).or_default();
                *seen += 1;
                if *seen <= self.config.mismatches_of_each {
                    let difference = format!("  on the {}:\n{text}", executor.name());
                    self.report.mismatches.push(Mismatch { generated: generated.clone(), difference });
                }
            }
        }
        Ok(true)
    }

    /// Makes a mismatch's state as plain as it can be and still differ.
    ///
    /// # Errors
    /// [`OracleError::Lost`].
    pub fn minimize(&mut self, mismatch: &Mismatch) -> Result<Mismatch, OracleError> {
        let programs = self.config.kind == Kind::Programs;
        let named = |executor: &&mut Box<dyn Executor>| mismatch.difference.contains(executor.name());
        let Some(executor) = self.executors.iter_mut().find(named) else {
            return Ok(Mismatch {
                generated: mismatch.generated.clone(),
                difference: mismatch.difference.clone(),
            });
        };
        crate::minimize::minimize(&mut self.oracle, executor.as_mut(), mismatch, programs)
    }

    /// The line that runs a mismatch's case again.
    pub fn reproduction(&self, mismatch: &Mismatch) -> String {
        let (number, mode) = (mismatch.generated.number, mismatch.generated.case.mode.bits());
        let what = match self.config.kind {
            Kind::Instructions => format!("--mode {mode}"),
            Kind::Programs => format!("--programs 1 --mode {mode}"),
        };
        format!("cargo xtask fuzz-isa --seed {} {what} --first {number} --cases 1", self.config.seed)
    }
}

fn executors(config: &Config) -> std::io::Result<Vec<Box<dyn Executor>>> {
    Ok(match config.kind {
        Kind::Instructions => {
            let mut subject = Subject::new()?;
            subject.replaced = config.replaced;
            vec![Box::new(subject)]
        }
        Kind::Programs => vec![Box::new(Machine::new(false)?), Box::new(Machine::new(true)?)],
    })
}

/// The instruction that a case's outcome is about.
pub(crate) fn instruction(generated: &Generated, host: &Outcome, programs: bool) -> Instruction {
    match (programs, host.vector) {
        (false, _) => generated.instruction,
        // The last instruction of a program defines the flags.
        (true, COMPLETED) => Instruction::with(Code::Nopd),
        (true, _) => instruction_at(&generated.case, host.rip),
    }
}

/// Why a case cannot be compared, once the host has run it.
fn undecided(
    instruction: &Instruction,
    generated: &Generated,
    host: &Outcome,
    programs: bool,
) -> Option<&'static str> {
    match host.vector {
        TIMED_OUT if programs => Some("overwrites the count of its rounds, and does not end"),
        TIMED_OUT => endless(instruction, &generated.case),
        _ => None,
    }
}

fn count(report: &mut Report, instruction: &Instruction, host: &Outcome) {
    report.cases += 1;
    report.coverage.count(instruction.code(), host.vector == COMPLETED);
    if host.vector != COMPLETED {
        report.exceptions += 1;
        *report.by_vector.entry(host.vector).or_default() += 1;
    }
}
