//! What Debian sees of the machine: processors, memory, interrupts, clocks, and nothing to complain about. All of it in
//! one boot, which also fetches nothing.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{debian_file, ringside, run_within, stderr};

const LIMIT: Duration = Duration::from_secs(300);
const CPUS: usize = 2;

/// What the host has to have for the guest to have it: instructions that programs use as soon as the processor says that
/// it has them. Protection keys, LA57, MOVDIR64B, SERIALIZE and the like are done in software.
const INSTRUCTIONS: &str = "abm adx aes avx avx2 avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni \
    avx512_vpopcntdq avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx_vnni amx_bf16 amx_int8 amx_tile \
    bmi1 bmi2 clflush clflushopt clwb cmov cx16 cx8 erms f16c fma fsgsbase fsrm gfni lahf_lm mmx movbe \
    pclmulqdq pdpe1gb pni popcnt rdpid rdrand rdseed rdtscp rtm sha_ni sse sse2 sse4_1 sse4_2 sse4a \
    ssse3 syscall tbm umip vaes vpclmulqdq waitpkg xgetbv1 xop xsave xsavec xsaveopt xsaves 3dnow fma4";

const PARTS: &[(&str, &str)] = &[
    ("flags", "grep -m 1 ^flags /proc/cpuinfo"),
    (
        "processors",
        "nproc; grep -c ^processor /proc/cpuinfo; grep '^core id' /proc/cpuinfo | sort -u | wc -l",
    ),
    ("memory", "grep MemTotal /proc/meminfo"),
    ("before", "cat /proc/interrupts"),
    ("uptime", "cut -d ' ' -f 1 /proc/uptime; sleep 2; cut -d ' ' -f 1 /proc/uptime"),
    ("interrupts", "cat /proc/interrupts"),
    ("date", "date +%s; hwclock -u > /dev/null 2>&1; cat /sys/class/rtc/rtc0/since_epoch"),
    ("clocks", "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
    ("console", "cat /proc/cmdline; cat /sys/class/tty/console/active"),
    (
        "complaints",
        "dmesg | grep -E 'BUG:|kernel BUG|Oops|WARNING:|Call Trace|unstable|stall|lockup|unchecked MSR|Firmware Bug|nobody cared'",
    ),
];

fn printed(part: &str) -> &'static str {
    static OUTPUT: OnceLock<HashMap<String, String>> = OnceLock::new();
    let all = OUTPUT.get_or_init(|| {
        debian_file("vmlinuz");
        let mut script = String::new();
        for (name, commands) in PARTS {
            let _ = writeln!(script, "echo '== {name}'; {commands}");
        }
        let mut command = ringside();
        command.args(["run", "--engine", "soft", "--cpus", &CPUS.to_string()]).args(memory_option());
        // Neither apt nor a network: what was fetched before is enough.
        command.env("PATH", "/nonexistent").env("http_proxy", "http://127.0.0.1:1/");
        let output = run_within(command.args(["--exec", &format!("{script}true")]), LIMIT);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
        let text = format!("\n{}", String::from_utf8(output.stdout).expect("text"));
        let parts = text.split("\n== ").skip(1).filter_map(|part| part.split_once('\n'));
        parts.map(|(name, rest)| (name.to_owned(), rest.trim_end().to_owned())).collect()
    });
    all.get(part).map_or("", String::as_str)
}

/// RAM on both sides of the device hole, where the host has that much.
fn memory_option() -> &'static [&'static str] {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse().ok());
    if kib.is_some_and(|kib: u64| kib > 6 << 20) { &["--memory", "4G"] } else { &[] }
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split_whitespace().collect()
}

#[test]
fn the_processors_instructions_are_a_subset_of_the_hosts() {
    let host = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let host = words(host.lines().find(|line| line.starts_with("flags")).unwrap());
    let guest = words(printed("flags"));
    let known = words(INSTRUCTIONS);
    let more: Vec<_> = guest.intersection(&known).filter(|flag| !host.contains(*flag)).collect();
    assert!(more.is_empty(), "{more:?}");
    for flag in ["sse2", "cx16", "nx", "lm", "apic", "x2apic", "tsc_deadline_timer", "hypervisor"] {
        assert!(guest.contains(flag), "no {flag}");
    }
}

#[test]
fn each_vcpu_is_a_core_and_all_memory_is_there() {
    assert_eq!(printed("processors"), format!("{CPUS}\n{CPUS}\n{CPUS}"));
    let kib: u64 = printed("memory").split_whitespace().nth(1).unwrap().parse().unwrap();
    let wanted = if memory_option().is_empty() { 512 << 10 } else { 4 << 20 };
    assert!((wanted * 85 / 100..wanted).contains(&kib), "{kib} KiB of {wanted}");
}

/// The counts of a line of /proc/interrupts.
fn counts(part: &str, name: &str) -> Vec<u64> {
    let line = printed(part).lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'));
    let line = line.unwrap_or_else(|| panic!("no {name} in {}", printed(part)));
    line.split_whitespace().take(CPUS).map(|count| count.parse().unwrap()).collect()
}

#[test]
fn the_local_timers_and_interprocessor_interrupts_arrive() {
    let (before, after) = (counts("before", "LOC"), counts("interrupts", "LOC"));
    assert!(before.iter().all(|&count| count > 10), "{before:?}");
    assert!(after.iter().sum::<u64>() > before.iter().sum(), "{before:?} {after:?}");
    let between = counts("interrupts", "RES").iter().chain(&counts("interrupts", "CAL")).sum::<u64>();
    assert!(between > 0);
    assert!(printed("interrupts").contains("IO-APIC"));
    for name in ["ERR", "MIS"] {
        assert!(
            printed("interrupts").lines().any(|line| line.trim().replace(' ', "") == format!("{name}:0"))
        );
    }
}

#[test]
fn the_guests_clocks_are_the_hosts() {
    // The guest's boot is over by now, and began a minute ago at most. Linux sets its clock to half a second past the second
    // that it reads from the CMOS clock.
    let dates: Vec<u64> = printed("date").lines().map(|line| line.parse().unwrap()).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(dates[0] <= now + 1 && now < dates[0] + 60, "{dates:?} {now}");
    assert!(dates[0].abs_diff(dates[1]) <= 2, "{dates:?}");
    let uptimes: Vec<f64> = printed("uptime").lines().map(|line| line.parse().unwrap()).collect();
    let slept = uptimes[1] - uptimes[0];
    assert!((1.95..6.0).contains(&slept), "{slept}");
    assert!(["tsc", "kvm-clock"].contains(&printed("clocks")), "{}", printed("clocks"));
}

#[test]
fn the_kernel_has_nothing_to_complain_about() {
    assert_eq!(printed("complaints"), "");
    assert!(printed("console").contains("console=ttyS0"));
}
