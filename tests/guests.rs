//! The bare-metal guests of `guests/`: every check that they make passes on the software CPU, interpreted and
//! translated, and the same images run in QEMU's TCG where it is installed.
//!
//! Where QEMU fails a check, the manual decides: `tests/common/qemu.rs` has each of these with what the manual says.

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
    passes_with(name, cpus, &[]);
}

/// The same on a machine with more.
#[track_caller]
fn passes_with(name: &str, cpus: &[&str], more: &[&str]) {
    let image = images::image(name);
    for jit in ["on", "off"] {
        for cpus in cpus {
            let mut command = ringside();
            command.args(["run", "--engine", "soft", "--memory", "256M", "--testdev", "--exits", "off"]);
            command.args(["--debug-exit", "0xf4", "--jit", jit, "--cpus", cpus]);
            command.args(more).arg("--kernel").arg(&image);
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
            assert!(made > 0, "{text}");
        }
    }
}

/// Runs a guest in QEMU's TCG; only what is known to differ may fail.
#[track_caller]
fn qemu_differs_only_where_known(guest: &str, cpus: &str) {
    let mut command = Command::new("qemu-system-x86_64");
    command.args("-accel tcg -cpu max -m 256M -no-reboot -display none -serial stdio".split(' '));
    command.args("-device isa-debug-exit,iobase=0xf4,iosize=4 -device pc-testdev".split(' '));
    command.args(["-smp", cpus]);
    command.arg("-kernel").arg(images::image(guest));
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-system-x86_64 is not installed");
        return;
    }
    // Its time is the host's: on a busy one, what has to do with time may fail now and then. Twice more is enough.
    let differs = (0..3).map_while(|_| different_in_qemu(&mut command, guest).err()).collect::<Vec<_>>();
    assert!(differs.len() < 3, "{guest} in QEMU, each time:\n{}", differs.join("\n\n"));
}

/// Runs a guest in QEMU. The error says what nobody expected.
fn different_in_qemu(command: &mut Command, guest: &str) -> Result<(), String> {
    let output = run_within(command, LIMIT);
    let text = String::from_utf8_lossy(&output.stdout);
    let (failed, made) = judge(&text);
    let known = |line: &&str| {
        // The name ends where the values begin.
        let name = line
            .strip_prefix("FAIL ")
            .and_then(|line| line.rsplit_once(": expected").or(line.rsplit_once(": got")));
        name.is_some_and(|(check, _)| qemu::fails(guest, check))
    };
    let unknown: Vec<_> = failed.into_iter().filter(|line| !known(line)).collect();
    if !unknown.is_empty() {
        return Err(unknown.join("\n"));
    }
    if !text.contains(&format!("DONE {made} checks, ")) {
        return Err(format!("{}\n{text}", stderr(&output)));
    }
    Ok(())
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

#[test]
fn tasks() {
    passes("tasks", &["1"]);
    qemu_differs_only_where_known("tasks", "1");
}

#[test]
fn virtual_8086() {
    passes("virtual_8086", &["1"]);
    qemu_differs_only_where_known("virtual_8086", "1");
}

#[test]
fn real_mode() {
    passes("real_mode", &["1"]);
    qemu_differs_only_where_known("real_mode", "1");
}

#[test]
fn debug() {
    passes("debug", &["1"]);
    qemu_differs_only_where_known("debug", "1");
}

#[test]
fn paging() {
    passes("paging", &["1"]);
    qemu_differs_only_where_known("paging", "1");
}

#[test]
fn system_calls() {
    passes("system_calls", &["1"]);
    qemu_differs_only_where_known("system_calls", "1");
}

#[test]
fn interrupts() {
    passes("interrupts", &["1"]);
    qemu_differs_only_where_known("interrupts", "1");
}

#[test]
fn changing_code() {
    passes("changing_code", &["1", "2", "4"]);
    qemu_differs_only_where_known("changing_code", "2");
}

#[test]
fn processors() {
    passes("processors", &["1", "2", "4"]);
    qemu_differs_only_where_known("processors", "2");
}

#[test]
fn processor_state() {
    passes("processor_state", &["1"]);
    qemu_differs_only_where_known("processor_state", "1");
}

#[test]
fn counters() {
    passes("counters", &["1"]);
}

#[test]
fn timers() {
    passes("timers", &["1"]);
    qemu_differs_only_where_known("timers", "1");
}

#[test]
fn boot_sectors() {
    passes("boot_sectors", &["1"]);
    qemu_differs_only_where_known("boot_sectors", "1");
}

#[test]
fn device_memory() {
    passes("device_memory", &["1"]);
    qemu_differs_only_where_known("device_memory", "1");
}

#[test]
fn virtio() {
    passes_with("virtio", &["1"], &["--rng"]);
    passes_with("virtio", &["1"], &["--rng", "--transport", "mmio"]);
}
