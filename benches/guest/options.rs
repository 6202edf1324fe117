//! What can be chosen.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Runs the same programs natively, in Ringside's software CPU and in QEMU's, and prints how long each took.
#[derive(Clone, Debug, Parser)]
#[command(name = "guest")]
pub struct Options {
    /// How often each side runs everything; the best counts
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Seconds that each workload is repeated for
    #[arg(long, default_value_t = 0.5)]
    pub seconds: f64,
    /// Only these workloads
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Leave this out: the side qemu, the real programs, the run on two vCPUs
    #[arg(long, value_name = "qemu|programs|pair", value_delimiter = ',')]
    pub without: Vec<String>,
    /// The guest, as `ringside guest list` names it
    #[arg(long, default_value = "debian")]
    pub guest: String,
    /// Measure this command instead of the one that was built with the benchmark
    #[arg(long, value_name = "FILE")]
    pub ringside: Option<PathBuf>,
    /// Whether the software CPU translates
    #[arg(long, default_value = "on")]
    pub jit: String,
    /// RAM of each machine, in MiB [default: 512, and more for the packages of the real programs]
    #[arg(long)]
    pub memory: Option<u64>,
    /// Seconds after which a side is given up
    #[arg(long, default_value_t = 900)]
    pub timeout: u64,
    /// Cargo says this to every benchmark.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    /// From the command line; ends the process where it is wrong.
    pub fn from_command_line() -> Self {
        Self::parse()
    }

    /// Whether this was not left out.
    pub fn wants(&self, part: &str) -> bool {
        !self.without.iter().any(|name| name == part)
    }

    /// The most that one side may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}
