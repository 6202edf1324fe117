//! Debian boots on the software CPU: what runs in it gives the host's results.
//!
//! The default guest is fetched where it is missing.

mod common;

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{fetch_guest, finish, ringside, run_within, stderr};
use sha2::{Digest, Sha256};

/// A guest that hangs; one that works takes a tenth of it.
const LIMIT: Duration = Duration::from_secs(300);

fn machine(arguments: &[&str]) -> Command {
    let mut command = ringside();
    command.args(["run", "--engine", "soft"]).args(arguments);
    command
}

/// Runs a command in the guest.
fn exec(cpus: &str, command: &str) -> Output {
    run_within(&mut machine(&["--cpus", cpus, "--exec", command]), LIMIT)
}

/// What the command writes; it has to succeed.
fn output_of(command: &str) -> String {
    let output = exec("1", command);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn boots_with(cpus: &str) {
    let output = exec(cpus, "nproc; uname -sm; exit 3");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, format!("{cpus}\nLinux x86_64\n"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn debian_boots_with_1_vcpu() {
    boots_with("1");
}

#[test]
fn debian_boots_with_2_vcpus() {
    boots_with("2");
}

#[test]
fn debian_boots_with_4_vcpus() {
    boots_with("4");
}

#[test]
fn every_way_into_the_kernel_boots() {
    for way in ["pvh", "linux64", "stub"] {
        let output = run_within(&mut machine(&["--boot", way, "--exec", "echo $((6 * 7))"]), LIMIT);
        assert_eq!((output.stdout.as_slice(), stderr(&output).as_str()), (&b"42\n"[..], ""), "{way}");
    }
}

#[test]
fn the_cloud_kernel_boots() {
    fetch_guest("debian-cloud");
    let output = run_within(&mut machine(&["--guest", "debian-cloud", "--exec", "uname -r"]), LIMIT);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("-cloud-amd64"), "{text} {}", stderr(&output));
}

#[test]
fn vcpus_that_compute_at_once_compute_what_one_does() {
    let script = "for round in 1 2 3; do for job in 1 2 3 4 5 6; do \
                  (seq 1 3000 | gzip | gunzip | sha256sum; seq 1 2000 | sort -r | sort -n | sha256sum) & done; wait; done \
                  | sort | uniq -c";
    let output = exec("4", script);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let digest = |last: u32| {
        let text: String = (1..=last).map(|number| format!("{number}\n")).collect();
        hex(&Sha256::digest(text))
    };
    let mut expected = [digest(3000), digest(2000)].map(|digest| format!("18 {digest} -"));
    expected.sort_by_key(|line| line[3..].to_owned());
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines, expected);
}

#[test]
fn too_little_memory_for_the_guest_is_refused_or_a_reset_that_is_named() {
    for (memory, status, why) in [
        ("16M", 240, "too big for the memory"),
        ("64M", 240, "too big for the memory"),
        ("80M", 240, "too big for the memory"),
        ("96M", 242, "asked for a reset"),
    ] {
        let output = run_within(&mut machine(&["--memory", memory, "--exec", "true"]), LIMIT);
        let text = stderr(&output);
        // A later kernel may need more, or less.
        let refused = output.status.code() == Some(240) && text.contains("too big for the memory");
        assert!(refused || (output.status.code() == Some(status) && text.contains(why)), "{memory}: {text}");
    }
}

#[test]
fn a_commands_output_errors_and_status_come_through_apart() {
    let output = exec("1", "echo out; echo error >&2; exit 7");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(stderr(&output), "error\n");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn binary_output_arrives_as_it_was_written() {
    let output = exec("1", "head -c 100000 /bin/busybox; head -c 100000 /bin/busybox | sha256sum >&2");
    assert_eq!(output.stdout.len(), 100_000);
    assert!(stderr(&output).starts_with(&hex(&Sha256::digest(&output.stdout))), "{}", stderr(&output));
}

#[test]
fn gzip_and_sha256_give_the_hosts_results() {
    let text: String = (1..=30_000).map(|number| format!("{number}\n")).collect();
    let output = output_of("seq 1 30000 | gzip | gunzip | sha256sum; seq 1 30000 | sha256sum");
    let expected = hex(&Sha256::digest(text));
    let digests: Vec<_> = output.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(digests, [expected.as_str(), expected.as_str()]);
}

#[test]
fn awk_computes_as_the_host_does() {
    let program = "BEGIN { for (i = 1; i <= 5000; i++) { s += i * 1.000001 / (i + 0.25); p = (p * 31 + i) % 1000003 } \
                   printf \"%.9f %d %s\\n\", s, p, 1 / 3 }";
    let (mut sum, mut product) = (0.0f64, 0u64);
    for i in 1..=5000u64 {
        let x = i as f64;
        sum += x * 1.000001 / (x + 0.25);
        product = (product * 31 + i) % 1_000_003;
    }
    assert_eq!(output_of(&format!("awk '{program}'")), format!("{sum:.9} {product} 0.333333\n"));
}

#[test]
fn shell_scripts_loop_branch_and_fork() {
    let script = "f() { [ $1 -lt 2 ] && echo $1 || echo $(($(f $(($1 - 1))) + $(f $(($1 - 2))))); }; f 9; \
                  for i in 3 1 2; do echo $i; done | sort | tr '\\n' ,; (exit 5) || echo status $?";
    assert_eq!(output_of(script), "34\n1,2,3,status 5\n");
}

/// Types `script` at the guest's shell through a pipe.
fn shell(script: &[u8]) -> Output {
    let mut child = machine(&["--exits", "off"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ringside starts");
    let mut stdin = child.stdin.take().expect("piped");
    let script = script.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&script));
    let output = finish(child, LIMIT);
    writer.join().expect("no panic").expect("all is read");
    output
}

#[test]
fn the_end_of_a_script_on_stdin_powers_off() {
    for script in ["echo sum=$((6 * 7))\n", "echo sum=$((6 * 7))"] {
        let output = shell(script.as_bytes());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("sum=42"), "{text}");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}

#[test]
fn a_long_script_on_stdin_loses_nothing() {
    let mut script = String::from("n=0\n");
    for _ in 0..2_000 {
        script.push_str("n=$((n + 1))\n");
    }
    script.push_str("echo total=$n\n");
    let output = shell(script.as_bytes());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("total=2000"), "{}", &text[text.len().saturating_sub(2000)..]);
}

#[test]
fn a_guest_that_ends_before_its_command_does_is_told_apart_from_success() {
    let output = exec("1", "poweroff -f; sleep 100");
    assert_eq!(output.status.code(), Some(246), "{}", stderr(&output));
    let output = exec("1", "reboot -f; sleep 100");
    assert_eq!(output.status.code(), Some(242), "{}", stderr(&output));
}

#[test]
fn a_kernel_panic_is_a_reset_and_its_message_is_on_the_console() {
    let output = shell(b"echo c > /proc/sysrq-trigger\n");
    assert_eq!(output.status.code(), Some(242), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Kernel panic"), "{text}");
}

#[test]
fn the_ledger_counts_the_boots_exits_by_reason_and_register() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("exits.json");
    let exits = format!("json={}", file.display());
    let output = run_within(&mut machine(&["--exits", &exits, "--exec", "sleep 1"]), LIMIT);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = std::fs::read_to_string(&file).expect("the report");
    let report = exits::Report::from_json(&text).expect("a report");
    for (reason, at) in
        [("IO_INSTRUCTION", "serial0 "), ("CPUID", "leaf "), ("HLT", ""), ("MSR_WRITE", "IA32_")]
    {
        let found = report.reasons.iter().find(|found| found.reason == reason);
        let found = found.unwrap_or_else(|| panic!("no {reason} in {:?}", report.reasons));
        assert!(found.times.count > 0);
        assert!(at.is_empty() || found.details.iter().any(|d| d.name.contains(at)), "{:?}", found.details);
    }
}

#[test]
fn a_start_with_the_guest_at_hand_begins_booting_within_a_third_of_a_second() {
    exec("1", "true");
    let before_the_first_instruction = || -> f64 {
        let text = stderr(&run_within(&mut machine(&["--stats", "--exec", "true"]), LIMIT));
        let line = text.lines().find(|line| line.starts_with("before the first instruction"));
        line.and_then(|line| line.split_whitespace().nth(4)?.parse().ok())
            .unwrap_or_else(|| panic!("no such line in {text}"))
    };
    // A busy host takes its time now and then: one start of ten is to be as quick.
    let least = (0..10).map(|_| before_the_first_instruction()).find(|&seconds| seconds < 0.3);
    assert!(least.is_some());
}

#[test]
fn a_booted_machine_takes_at_most_64_mib_of_the_hosts_memory_besides_its_ram() {
    let text = stderr(&run_within(&mut machine(&["--stats", "--exec", "true"]), LIMIT));
    let mib = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" MiB"));
        line.and_then(|mib| mib.parse().ok()).unwrap_or_else(|| panic!("no {name:?} in {text}"))
    };
    let (guest, beside) = (mib("memory: the guest's, as far as touched"), mib("memory beside it"));
    assert!((20.0..512.0).contains(&guest) && (1.0..64.0).contains(&beside), "{guest} {beside}");
}
