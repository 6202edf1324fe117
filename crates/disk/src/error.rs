use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A file that cannot be used as an image, or for one.
#[derive(Debug)]
pub struct Error {
    /// The file: the image, or a backing file of it.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: Reason,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Name(&self.path), self.reason)
    }
}

impl std::error::Error for Error {}

/// A file's name on one line: control characters are escaped.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a>(pub &'a Path);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string_lossy().chars() {
            match c {
                c if c.is_control() => write!(f, "{}", c.escape_default())?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The host's error.
    #[error("{0}")]
    Host(#[from] io::Error),
    /// Not a regular file or a block device.
    #[error("it is {0}, not a file")]
    Kind(&'static str),
    /// No bytes.
    #[error("it is empty")]
    Empty,
    /// Half a sector at the end.
    #[error("it has {0} bytes, no multiple of 512")]
    Odd(u64),
    /// Somebody else has it open.
    #[error("another process {0}")]
    InUse(&'static str),
    /// It begins otherwise.
    #[error("it is no qcow2 image: it does not begin as one does")]
    NotQcow2,
    /// Only versions 2 and 3 are known.
    #[error("it is a qcow2 image of version {0}; versions 2 and 3 are known")]
    Version(u32),
    /// Something that the header names lies behind the end of the file.
    #[error("it is truncated: {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// What.
        what: &'static str,
        /// Where it ends.
        end: u64,
        /// Where the file does.
        len: u64,
    },
    /// A field whose value cannot be.
    #[error("its header is damaged: {what} is {value:#x}")]
    Header {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Encrypted.
    #[error("it is encrypted; encrypted images are not supported")]
    Encrypted,
    /// Something that qcow2 has and this program does not.
    #[error("it uses {0}, which is not supported")]
    Unsupported(String),
    /// Its refcounts cannot be relied upon.
    #[error("it was not closed properly: repair it with `ringside disk check --repair`")]
    Dirty,
    /// It is marked so.
    #[error("it is marked as damaged: look at it with `ringside disk check`")]
    Corrupt,
    /// Its tables contradict each other.
    #[error("its tables are damaged: {0}")]
    Damaged(String),
    /// A backing file that is one of those that it backs.
    #[error("its backing files go round in a circle")]
    Loop,
    /// A chain of backing files that is too long.
    #[error("it has more than {0} backing files below each other")]
    Depth(usize),
    /// A backing file that is not named by a path.
    #[error("its backing file is {0:?}; only files can be backing files")]
    Protocol(String),
    /// A backing file's format.
    #[error("its backing file has the format {0:?}; raw and qcow2 are known")]
    BackingFormat(String),
    /// A size that no disk has.
    #[error("{0}")]
    Size(String),
}

impl Reason {
    pub(crate) fn at(self, path: &Path) -> Error {
        Error { path: path.to_owned(), reason: self }
    }
}
