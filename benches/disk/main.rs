//! What a disk can do: the device with a driver's mock on its other side, and fio and dd in the guest beside QEMU's TCG.
//!
//! ```text
//! cargo bench --bench disk                      all of it
//! cargo bench --bench disk -- --without guest   the device alone
//! cargo bench --bench disk -- --without device --format qcow2
//! ```

mod device;
mod guest;

use std::path::PathBuf;

use clap::Parser;

/// Measures block storage: requests a second of the device alone, and fio and dd in the guest beside QEMU's TCG.
#[derive(Clone, Debug, Parser)]
#[command(name = "disk")]
pub struct Options {
    /// How often each side runs everything; the best counts
    #[arg(long, default_value_t = 2)]
    pub runs: usize,
    /// Seconds of each of fio's cases
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
    /// Leave this out
    #[arg(long, value_name = "device|guest|qemu", value_delimiter = ',')]
    pub without: Vec<String>,
    /// Bytes of the guest's disk, in MiB
    #[arg(long, default_value_t = 256)]
    pub size: u64,
    /// Whether the host's page cache is used: writeback or direct
    #[arg(long, default_value = "writeback")]
    pub cache: String,
    /// Where the images are made, on whose file system it depends what they cost
    #[arg(long, value_name = "FOLDER", default_value = env!("CARGO_TARGET_TMPDIR"))]
    pub folder: PathBuf,
    /// The guest's disk: raw or qcow2
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    pub format: String,
    /// Measure this command instead of the one that was built with the benchmark
    #[arg(long, value_name = "FILE")]
    pub ringside: Option<PathBuf>,
    /// Cargo says this to every benchmark.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    fn wants(&self, part: &str) -> bool {
        !self.without.iter().any(|name| name == part)
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let folder = tempfile::Builder::new().prefix("ringside-disk.").tempdir_in(&options.folder)?;
    if options.wants("device") {
        device::measure(folder.path())?;
    }
    if options.wants("guest") {
        guest::measure(&options, folder.path())?;
    }
    Ok(())
}
