use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use x86::ExitReason;

use crate::ledger::{Page, Tally};
use crate::{Detail, KernelCounts, Ledger, names};

/// The name and version of the JSON that a [`Report`] is written as. Later versions only add.
pub const FORMAT: &str = "ringside-exits/1";

/// A machine's exits, summed up. Times are in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: String,
    /// Frequency of the counter that measured, in Hz.
    pub tick_frequency: u64,
    /// From the ledger's start to the report.
    pub elapsed_ns: u64,
    /// All exits.
    pub exits: u64,
    /// Time spent handling them, without waiting.
    pub handling_ns: u64,
    /// Time that halted vCPUs waited.
    pub waiting_ns: u64,
    /// By reason: those that took the most time first, waiting ones last.
    pub reasons: Vec<ReasonReport>,
    /// By vCPU, in ascending order.
    pub vcpus: Vec<VcpuReport>,
    /// What the host's kernel handled, where the engine has a part there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelReport>,
}

/// Exits that never left the host's kernel: counted, not timed, and not part of [`Report::exits`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelReport {
    /// All exits of all vCPUs by the kernel's count, also those that left the kernel.
    pub exits: u64,
    /// How long vCPUs were halted there.
    pub halted_ns: u64,
    /// Those that the kernel tells apart, the most frequent first.
    pub reasons: Vec<KernelReason>,
}

/// The kernel's count for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelReason {
    /// Intel's name.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// The exits for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonReport {
    /// Intel's name.
    pub reason: String,
    /// Its number in a VMCS.
    pub number: u8,
    /// Whether its time is waiting, not handling.
    pub waiting: bool,
    /// How many, and how long.
    #[serde(flatten)]
    pub times: Times,
    /// By what they were at: those that took the most time first.
    pub details: Vec<DetailReport>,
    /// What was beyond the ledger's bound of details.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others: Option<Times>,
}

/// The exits at one register or address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetailReport {
    /// What the machine calls it.
    pub name: String,
    /// What it is.
    pub detail: Detail,
    /// How many, and how long.
    #[serde(flatten)]
    pub times: Times,
}

/// One vCPU's exits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuReport {
    /// Its number.
    pub vcpu: u32,
    /// All its exits.
    pub exits: u64,
    /// Time spent handling them, without waiting.
    pub handling_ns: u64,
    /// Time that it waited, halted.
    pub waiting_ns: u64,
}

/// How many exits, and how long they took, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// How many.
    pub count: u64,
    /// In all.
    pub total_ns: u64,
    /// The median, at most an eighth off.
    pub p50_ns: u64,
    /// The 99th percentile, at most an eighth off.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// The distribution.
    pub histogram: Vec<Bucket>,
}

/// How many took longer than the bucket before and at most this long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// The longest that counts here, in nanoseconds.
    pub up_to_ns: u64,
    /// How many.
    pub count: u64,
}

impl Report {
    /// Sums up what the ledger holds, over all vCPUs.
    ///
    /// `tick_frequency` is that of [`crate::ticks`], in Hz. `resolve` gives the machine's name for an address:
    /// "serial0 THR (w)"; where it gives none, the detail is named by its number.
    pub fn new(ledger: &Ledger, tick_frequency: u64, resolve: &dyn Fn(&Detail) -> Option<String>) -> Self {
        let clock = Clock(tick_frequency.max(1));
        let books = ledger.pages();
        let vcpus: Vec<_> = books.iter().map(|(vcpu, pages)| clock.vcpu(*vcpu, pages)).collect();
        let mut reasons: Vec<_> =
            merge(books).into_iter().map(|(reason, page)| clock.reason(reason, page, resolve)).collect();
        reasons.sort_by_key(|r| (r.waiting, std::cmp::Reverse(r.times.total_ns), r.number));
        Self {
            format: FORMAT.to_owned(),
            tick_frequency,
            elapsed_ns: clock.nanoseconds(ledger.elapsed()),
            exits: vcpus.iter().map(|v| v.exits).sum(),
            handling_ns: vcpus.iter().map(|v| v.handling_ns).sum(),
            waiting_ns: vcpus.iter().map(|v| v.waiting_ns).sum(),
            reasons,
            vcpus,
            kernel: kernel(&ledger.kernel_counts()),
        }
    }

    /// The report as JSON, indented, everything in it.
    ///
    /// # Errors
    /// None that this type can cause; serde's signature has one.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }

    /// Reads what [`Self::to_json`] wrote.
    ///
    /// # Errors
    /// Where it is no such JSON.
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }
}

