//! Code that changes while it runs, in Debian: by itself, through other mappings, by other threads, by a device, under changing
//! rights, signals, single steps and breakpoints. The program checks itself (`tests/guest/stress_code.c`).

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use common::c_program::Programs;
use common::{run_within, stderr};

const LIMIT: Duration = Duration::from_secs(600);
/// Parts of the program, the device's among them.
const PARTS: usize = 14;
/// How often each part does its work; the environment variable `RINGSIDE_STRESS_SCALE` names another number.
const SCALE: u32 = 2;

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::new(&["stress_code"]))
}

fn scale() -> u32 {
    std::env::var("RINGSIDE_STRESS_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(SCALE)
}

#[track_caller]
fn is_right(cpus: u32, jit: &str, scale: u32) {
    let mut run = programs().run(&format!("/ringside/stress_code {scale} {cpus} dma"));
    run.args(["--jit", jit, "--cpus", &cpus.to_string()]);
    let mut output = run_within(&mut run, LIMIT);
    // Lockstep does not follow an undefined flag into the frame of an exception that comes right behind it.
    for _ in 0..4 {
        if output.status.code() != Some(247) || !differs_in_a_pushed_overflow_flag(&stderr(&output)) {
            break;
        }
        output = run_within(&mut run, LIMIT);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{cpus} vCPUs, --jit {jit}:\n{text}");
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert_eq!(text.lines().filter(|line| line.contains(" right ")).count(), PARTS, "{text}");
    // 17 accesses in four rounds fault: a call and a store in each, a call in the last, two calls in each move.
    let faults = format!("right, {} faults", (2 * 4 + 1 + 2 * 4) * 50 * scale);
    assert_eq!(text.lines().last(), Some(faults.as_str()), "{text}");
}

/// Whether all that lockstep found is one byte in memory that differs in bit 3: bit 11 of pushed flags.
fn differs_in_a_pushed_overflow_flag(report: &str) -> bool {
    let mut bytes = report.lines().filter_map(|line| line.trim().strip_prefix("memory at "));
    let Some((_, values)) = bytes.next().and_then(|line| line.split_once(": ")) else { return false };
    let values: Vec<_> = values
        .split(", ")
        .filter_map(|value| u8::from_str_radix(value.trim().strip_prefix("0x")?, 16).ok())
        .collect();
    bytes.next().is_none() && values.len() == 2 && values[0] ^ values[1] == 8
}

#[test]
fn changing_code_is_right_on_one_vcpu() {
    is_right(1, "on", scale());
}

#[test]
fn changing_code_is_right_on_two_vcpus() {
    is_right(2, "on", scale());
}

#[test]
fn changing_code_is_right_on_four_vcpus() {
    is_right(4, "on", scale());
}

#[test]
fn changing_code_is_right_on_one_interpreted_vcpu() {
    is_right(1, "off", 1);
}

#[test]
fn changing_code_is_right_on_two_interpreted_vcpus() {
    is_right(2, "off", 1);
}

/// The program's instructions, and what the kernel does for it, are the same on the translator and the interpreter.
#[test]
fn changing_code_runs_in_lockstep() {
    is_right(1, "lockstep", 1);
}
