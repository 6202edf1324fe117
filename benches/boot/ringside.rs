//! Ringside's own legs.

use std::process::Command;
use std::time::Duration;

use crate::inputs::{AT_THE_SHELL, Inputs};
use crate::leg::{Details, Kind, Leg, Work};
use crate::options::Options;
use crate::process::{Console, Finished, Job};

/// The ledger off and on, next to each other so that they can be paired, and the kernel that unpacks itself.
pub fn legs(inputs: &Inputs, options: &Options) -> Vec<Leg> {
    [
        (Kind::Ringside, "ringside", &["--exits", "off"][..]),
        (Kind::RingsideLedger, "ringside, ledger on", &["--exits", "table"]),
        (Kind::RingsideStub, "ringside --boot stub", &["--exits", "off", "--boot", "stub"]),
    ]
    .into_iter()
    .map(|(kind, name, arguments)| {
        let mut all: Vec<String> = ["run", "--engine", "soft", "--stats", "--guest", &inputs.guest]
            .into_iter()
            .chain(arguments.iter().copied())
            .map(str::to_owned)
            .collect();
        all.extend(["--memory".into(), format!("{}M", options.memory), "--initrd".into()]);
        let (program, initrd) = (inputs.ringside.clone(), inputs.initrd.clone());
        Leg {
            name: name.to_owned(),
            kind,
            runs: options.runs,
            work: Work::Counted,
            job: Box::new(move || {
                let mut command = Command::new(&program);
                command.args(&all).arg(&initrd);
                Job { command, console: Console::Stdout, marks: vec![AT_THE_SHELL], stop_at_last_mark: false }
            }),
            details: Box::new(details),
        }
    })
    .collect()
}

/// Reads what `--stats` and the ledger's table say.
fn details(finished: &Finished) -> Details {
    let instructions: Vec<f64> = finished.errors.lines().filter_map(instructions).collect();
    Details {
        instructions: (!instructions.is_empty()).then(|| instructions.iter().sum()),
        first_instruction: finished.errors.lines().find_map(first_instruction),
        exits: finished.errors.lines().find_map(exits),
        own_memory: finished.errors.lines().find_map(own_memory),
        before_kernel: None,
    }
}

/// `vCPU 0    1234 instructions, …`
fn instructions(line: &str) -> Option<f64> {
    let mut words = line.strip_prefix("vCPU ")?.split_whitespace().skip(1);
    let count = words.next()?.parse().ok()?;
    (words.next() == Some("instructions,")).then_some(count)
}

/// `before the first instruction  0.123 s`
fn first_instruction(line: &str) -> Option<Duration> {
    let seconds =
        line.strip_prefix("before the first instruction")?.trim().strip_suffix(" s")?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// `VM exits: 12,345 in 3.2 s (…`
fn exits(line: &str) -> Option<u64> {
    let (count, _) = line.strip_prefix("VM exits: ")?.split_once(" in ")?;
    count.chars().filter(char::is_ascii_digit).collect::<String>().parse().ok()
}

/// `memory beside it   51.3 MiB`
fn own_memory(line: &str) -> Option<f64> {
    line.strip_prefix("memory beside it")?.trim().strip_suffix(" MiB")?.parse().ok()
}
