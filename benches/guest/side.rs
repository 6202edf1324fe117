//! Where the workloads run: the host itself, Ringside, QEMU.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringside::guest::{self, GuestFiles, initramfs};

use crate::options::Options;
use crate::processor_time;
use crate::programs::{self, Programs};
use crate::workloads::{self, Said, Workload};

/// The `ringside` command that this benchmark was built with.
const RINGSIDE: &str = env!("CARGO_BIN_EXE_ringside");
const QEMU: &str = "qemu-system-x86_64";
/// The port at which init reports the script's status.
const STATUS_PORT: &str = "isa-debug-exit,iobase=0xf4,iosize=4";

/// What one unit of a workload took.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Processor time of the side's process.
    pub processor: Duration,
    /// Time on the guest's clock.
    pub clock: Duration,
    /// What it computed.
    pub checksum: String,
}

/// By workload.
pub type Results = BTreeMap<String, Measured>;

/// The files of a measurement, in a folder of its own that goes when this is dropped.
pub struct Inputs {
    /// The `ringside` command: a copy, for the next build may come while this measures.
    pub ringside: PathBuf,
    /// The workload program.
    pub program: PathBuf,
    /// The guest's kernel and command line.
    pub guest: GuestFiles,
    /// The guest's initramfs with the program in it.
    pub initrd: PathBuf,
    /// The real programs, where they are wanted.
    programs: Option<Programs>,
    /// RAM of each machine, in MiB.
    memory: u64,
    folder: tempfile::TempDir,
}

impl Inputs {
    /// Builds the program and finds the guest (fetches it where it is missing).
    ///
    /// # Errors
    /// Where the compiler or the guest cannot be had, or the temporary folder cannot be written.
    pub fn prepare(options: &Options, selected: &[&Workload]) -> anyhow::Result<Self> {
        let guest = guest::fetch(&options.guest, &mut *guest::to_stderr())?;
        let folder =
            tempfile::Builder::new().prefix("ringside-bench.").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let program = workloads::build(folder.path())?;
        let programs = match selected.iter().any(|workload| workload.is_program()) {
            true => Some(Programs::prepare(&options.guest, &guest, folder.path())?),
            false => None,
        };
        let base = programs.as_ref().map_or(&guest.initrd, |programs| &programs.initrd);
        let mut bytes = fs::read(base).with_context(|| base.display().to_string())?;
        let mut files = programs.as_ref().map_or(Ok(Vec::new()), Programs::files)?;
        files.push(("workload", fs::read(&program)?));
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
        bytes.extend(initramfs::programs_overlay("bench", &files)?);
        let initrd = folder.path().join("initrd");
        fs::write(&initrd, bytes)?;
        let ringside = folder.path().join("ringside");
        let built = options.ringside.as_deref().unwrap_or(Path::new(RINGSIDE));
        fs::copy(built, &ringside).with_context(|| built.display().to_string())?;
        let packages = programs.as_ref().map_or(0, |programs| programs.bytes >> 20);
        let memory = options.memory.unwrap_or(512 + 3 * packages);
        Ok(Self { ringside, program, guest, initrd, programs, memory, folder })
    }

    /// Ringside with so many vCPUs and a shell command.
    pub fn ringside(&self, options: &Options, cpus: u32, script: &str) -> Command {
        let mut command = Command::new(&self.ringside);
        command.args(["run", "--engine", "soft", "--exits", "off", "--guest", &options.guest]);
        command.args(["--jit", &options.jit, "--memory", &format!("{}M", self.memory)]);
        command.args(["--cpus", &cpus.to_string()]);
        command.arg("--initrd").arg(&self.initrd).args(["--exec", script]);
        command
    }

