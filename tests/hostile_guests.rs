//! Guests that do what no guest should: each ends in a way that has a name and an exit status of its own.

mod common;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{KernelFile, finish, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(60);

fn command(kernel: &KernelFile) -> Command {
    let mut command = ringside();
    command.args(["run", "--engine", "soft", "--memory", "32M", "--debug-exit", "0xf4", "--exits", "off"]);
    command.arg("--kernel").arg(kernel.path());
    command
}

/// Runs 32-bit code; gives the exit status and stderr.
fn run(code: &[u8]) -> (i32, String) {
    let kernel = KernelFile::with_code(code);
    let output = run_within(&mut command(&kernel), LIMIT);
    (output.status.code().expect("no signal"), stderr(&output))
}

#[test]
fn a_power_off_is_success_and_says_nothing() {
    // mov dx, 0x604; mov ax, 0x3400; out dx, ax
    let (status, message) = run(b"\x66\xba\x04\x06\x66\xb8\x00\x34\x66\xef\xeb\xfe");
    assert_eq!((status, message.as_str()), (0, ""));
}

#[test]
fn a_value_at_the_debug_exit_port_is_the_status_and_is_shown_whole() {
    // mov eax, 0x12345607; out 0xf4, eax
    let (status, message) = run(b"\xb8\x07\x56\x34\x12\xe7\xf4\xeb\xfe");
    assert_eq!(status, 7);
    assert!(message.contains("0x12345607"), "{message}");
}

#[test]
fn a_triple_fault_is_named_with_rip_and_reason() {
    // lidt [an empty table]; ud2
    let (status, message) = run(b"\x0f\x01\x1d\x0c\x00\x20\x00\x0f\x0b\xeb\xfe\x90\0\0\0\0\0\0");
    assert_eq!(status, 241, "{message}");
    assert!(message.contains("RIP 0x200007") && message.contains("#UD"), "{message}");
}

#[test]
fn a_jump_to_nothing_is_named_too() {
    // mov eax, 0xd0000000; jmp eax
    let (status, message) = run(b"\xb8\x00\x00\x00\xd0\xff\xe0");
    assert_eq!(status, 241, "{message}");
    assert!(message.contains("RIP 0xd0000000"), "{message}");
}

#[test]
fn a_reset_is_named_by_the_port_that_asked_for_it() {
    // mov al, 6; mov dx, 0xcf9; out dx, al
    let (status, message) = run(b"\xb0\x06\x66\xba\xf9\x0c\xee\xeb\xfe");
    assert_eq!(status, 242);
    assert!(message.contains("0xcf9"), "{message}");
    // mov al, 0xfe; out 0x64, al
    let (status, message) = run(b"\xb0\xfe\xe6\x64\xeb\xfe");
    assert_eq!(status, 242, "{message}");
}

#[test]
fn a_halt_with_interrupts_off_is_called_stuck() {
    let (status, message) = run(b"\xfa\xf4\xeb\xfd");
    assert_eq!(status, 245);
    assert!(message.contains("halted with interrupts off"), "{message}");
}

#[test]
fn writes_to_rom_and_to_unmapped_space_are_lost() {
    // mov dword [0xe0000], 0; mov dword [0xd0000000], 0; mov eax, [0xe0000] ("RSD "); out 0xf4, eax
    let code = b"\xc7\x05\x00\x00\x0e\x00\0\0\0\0\xc7\x05\x00\x00\x00\xd0\0\0\0\0\xa1\x00\x00\x0e\x00\xe7\xf4\xeb\xfe";
    let (status, message) = run(code);
    assert_eq!(status, i32::from(b'R'), "{message}");
    assert!(message.contains("0x20445352"), "{message}");
}

/// mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1
const FLOOD: &[u8] = b"\x66\xba\xf8\x03\xb0\x78\xee\xeb\xfd";

#[test]
fn a_guest_that_spins_with_interrupts_off_ends_at_sigterm() {
    for code in [&b"\xfa\xeb\xfe"[..], FLOOD] {
        let kernel = KernelFile::with_code(code);
        let child = command(&kernel).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let output = finish(child, LIMIT);
        assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
    }
}

#[test]
fn a_flooding_guest_ends_cleanly_when_nobody_reads_any_more() {
    let kernel = KernelFile::with_code(FLOOD);
    let mut child = command(&kernel).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 100_000];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    assert!(some.iter().all(|&byte| byte == b'x'));
    drop(child.stdout.take());
    let output = finish(child, LIMIT);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
}

#[test]
fn a_flooding_guest_that_nobody_reads_takes_no_memory_and_ends_at_sigterm() {
    let kernel = KernelFile::with_code(FLOOD);
    let child = command(&kernel).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let resident = resident_kib(child.id());
    assert!(resident < 200 * 1024, "{resident} KiB");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = finish(child, LIMIT);
    assert_eq!(output.status.code(), Some(143));
}

fn resident_kib(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
