//! What an image is, told to a person.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::open::{Access, FileLayer, Format};
use crate::qcow2::Header;

/// An image.
#[derive(Debug)]
pub struct Info {
    /// Its files: the image, then its backing files.
    pub layers: Vec<Layer>,
    /// Why there are no more, where a backing file cannot be used.
    pub broken: Option<Error>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Where it is.
    pub path: PathBuf,
    /// What its bytes mean.
    pub format: Format,
    /// The disk's bytes.
    pub size: u64,
    /// The file's bytes.
    pub file_size: u64,
    /// Bytes that the file takes up on the host.
    pub allocated: u64,
    /// Of a qcow2 image.
    pub header: Option<Header>,
}

/// Looks at an image, which may be in use.
///
/// # Errors
/// What keeps it from being looked at.
pub fn info(path: &Path, format: Option<Format>) -> Result<Info, Error> {
    let (layers, broken) = Access { write: false, locked: false }.layers_so_far(path, format)?;
    let layer = |layer: FileLayer| Layer {
        format: layer.format(),
        size: layer.size,
        file_size: layer.metadata.len(),
        allocated: layer.metadata.blocks() * 512,
        header: layer.header,
        path: layer.path,
    };
    Ok(Info { layers: layers.into_iter().map(layer).collect(), broken })
}
