//! fio and dd in the guest, in Ringside and in QEMU's TCG: the same kernel, initramfs, disk and cache mode.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use disk::{Creation, Format};
use ringside::guest::{self, GuestFiles, initramfs, software};

use crate::Options;

const GUEST: &str = "debian";
const QEMU: &str = "qemu-system-x86_64";
const STATUS_PORT: &str = "isa-debug-exit,iobase=0xf4,iosize=4";
/// fio's cases: name, pattern, block size, queue depth.
const CASES: [(&str, &str, &str, u32); 8] = [
    ("4k random reads, 1", "randread", "4k", 1),
    ("4k random reads, 32", "randread", "4k", 32),
    ("4k random writes, 1", "randwrite", "4k", 1),
    ("4k random writes, 32", "randwrite", "4k", 32),
    ("128k reads, 1", "read", "128k", 1),
    ("128k reads, 32", "read", "128k", 32),
    ("128k writes, 1", "write", "128k", 1),
    ("128k writes, 32", "write", "128k", 32),
];
const DD: [(&str, &str); 2] = [
    ("dd reads", "if=/dev/vda of=/dev/null iflag=direct"),
    ("dd writes", "if=/dev/zero of=/dev/vda oflag=direct"),
];
/// Requests of the run that counts exits, and of the one whose exits are taken off.
const COUNTED: u64 = 60_000;
const UNCOUNTED: u64 = 2_000;

/// KiB a second by case.
type Results = BTreeMap<String, f64>;

struct Inputs {
    ringside: PathBuf,
    files: GuestFiles,
    initrd: PathBuf,
    disk: PathBuf,
    folder: PathBuf,
}

/// Measures and prints.
pub fn measure(options: &Options, folder: &Path) -> anyhow::Result<()> {
    let files = guest::fetch(GUEST, &mut *guest::to_stderr())?;
    let packages = software::with_packages(GUEST, &files, &["fio".to_owned()], &mut *guest::to_stderr())?;
    let ringside = folder.join("ringside");
    let built = options.ringside.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_ringside")));
    fs::copy(built, &ringside)?;
    let disk = folder.join("guest.img");
    make_disk(&disk, options)?;
    let inputs = Inputs { ringside, files, initrd: packages.initrd, disk, folder: folder.to_owned() };
    let script = script(options);
    let (mut ours, mut theirs) = (Results::new(), Results::new());
    for _ in 0..options.runs {
        best(&mut ours, &run(&mut inputs.ringside(options, &script, &[]))?);
        if options.wants("qemu") && Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok()
        {
            best(&mut theirs, &run(&mut inputs.qemu(options, &script)?)?);
        }
    }
    print(options, &ours, &theirs);
    exits(options, &inputs)
}

/// A disk without holes.
fn make_disk(path: &Path, options: &Options) -> anyhow::Result<()> {
    let format = Format::from_name(&options.format).context("a format")?;
    disk::create(&Creation::new(path, format, options.size << 20))?;
    let disk = disk::open(&disk::Options { format: Some(format), ..disk::Options::new(path) })?;
    let part = vec![0x5a; 1 << 20];
    (0..options.size).try_for_each(|mib| disk.write(mib << 20, &part))?;
    Ok(disk.flush()?)
}

fn best(all: &mut Results, more: &Results) {
    for (name, rate) in more {
        let slot = all.entry(name.clone()).or_default();
        *slot = slot.max(*rate);
    }
}

fn print(options: &Options, ours: &Results, theirs: &Results) {
    println!(
        "in the guest, a {} disk of {} MiB, cache={}, MiB/s (the best of {})",
        options.format, options.size, options.cache, options.runs
    );
    println!("{:<22} {:>12} {:>12} {:>8}", "case, queue depth", "Ringside", "QEMU TCG", "ratio");
    let names = CASES.iter().map(|case| case.0).chain(DD.iter().map(|case| case.0));
    for name in names {
        let ours = ours.get(name).copied().unwrap_or_default() / 1024.0;
        match theirs.get(name).map(|rate| rate / 1024.0) {
            Some(theirs) => println!("{name:<22} {ours:>12.1} {theirs:>12.1} {:>8.2}", ours / theirs),
            None => println!("{name:<22} {ours:>12.1} {:>12}", "-"),
        }
    }
}

