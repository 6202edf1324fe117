//! The software CPU against the host's processor.

use isa_fuzz::{Config, Session};

/// A tenth of them is excluded; a million is left, a few dozen for each encoding of each mode.
const CASES: u64 = 1_120_000;

#[test]
fn a_million_random_instructions_do_what_the_host_does() {
    let cases = std::env::var("ISA_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(CASES);
    let mut session = Session::new(Config::new(0x5eed)).expect("an oracle");
    let start = std::time::Instant::now();
    let first = std::env::var("ISA_FUZZ_FIRST").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    session.run(first..first + cases).expect("the oracle stays");
    let report = &session.report;
    println!(
        "{} cases in {:.1} s, {} raised an exception {:?}, {} encodings completed; {} differ",
        report.cases,
        start.elapsed().as_secs_f64(),
        report.exceptions,
        report.by_vector,
        report.completed.len(),
        report.different,
    );
    println!("excluded: {:#?}", report.excluded);
    let mismatches = std::mem::take(&mut session.report.mismatches);
    for mismatch in mismatches.iter().take(600) {
        let plain = session.minimize(mismatch).expect("the oracle stays");
        println!("{plain}  again: {}\n", session.reproduction(mismatch));
    }
    assert!(mismatches.is_empty(), "{} encodings differ", mismatches.len());
}
