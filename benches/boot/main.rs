//! Boots the same Debian kernel and initramfs on Ringside, QEMU's TCG and Bochs, in turn, and prints how long each
//! took. `cargo bench --bench boot -- --help` lists the options; benches/README.md says what the columns mean.
//!
//! It measures and never judges: whatever the numbers are, it ends well. A peer that is not installed is named and
//! left out.

mod bochs;
mod inputs;
mod leg;
mod options;
mod process;
mod qemu;
mod report;
mod ringside;

use std::process::ExitCode;

use inputs::Inputs;
use leg::{Leg, Results};
use options::Options;

fn main() -> ExitCode {
    match bench(&Options::from_command_line()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> anyhow::Result<()> {
    let inputs = Inputs::prepare(options)?;
    println!("{}", report::heading(&inputs, options));
    let mut legs = ringside::legs(&inputs, options);
    if options.wants("qemu") {
        match qemu::find() {
            Ok(program) => legs.extend(qemu::legs(&program, &inputs, options)),
            Err(missing) => println!("{missing}"),
        }
    }
    if options.wants("bochs") {
        match bochs::find() {
            Ok(installation) => legs.push(bochs::leg(&installation, &inputs, options)?),
            Err(missing) => println!("{missing}"),
        }
    }
    let results = run_in_turn(&legs, options);
    println!("\n{}", report::table(&legs, &results));
    println!("{}", report::shell(&results, &legs));
    println!("{}", report::ledger(&results, &legs));
    println!("{}", report::memory(&results, &legs));
    println!("{}", report::start(&results, &legs));
    println!("{}", report::NOTES);
    Ok(())
}

/// One run of each leg, then the next, so that a change of the host's mood meets them all.
fn run_in_turn(legs: &[Leg], options: &Options) -> Results {
    let mut results = Results::new(legs.len());
    for round in 0..options.runs {
        // Forwards and backwards: nobody always runs after the same neighbour.
        let order: Vec<usize> =
            if round % 2 == 0 { (0..legs.len()).collect() } else { (0..legs.len()).rev().collect() };
        for at in order {
            let leg = &legs[at];
            if round >= leg.runs || results.has_failed(at) {
                continue;
            }
            eprint!("round {} of {}: {} … ", round + 1, leg.runs, leg.name);
            let result = leg.run(options.timeout());
            match &result {
                Ok(run) => eprintln!("{}", run.summary()),
                Err(error) => eprintln!("failed: {error:#}"),
            }
            results.add(at, result);
        }
    }
    results
}
