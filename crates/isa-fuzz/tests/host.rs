//! The software CPU against the host's processor.

use std::collections::BTreeSet;

use iced_x86::{Code, Mnemonic};
use isa_fuzz::interpreter::model;
use isa_fuzz::{Config, Mode, Session, encode, exclusions, host};

/// A tenth of them is excluded; a million is left, a few hundred for each encoding of each mode.
const CASES: u64 = 1_120_000;
/// Programs, each of them interpreted and translated.
const PROGRAMS: u64 = 120_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs cases, and fails where the sides differ.
fn agree(config: Config, cases: u64) -> Session {
    let mut session = Session::new(config).expect("an oracle");
    let start = std::time::Instant::now();
    let first = number("ISA_FUZZ_FIRST").unwrap_or(0);
    session.run(first..first + cases).expect("the oracle stays");
    let report = &session.report;
    println!(
        "{} cases in {:.1} s, {} raised an exception {:?}, {} encodings completed; {} differ",
        report.cases,
        start.elapsed().as_secs_f64(),
        report.exceptions,
        report.by_vector,
        report.coverage.encodings(),
        report.different,
    );
    println!("excluded: {:#?}", report.excluded);
    let mismatches = std::mem::take(&mut session.report.mismatches);
    for mismatch in mismatches.iter().take(100) {
        let plain = session.minimize(mismatch).expect("the oracle stays");
        println!("{plain}  again: {}\n", session.reproduction(mismatch));
    }
    assert!(mismatches.is_empty(), "{} encodings differ", mismatches.len());
    session
}

#[test]
fn a_million_random_instructions_do_what_the_host_does() {
    let session = agree(Config::new(0x5eed), number("ISA_FUZZ_CASES").unwrap_or(CASES));
    let counts = session.report.coverage.by_mnemonic();
    for (mnemonic, (executed, completed)) in &counts {
        println!("{mnemonic:20} {executed:7} {completed:7}");
    }
    let executed =
        |mnemonic: &Mnemonic| counts.get(&format!("{mnemonic:?}")).is_some_and(|count| count.0 >= 20);
    let missing: Vec<_> = comparable().into_iter().filter(|mnemonic| !executed(mnemonic)).collect();
    assert!(missing.is_empty(), "hardly executed: {missing:?}");
}

/// What the model promises, some mode has, and is not excluded whatever its operands are.
fn comparable() -> BTreeSet<Mnemonic> {
    let model = model();
    let promised = |code: &Code| {
        let mut instruction = iced_x86::Instruction::new();
        instruction.set_code(*code);
        model.allows(code.cpuid_features())
            && exclusions::excluded(&instruction).is_none()
            && host::has_another(&instruction, Mode::Bits64, &[]).is_none()
    };
    Mode::ALL.iter().flat_map(|&mode| encode::codes(mode)).filter(promised).map(Code::mnemonic).collect()
}

#[test]
fn random_programs_do_what_the_host_does_interpreted_and_translated() {
    agree(Config::programs(0x5eed, Mode::Bits64), number("ISA_FUZZ_PROGRAMS").unwrap_or(PROGRAMS));
}

#[test]
fn random_programs_of_flat_code_do_what_the_host_does_interpreted_and_translated() {
    agree(Config::programs(0x5eed, Mode::Bits32), number("ISA_FUZZ_PROGRAMS").unwrap_or(PROGRAMS));
}
