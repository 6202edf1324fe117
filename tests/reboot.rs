//! `--reboot`: a reset starts the machine again, as on hardware.

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use common::{KernelFile, finish, ringside};
use rustix::process::{Pid, Signal, kill_process};

/// Runs 32-bit code until it has started three times, then ends the run.
fn starts_again_and_again(code: &[u8], why: &str) {
    let kernel = KernelFile::with_code(code);
    let file = kernel.folder().join("disk.img");
    std::fs::write(&file, [0; 4096]).expect("a file");
    let memory = kernel.folder().join("memory.img");
    let mut command = ringside();
    command
        .args(["-v", "run", "--engine", "soft", "--memory", "16M", "--reboot", "--exits", "off", "--kernel"]);
    command.arg(kernel.path());
    // Each machine opens its files for itself.
    command.arg("--disk").arg(&file).arg(format!("--pmem=path={},size=2M", memory.display()));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("ringside starts");
    let stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut restarts = stderr.lines().map_while(Result::ok).filter(|line| line.contains("starting again"));
    for _ in 0..3 {
        let line = restarts.next().expect("another restart");
        assert!(line.contains(why), "{line}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    // The pipe is read to its end, so that nothing holds up the command.
    restarts.for_each(drop);
    assert_eq!(finish(child, Duration::from_secs(20)).status.code(), Some(143));
}

#[test]
fn a_reset_request_starts_the_machine_again() {
    // mov al, 6; mov dx, 0xcf9; out dx, al; jmp $
    starts_again_and_again(b"\xb0\x06\x66\xba\xf9\x0c\xee\xeb\xfe", "port 0xcf9");
}

#[test]
fn a_triple_fault_starts_the_machine_again() {
    // ud2, with no interrupt descriptor table
    starts_again_and_again(b"\x0f\x0b", "triple fault");
}
