use std::io;
use std::path::{Path, PathBuf};

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The catalog has no such name.
    #[error("there is no guest named {name:?}: there are {}", super::catalog::names())]
    UnknownGuest {
        /// The name.
        name: String,
    },
    /// The environment names no home and no cache folder.
    #[error("no cache folder: set RINGSIDE_CACHE, XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheFolder,
    /// apt is not installed.
    #[error(
        "the default guest comes from Debian through apt, and there is no {program} here. \
         Boot a kernel of your own with: ringside run --kernel FILE [--initrd FILE]"
    )]
    NoApt {
        /// The program that was not found.
        program: &'static str,
    },
    /// Nothing vouches for Debian's archive.
    #[error(
        "apt cannot check Debian's signatures: {} is missing (package debian-archive-keyring). \
         Install it, or boot a kernel of your own with: ringside run --kernel FILE [--initrd FILE]",
        .keyring.display()
    )]
    NoKeyring {
        /// The keyring.
        keyring: PathBuf,
    },
    /// apt failed.
    #[error("apt could not {what}:\n{message}")]
    Apt {
        /// What was tried.
        what: String,
        /// What apt said.
        message: String,
    },
    /// apt's answer or Debian's archive is not as expected.
    #[error("the package {package}: {reason}")]
    Package {
        /// The package's name or file.
        package: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A kernel module is not one, or modules depend on each other in a circle.
    #[error("the kernel's module {module}: {reason}")]
    Module {
        /// The module's name.
        module: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What the cache folder holds is not what was put there.
    #[error("the guest in {} is damaged: {reason}", .folder.display())]
    Damaged {
        /// The guest's folder.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The installation in a guest did not succeed.
    #[error("Debian could not be installed on the disk: {reason}")]
    Install {
        /// What went wrong.
        reason: String,
    },
    /// Somebody asked for the end of what was done.
    #[error("cancelled; nothing was left behind")]
    Cancelled,
    /// A file could not be read or written.
    #[error("cannot {what} {}: {source}", .path.display())]
    File {
        /// What was tried: "write", "read" …
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

impl GuestError {
    /// For `map_err`: names what was tried on which file.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }

    pub(super) fn package(package: impl Into<String>, reason: impl ToString) -> Self {
        Self::Package { package: package.into(), reason: reason.to_string() }
    }

    pub(super) fn module(module: impl Into<String>, reason: impl ToString) -> Self {
        Self::Module { module: module.into(), reason: reason.to_string() }
    }
}