    /// QEMU with a shell command; `None` where it is not installed.
    ///
    /// # Errors
    /// Where the folder cannot be written.
    pub fn qemu(&self, script: &str) -> anyhow::Result<Option<Command>> {
        if Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
            return Ok(None);
        }
        let mut bytes = fs::read(&self.initrd)?;
        bytes.extend(initramfs::exec_overlay(script));
        let initrd = self.folder.path().join("initrd.qemu");
        fs::write(&initrd, bytes)?;
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-device", STATUS_PORT, "-m", &format!("{}M", self.memory)]);
        // The script's output comes on the second serial line.
        command.args(["-serial", "null", "-serial", "stdio", "-append", &self.guest.cmdline]);
        command.arg("-kernel").arg(&self.guest.bzimage).arg("-initrd").arg(initrd);
        Ok(Some(command))
    }

    /// The script that runs the workloads in a guest.
    ///
    /// # Errors
    /// Where the packages lack a workload's program.
    pub fn script(&self, selected: &[&Workload], options: &Options) -> anyhow::Result<String> {
        let mut script = "cd /bench\n".to_owned();
        for (name, value) in programs::environment("") {
            script.push_str(&format!("export {name}={value}\n"));
        }
        for workload in selected {
            let words = self.programs.as_ref().map_or(Ok(String::new()), |all| all.in_guest(workload))?;
            script.push_str(&format!("./workload {} {} {words}\n", options.seconds, workload.name));
        }
        Ok(script)
    }
}

/// Runs the workloads on the host.
///
/// # Errors
/// Where one fails.
pub fn native(inputs: &Inputs, selected: &[&Workload], options: &Options) -> anyhow::Result<Results> {
    let mut results = Results::new();
    for workload in selected {
        let command = match &inputs.programs {
            Some(programs) => programs.native(&inputs.program, workload, options.seconds)?,
            None => {
                let mut command = Command::new(&inputs.program);
                command.arg(options.seconds.to_string()).arg(workload.name);
                command
            }
        };
        results.extend(follow(command, true, options.timeout())?);
    }
    Ok(results)
}

/// Runs a workload natively on one of the host's processors, by `taskset`; nothing where that is not there.
///
/// # Errors
/// Where it does not end as it should.
pub fn native_on_one(inputs: &Inputs, workload: &Workload, options: &Options) -> anyhow::Result<Results> {
    let Ok(allowed) = std::fs::read_to_string("/proc/self/status") else { return Ok(Results::new()) };
    let first = allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let Some(first) = first.and_then(|list| list.trim().split([',', '-']).next()) else {
        return Ok(Results::new());
    };
    if Command::new("taskset").arg("--version").output().is_err() {
        return Ok(Results::new());
    }
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", first]).arg(&inputs.program);
    command.arg(options.seconds.to_string()).arg(workload.name);
    follow(command, true, options.timeout())
}

/// Runs a machine whose guest runs the workloads.
///
/// # Errors
/// Where it does not start or end, or one workload did not end.
pub fn machine(
    command: Command,
    selected: &[&Workload],
    options: &Options,
) -> anyhow::Result<(Results, Vec<String>)> {
    let results = follow(command, false, options.timeout())?;
    let lost = selected.iter().filter(|workload| !results.contains_key(workload.name));
    let lost = lost.map(|workload| workload.name.to_owned()).collect();
    Ok((results, lost))
}

/// Follows what a process says of workloads to its end. What it uses between `begin` and `end` counts; of a process that
/// is the workload itself, what it says of itself, for that has its children in it.
fn follow(mut command: Command, is_workload: bool, timeout: Duration) -> anyhow::Result<Results> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let id = child.id();
    let stdout = child.stdout.take().context("no output")?;
    let errors = child.stderr.take().map(|mut stderr| {
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        })
    });
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // At once: what the process uses from here on is not the workload's.
            if sender.send((line, processor_time::of_process(id))).is_err() {
                break;
            }
        }
    });
    let (started, mut began, mut results) = (Instant::now(), None, Results::new());
    loop {
        match lines.recv_timeout(timeout.saturating_sub(started.elapsed())) {
            Ok((line, used)) => match Said::parse(&line) {
                Some(Said::Begin(_)) => began = used,
                Some(Said::End { name, units, clock, processor, checksum }) => {
                    let used = began.take().zip(used).map(|(before, after)| after.saturating_sub(before));
                    let processor = if is_workload { processor } else { used.unwrap_or(clock) };
                    let each = |time: Duration| time.div_f64(units as f64);
                    let measured = Measured { processor: each(processor), clock: each(clock), checksum };
                    results.insert(name, measured);
                }
                Some(Said::Unsupported(_)) | None => {}
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                bail!("{program} did not end within {} s", timeout.as_secs());
            }
        }
    }
    let status = child.wait()?;
    let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if is_workload && !status.success() {
        bail!("{program} failed: {errors}");
    }
    if !errors.trim().is_empty() {
        eprintln!("{program}: {}", errors.trim());
    }
    Ok(results)
}