fn fio(pattern: &str, block: &str, depth: u32, rest: &str) -> String {
    format!(
        "fio --name=a --filename=/dev/vda --direct=1 --ioengine=libaio --rw={pattern} --bs={block} --iodepth={depth} \
         --randrepeat=0 --norandommap --output-format=terse --terse-version=3 {rest}"
    )
}

fn script(options: &Options) -> String {
    let mut script = String::new();
    for (name, pattern, block, depth) in CASES {
        let rest = format!("--runtime={} --time_based --size={}M", options.seconds, options.size);
        // Fields 7 and 48: KiB a second read and written.
        let pick = format!("awk -F';' '{{ print \"result;{name};\" $7 + $48 }}'");
        script.push_str(&format!("{} | {pick}\n", fio(pattern, block, depth, &rest)));
    }
    for (name, what) in DD {
        script.push_str(&format!(
            "a=$(cut -d' ' -f1 /proc/uptime); dd bs=1M count={size} {what} 2>/dev/null; b=$(cut -d' ' -f1 /proc/uptime); \
             echo $a $b | awk '{{ print \"result;{name};\" {size} * 1024 / ($2 - $1 + 0.001) }}'\n",
            size = options.size
        ));
    }
    script
}

fn run(command: &mut Command) -> anyhow::Result<Results> {
    let output = command.stdin(Stdio::null()).output().context("a machine does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let parse = |line: &str| {
        let mut fields = line.trim().strip_prefix("result;")?.split(';');
        Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
    };
    let results: Results = text.lines().filter_map(parse).collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(results.len() == CASES.len() + DD.len(), "{command:?} gave {text:?} and {errors:?}");
    Ok(results)
}

impl Inputs {
    fn ringside(&self, options: &Options, script: &str, more: &[&str]) -> Command {
        let mut command = Command::new(&self.ringside);
        command.args(["run", "--engine", "soft", "--memory", "1G", "--package", "fio"]);
        let disk = format!("path={},format={},cache={}", self.disk.display(), options.format, options.cache);
        command.args(["--disk", &disk]).args(more).args(["--exec", script]);
        command
    }

    fn qemu(&self, options: &Options, script: &str) -> anyhow::Result<Command> {
        let mut bytes = fs::read(&self.initrd)?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(initramfs::exec_overlay(script));
        let initrd = self.folder.join("initrd.qemu");
        fs::write(&initrd, bytes)?;
        let cache = if options.cache == "direct" { "none" } else { "writeback" };
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args([
            "-no-reboot",
            "-device",
            STATUS_PORT,
            "-m",
            "1G",
            "-serial",
            "null",
            "-serial",
            "stdio",
        ]);
        command.args(["-append", &self.files.cmdline]).arg("-kernel").arg(&self.files.bzimage);
        command.arg("-initrd").arg(initrd);
        let drive =
            format!("file={},format={},if=none,id=disk,cache={cache}", self.disk.display(), options.format);
        command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"]);
        Ok(command)
    }
}

/// Prints what the ledger counts for each request at queue depth 32.
fn exits(options: &Options, inputs: &Inputs) -> anyhow::Result<()> {
    let count = |pattern: &str, requests: u64| -> anyhow::Result<f64> {
        let script = format!(
            "{} > /dev/null",
            fio(pattern, "4k", 32, &format!("--size=200M --number_ios={requests}"))
        );
        let output =
            inputs.ringside(options, &script, &["--exits", "table"]).stdin(Stdio::null()).output()?;
        let table = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = table.lines().find(|line| line.starts_with("virtio-blk NOTIFY"));
        let line = line.with_context(|| format!("no notifications in {table}"))?;
        let number = line.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        Ok(number.context("a count")?.replace(',', "").parse()?)
    };
    println!("\nexits for each request at queue depth 32 (4 KiB, EVENT_IDX):");
    for pattern in ["randread", "randwrite"] {
        let more = count(pattern, COUNTED)? - count(pattern, UNCOUNTED)?;
        println!("{pattern:<12} {:.4}", more.max(0.0) / (COUNTED - UNCOUNTED) as f64);
    }
    Ok(())
}