/// Whether an exit's time is the guest's waiting rather than our work.
const fn is_wait(reason: ExitReason) -> bool {
    matches!(reason, ExitReason::Hlt | ExitReason::Mwait)
}

/// One page for each reason, over all vCPUs.
fn merge(books: Vec<(u32, Vec<(ExitReason, Page)>)>) -> BTreeMap<ExitReason, MergedPage> {
    let mut merged: BTreeMap<ExitReason, MergedPage> = BTreeMap::new();
    for (reason, page) in books.into_iter().flat_map(|(_, pages)| pages) {
        let into = merged.entry(reason).or_default();
        into.all.merge(&page.all);
        into.others.merge(&page.others);
        for (detail, tally) in page.details {
            into.details.entry(detail).or_default().merge(&tally);
        }
    }
    merged
}

/// Over all vCPUs; `None` where no kernel had a part.
fn kernel(counts: &[KernelCounts]) -> Option<KernelReport> {
    if counts.is_empty() {
        return None;
    }
    let mut by_reason: BTreeMap<ExitReason, u64> = BTreeMap::new();
    for (reason, count) in counts.iter().flat_map(|c| &c.by_reason) {
        *by_reason.entry(*reason).or_default() += count;
    }
    let mut reasons: Vec<_> = by_reason
        .into_iter()
        .map(|(reason, count)| KernelReason { reason: reason.name().to_owned(), count })
        .collect();
    reasons.sort_by_key(|r| std::cmp::Reverse(r.count));
    Some(KernelReport {
        exits: counts.iter().map(|c| c.exits).sum(),
        halted_ns: counts.iter().map(|c| c.halted_ns).sum(),
        reasons,
    })
}

#[derive(Default)]
struct MergedPage {
    all: Tally,
    others: Tally,
    details: BTreeMap<Detail, Tally>,
}

/// Ticks a second, at least one.
struct Clock(u64);

