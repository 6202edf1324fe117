//! `cargo xtask`: the project's chores by one name. What each does is written where it is used: the checks in `.ci/run`, the
//! benchmarks in `benches/`.

mod fuzz_isa;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;

const HELP: &str = "\
cargo xtask check                  everything that must hold before a change lands: .ci/run
cargo xtask bench [NAME [ARGS…]]   all benchmarks, or one: boot, interpreter, ledger, share
cargo xtask fuzz-isa [OPTIONS]     the software CPU against the host's processor, until they differ:
                                   --seed N, --first N, --cases N, --mode 64|32|16, --programs 1,
                                   --only MNEMONIC";
/// Each is a `[[bench]]` of the root crate, the quick ones first.
const BENCHES: [&str; 4] = ["ledger", "interpreter", "boot", "share"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["check"] => root().and_then(|root| run(&mut Command::new(root.join(".ci/run")))),
        ["bench"] => BENCHES.iter().try_for_each(|name| bench(name, &[])),
        ["bench", name, ref more @ ..] if BENCHES.contains(&name) => bench(name, more),
        ["fuzz-isa", ref options @ ..] => fuzz_isa::run(options),
        [] | ["help" | "--help" | "-h"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(name: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo).args(["bench", "--bench", name, "--"]).args(arguments))
}

/// Runs a program in the workspace's folder.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.current_dir(root()?).status().with_context(|| format!("cannot start {program}"))?;
    anyhow::ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

fn root() -> anyhow::Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace has no folder")
}
