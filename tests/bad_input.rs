//! Options and files that no machine can be made of: a clear message, an exit status, and nothing on stdout.

mod common;

use std::time::Duration;

use common::{KernelFile, elf, ringside, run_within, stderr};

/// Runs with these arguments; gives the exit status and stderr.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = run_within(ringside().args(arguments), Duration::from_secs(20));
    assert_eq!(output.stdout, b"");
    (output.status.code().expect("no signal"), stderr(&output))
}

#[test]
fn bad_options_are_usage_errors_that_name_the_value() {
    for (option, value) in
        [("--memory", "0"), ("--memory", "999999T"), ("--cpus", "0"), ("--cpus", "300"), ("--exits", "csv")]
    {
        let (status, message) = refused(&["run", option, value]);
        assert_eq!(status, 2, "{message}");
        assert!(message.contains(&format!("'{value}'")) && message.contains(option), "{message}");
    }
}

#[test]
fn files_that_are_no_kernel_are_refused_by_what_they_are() {
    let good = elf(b"\xeb\xfe");
    for (bytes, why) in [
        (&b""[..], "empty"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF file"),
        (&good[..100], "bad ELF file"),
    ] {
        let kernel = KernelFile::new(bytes);
        let (status, message) = refused(&["run", "--kernel", kernel.path().to_str().unwrap()]);
        assert_eq!(status, 240, "{message}");
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn files_that_are_not_there_or_no_files_are_named() {
    let (status, message) = refused(&["run", "--kernel", "/nonexistent/kernel"]);
    assert_eq!(status, 240);
    assert!(message.contains("/nonexistent/kernel"), "{message}");
    let (status, message) = refused(&["run", "--kernel", "/tmp"]);
    assert_eq!(status, 240);
    assert!(message.contains("/tmp is a directory"), "{message}");
}

#[test]
fn an_initrd_that_is_too_big_for_the_memory_is_refused() {
    let kernel = KernelFile::with_code(b"\xeb\xfe");
    let initrd = kernel.folder().join("initrd");
    std::fs::File::create(&initrd).unwrap().set_len(17 << 20).unwrap();
    let arguments = ["run", "--memory", "16M", "--kernel"];
    let (status, message) = refused(
        &[&arguments[..], &[kernel.path().to_str().unwrap(), "--initrd", initrd.to_str().unwrap()]].concat(),
    );
    assert_eq!(status, 240);
    assert!(message.contains("initrd"), "{message}");
}

#[test]
fn a_report_that_cannot_be_written_is_told_before_the_run() {
    let kernel = KernelFile::with_code(b"\xeb\xfe");
    let path = kernel.path();
    let (status, message) =
        refused(&["run", "--kernel", path.to_str().unwrap(), "--exits", "json=/nonexistent/exits.json"]);
    assert_eq!(status, 240);
    assert!(message.contains("/nonexistent/exits.json"), "{message}");
}

#[test]
fn an_unknown_guest_is_answered_with_those_that_there_are() {
    let (status, message) = refused(&["run", "--guest", "plan9"]);
    assert_eq!(status, 240);
    assert!(message.contains("plan9") && message.contains("debian"), "{message}");
}
