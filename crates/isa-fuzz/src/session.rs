//! Many cases: both sides run at the same time, and what differs is collected.

use std::collections::BTreeMap;

use emulator::insn::Handler;
use iced_x86::{Code, Mnemonic};

use crate::case::{COMPLETED, Case, TIMED_OUT};
use crate::compare::difference;
use crate::exclusions::endless;
use crate::generate::{Generated, Generator};
use crate::interpreter::Subject;
use crate::layout::Mode;
use crate::oracle::{BATCH, Oracle, OracleError};

/// What to run.
pub struct Config {
    /// Where the cases come from.
    pub seed: u64,
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
    /// All modes and encodings.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            modes: Mode::ALL.to_vec(),
            only: Box::new(|_| true),
            replaced: None,
            mismatches_of_each: 1,
        }
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
    /// Cases that both sides ran.
    pub cases: u64,
    /// Those that raised an exception, on the host.
    pub exceptions: u64,
    /// By vector.
    pub by_vector: BTreeMap<u8, u64>,
    /// Cases of each encoding that completed.
    pub completed: BTreeMap<Code, u64>,
    /// Cases that differ.
    pub different: u64,
    /// The first of those for each encoding.
    pub mismatches: Vec<Mismatch>,
    /// How many cases were excluded for which reason.
    pub excluded: BTreeMap<&'static str, u64>,
}

/// Both sides.
pub struct Session {
    config: Config,
    generator: Generator,
    oracle: Oracle,
    subject: Subject,
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
        let mut subject = Subject::new()
            .map_err(|source| OracleError::Host { what: "setting the software CPU up", source })?;
        subject.replaced = config.replaced;
        let generator = Generator::new(config.seed, &config.only);
        Ok(Self { config, generator, oracle, subject, report: Report::default(), seen: BTreeMap::new() })
    }

    /// Runs the cases of these numbers.
    ///
    /// # Errors
    /// [`OracleError::Lost`].
    pub fn run(&mut self, numbers: std::ops::Range<u64>) -> Result<(), OracleError> {
        let mut waiting: Option<(usize, Vec<Generated>)> = None;
        let mut numbers = numbers.peekable();
        while numbers.peek().is_some() {
            let batch = self.generate(&mut numbers);
            let cases: Vec<Case> = batch.iter().map(|generated| generated.case).collect();
            let ticket = self.oracle.submit(&cases);
            if let Some((ticket, batch)) = waiting.replace((ticket, batch)) {
                self.finish(ticket, &batch)?;
            }
        }
        waiting.map_or(Ok(()), |(ticket, batch)| self.finish(ticket, &batch))
    }

    fn generate(&mut self, numbers: &mut impl Iterator<Item = u64>) -> Vec<Generated> {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH {
            let Some(number) = numbers.next() else { break };
            let mode = self.config.modes[number as usize % self.config.modes.len()];
            match self.generator.case(number, mode) {
                Ok(generated) if !self.subject.model().allows(generated.instruction.cpuid_features()) => {
                    *self.report.excluded.entry("is of a feature that no model has").or_default() += 1;
                }
                Ok(generated) => batch.push(generated),
                Err(reason) => *self.report.excluded.entry(reason).or_default() += 1,
            }
        }
        batch
    }

    fn finish(&mut self, ticket: usize, batch: &[Generated]) -> Result<(), OracleError> {
        let ours: Vec<_> = batch.iter().map(|generated| self.subject.run(&generated.case)).collect();
        let report = &mut self.report;
        let host = self.oracle.wait(ticket).inspect_err(|error| {
            if let OracleError::Lost { case, .. } = error
                && let Some(generated) = batch.get(*case)
            {
                let difference = format!("  {error}\n");
                report.mismatches.push(Mismatch { generated: generated.clone(), difference });
            }
        })?;
        for ((generated, host), ours) in batch.iter().zip(host).zip(&ours) {
            let code = generated.instruction.code();
            report.cases += 1;
            if host.vector == COMPLETED {
                *report.completed.entry(code).or_default() += 1;
            } else {
                report.exceptions += 1;
                *report.by_vector.entry(host.vector).or_default() += 1;
            }
            if host.vector == TIMED_OUT
                && let Some(reason) = endless(&generated.instruction, &generated.case)
            {
                *report.excluded.entry(reason).or_default() += 1;
                continue;
            }
            let difference = difference(&generated.case, &generated.instruction, host, ours);
            if !difference.is_empty() {
                report.different += 1;
                let seen = self.seen.entry((code, generated.case.mode)).or_default();
                *seen += 1;
                if *seen <= self.config.mismatches_of_each {
                    report.mismatches.push(Mismatch { generated: generated.clone(), difference });
                }
            }
        }
        Ok(())
    }

    /// Makes a mismatch's state as plain as it can be and still differ.
    ///
    /// # Errors
    /// [`OracleError::Lost`].
    pub fn minimize(&mut self, mismatch: &Mismatch) -> Result<Mismatch, OracleError> {
        crate::minimize::minimize(&mut self.oracle, &mut self.subject, mismatch)
    }

    /// The line that runs a mismatch's case again.
    pub fn reproduction(&self, mismatch: &Mismatch) -> String {
        let (number, mode) = (mismatch.generated.number, mismatch.generated.case.mode.bits());
        format!("cargo xtask fuzz-isa --seed {} --mode {mode} --first {number} --cases 1", self.config.seed)
    }
}
