//! The tables.

use std::fmt::Write as _;
use std::time::Duration;

use crate::side::{Measured, Results};
use crate::workloads::{Class, THREADS, Workload};

/// The best of several runs of everything, for each side.
#[derive(Default)]
pub struct Best {
    results: Results,
}

impl Best {
    /// Takes a run; gives the workloads whose checksum is another than before.
    pub fn add(&mut self, run: Results) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, new) in run {
            match self.results.get_mut(&name) {
                None => drop(self.results.insert(name, new)),
                Some(old) => {
                    if old.checksum != new.checksum {
                        wrong.push(name);
                    }
                    old.processor = old.processor.min(new.processor);
                    old.clock = old.clock.min(new.clock);
                }
            }
        }
        wrong
    }

    /// What is known of a workload.
    pub fn get(&self, name: &str) -> Option<&Measured> {
        self.results.get(name)
    }
}

/// The classes whose means are printed.
const CLASSES: &[(&str, Option<Class>)] = &[
    ("integer", Some(Class::Integer)),
    ("floats, vectors", Some(Class::Floats)),
    ("kernel", Some(Class::Kernel)),
    ("programs", Some(Class::Programs)),
    ("all", None),
];

/// Each workload's times, and the means.
pub fn table(selected: &[&Workload], native: &Best, ringside: &Best, qemu: &Best) -> String {
    let mut text = format!(
        "{:<12} {:>10} {:>10} {:>10} {:>9} {:>9}  unit\n",
        "workload", "native µs", "ringside", "qemu", "ringside", "qemu"
    );
    let _ = writeln!(text, "{:<12} {:>10} {:>10} {:>10} {:>9} {:>9}", "", "", "", "", "/native", "/ringside");
    let time = |best: &Best, name| best.get(name).map(|measured| measured.processor);
    let mut ratios = Vec::new();
    for workload in selected {
        let (host, ours, theirs) =
            (time(native, workload.name), time(ringside, workload.name), time(qemu, workload.name));
        let (slower, faster) = (ratio(ours, host), ratio(theirs, ours));
        ratios.push((workload.class, slower, faster));
        let wrong = match (native.get(workload.name), ringside.get(workload.name)) {
            (Some(host), Some(ours)) if host.checksum != ours.checksum => {
                "  WRONG: another checksum than native"
            }
            _ => "",
        };
        let _ = writeln!(
            text,
            "{:<12} {} {} {} {} {}  {}{wrong}",
            workload.name,
            micros(host),
            micros(ours),
            micros(theirs),
            times(slower),
            times(faster),
            workload.unit
        );
    }
    text.push_str("geometric means\n");
    for (name, class) in CLASSES {
        let of_class = || ratios.iter().filter(|row| class.is_none_or(|class| class == row.0));
        let slower = geometric_mean(of_class().filter_map(|row| row.1));
        let faster = geometric_mean(of_class().filter_map(|row| row.2));
        if slower.is_some() {
            let _ = writeln!(text, "{name:<45} {} {}", times(slower), times(faster));
        }
    }
    text
}

/// What a second processor brings to two threads that have nothing to do with each other.
pub fn pair(processors: &str, one: &Best, two: &Best) -> Option<String> {
    let (one, two) = (one.get(THREADS)?, two.get(THREADS)?);
    let ratio = |time: fn(&Measured) -> Duration| time(one).as_secs_f64() / time(two).as_secs_f64();
    Some(format!(
        "two {processors} do {:.2} times the work of one in the same time, with {:.2} times its processor time for each unit\n",
        ratio(|measured| measured.clock),
        1.0 / ratio(|measured| measured.processor),
    ))
}

fn ratio(of: Option<Duration>, to: Option<Duration>) -> Option<f64> {
    Some(of?.as_secs_f64() / to?.as_secs_f64())
}

fn micros(time: Option<Duration>) -> String {
    time.map_or(format!("{:>10}", "-"), |time| format!("{:>10.1}", time.as_secs_f64() * 1e6))
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or(format!("{:>9}", "-"), |ratio| format!("{ratio:>9.2}"))
}

/// The mean whose logarithm is the mean of the logarithms.
fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}
