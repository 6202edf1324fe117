//! The workload program: which workloads it has, how it is built, and what it says.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

/// What a workload is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Integer work of user programs.
    Integer,
    /// Floating-point and vector work of user programs.
    Floats,
    /// Work that is mostly the kernel's.
    Kernel,
    /// Threads.
    Threads,
}

/// A workload of the program.
#[derive(Debug)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub class: Class,
    /// What one unit of it is.
    pub unit: &'static str,
}

const fn workload(name: &'static str, class: Class, unit: &'static str) -> Workload {
    Workload { name, class, unit }
}

/// All of them, in the order in which they run.
pub const WORKLOADS: &[Workload] = &[
    workload("sha256", Class::Integer, "SHA-256 of 256 KiB, in plain C"),
    workload("quicksort", Class::Integer, "20,000 numbers"),
    workload("fib", Class::Integer, "fib(25) by recursion"),
    workload("sieve", Class::Integer, "primes below 2^18"),
    workload("bytecode", Class::Integer, "an interpreter with a switch"),
    workload("memcpy", Class::Integer, "copies of 16 bytes to 1 MiB"),
    workload("hash", Class::Integer, "60,000 updates of a 1 MiB table"),
    workload("chase", Class::Integer, "10,000 pointers in 32 MiB"),
    workload("nbody", Class::Floats, "3,000 steps of five bodies"),
    workload("x87", Class::Floats, "long double: divisions and roots"),
    workload("matrix", Class::Floats, "128 x 128 floats, AVX2"),
    workload("registers", Class::Floats, "Mandelbrot in registers, AVX2"),
    workload("syscalls", Class::Kernel, "3,000 times getppid"),
    workload("pingpong", Class::Kernel, "200 turns through two pipes"),
    workload("fork", Class::Kernel, "10 forks, waited for"),
    workload("faults", Class::Kernel, "1,024 fresh pages"),
    workload("exec", Class::Kernel, "3 forks and execs"),
    workload("tcp", Class::Kernel, "2 MiB over loopback"),
    workload("threads", Class::Threads, "two threads, work of their own"),
];

/// Those that are wanted.
///
/// # Errors
/// For a name that there is not.
pub fn select(names: &[String]) -> anyhow::Result<Vec<&'static Workload>> {
    for name in names {
        if !WORKLOADS.iter().any(|workload| workload.name == name) {
            let all: Vec<_> = WORKLOADS.iter().map(|workload| workload.name).collect();
            bail!("there is no workload {name}: there are {}", all.join(", "));
        }
    }
    let wanted = |workload: &&Workload| names.is_empty() || names.iter().any(|name| name == workload.name);
    Ok(WORKLOADS.iter().filter(wanted).collect())
}

/// Compiles the program into `folder`.
///
/// # Errors
/// Where there is no C compiler, and what it says.
pub fn build(folder: &Path) -> anyhow::Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/guest/workload");
    let program = folder.join("workload");
    let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    command.args(["-O2", "-static", "-Wall", "-o"]).arg(&program);
    for name in ["main.c", "integer.c", "floats.c", "kernel.c", "threads.c"] {
        command.arg(sources.join(name));
    }
    let output = command
        .args(["-lm", "-lpthread"])
        .output()
        .context("cannot start the C compiler (Debian: apt-get install gcc libc6-dev)")?;
    if !output.status.success() {
        bail!("the C compiler failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(program)
}

/// One line that the program prints.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// It begins to repeat a workload's unit.
    Begin(String),
    /// It has repeated it.
    End {
        /// The workload.
        name: String,
        /// How often.
        units: u64,
        /// Time on its clock.
        clock: Duration,
        /// Processor time, as its kernel accounts it.
        processor: Duration,
        /// What each unit computed.
        checksum: String,
    },
    /// The processor lacks what it needs.
    Unsupported(String),
}

impl Said {
    /// Reads a line; `None` for any other.
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let seconds = |text: &str| Duration::try_from_secs_f64(text.parse().ok()?).ok();
        Some(match words.as_slice() {
            ["begin", name] => Self::Begin((*name).to_owned()),
            ["unsupported", name] => Self::Unsupported((*name).to_owned()),
            ["end", name, units, clock, processor, checksum] => Self::End {
                name: (*name).to_owned(),
                units: units.parse().ok().filter(|&units| units > 0)?,
                clock: seconds(clock)?,
                processor: seconds(processor)?,
                checksum: (*checksum).to_owned(),
            },
            _ => return None,
        })
    }
}
