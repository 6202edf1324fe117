//! The same static program natively, in Ringside and in QEMU's TCG: what one unit of each workload costs.
//!
//! ```text
//! workload/*.c ──cc──> program ──> native, or into Debian's initramfs ──> ringside, qemu
//! ```
//!
//! What counts is the processor time that the host's kernel accounts to the process (for a machine: to all its threads)
//! between two lines that the program prints, so that what else runs on the host does little harm.

mod options;
mod processor_time;
mod report;
mod side;
mod workloads;

use options::Options;
use report::Best;
use side::Inputs;

fn main() -> anyhow::Result<()> {
    let options = Options::from_command_line();
    let selected = workloads::select(&options.only)?;
    let inputs = Inputs::prepare(&options)?;
    let script = side::script(&selected, &options);
    let (mut native, mut ringside, mut qemu) = (Best::default(), Best::default(), Best::default());
    let mut wrong = Vec::new();
    for round in 1..=options.runs {
        eprintln!(
            "round {round} of {}: native, ringside{}",
            options.runs,
            if options.wants("qemu") { ", qemu" } else { "" }
        );
        wrong.extend(native.add(side::native(&inputs, &selected, &options)?));
        let (results, lost) = side::machine(inputs.ringside(&options, &script), &selected, &options)?;
        note_lost("ringside", &lost);
        wrong.extend(ringside.add(results));
        if options.wants("qemu")
            && let Some(command) = inputs.qemu(&options, &script)?
        {
            let (results, lost) = side::machine(command, &selected, &options)?;
            note_lost("qemu", &lost);
            wrong.extend(qemu.add(results));
        }
    }
    print!("{}", report::table(&selected, &native, &ringside, &qemu));
    if !wrong.is_empty() {
        println!("WRONG: the checksum of {} differed between runs", wrong.join(", "));
    }
    Ok(())
}

fn note_lost(side: &str, lost: &[String]) {
    if !lost.is_empty() {
        eprintln!("{side} did not run: {}", lost.join(", "));
    }
}
