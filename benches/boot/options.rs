//! What can be chosen.

use std::time::Duration;

use clap::Parser;

/// Boots the same kernel and initramfs on Ringside and its peers and prints how long each took.
#[derive(Debug, Parser)]
#[command(name = "boot")]
pub struct Options {
    /// The guest, as `ringside guest list` names it
    #[arg(long, default_value = "debian-cloud")]
    pub guest: String,
    /// How often each monitor boots it (Bochs: --bochs-runs)
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// How often Bochs boots it; it takes its time
    #[arg(long, default_value_t = 1)]
    pub bochs_runs: usize,
    /// Leave this peer out: qemu, bochs
    #[arg(long, value_name = "PEER", value_delimiter = ',')]
    pub without: Vec<String>,
    /// Also QEMU's machine q35
    #[arg(long)]
    pub extra: bool,
    /// RAM of each machine, in MiB
    #[arg(long, default_value_t = 512)]
    pub memory: u32,
    /// Seconds after which a run is given up
    #[arg(long, default_value_t = 300)]
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

    /// Whether a peer was not left out.
    pub fn wants(&self, peer: &str) -> bool {
        !self.without.iter().any(|name| name == peer)
    }

    /// The most that one run may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}
