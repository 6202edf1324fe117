//! A leg of the comparison: one monitor in one configuration, and what its runs gave.

use std::time::Duration;

use anyhow::Context;

use crate::inputs::AT_THE_SHELL;
use crate::process::{Finished, Job, tail};

/// Which instruction count a leg's rate is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The monitor counts its own.
    Counted,
    /// The monitor counts its own, and what it skips while the guest is halted among them.
    CountedWithIdle,
    /// As many as Ringside counts from the unpacked kernel's entry on.
    LikeUnpacked,
    /// As many as Ringside counts with the kernel unpacking itself.
    LikePacked,
}

/// One monitor in one configuration.
pub struct Leg {
    /// What the table calls it.
    pub name: String,
    /// What it is for the report.
    pub kind: Kind,
    /// How often it runs.
    pub runs: usize,
    /// Where its instruction count comes from.
    pub work: Work,
    /// Makes the command of a run.
    pub job: Box<dyn Fn() -> Job>,
    /// Reads more out of a run.
    pub details: Box<dyn Fn(&Finished) -> Details>,
}

/// What the report looks for among the legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ringside, kernel unpacked on the host: what the others are compared with.
    Ringside,
    /// The same with the ledger on.
    RingsideLedger,
    /// The kernel unpacks itself.
    RingsideStub,
    /// Another monitor.
    Peer,
    /// Another monitor, ended at the kernel's first words: no row of its own.
    FirstWords,
}

/// What a monitor says of itself.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// Instructions that the guest executed.
    pub instructions: Option<f64>,
    /// From the process's start to the guest's first instruction.
    pub first_instruction: Option<Duration>,
    /// VM exits that were counted.
    pub exits: Option<u64>,
    /// MiB that the process has resident at the end, besides the guest's RAM.
    pub own_memory: Option<f64>,
    /// From the process's start to the kernel's entry or its first words: what firmware, boot loader and
    /// unpacking take.
    pub before_kernel: Option<Duration>,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Run {
    /// From the process's start to the guest's shell.
    pub shell: Option<Duration>,
    /// From the process's start to its end, which is the guest's power-off.
    pub power_off: Duration,
    /// Processor time of it all.
    pub cpu: Duration,
    /// The rest.
    pub details: Details,
}

impl Leg {
    /// Boots once.
    ///
    /// # Errors
    /// Where the guest does not come to its shell, with the end of what was said.
    pub fn run(&self, timeout: Duration) -> anyhow::Result<Run> {
        let job = (self.job)();
        let wanted = job.marks.clone();
        let finished = job.run(timeout)?;
        if finished.marks.iter().any(Option::is_none) {
            let missing: Vec<_> = wanted
                .iter()
                .zip(&finished.marks)
                .filter(|(_, seen)| seen.is_none())
                .map(|(mark, _)| *mark)
                .collect();
            let said = format!("{}\n{}", tail(&finished.console), tail(&finished.errors));
            return Err(anyhow::anyhow!("{said}"))
                .with_context(|| format!("it ended without saying {missing:?}"));
        }
        let at_shell = wanted.iter().position(|mark| *mark == AT_THE_SHELL);
        Ok(Run {
            shell: at_shell.and_then(|at| finished.marks[at]),
            power_off: finished.elapsed,
            cpu: finished.cpu,
            details: (self.details)(&finished),
        })
    }
}

impl Run {
    /// A line for the one who waits.
    pub fn summary(&self) -> String {
        let shell =
            self.shell.map(|time| format!("{:.2} s to the shell, ", time.as_secs_f64())).unwrap_or_default();
        format!("{shell}{:.2} s in all, {:.2} s of CPU", self.power_off.as_secs_f64(), self.cpu.as_secs_f64())
    }
}

/// The runs of all legs, by the leg's place.
pub struct Results(Vec<Result<Vec<Run>, String>>);

impl Results {
    /// Nothing so far.
    pub fn new(legs: usize) -> Self {
        Self((0..legs).map(|_| Ok(Vec::new())).collect())
    }

    /// Adds a run; the first failure stays.
    pub fn add(&mut self, at: usize, result: anyhow::Result<Run>) {
        match (&mut self.0[at], result) {
            (Ok(runs), Ok(run)) => runs.push(run),
            (Ok(_), Err(error)) => self.0[at] = Err(format!("{error:#}")),
            (Err(_), _) => {}
        }
    }

    /// Whether a run failed.
    pub fn has_failed(&self, at: usize) -> bool {
        self.0[at].is_err()
    }

    /// Why, where one failed.
    pub fn failure(&self, at: usize) -> Option<&str> {
        self.0[at].as_ref().err().map(String::as_str)
    }

    /// The runs; none where one failed.
    pub fn runs(&self, at: usize) -> &[Run] {
        self.0[at].as_deref().unwrap_or_default()
    }
}

/// The middle value; `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        len if len % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}