impl Clock {
    fn nanoseconds(&self, ticks: u64) -> u64 {
        let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(self.0);
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    fn vcpu(&self, vcpu: u32, pages: &[(ExitReason, Page)]) -> VcpuReport {
        let ticks = |waiting| {
            let of_kind = pages.iter().filter(|(reason, _)| is_wait(*reason) == waiting);
            of_kind.fold(0u64, |sum, (_, page)| sum.saturating_add(page.all.ticks))
        };
        VcpuReport {
            vcpu,
            exits: pages.iter().map(|(_, page)| page.all.count).sum(),
            handling_ns: self.nanoseconds(ticks(false)),
            waiting_ns: self.nanoseconds(ticks(true)),
        }
    }

    fn reason(
        &self,
        reason: ExitReason,
        page: MergedPage,
        resolve: &dyn Fn(&Detail) -> Option<String>,
    ) -> ReasonReport {
        let mut details: Vec<_> = page
            .details
            .iter()
            .map(|(detail, tally)| DetailReport {
                name: resolve(detail).unwrap_or_else(|| names::name(reason, detail)),
                detail: *detail,
                times: self.times(tally),
            })
            .collect();
        details.sort_by_key(|d| (std::cmp::Reverse(d.times.total_ns), d.detail));
        ReasonReport {
            reason: reason.name().to_owned(),
            number: reason as u8,
            waiting: is_wait(reason),
            times: self.times(&page.all),
            details,
            others: (page.others.count > 0).then(|| self.times(&page.others)),
        }
    }

    fn times(&self, tally: &Tally) -> Times {
        let quantile = |share| self.nanoseconds(tally.histogram.quantile(share).min(tally.longest));
        Times {
            count: tally.count,
            total_ns: self.nanoseconds(tally.ticks),
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            max_ns: self.nanoseconds(tally.longest),
            histogram: tally
                .histogram
                .buckets()
                .map(|(value, count)| Bucket { up_to_ns: self.nanoseconds(value), count })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Exit, MAX_DETAILS};

    /// A frequency at which a tick is a nanosecond.
    const GHZ: u64 = 1_000_000_000;

    fn port(port: u16, write: bool) -> Exit {
        Exit::at(ExitReason::IoInstruction, Detail::Port { port, size: 1, write })
    }

    fn two_vcpus() -> Ledger {
        let ledger = Ledger::new();
        let (first, second) = (ledger.recorder(0), ledger.recorder(1));
        first.record(port(0x3f8, true), 100);
        second.record(port(0x3f8, true), 300);
        second.record(port(0x3fd, false), 50);
        first.record(Exit::new(ExitReason::Hlt), 1_000_000);
        first.record(Exit::at(ExitReason::MsrWrite, Detail::Msr(0x6e0)), 5_000);
        ledger
    }

    fn unnamed(_: &Detail) -> Option<String> {
        None
    }

    #[test]
    fn vcpus_are_merged_and_also_told_apart() {
        let report = Report::new(&two_vcpus(), GHZ, &unnamed);
        let io = report.reasons.iter().find(|r| r.reason == "IO_INSTRUCTION").unwrap();
        assert_eq!((io.times.count, io.times.total_ns, io.times.max_ns), (3, 450, 300));
        assert_eq!((io.details[0].times.count, io.details[0].times.total_ns), (2, 400));
        let totals: Vec<_> =
            report.vcpus.iter().map(|v| (v.vcpu, v.exits, v.handling_ns, v.waiting_ns)).collect();
        assert_eq!(totals, [(0, 3, 5_100, 1_000_000), (1, 2, 350, 0)]);
        assert_eq!((report.exits, report.handling_ns), (5, 5_450));
    }

    #[test]
    fn waiting_is_no_handling_and_comes_last() {
        let report = Report::new(&two_vcpus(), GHZ, &unnamed);
        let order: Vec<_> = report.reasons.iter().map(|r| (r.reason.as_str(), r.waiting)).collect();
        assert_eq!(order, [("MSR_WRITE", false), ("IO_INSTRUCTION", false), ("HLT", true)]);
        assert_eq!(report.waiting_ns, 1_000_000);
    }

    #[test]
    fn the_machine_names_its_registers() {
        let resolve = |detail: &Detail| {
            let Detail::Port { port: 0x3f8, write: true, .. } = detail else { return None };
            Some("serial0 THR (w)".to_owned())
        };
        let report = Report::new(&two_vcpus(), GHZ, &resolve);
        let names: Vec<_> = report.reasons[1].details.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["serial0 THR (w)", "port 0x3fd (r)"]);
    }

    #[test]
    fn ticks_become_nanoseconds() {
        let report = Report::new(&two_vcpus(), 2_500_000_000, &unnamed);
        assert_eq!(report.waiting_ns, 400_000);
    }

    #[test]
    fn json_holds_everything() {
        let mut report = Report::new(&two_vcpus(), GHZ, &unnamed);
        report.reasons[0].others = Some(Times::default());
        let json = report.to_json().unwrap();
        assert_eq!(Report::from_json(&json).unwrap(), report);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["format"], "ringside-exits/1");
        assert_eq!(value["reasons"][0]["details"][0]["name"], "IA32_TSC_DEADLINE");
        assert_eq!(value["reasons"][0]["details"][0]["detail"]["at"], 0x6e0);
        assert_eq!(value["reasons"][1]["details"][0]["detail"]["at"]["port"], 0x3f8);
        assert_eq!(value["reasons"][1]["count"], 3);
    }

    #[test]
    fn details_beyond_the_bound_are_others() {
        let ledger = Ledger::new();
        let recorder = ledger.recorder(0);
        (0..1000u16).for_each(|n| recorder.record(port(n, false), 7));
        let report = Report::new(&ledger, GHZ, &unnamed);
        assert_eq!(report.reasons[0].details.len(), MAX_DETAILS);
        let others = report.reasons[0].others.as_ref().unwrap();
        assert_eq!((others.count, others.p50_ns), (1000 - MAX_DETAILS as u64, 7));
    }

    #[test]
    fn what_the_kernel_counted_is_summed_up_and_kept_apart() {
        let ledger = two_vcpus();
        let counts =
            |halts| KernelCounts { exits: 100, halted_ns: 7, by_reason: vec![(ExitReason::Hlt, halts)] };
        ledger.recorder(0).set_kernel_counts(counts(1));
        ledger.recorder(0).set_kernel_counts(counts(3));
        ledger.recorder(1).set_kernel_counts(counts(5));
        let report = Report::new(&ledger, GHZ, &unnamed);
        let halts = KernelReason { reason: "HLT".to_owned(), count: 8 };
        assert_eq!(report.kernel, Some(KernelReport { exits: 200, halted_ns: 14, reasons: vec![halts] }));
        assert_eq!(report.exits, 5);
        assert_eq!(Report::from_json(&report.to_json().unwrap()).unwrap(), report);
    }

    #[test]
    fn an_unknown_frequency_is_no_division_by_zero() {
        assert_eq!(Report::new(&two_vcpus(), 0, &unnamed).exits, 5);
    }
}
