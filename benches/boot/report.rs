//! The tables.

use std::fmt::Write;

use crate::inputs::Inputs;
use crate::leg::{Kind, Leg, Results, Run, Work, median};
use crate::options::Options;

/// What one has to know to read the table.
pub const NOTES: &str = "\
to shell, power-off  from the start of the process, median. Ringside unpacks the kernel on the host; the stub, QEMU's
                     pc and Bochs have the guest unpack it.
CPU                  processor time of the monitor's process, user and system: what a busy host disturbs least.
Minstr               million instructions of the guest, as Ringside counts them. QEMU does not count: its number (~) is
                     Ringside's for the same kernel, unpacked or unpacking itself, without QEMU's firmware. Bochs'
                     number (<) has firmware, boot loader and the time that it skips while the guest is halted in it.
Minstr/s, /CPU s     these over the time to power-off, and over the processor time.
x shell              time to the shell, times Ringside's: above 1, Ringside is faster.
x work               processor time, times Ringside's for the same work: the kernel unpacked, or unpacking itself.";

/// What is measured, and where.
pub fn heading(inputs: &Inputs, options: &Options) -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "guest {} ({}), {} MiB, 1 vCPU, {} runs; host{}, {} CPUs, load {}",
        inputs.guest,
        inputs.version,
        options.memory,
        options.runs,
        model.trim_start_matches(['\t', ':']),
        std::thread::available_parallelism().map_or(0, usize::from),
        load.split_whitespace().next().unwrap_or("?"),
    )
}

/// A leg's medians, in seconds and instructions.
struct Medians {
    shell: Option<f64>,
    power_off: Option<f64>,
    cpu: Option<f64>,
    instructions: Option<f64>,
    before_kernel: Option<f64>,
}

impl Medians {
    fn of(runs: &[Run]) -> Self {
        let over = |value: fn(&Run) -> Option<f64>| median(runs.iter().filter_map(value));
        Self {
            shell: over(|run| run.shell.map(|time| time.as_secs_f64())),
            power_off: over(|run| Some(run.power_off.as_secs_f64())),
            cpu: over(|run| Some(run.cpu.as_secs_f64())),
            instructions: over(|run| run.details.instructions),
            before_kernel: over(|run| run.details.before_kernel.map(|time| time.as_secs_f64())),
        }
    }
}

/// The legs, one a line.
pub fn table(legs: &[Leg], results: &Results) -> String {
    let of_kind = |kind| legs.iter().position(|leg| leg.kind == kind).map(|at| Medians::of(results.runs(at)));
    let (ours, stub) = (of_kind(Kind::Ringside), of_kind(Kind::RingsideStub));
    let mut text = format!(
        "{:<32}{:>9}{:>10}{:>9}{:>9}{:>10}{:>8}{:>9}{:>8}\n",
        "", "to shell", "power-off", "CPU", "Minstr", "Minstr/s", "/CPU s", "x shell", "x work"
    );
    for (at, leg) in legs.iter().enumerate().filter(|(_, leg)| leg.kind != Kind::FirstWords) {
        if let Some(why) = results.failure(at) {
            let _ = writeln!(text, "{:<32}failed: {}", leg.name, why.replace('\n', "\n    "));
            continue;
        }
        let medians = Medians::of(results.runs(at));
        let packed =
            leg.kind == Kind::RingsideStub || matches!(leg.work, Work::LikePacked | Work::CountedWithIdle);
        let same_work = if packed { stub.as_ref() } else { ours.as_ref() };
        let counted = match leg.work {
            Work::Counted | Work::CountedWithIdle => medians.instructions,
            Work::LikeUnpacked | Work::LikePacked => same_work.and_then(|like| like.instructions),
        };
        if leg.work == Work::Counted && counted.is_none() {
            text.push_str("(what `ringside --stats` says of instructions was not understood)\n");
        }
        text.push_str(&row(leg, &medians, counted, [ours.as_ref(), same_work]));
    }
    for (at, leg) in legs.iter().enumerate() {
        let Some(before) = Medians::of(results.runs(at)).before_kernel else { continue };
        let what = if leg.kind == Kind::FirstWords {
            "the unpacked kernel speaks after"
        } else {
            "the kernel is entered after"
        };
        let _ = writeln!(text, "{}: {what} {before:.2} s", leg.name);
    }
    text
}

