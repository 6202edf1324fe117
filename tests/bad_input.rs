//! Options and files that no machine can be made of: a clear message, an exit status, and nothing on stdout.

mod common;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::guest::{BASE, End, Guest, Random, machine};
use common::{KernelFile, elf, ringside, run_within, stderr};

/// How long a refusal may take.
const SOON: Duration = Duration::from_secs(5);
/// Code that powers off: mov dx, 0x604; mov ax, 0x3400; out dx, ax.
const POWER_OFF: &[u8] = b"\x66\xba\x04\x06\x66\xb8\x00\x34\x66\xef\xeb\xfe";

/// Runs with these arguments; gives the exit status and stderr.
#[track_caller]
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = run_within(ringside().args(arguments), SOON);
    assert_eq!(output.stdout, b"");
    let message = stderr(&output);
    assert!(!message.contains("panicked"), "{message}");
    (output.status.code().expect("no signal"), message)
}

/// It is no machine, and the message has all of these.
#[track_caller]
fn no_machine(arguments: &[&str], parts: &[&str]) {
    let (status, message) = refused(arguments);
    assert_eq!(status, 240, "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
    assert_eq!(message.lines().count(), 1, "{message}");
}

/// The same for a kernel file of these bytes.
#[track_caller]
fn no_kernel(bytes: &[u8], parts: &[&str]) {
    let kernel = KernelFile::new(bytes);
    no_machine(&["run", "--engine", "soft", "--kernel", kernel.path().to_str().unwrap()], parts);
}

#[test]
fn bad_options_are_usage_errors_that_name_the_value() {
    for (option, value) in [
        ("--memory", "0"),
        ("--memory", "999999T"),
        ("--memory", "1K"),
        ("--memory", "lots"),
        ("--memory", "1.5G"),
        ("--memory", "99999999999999999999999"),
        ("--memory", ""),
        ("--cpus", "0"),
        ("--cpus", "300"),
        ("--cpus", "4294967297"),
        ("--cpus", "two"),
        ("--exits", "csv"),
        ("--engine", "tcg"),
        ("--boot", "bios"),
        ("--debug-exit", "0x10000"),
    ] {
        let (status, message) = refused(&["run", option, value]);
        assert_eq!(status, 2, "{message}");
        assert!(message.contains(&format!("'{value}'")) && message.contains(option), "{message}");
    }
}

#[test]
fn bad_command_lines_are_usage_errors() {
    for arguments in [
        &["run", "--frobnicate"][..],
        &["walk"],
        &["run", "--kernel"],
        &["run", "--kernel", ""],
        &["run", "--cpu", ""],
        &["run", "--kernel", "k", "--guest", "debian"],
        &["run", "--kernel", "k", "--exec", "true"],
        &["run", "--exec", ""],
        &["run", "stray"],
        &["guest"],
    ] {
        let (status, message) = refused(arguments);
        assert_eq!(status, 2, "{arguments:?}: {message}");
        assert!(message.contains("Usage:") || message.contains("--help"), "{message}");
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let kernel = KernelFile::with_code(POWER_OFF);
    no_machine(&["run", "--kernel", kernel.path().to_str().unwrap(), "--memory", "1023G"], &["memory"]);
}

#[test]
fn cpu_models_and_features_that_are_none_are_named() {
    let kernel = KernelFile::with_code(POWER_OFF);
    let path = kernel.path();
    for cpu in ["pentium9", "host,+warp", "host,-warp", "host,sse2", "host,+"] {
        let arguments = ["run", "--engine", "soft", "--kernel", path.to_str().unwrap(), "--cpu", cpu];
        let (status, message) = refused(&arguments);
        assert!(matches!(status, 2 | 240), "{cpu:?} gives {status}: {message}");
        let name = cpu.rsplit([',', '+', '-']).next().unwrap();
        assert!(message.contains("--cpu") && message.contains(name), "{message}");
    }
}

#[test]
fn files_that_are_no_kernel_are_refused_by_what_they_are() {
    no_kernel(b"", &["empty"]);
    no_kernel(b"#!/bin/sh\n", &["neither a bzImage nor an ELF file"]);
    no_kernel(&[0; 4096], &["neither a bzImage nor an ELF file"]);
    no_kernel(b"\x7fELF", &["ELF"]);
    no_kernel(b"MZ", &["neither a bzImage nor an ELF file"]);
    // The tests' own program: an ELF file, but linked to where no RAM is, or to nothing at all.
    let own = std::fs::read("/proc/self/exe").unwrap();
    let (status, message) = {
        let kernel = KernelFile::new(&own);
        refused(&["run", "--engine", "soft", "--memory", "1G", "--kernel", kernel.path().to_str().unwrap()])
    };
    assert_eq!(status, 240, "{message}");
}

#[test]
fn an_elf_kernel_that_is_cut_anywhere_is_refused() {
    let good = elf(POWER_OFF);
    for len in 1..good.len() {
        no_kernel(&good[..len], &["cannot boot "]);
    }
}

/// Debian's own kernel as it is packed.
fn bzimage() -> PathBuf {
    common::debian_file("vmlinuz")
}

#[test]
fn a_bzimage_that_is_cut_anywhere_is_refused() {
    let good = std::fs::read(bzimage()).unwrap();
    let word = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap()) as usize;
    // Linux boot protocol: setup_sects, payload_offset and payload_length. What follows the payload is not needed.
    let payload_end = (usize::from(good[0x1f1]) + 1) * 512 + word(0x248) + word(0x24c);
    let evenly = (1..12).map(|part| payload_end / 12 * part);
    for len in evenly.chain([2, 0x1f0, 0x202, 0x210, 0x250, 0x268, 512, 1024, 20_000, payload_end - 1]) {
        no_kernel(&good[..len], &["cannot boot "]);
    }
}

#[test]
fn a_bzimage_with_damage_in_it_is_refused() {
    let good = std::fs::read(bzimage()).unwrap();
    let mut random = Random::new(1);
    for _ in 0..12 {
        let mut damaged = good.clone();
        for _ in 0..64 {
            // In the packed kernel.
            let at = 0x10_000 + random.next() as usize % (good.len() - 0x20_000);
            damaged[at] ^= 1 << (random.next() % 8);
        }
        no_kernel(&damaged, &["cannot boot "]);
    }
    for field in 0x1f1..0x268 {
        let mut damaged = good[..0x8000].to_vec();
        damaged[field] ^= 0xff;
        no_kernel(&damaged, &["cannot boot "]);
    }
}

#[test]
fn an_elf_kernel_with_damaged_headers_is_refused_or_ends_with_a_name() {
    let good = elf(POWER_OFF);
    let mut random = Random::new(2);
    for at in 0..good.len() - POWER_OFF.len() {
        let mut damaged = good.clone();
        damaged[at] = if at % 2 == 0 { 0xff } else { random.next() as u8 };
        let kernel = KernelFile::new(&damaged);
        let output = run_within(&mut machine(&kernel), SOON);
        let end = End { status: output.status.code(), message: stderr(&output) };
        if end.status != Some(240) {
            end.has_a_name();
        }
        assert!(!end.message.contains("panicked"), "{end:?}");
    }
}

#[test]
fn a_kernel_that_is_too_big_for_the_memory_is_refused_by_its_size() {
    let mut file = elf(POWER_OFF);
    // The second program header's size in memory.
    let at = 64 + 56 + 40;
    for size in [64u64 << 20, 1 << 40, u64::MAX - BASE] {
        file[at..at + 8].copy_from_slice(&size.to_le_bytes());
        let kernel = KernelFile::new(&file);
        let path = kernel.path();
        no_machine(
            &["run", "--memory", "16M", "--kernel", path.to_str().unwrap()],
            &["cannot boot", "too big for the memory"],
        );
    }
    // More bytes than there is memory.
    let kernel = KernelFile::new(&file);
    File::options().write(true).open(kernel.path()).unwrap().set_len(1 << 40).unwrap();
    let path = kernel.path();
    no_machine(
        &["run", "--memory", "16M", "--kernel", path.to_str().unwrap()],
        &["too big", "1099511627776"],
    );
}

#[test]
fn a_kernel_that_is_linked_to_where_no_ram_is_is_refused() {
    for address in [0, 0x1000, 0xa_0000, 0xe_0000, 0xfee0_0000, 0x1_0000_0000, u64::MAX - 0x1000] {
        let file = Guest::of_bytes(POWER_OFF).with(address, [0x90; 64]).elf();
        no_kernel(&file, &["cannot boot"]);
    }
}

#[test]
fn files_that_are_not_there_or_no_files_are_named() {
    no_machine(&["run", "--kernel", "/nonexistent/kernel"], &["/nonexistent/kernel"]);
    no_machine(&["run", "--kernel", "/tmp"], &["/tmp is a directory"]);
    no_machine(&["run", "--kernel", "/dev/zero"], &["/dev/zero is "]);
    let kernel = KernelFile::with_code(POWER_OFF);
    let path = kernel.path();
    let with_initrd = |initrd| ["run", "--kernel", path.to_str().unwrap(), "--initrd", initrd];
    no_machine(&with_initrd("/nonexistent/initrd"), &["/nonexistent/initrd"]);
    no_machine(&with_initrd("/tmp"), &["/tmp is a directory"]);
}

#[test]
fn an_initrd_that_is_too_big_for_the_memory_is_refused() {
    let kernel = KernelFile::with_code(POWER_OFF);
    let initrd = kernel.folder().join("initrd");
    for size in [15 << 20, 17 << 20, 1 << 40] {
        File::create(&initrd).unwrap().set_len(size).unwrap();
        no_machine(
            &[
                "run",
                "--memory",
                "16M",
                "--kernel",
                kernel.path().to_str().unwrap(),
                "--initrd",
                initrd.to_str().unwrap(),
            ],
            &["initrd", "too big for the memory", &size.to_string()],
        );
    }
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused() {
    let kernel = KernelFile::with_code(POWER_OFF);
    let cmdline = "x".repeat(5000);
    no_machine(
        &["run", "--kernel", kernel.path().to_str().unwrap(), "--cmdline", &cmdline],
        &["command line", "5000"],
    );
}

#[test]
fn a_debug_exit_port_where_a_device_is_is_refused() {
    let kernel = KernelFile::with_code(POWER_OFF);
    for port in ["0x3f8", "0x60", "0xcf8", "0x604"] {
        let path = kernel.path();
        let arguments = ["run", "--engine", "soft", "--kernel", path.to_str().unwrap(), "--debug-exit", port];
        no_machine(&arguments, &[port.trim_start_matches("0x")]);
    }
}

#[test]
fn a_report_that_cannot_be_written_is_told_before_the_run() {
    let kernel = KernelFile::with_code(b"\xeb\xfe");
    let path = kernel.path();
    for file in ["/nonexistent/exits.json", "/tmp"] {
        let report = format!("json={file}");
        no_machine(&["run", "--kernel", path.to_str().unwrap(), "--exits", &report], &[file]);
    }
    // One that turns out to be full is told after it.
    let kernel = KernelFile::with_code(POWER_OFF);
    let path = kernel.path();
    let arguments =
        ["run", "--engine", "soft", "--kernel", path.to_str().unwrap(), "--exits", "json=/dev/full"];
    no_machine(&arguments, &["exits", "No space left"]);
}

#[test]
fn an_unknown_guest_is_answered_with_those_that_there_are() {
    for arguments in
        [&["run", "--guest", "plan9"], &["guest", "fetch", "plan9"], &["guest", "remove", "../.."]]
    {
        let name = arguments[2];
        no_machine(arguments, &[name, "debian"]);
    }
}

#[test]
fn a_refusal_is_fast() {
    let started = Instant::now();
    let kernel = KernelFile::new(b"nothing");
    no_machine(&["run", "--kernel", kernel.path().to_str().unwrap()], &[]);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}
