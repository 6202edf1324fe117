//! Lockstep: Debian on the translator and the interpreter at once, compared after each block.

mod common;

use std::time::Duration;

use common::{debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(900);

/// More than a boot: processes, pipes, floating point and a little of everything that a shell does.
const COMMAND: &str = "uname -s; awk 'BEGIN { for (i = 1; i < 2000; i++) s += sqrt(i) / i; printf \"%.6f\\n\", s }'; \
    seq 1 2000 | sort -r | sha256sum | cut -c 1-8; dd if=/dev/zero bs=64k count=4 2>/dev/null | gzip -c | gunzip -c | wc -c";

#[test]
fn debian_boots_and_works_in_lockstep() {
    debian_file("initramfs.cpio");
    let mut run = ringside();
    let output = run_within(run.args(["run", "--jit", "lockstep", "--stats", "--exec", COMMAND]), LIMIT);
    let report = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    let reference = run_within(ringside().args(["run", "--engine", "soft", "--exec", COMMAND]), LIMIT);
    assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&reference.stdout));
    assert!(output.stdout.starts_with(b"Linux\n"));
    let counter = |name: &str| -> u64 {
        let line = report.lines().find(|line| line.contains(name)).expect("a counter");
        line.split_whitespace().last().and_then(|number| number.parse().ok()).expect("a number")
    };
    assert!(counter("slices compared") > 10_000_000, "{report}");
    assert!(counter("blocks translated") > 1000, "{report}");
}

#[test]
fn lockstep_is_refused_where_it_cannot_compare() {
    for arguments in [["--cpus", "2"], ["--engine", "kvm"]] {
        let output = run_within(ringside().args(["run", "--jit", "lockstep"]).args(arguments), LIMIT);
        assert_eq!(output.status.code(), Some(240), "{}", stderr(&output));
        assert!(stderr(&output).contains("--jit lockstep compares"), "{}", stderr(&output));
    }
}
