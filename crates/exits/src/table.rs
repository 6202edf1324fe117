//! The report as a person reads it, at most 100 columns wide.

use std::fmt::{self, Write};

use crate::{DetailReport, Report, Times};

/// Rows of the second table.
const TOP: usize = 15;
/// Columns of its names.
const NAME: usize = 36;

impl Report {
    /// The report as a table: by reason, the registers and addresses that cost most, and by vCPU.
    pub fn table(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.head(f)?;
        self.by_reason(f)?;
        self.by_detail(f)?;
        self.by_vcpu(f)?;
        self.in_kernel(f)
    }
}

impl Report {
    fn head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = (u128::from(self.exits) * 1_000_000_000).checked_div(u128::from(self.elapsed_ns));
        let capacity = self.elapsed_ns.saturating_mul(self.vcpus.len() as u64);
        writeln!(
            f,
            "VM exits: {} in {} ({}/s); handling took {} ({} of the vCPUs' time), halted {}",
            count(self.exits),
            time(self.elapsed_ns),
            count(per_second.unwrap_or(0).try_into().unwrap_or(u64::MAX)),
            time(self.handling_ns),
            share(self.handling_ns, capacity).trim_start(),
            time(self.waiting_ns),
        )
    }

    fn by_reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reasons.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n{:22}{}", "reason", columns())?;
        for reason in &self.reasons {
            let of = (!reason.waiting).then_some(self.handling_ns);
            writeln!(f, "{:22}{}", reason.reason, self.row(&reason.times, of))?;
        }
        Ok(())
    }

    fn by_detail(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<(&str, &DetailReport)> =
            self.reasons.iter().flat_map(|r| r.details.iter().map(|d| (r.reason.as_str(), d))).collect();
        if rows.is_empty() {
            return Ok(());
        }
        rows.sort_by_key(|(_, d)| std::cmp::Reverse(d.times.total_ns));
        let top = &rows[..rows.len().min(TOP)];
        writeln!(f, "\n{:NAME$}{:22}{:>10}{:>10}{:>9}{:>9}", "at", "reason", "count", "time", "p50", "max")?;
        for (reason, detail) in top {
            let times = &detail.times;
            writeln!(
                f,
                "{:NAME$}{:22}{:>10}{:>10}{:>9}{:>9}",
                fitted(&detail.name),
                reason,
                count(times.count),
                time(times.total_ns),
                time(times.p50_ns),
                time(times.max_ns)
            )?;
        }
        if rows.len() > top.len() {
            writeln!(f, "... and {} more", rows.len() - top.len())?;
        }
        Ok(())
    }

    fn by_vcpu(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vcpus.len() < 2 {
            return Ok(());
        }
        writeln!(f, "\n{:8}{:>14}{:>12}{:>12}", "vCPU", "count", "handling", "halted")?;
        for vcpu in &self.vcpus {
            let (handling, waiting) = (time(vcpu.handling_ns), time(vcpu.waiting_ns));
            writeln!(f, "{:<8}{:>14}{:>12}{:>12}", vcpu.vcpu, count(vcpu.exits), handling, waiting)?;
        }
        Ok(())
    }

    fn in_kernel(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let all = format!("{} exits in all, halted {}", count(kernel.exits), time(kernel.halted_ns));
        writeln!(f, "\nby the host kernel's count, not timed: {all}")?;
        for reason in &kernel.reasons {
            writeln!(f, "{:22}{:>14}", reason.reason, count(reason.count))?;
        }
        Ok(())
    }

    /// A reason's columns; `handling` is what its time is a share of, `None` where it is waiting.
    fn row(&self, times: &Times, handling: Option<u64>) -> String {
        let mut row = format!("{:>14}{:>9}", count(times.count), share(times.count, self.exits));
        let of_time = handling.map_or_else(|| "waiting".to_owned(), |all| share(times.total_ns, all));
        for cell in
            [time(times.total_ns), of_time, time(times.p50_ns), time(times.p99_ns), time(times.max_ns)]
        {
            let _ = write!(row, "{cell:>10}");
        }
        row
    }
}

fn columns() -> String {
    format!(
        "{:>14}{:>9}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "count", "share", "time", "share", "p50", "p99", "max"
    )
}

/// A name that leaves one column free: names come from devices and may be long.
fn fitted(name: &str) -> String {
    let length = name.chars().count();
    if length < NAME {
        return name.to_owned();
    }
    name.chars().take(NAME - 4).chain("...".chars()).collect()
}