fn row(
    leg: &Leg,
    medians: &Medians,
    instructions: Option<f64>,
    [ours, same_work]: [Option<&Medians>; 2],
) -> String {
    let seconds = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2} s"));
    let ratio = |value: Option<f64>, ours: Option<f64>| match (value, ours) {
        (Some(value), Some(ours)) if ours > 0.0 => format!("{:.2}", value / ours),
        _ => "-".into(),
    };
    let millions = instructions.map(|count| count / 1e6);
    let rate = |time: Option<f64>| match (millions, time) {
        (Some(count), Some(time)) if time > 0.0 => format!("{:.1}", count / time),
        _ => "-".into(),
    };
    let about = match leg.work {
        Work::Counted => "",
        Work::CountedWithIdle => "<",
        Work::LikeUnpacked | Work::LikePacked => "~",
    };
    format!(
        "{:<32}{:>9}{:>10}{:>9}{:>9}{:>10}{:>8}{:>9}{:>8}\n",
        leg.name,
        seconds(medians.shell),
        seconds(medians.power_off),
        seconds(medians.cpu),
        millions.map_or("-".into(), |count| format!("{about}{count:.0}")),
        rate(medians.power_off),
        rate(medians.cpu),
        ratio(medians.shell, ours.and_then(|ours| ours.shell)),
        ratio(medians.cpu, same_work.and_then(|like| like.cpu)),
    )
}

/// What the ledger costs: each round's run with it against the run without it.
pub fn ledger(results: &Results, legs: &[Leg]) -> String {
    let runs = |kind| legs.iter().position(|leg| leg.kind == kind).map_or(&[][..], |at| results.runs(at));
    let (off, on) = (runs(Kind::Ringside), runs(Kind::RingsideLedger));
    let cost = |time: fn(&Run) -> f64| {
        let percent = |(off, on): (&Run, &Run)| (time(on) / time(off) - 1.0) * 100.0;
        median(off.iter().zip(on).map(percent))
    };
    let wall = cost(|run| run.power_off.as_secs_f64());
    let cpu = cost(|run| run.cpu.as_secs_f64());
    let (Some(wall), Some(cpu)) = (wall, cpu) else { return "the ledger's cost: not measured".into() };
    let spread = |runs: &[Run]| {
        let cpu = || runs.iter().map(|run| run.cpu.as_secs_f64());
        let (least, most) = (cpu().fold(f64::MAX, f64::min), cpu().fold(0.0, f64::max));
        (most / least - 1.0) * 100.0
    };
    let exits = on.iter().find_map(|run| run.details.exits);
    format!(
        "the ledger costs {wall:+.1} % of the time to power-off, {cpu:+.1} % of the CPU time (median of {} pairs; \
         runs without it differ by {:.1} % among themselves){}",
        off.len().min(on.len()),
        spread(off),
        exits.map(|count| format!("; {count} exits")).unwrap_or_default(),
    )
}

/// How much sooner the shell is there than on the quickest of QEMU's machines.
pub fn shell(results: &Results, legs: &[Leg]) -> String {
    let shells = |wanted: fn(&Leg) -> bool| {
        let times = legs.iter().enumerate().filter(move |(_, leg)| wanted(leg));
        times.filter_map(|(at, leg)| Some((Medians::of(results.runs(at)).shell?, &leg.name)))
    };
    let ours = shells(|leg| leg.kind == Kind::Ringside).next();
    let quickest = shells(|leg| leg.kind == Kind::Peer && leg.name.starts_with("qemu"))
        .min_by(|(one, _), (other, _)| one.total_cmp(other));
    match (ours, quickest) {
        (Some((ours, _)), Some((time, name))) => format!(
            "the shell is there after {:.0} % of the time of the quickest QEMU, {name} (goal: 50 % of QEMU's)",
            ours / time * 100.0
        ),
        _ => "the time to the shell beside QEMU's: not measured".into(),
    }
}

/// What Ringside takes of the host's memory besides the guest's RAM.
pub fn memory(results: &Results, legs: &[Leg]) -> String {
    let ours = legs.iter().enumerate().filter(|(_, leg)| leg.kind == Kind::Ringside);
    let memory = ours.flat_map(|(at, _)| results.runs(at)).filter_map(|run| run.details.own_memory);
    match median(memory) {
        Some(mib) => format!("it has {mib:.0} MiB resident besides the guest's RAM (goal: at most 64 MiB)"),
        None => "its memory besides the guest's RAM: not measured".into(),
    }
}

/// How soon the guest's first instruction runs.
pub fn start(results: &Results, legs: &[Leg]) -> String {
    let times = legs.iter().enumerate().filter(|(_, leg)| leg.kind == Kind::Ringside);
    let first = times.flat_map(|(at, _)| results.runs(at)).filter_map(|run| run.details.first_instruction);
    match median(first.map(|time| time.as_secs_f64())) {
        Some(time) => format!(
            "the guest's first instruction runs {:.0} ms after the start (goal: 300 ms)\n",
            time * 1e3
        ),
        None => "the time to the guest's first instruction: not measured\n".into(),
    }
}
