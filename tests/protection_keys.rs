//! Protection keys in Debian: Linux finds them, keeps PKRU for each thread and in signals' frames, and a program's accesses
//! and the kernel's for it obey them. The program checks itself (`tests/guest/protection_keys.c`).

mod common;

use std::time::Duration;

use common::c_program::Programs;
use common::{run_within, stderr};

const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn linux_programs_and_their_threads_have_protection_keys() {
    let programs = Programs::new(&["protection_keys"]);
    for (cpus, jit) in [("1", "on"), ("2", "on"), ("1", "off")] {
        let mut run = programs.run("/ringside/protection_keys");
        let output = run_within(run.args(["--jit", jit, "--cpus", cpus]), LIMIT);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{cpus} vCPUs, --jit {jit}: {text}{}", stderr(&output));
        // Five accesses by rights, one whose handler grants them, each hundredth of 20,000 stores, one load of code.
        assert_eq!(text.lines().last(), Some("right, 207 faults"), "{cpus} vCPUs, --jit {jit}");
    }
}
