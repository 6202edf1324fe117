//! 32-bit programs in Debian: plain computing, code that changes itself, signals, segments that are not flat, and pages that are
//! 32-bit and 64-bit code at once. The program checks itself (`tests/guest/flat_code.c`).

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use common::c_program::{BARE_32, Programs};
use common::{run_within, stderr};

const LIMIT: Duration = Duration::from_secs(600);
/// Parts of the program.
const PARTS: usize = 10;

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::built(&["flat_code"], &BARE_32))
}

/// Runs it, and gives what is counted.
#[track_caller]
fn is_right(cpus: u32, jit: &str, scale: u32) -> String {
    let mut run = programs().run(&format!("/ringside/flat_code {scale} {cpus}"));
    run.args(["--jit", jit, "--stats", "--cpus", &cpus.to_string()]);
    let output = run_within(&mut run, LIMIT);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{cpus} vCPUs, --jit {jit}:\n{text}");
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert_eq!(text.lines().filter(|line| line.contains(" right ")).count(), PARTS, "{text}");
    assert_eq!(text.lines().last(), Some("right"), "{text}");
    stderr(&output)
}

#[test]
fn programs_of_32_bit_code_are_right_on_one_vcpu() {
    is_right(1, "on", 4);
}

#[test]
fn programs_of_32_bit_code_are_right_on_two_vcpus() {
    is_right(2, "on", 4);
}

#[test]
fn programs_of_32_bit_code_are_right_interpreted() {
    is_right(2, "off", 1);
}

#[test]
fn programs_of_32_bit_code_are_right_in_lockstep() {
    is_right(1, "lockstep", 1);
}
