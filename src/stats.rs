//! `--stats`: what a run took.

use std::time::{Duration, Instant};

use vmm::{CounterValue, Summary, VcpuSummary};

use crate::size;

/// The table for stderr. `started` is when the process began.
pub fn table(summary: &Summary, started: Instant) -> String {
    let mut rows = vec![
        ("engine".to_owned(), summary.engine.to_owned()),
        ("wall time".to_owned(), seconds(started.elapsed())),
    ];
    if let Some(first) = summary.first_instruction {
        rows.push(("before the first instruction".to_owned(), seconds(first.duration_since(started))));
    }
    for vcpu in &summary.vcpus {
        rows.push((format!("vCPU {}", vcpu.id), work(vcpu, summary.elapsed)));
        rows.extend(
            vcpu.counters.iter().map(|counter| (format!("  {}", counter.name), value(counter.value))),
        );
    }
    if let Some(memory) = summary.memory {
        rows.push(("memory: the guest's, as far as touched".to_owned(), size::display(memory.guest)));
        rows.push(("memory beside it".to_owned(), size::display(memory.beside)));
    }
    if let Some(bytes) = peak_memory() {
        rows.push(("peak memory".to_owned(), size::display(bytes)));
    }
    rows.iter().map(|(name, value)| format!("{name:<42}{value}\n")).collect()
}

fn value(value: CounterValue) -> String {
    match value {
        CounterValue::Count(count) => count.to_string(),
        CounterValue::Bytes(bytes) => size::display(bytes),
        CounterValue::Time(time) => seconds(time),
    }
}

fn work(vcpu: &VcpuSummary, elapsed: Duration) -> String {
    let busy = elapsed.saturating_sub(vcpu.idle);
    let times = format!("busy {}, idle {}", seconds(busy), seconds(vcpu.idle));
    match vcpu.instructions {
        Some(count) => format!("{count} instructions, {:.1} million/s; {times}", rate(count, busy)),
        None => times,
    }
}

/// Million a second.
fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / 1e6 / time.as_secs_f64().max(1e-9)
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

/// The most memory that this process had resident, in bytes; the guest's RAM is part of it.
fn peak_memory() -> Option<u64> {
    parse_peak(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Finds `VmHWM:   1234 kB`.
fn parse_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_from_the_processs_status() {
        assert_eq!(parse_peak("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2 << 20));
        assert_eq!(parse_peak("Name:\tx\n"), None);
    }

    #[test]
    fn a_vcpu_that_never_ran_has_no_absurd_rate() {
        assert_eq!(rate(0, Duration::ZERO), 0.0);
        assert!((rate(240_000_000, Duration::from_secs(2)) - 120.0).abs() < 1e-6);
    }
}
