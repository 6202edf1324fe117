//! The default guests: Debian's own kernel and busybox, fetched through apt and made into something that boots.
//!
//! ```text
//! catalog ──> apt (sources) ──> deb ──> modules ──> initramfs ──> cache
//! names       fetches .deb      reads   orders      writes cpio   keeps, finds
//! ```
//!
//! Nothing here needs root, and nothing knows of the machine that boots the result.

mod apt;
mod build;
mod cache;
pub mod catalog;
mod child;
mod deb;
mod error;
pub mod initramfs;
mod manifest;
mod modules;
mod packages;
mod progress;
mod report;
pub mod root_disk;
pub mod software;
mod sources;
#[cfg(test)]
mod testing;

use std::path::PathBuf;

pub use cache::Cache;
pub use catalog::Guest;
pub use child::end_all as end_children;
pub use error::GuestError;
pub use packages::unpack;
pub use progress::{Progress, Silent, to_stderr};

/// A guest on the disk, ready to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// The kernel to boot: unpacked (ELF) where that is there, the bzImage otherwise.
    pub kernel: PathBuf,
    /// The kernel as Debian packs it.
    pub bzimage: PathBuf,
    /// The initramfs: uncompressed cpio, to which [`initramfs::exec_overlay`] may be appended.
    pub initrd: PathBuf,
    /// The kernel command line that suits it.
    pub cmdline: String,
    /// The kernel package's version.
    pub version: String,
}

/// The kernel command line of the default guests.
///
/// Only warnings reach the serial console (its every byte is an exit); a panic resets the machine at once, so that
/// nobody waits for a dead guest; the TSC needs no watchdog, as the machine's never drifts; the self-tests of the
/// kernel's cryptography, which take as long as the rest of its boot, are left out.
pub fn default_cmdline() -> String {
    "console=ttyS0 loglevel=4 panic=-1 tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests"
        .to_owned()
}

/// More of the kernel command line: the terminal's kind and size, which the kernel hands to init as its environment.
/// Without them init takes it that there is no terminal: no line editor, no echo.
///
/// A `kind` that is not a plain word is left out.
pub fn terminal_arguments(kind: &str, columns: u16, rows: u16) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '_');
    let mut arguments = format!("COLUMNS={columns} LINES={rows}");
    if !kind.is_empty() && kind.len() <= 40 && kind.chars().all(plain) {
        arguments.push_str(&format!(" TERM={kind}"));
    }
    arguments
}

/// Gets a guest: from the cache folder, or from Debian's archive where it is not there or is damaged.
///
/// # Errors
/// [`GuestError`] for a name that is not in the catalog, where apt is missing or fails, and where the cache folder
/// cannot be written.
pub fn fetch(name: &str, progress: &mut dyn Progress) -> Result<GuestFiles, GuestError> {
    let guest = catalog::find(name)?;
    Cache::of_user()?.fetch(guest, progress)
}

/// Finds a guest in the cache folder, without fetching; `None` where it is not there or is damaged.
pub fn locate(name: &str) -> Option<GuestFiles> {
    let guest = catalog::find(name).ok()?;
    let found = Cache::of_user().and_then(|cache| cache.load(guest));
    found.unwrap_or_else(|error| {
        log::info!("{error}");
        None
    })
}

/// A guest of the catalog and what is on the disk of it.
#[derive(Debug)]
pub struct Listed {
    /// The catalog's entry.
    pub guest: &'static Guest,
    /// Its files, where they are complete.
    pub files: Option<GuestFiles>,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// What is wrong with the files, where they are damaged.
    pub problem: Option<GuestError>,
}

/// Lists the catalog.
///
/// # Errors
/// [`GuestError::NoCacheFolder`] where the environment names none.
pub fn list() -> Result<Vec<Listed>, GuestError> {
    let cache = Cache::of_user()?;
    let listed = catalog::GUESTS.iter().map(|guest| {
        let (files, problem) = match cache.load(guest) {
            Ok(files) => (files, None),
            Err(problem) => (None, Some(problem)),
        };
        Listed { guest, files, bytes: cache.bytes(guest), problem }
    });
    Ok(listed.collect())
}

/// Removes a guest from the cache folder: whether it was there.
///
/// # Errors
/// [`GuestError`] for a name that is not in the catalog, and where the folder cannot be removed.
pub fn remove(name: &str) -> Result<bool, GuestError> {
    let guest = catalog::find(name)?;
    Cache::of_user()?.remove(guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_kind_that_would_add_kernel_arguments_is_left_out() {
        assert_eq!(terminal_arguments("xterm-256color", 80, 24), "COLUMNS=80 LINES=24 TERM=xterm-256color");
        assert_eq!(terminal_arguments("x init=/bin/evil", 80, 24), "COLUMNS=80 LINES=24");
    }
}
