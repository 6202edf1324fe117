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
    /// Real programs.
    Programs,
}

/// What does a workload's work.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// The workload program itself.
    BuiltIn,
    /// A run of a program of the packages: its path and its words. Its output is what it computes.
    Program(&'static [&'static str]),
    /// `openssl speed`, which counts its units itself.
    Speed(&'static [&'static str]),
}

/// A workload.
#[derive(Debug)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub class: Class,
    /// What one unit of it is.
    pub unit: &'static str,
    /// What does it.
    pub kind: Kind,
}

const fn workload(name: &'static str, class: Class, unit: &'static str) -> Workload {
    Workload { name, class, unit, kind: Kind::BuiltIn }
}

const fn program(name: &'static str, unit: &'static str, words: &'static [&'static str]) -> Workload {
    Workload { name, class: Class::Programs, unit, kind: Kind::Program(words) }
}

const fn speed(name: &'static str, unit: &'static str, words: &'static [&'static str]) -> Workload {
    Workload { name, class: Class::Programs, unit, kind: Kind::Speed(words) }
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
    workload(THREADS, Class::Threads, "two threads, work of their own"),
    speed(
        "ssl-sha256",
        "openssl speed: 16 KiB",
        &["bin/openssl", "speed", "-mr", "-seconds", "1", "-bytes", "16384", "-evp", "sha256"],
    ),
    speed(
        "ssl-aes-gcm",
        "openssl speed: 16 KiB",
        &["bin/openssl", "speed", "-mr", "-seconds", "1", "-bytes", "16384", "-evp", "aes-128-gcm"],
    ),
    speed(
        "ssl-md5-64",
        "openssl speed: 64 bytes",
        &["bin/openssl", "speed", "-mr", "-seconds", "1", "-bytes", "64", "-evp", "md5"],
    ),
    program("gzip", "a text of 1 MiB", &["bin/gzip", "-nc", "text"]),
    program("gunzip", "to a text of 1 MiB", &["bin/gzip", "-dc", "text.gz"]),
    program("xz", "a text of 1 MiB", &["bin/xz", "-3", "-c", "text"]),
    program("unxz", "to a text of 1 MiB", &["bin/xz", "-dc", "text.xz"]),
    program("python", "start and end", &["bin/python3", "-c", "pass"]),
    program("python-work", "bench.py: dict, str, json, objects", &["bin/python3", "bench.py"]),
    program(
        "sqlite",
        "bench.sql: 30,000 rows in and out",
        &["bin/sqlite3", "-batch", "-init", "bench.sql", ":memory:"],
    ),
    program(
        "gcc",
        "cc1 -O2: 1,800 lines",
        &["lib/gcc/x86_64-linux-gnu/*/cc1", "-O2", "-quiet", "-fpreprocessed", "-o", "-", "large.c"],
    ),
];

/// The workload of two threads, by which two vCPUs are compared with one.
pub const THREADS: &str = "threads";

impl Workload {
    /// Whether it needs the packages.
    pub fn is_program(&self) -> bool {
        !matches!(self.kind, Kind::BuiltIn)
    }
}

/// Those that are wanted.
///
/// # Errors
/// For a name that there is not.
pub fn select(names: &[String], programs: bool) -> anyhow::Result<Vec<&'static Workload>> {
    for name in names {
        if !WORKLOADS.iter().any(|workload| workload.name == name) {
            let all: Vec<_> = WORKLOADS.iter().map(|workload| workload.name).collect();
            bail!("there is no workload {name}: there are {}", all.join(", "));
        }
    }
    let wanted = |workload: &&Workload| names.is_empty() || names.iter().any(|name| name == workload.name);
    Ok(WORKLOADS.iter().filter(wanted).filter(|workload| programs || !workload.is_program()).collect())
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
    for name in ["main.c", "integer.c", "floats.c", "kernel.c", "threads.c", "program.c"] {
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
