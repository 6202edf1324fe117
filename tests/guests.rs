//! The bare-metal guests of `guests/`: every check that they make passes on the software CPU, interpreted and
//! translated, and the same images run in QEMU's TCG where it is installed.
//!
//! Where QEMU fails a check, the manual decides: [`qemu::DEVIATIONS`] has each of these with what the manual says.

mod common;
#[path = "common/images.rs"]
mod images;
#[path = "common/qemu.rs"]
mod qemu;

use std::process::Command;
use std::time::Duration;

use common::{ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(300);
/// What a guest's checks are worth: its exit value where all passed.
const PASSED: i32 = 0x10;

/// The lines that say what failed, and the count of the checks that were made.
fn judge(text: &str) -> (Vec<&str>, usize) {
    let lines = text.lines().map(|line| line.trim_end());
    let failed = lines.clone().filter(|line| line.starts_with("FAIL ")).collect();
    let made = lines.filter(|line| line.starts_with("PASS ") || line.starts_with("FAIL ")).count();
    (failed, made)
}

/// Runs a guest on the software CPU, interpreted and translated; all that it checks must hold.
#[track_caller]
fn passes(name: &str, cpus: &[&str]) {
    let image = images::image(name);
    for jit in ["on", "off"] {
        for cpus in cpus {
            let mut command = ringside();
            command.args(["run", "--engine", "soft", "--memory", "256M", "--testdev", "--exits", "off"]);
            command.args(["--debug-exit", "0xf4", "--jit", jit, "--cpus", cpus, "--kernel"]).arg(&image);
            let output = run_within(&mut command, LIMIT);
            let text = String::from_utf8_lossy(&output.stdout);
            let (failed, made) = judge(&text);
            let failed = failed.join("\n");
            assert!(failed.is_empty(), "{name}, --jit {jit}, --cpus {cpus}:\n{failed}");
            let status = output.status.code();
            assert_eq!(
                status,
                Some(PASSED),
                "{name}, --jit {jit}, --cpus {cpus}: {}\n{text}",
                stderr(&output)
            );
            assert!(text.contains(&format!("DONE {made} checks, 0 failed")), "{text}");
            assert!(made > 1, "{text}");
        }
    }
}

/// Runs a guest in QEMU's TCG; only what is known to differ may fail.
#[track_caller]
fn qemu_differs_only_where_known(name: &str, cpus: &str) {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "256M",
        "-smp",
        cpus,
        "-no-reboot",
        "-display",
        "none",
    ]);
    command.args([
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "-device",
        "pc-testdev",
        "-serial",
        "stdio",
    ]);
    command.arg("-kernel").arg(images::image(name));
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-system-x86_64 is not installed");
        return;
    }
    let output = run_within(&mut command, LIMIT);
    let text = String::from_utf8_lossy(&output.stdout);
    let (failed, made) = judge(&text);
    let known = |line: &&str| {
        qemu::DEVIATIONS.iter().any(|(guest, check, _)| {
            *guest == name
                && line.strip_prefix("FAIL ").is_some_and(|line| line.starts_with(&format!("{check}:")))
        })
    };
    let unknown: Vec<_> = failed.into_iter().filter(|line| !known(line)).collect();
    assert!(unknown.is_empty(), "{name} in QEMU:\n{}", unknown.join("\n"));
    assert!(text.contains(&format!("DONE {made} checks, ")), "{name} in QEMU: {}\n{text}", stderr(&output));
}

#[test]
fn exceptions() {
    passes("exceptions", &["1"]);
    qemu_differs_only_where_known("exceptions", "1");
}

#[test]
fn segments() {
    passes("segments", &["1"]);
    qemu_differs_only_where_known("segments", "1");
}