/// "1,234,567".
fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// "12.3 %"; nothing of nothing is 0.
fn share(part: u64, whole: u64) -> String {
    let percent = if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    format!("{percent:.1} %")
}

/// Nanoseconds with three digits and a unit: "310 ns", "4.57 µs", "12.3 ms", "2.06 s".
fn time(nanoseconds: u64) -> String {
    if nanoseconds < 1000 {
        return format!("{nanoseconds} ns");
    }
    let (mut value, mut unit) = (nanoseconds as f64, "ns");
    for larger in ["µs", "ms", "s"] {
        // What would be rounded to 1,000 is 1 of the next unit.
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, larger);
    }
    let digits = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Detail, Exit, Ledger};
    use x86::ExitReason;

    fn report() -> Report {
        let ledger = Ledger::new();
        let (first, second) = (ledger.recorder(0), ledger.recorder(1));
        let port = |port, write| Exit::at(ExitReason::IoInstruction, Detail::Port { port, size: 1, write });
        (0..1234).for_each(|n| first.record(port(0x3f8, true), 300 + n));
        (0..10).for_each(|_| first.record(port(0x3fd, false), 200));
        (0..100).for_each(|_| second.record(Exit::at(ExitReason::MsrWrite, Detail::Msr(0x6e0)), 8_000));
        second.record(Exit::at(ExitReason::MsrWrite, Detail::Msr(0x277)), 2_000);
        second.record(Exit::new(ExitReason::Hlt), 1_500_000_000);
        let resolve = |detail: &Detail| {
            matches!(detail, Detail::Port { port: 0x3f8, .. }).then(|| "serial0 THR (w)".to_owned())
        };
        Report { elapsed_ns: 2_000_000_000, ..Report::new(&ledger, 1_000_000_000, &resolve) }
    }

    #[test]
    fn the_table_reads_at_a_hundred_columns() {
        let table = report().table();
        assert_eq!(
            table,
            "\
VM exits: 1,346 in 2.00 s (673/s); handling took 1.93 ms (0.0 % of the vCPUs' time), halted 1.50 s

reason                         count    share      time     share       p50       p99       max
IO_INSTRUCTION                 1,244   92.4 %   1.13 ms    58.6 %    959 ns   1.41 µs   1.53 µs
MSR_WRITE                        101    7.5 %    802 µs    41.4 %   7.68 µs   7.68 µs   8.00 µs
HLT                                1    0.1 %    1.50 s   waiting    1.48 s    1.48 s    1.50 s

at                                  reason                     count      time      p50      max
serial0 THR (w)                     IO_INSTRUCTION             1,234   1.13 ms   959 ns  1.53 µs
IA32_TSC_DEADLINE                   MSR_WRITE                    100    800 µs  7.68 µs  8.00 µs
port 0x3fd (r)                      IO_INSTRUCTION                10   2.00 µs   200 ns   200 ns
IA32_PAT                            MSR_WRITE                      1   2.00 µs  1.92 µs  2.00 µs

vCPU             count    handling      halted
0                1,244     1.13 ms        0 ns
1                  102      802 µs      1.50 s
"
        );
    }

    #[test]
    fn no_line_is_longer_than_a_hundred_columns() {
        let mut report = report();
        report.exits = u64::MAX;
        for reason in &mut report.reasons {
            reason.times.count = 999_999_999_999;
            reason.details.iter_mut().for_each(|d| d.name = "é".repeat(200));
        }
        for line in report.table().lines().skip(1) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }

    #[test]
    fn exits_that_the_kernel_handled_follow_at_the_end() {
        let ledger = Ledger::new();
        ledger.recorder(0).set_kernel_counts(crate::KernelCounts {
            exits: 12_345,
            halted_ns: 1_500_000,
            by_reason: vec![(ExitReason::Hlt, 1_000)],
        });
        let table = Report::new(&ledger, 1, &|_| None).table();
        let end = "\
by the host kernel's count, not timed: 12,345 exits in all, halted 1.50 ms
HLT                            1,000
";
        assert!(table.ends_with(end), "{table}");
    }

    #[test]
    fn a_machine_without_exits_has_a_report() {
        let report = Report { elapsed_ns: 0, ..Report::new(&Ledger::new(), 1, &|_| None) };
        assert_eq!(report.table().lines().count(), 1);
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.00 µs"),
            (9_996, "10.0 µs"),
            (45_678, "45.7 µs"),
            (999_600, "1.00 ms"),
            (123_456_789, "123 ms"),
            (86_400_000_000_000, "86400 s"),
        ] {
            assert_eq!(time(nanoseconds), text);
        }
    }

    #[test]
    fn counts_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
    }
}
