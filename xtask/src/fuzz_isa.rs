//! `cargo xtask fuzz-isa`: random instructions on the software CPU and on the host's processor, until they differ.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use isa_fuzz::{Config, Kind, Mode, Session};

/// Cases between two lines of progress.
const ROUND: u64 = 500_000;

/// What to run. Without a number of cases it does not end.
struct Options {
    seed: Option<u64>,
    first: u64,
    cases: u64,
    modes: Vec<Mode>,
    programs: bool,
    /// A mnemonic.
    only: Option<String>,
}

fn parse(words: &[&str]) -> Result<Options> {
    let mut options = Options {
        seed: None,
        first: 0,
        cases: u64::MAX,
        modes: Mode::ALL.to_vec(),
        programs: false,
        only: None,
    };
    for pair in words.chunks(2) {
        let [option, value] = pair else { bail!("{} needs a value", pair.concat()) };
        if *option == "--only" {
            options.only = Some(value.to_lowercase());
            continue;
        }
        let number: u64 = value.parse().with_context(|| format!("{option} {value}"))?;
        match *option {
            "--seed" => options.seed = Some(number),
            "--first" => options.first = number,
            "--cases" => options.cases = number,
            "--programs" => options.programs = number != 0,
            "--mode" => {
                let mode = u32::try_from(number).ok().and_then(Mode::from_bits);
                options.modes = vec![mode.context("a mode is 64, 32 or 16")?];
            }
            _ => bail!("{option} is no option"),
        }
    }
    Ok(options)
}

/// Runs it. The first mismatch ends it with an error.
pub fn run(words: &[&str]) -> Result<()> {
    let Options { seed, first, cases, modes, programs, only } = parse(words)?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = seed.unwrap_or(time);
    println!("seed {seed}");
    let kind = if programs { Kind::Programs } else { Kind::Instructions };
    let mut modes = modes;
    if programs {
        modes.retain(|&mode| mode != Mode::Bits16);
        anyhow::ensure!(!modes.is_empty(), "programs are of 64-bit or 32-bit code");
    }
    let mut config = Config { modes, kind, ..Config::new(seed) };
    if let Some(only) = only {
        config.only = Box::new(move |code| format!("{:?}", code.mnemonic()).to_lowercase() == only);
    }
    let mut session = Session::new(config)?;
    let (start, end) = (Instant::now(), first.saturating_add(cases));
    let mut next = first;
    while next < end {
        let until = end.min(next.saturating_add(ROUND));
        session.run(next..until)?;
        next = until;
        let report = &session.report;
        let rate = report.cases as f64 / start.elapsed().as_secs_f64();
        let (cases, vectors) = (report.cases, &report.by_vector);
        println!(
            "{cases} cases, {rate:.0} in a second; {} with an exception: {vectors:?}",
            report.exceptions
        );
        let mismatches = std::mem::take(&mut session.report.mismatches);
        for mismatch in &mismatches {
            println!("{mismatch}  again: {}", session.reproduction(mismatch));
            println!("plainer: {}", session.minimize(mismatch)?);
        }
        if !mismatches.is_empty() {
            bail!("{} cases differ", session.report.different);
        }
    }
    Ok(())
}
