//! The same programs natively, in Ringside and in QEMU's TCG: what one unit of each workload costs.
//!
//! ```text
//! workload/*.c ──cc──> program  ─┐
//! inputs/, made files            ├─> native, or into Debian's initramfs ──> ringside, qemu
//! Debian's packages ──> programs ┘
//! ```
//!
//! What counts is the processor time that the host's kernel accounts to the process (for a machine: to all its threads)
//! between two lines that the program prints, so that what else runs on the host does little harm.

mod options;
mod processor_time;
mod programs;
mod report;
mod side;
mod workloads;

use std::process::Command;

use options::Options;
use report::Best;
use side::{Inputs, Results};
use workloads::{THREADS, Workload};

fn main() -> anyhow::Result<()> {
    let options = Options::from_command_line();
    let selected = workloads::select(&options.only, options.wants("programs"))?;
    let inputs = Inputs::prepare(&options, &selected)?;
    let mut sides = Sides::default();
    for round in 1..=options.runs {
        sides.add_round(&inputs, &selected, &options, round)?;
    }
    print!("{}", report::table(&selected, &sides.native, &sides.ringside, &sides.qemu));
    print!("{}", report::pair("vCPUs", &sides.ringside, &sides.pair).unwrap_or_default());
    print!(
        "{}",
        report::pair("processors of the host", &sides.native_on_one, &sides.native).unwrap_or_default()
    );
    if !sides.wrong.is_empty() {
        println!("WRONG: the checksum of {} differed between runs", sides.wrong.join(", "));
    }
    Ok(())
}

/// What each side needed at best.
#[derive(Default)]
struct Sides {
    native: Best,
    ringside: Best,
    /// Ringside with two vCPUs.
    pair: Best,
    /// The same program natively, on one of the host's processors.
    native_on_one: Best,
    qemu: Best,
    /// Workloads whose checksum was not always the same on a side.
    wrong: Vec<String>,
}

impl Sides {
    /// One run of everything on each side.
    fn add_round(
        &mut self,
        inputs: &Inputs,
        selected: &[&Workload],
        options: &Options,
        round: usize,
    ) -> anyhow::Result<()> {
        eprintln!("round {round} of {}", options.runs);
        let script = inputs.script(selected, options)?;
        self.wrong.extend(self.native.add(side::native(inputs, selected, options)?));
        let command = inputs.ringside(options, 1, &script);
        self.wrong.extend(self.ringside.add(run("ringside", command, selected, options)?));
        let threads: Vec<&Workload> = selected.iter().copied().filter(|all| all.name == THREADS).collect();
        if options.wants("pair") && !threads.is_empty() {
            let command = inputs.ringside(options, 2, &inputs.script(&threads, options)?);
            self.wrong.extend(self.pair.add(run("ringside with two vCPUs", command, &threads, options)?));
            self.wrong.extend(self.native_on_one.add(side::native_on_one(inputs, threads[0], options)?));
        }
        if options.wants("qemu")
            && let Some(command) = inputs.qemu(&script)?
        {
            self.wrong.extend(self.qemu.add(run("qemu", command, selected, options)?));
        }
        Ok(())
    }
}

/// Runs a machine, and says what did not run in it.
fn run(side: &str, command: Command, selected: &[&Workload], options: &Options) -> anyhow::Result<Results> {
    eprintln!("  {side}");
    let (results, lost) = side::machine(command, selected, options)?;
    if !lost.is_empty() {
        eprintln!("{side} did not run: {}", lost.join(", "));
    }
    Ok(results)
}
