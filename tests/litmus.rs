//! The memory model between vCPUs: no outcome that the processor's ordering forbids, no torn access, no lost locked
//! operation. The litmus tests are a program of threads in Debian (`tests/guest/litmus.c`).

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use common::c_program::Programs;
use common::{run_within, stderr};

const LIMIT: Duration = Duration::from_secs(300);

/// Milliseconds for each of the litmus tests; the environment variable `RINGSIDE_LITMUS_MS` names another number.
const MILLISECONDS: u64 = 100;

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::new(&["litmus"]))
}

/// Runs all of the litmus tests on so many vCPUs.
#[track_caller]
fn nothing_forbidden(cpus: u32, jit: &str) {
    let milliseconds = std::env::var("RINGSIDE_LITMUS_MS").ok().and_then(|text| text.parse().ok());
    let milliseconds: u64 = milliseconds.unwrap_or(MILLISECONDS);
    let limit = LIMIT + Duration::from_millis(milliseconds * 200);
    let mut run = programs().run(&format!("/ringside/litmus {milliseconds} {cpus}"));
    let output = run_within(run.args(["--jit", jit, "--cpus", &cpus.to_string()]), limit);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{cpus} vCPUs, --jit {jit}:\n{text}");
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert_eq!(text.lines().last(), Some("right"), "{text}");
    // Each of the tests has run, and the threads have met: this one shows what one store buffer hides.
    assert!(text.lines().count() >= 38, "{text}");
    let reordered = text.lines().find(|line| line.starts_with("SB  ")).expect("store buffering");
    let runs: u64 = reordered.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(runs > 1000, "{reordered}");
}

#[test]
fn two_vcpus_order_memory_as_processors_do() {
    nothing_forbidden(2, "on");
}

#[test]
fn two_interpreted_vcpus_order_memory_as_processors_do() {
    nothing_forbidden(2, "off");
}

#[test]
fn four_vcpus_order_memory_as_processors_do() {
    nothing_forbidden(4, "on");
}

/// The test can fail: natively, where nothing else keeps a load behind an earlier store, it sees them reordered.
#[test]
fn the_program_sees_reordered_loads_natively() {
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        return;
    }
    let mut command = std::process::Command::new(programs().native("litmus"));
    let output = run_within(command.args(["60", "2"]), LIMIT);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let seen = |name: &str| {
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(name));
        let count = line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok());
        count.expect("a count")
    };
    assert!(seen("SB") + seen("R") + seen("n6") > 0, "{text}");
}
