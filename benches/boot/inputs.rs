//! What every monitor is given: one kernel, one initramfs, one command line.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ringside::guest::{self, initramfs};
use tempfile::TempDir;

use crate::options::Options;

/// What the guest writes to its console when its init has come to the shell.
pub const AT_THE_SHELL: &str = "bench: at the shell";

/// The command that this benchmark was built with.
const RINGSIDE: &str = env!("CARGO_BIN_EXE_ringside");

/// The files of a measurement, in a folder of its own (Cargo's, from which programs may run) that goes when this is dropped.
pub struct Inputs {
    /// The `ringside` command: a copy, for the next build may come while this measures.
    pub ringside: PathBuf,
    /// The catalog's name of the guest.
    pub guest: String,
    /// The kernel package's version.
    pub version: String,
    /// The kernel as Debian packs it: what a boot loader gets.
    pub bzimage: PathBuf,
    /// The kernel unpacked, where the cache has it so.
    pub vmlinux: Option<PathBuf>,
    /// The initramfs with the workload in it.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    folder: TempDir,
}

impl Inputs {
    /// Finds the guest (fetches it where it is missing) and adds the workload: tell that the shell is there, power off.
    ///
    /// # Errors
    /// Where the guest cannot be had, or the temporary folder cannot be written.
    pub fn prepare(options: &Options) -> anyhow::Result<Self> {
        let files = guest::fetch(&options.guest, &mut *guest::to_stderr())?;
        let folder =
            tempfile::Builder::new().prefix("ringside-bench.").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let initrd = folder.path().join("initrd");
        let mut bytes = fs::read(&files.initrd).with_context(|| files.initrd.display().to_string())?;
        // stty waits until the line has sent everything, or the kernel would talk in between at its power-off. Nothing
        // takes the status that init writes to its port, so it powers off then.
        let workload = format!("echo '{AT_THE_SHELL}' > /dev/console\nstty -echo < /dev/console\n");
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(&initramfs::exec_overlay(&workload));
        fs::write(&initrd, bytes)?;
        let ringside = folder.path().join("ringside");
        fs::copy(RINGSIDE, &ringside).context(RINGSIDE)?;
        Ok(Self {
            ringside,
            guest: options.guest.clone(),
            version: files.version,
            vmlinux: (files.kernel != files.bzimage).then_some(files.kernel),
            bzimage: files.bzimage,
            initrd,
            cmdline: files.cmdline,
            folder,
        })
    }

    /// Where more files may be put.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}
