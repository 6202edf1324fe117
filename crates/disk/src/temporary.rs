//! The overlay of a snapshot: a qcow2 image without a name, gone when it is closed.

use std::fs::File;
use std::io;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, file};

/// Its clusters, in bytes.
pub(crate) const CLUSTER_SIZE: usize = 64 << 10;

/// Puts an empty overlay on an image; its file, too.
pub(crate) fn overlay(
    base: FormatAccess<file::File>,
    size: u64,
) -> io::Result<(FormatAccess<file::File>, File)> {
    let temporary = tempfile::tempfile().map_err(|error| {
        let folder = std::env::temp_dir();
        io::Error::new(
            error.kind(),
            format!("no temporary file for the snapshot in {}: {error}", folder.display()),
        )
    })?;
    let same = temporary.try_clone()?;
    let image = Qcow2::<file::File>::create_builder(file::File::try_from(temporary)?)
        .size(size)
        .cluster_size(CLUSTER_SIZE)
        .create_open(DenyImplicitOpenGate::default(), |image| {
            Ok(Qcow2::<file::File>::builder(image).backing(Some(base)))
        })?;
    Ok((FormatAccess::new(image), same))
}
