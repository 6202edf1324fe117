//! New images, and images of another size.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, file};
use rustix::fs::{FallocateFlags, fallocate};
use tempfile::NamedTempFile;

use crate::error::{Error, Reason};
use crate::lock::lock;
use crate::open::{Access, FileLayer, Format, open_file, stack};
use crate::qcow2::{Qcow2Disk, caught};
use crate::raw::RawDisk;
use crate::{Disk, SECTOR};

/// The most bytes of a disk: what a file's length can say, without the last block.
const MAX_SIZE: u64 = i64::MAX as u64 & !0xfff;

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// Where.
    pub path: PathBuf,
    /// What its bytes mean.
    pub format: Format,
    /// The disk's bytes; the backing file's where they are not told.
    pub size: Option<u64>,
    /// What it shows where it has not been written, as it is written into the image: relative to the image's folder.
    pub backing: Option<(PathBuf, Option<Format>)>,
    /// Bytes of a cluster of qcow2: a power of two from 512 to 2 MiB.
    pub cluster_size: Option<u64>,
    /// Whether the space is taken now.
    pub preallocate: bool,
    /// Whether an image that is there already is replaced.
    pub replace: bool,
}

impl Creation {
    /// A sparse image of that size.
    pub fn new(path: impl Into<PathBuf>, format: Format, size: u64) -> Self {
        Self {
            path: path.into(),
            format,
            size: Some(size),
            backing: None,
            cluster_size: None,
            preallocate: false,
            replace: false,
        }
    }
}

/// Creates an image; gives the disk's bytes.
///
/// # Errors
/// What keeps it from being created; then there is no file.
pub fn create(creation: &Creation) -> Result<u64, Error> {
    let draft = Draft::new(creation)?;
    let len = draft.disk.size();
    draft.keep(creation)?;
    Ok(len)
}

/// An image that has no name yet.
pub(crate) struct Draft {
    file: NamedTempFile,
    pub(crate) disk: Box<dyn Disk>,
}

impl Draft {
    pub(crate) fn new(creation: &Creation) -> Result<Self, Error> {
        let backing_size = match &creation.backing {
            Some(backing) => Some(check_backing(creation, backing)?),
            None => None,
        };
        Self::make(creation, backing_size).map_err(|reason| reason.at(&creation.path))
    }

    fn make(creation: &Creation, backing_size: Option<u64>) -> Result<Self, Reason> {
        let size = creation.size.or(backing_size);
        let size = size.ok_or_else(|| Reason::Size("a new disk needs a size".into()))?;
        check_size(size)?;
        check_place(creation)?;
        let folder = folder_of(&creation.path);
        let file = tempfile::Builder::new()
            .prefix(".ringside-disk-")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        let handle = file.as_file().try_clone()?;
        let disk: Box<dyn Disk> = match creation.format {
            Format::Raw => Box::new(create_raw(handle, size, creation)?),
            Format::Qcow2 => Box::new(caught(|| create_qcow2(handle, size, creation))?),
        };
        Ok(Self { file, disk })
    }

    /// Gives it its name, once it is whole.
    pub(crate) fn keep(self, creation: &Creation) -> Result<(), Error> {
        let keep = || -> Result<(), Reason> {
            self.disk.flush()?;
            drop(self.disk);
            self.file.as_file().sync_all()?;
            check_place(creation)?;
            match creation.replace {
                true => self.file.persist(&creation.path),
                false => self.file.persist_noclobber(&creation.path),
            }
            .map_err(|error| error.error)?;
            // The name is as durable as the bytes.
            File::open(folder_of(&creation.path))
                .and_then(|folder| folder.sync_all())
                .or_else(ignore_unsupported)?;
            Ok(())
        };
        keep().map_err(|reason| reason.at(&creation.path))
    }
}

fn ignore_unsupported(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Looks whether the new image can have its name; a replaced one is used by nobody.
fn check_place(creation: &Creation) -> Result<(), Reason> {
    let metadata = match creation.path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !metadata.file_type().is_file() {
        return Err(Reason::Size("there is something already that is no image".into()));
    }
    if !creation.replace {
        return Err(Reason::Size("it is there already; --force replaces it".into()));
    }
    let (file, _) = open_file(&creation.path, true)?;
    lock(&file, true)
}

fn check_size(size: u64) -> Result<(), Reason> {
    match size {
        0 => Err(Reason::Size("a disk of no bytes is of no use".into())),
        size if size % SECTOR != 0 => Err(Reason::Size(format!("{size} bytes are no multiple of 512"))),
        size if size > MAX_SIZE => Err(Reason::Size("it is larger than a file can be".into())),
        _ => Ok(()),
    }
}

/// Looks whether the backing file is one; gives its disk's bytes.
fn check_backing(creation: &Creation, (path, format): &(PathBuf, Option<Format>)) -> Result<u64, Error> {
    if creation.format == Format::Raw {
        return Err(Reason::Size("a raw image has no backing file; qcow2 has".into()).at(&creation.path));
    }
    if path.to_str().is_none() || path.to_string_lossy().contains('\0') {
        return Err(Reason::Size("its name is no text".into()).at(path));
    }
    let place = folder_of(&creation.path).join(path);
    let layers = Access { write: false, locked: true }.layers(&place, *format)?;
    Ok(layers[0].size.next_multiple_of(SECTOR))
}

fn create_raw(file: File, size: u64, creation: &Creation) -> Result<RawDisk, Reason> {
    if creation.cluster_size.is_some() {
        return Err(Reason::Size("a raw image has no clusters".into()));
    }
    file.set_len(size).map_err(|error| match error.raw_os_error() {
        Some(libc::EFBIG) => Reason::Size("its file system has no files of that size".into()),
        _ => error.into(),
    })?;
    if creation.preallocate {
        fallocate(&file, FallocateFlags::empty(), 0, size).map_err(io::Error::from)?;
    }
    Ok(RawDisk::new(file, size, false, false)?)
}

fn create_qcow2(file: File, size: u64, creation: &Creation) -> io::Result<Qcow2Disk> {
    let cluster_size = creation.cluster_size.unwrap_or(64 << 10);
    let mut builder = Qcow2::<file::File>::create_builder(file::File::try_from(file)?)
        .size(size)
        .cluster_size(usize::try_from(cluster_size).unwrap_or(usize::MAX));
    if creation.preallocate {
        builder = builder.preallocate(PreallocateMode::FullAllocate);
    }
    if let Some((path, format)) = &creation.backing {
        let place = folder_of(&creation.path).join(path);
        // A format that is not told would be found out anew each time, from bytes that a guest may have written.
        let format = match format {
            Some(format) => *format,
            None => Access { write: false, locked: false }.layers(&place, None).map_err(io::Error::other)?[0]
                .format(),
        };
        builder = builder.backing(path.to_string_lossy().into_owned(), format.name().into());
    }
    let image = builder.create_open(DenyImplicitOpenGate::default(), |image| {
        Ok(Qcow2::<file::File>::builder(image).backing(None))
    })?;
    Ok(Qcow2Disk::new(FormatAccess::new(image), false, cluster_size))
}

/// Gives an image's disk another size; bytes that are new are zeros. Gives the old size.
///
/// # Errors
/// What keeps it from being done. `shrink` has to be told where bytes at the end are lost.
pub fn resize(path: &Path, format: Option<Format>, size: u64, shrink: bool) -> Result<u64, Error> {
    let at = |reason: Reason| reason.at(path);
    check_size(size).map_err(at)?;
    let layers = Access { write: true, locked: true }.layers(path, format)?;
    let (old, below) = (layers[0].size, layers.get(1).map(|layer| layer.size));
    check_resize(&layers[0], size, shrink).map_err(at)?;
    if layers[0].format() == Format::Raw {
        let file = &layers[0].file;
        file.set_len(size).and_then(|()| file.sync_all()).map_err(|error| at(error.into()))?;
        return Ok(old);
    }
    let mut image = stack(layers, true, false)?;
    // What is new must not show what the backing file has there.
    let mode = if below.is_some_and(|len| len > old) { PreallocateMode::Zero } else { PreallocateMode::None };
    let done = caught(|| {
        image.resize(size, mode)?;
        image.flush()?;
        image.sync()
    });
    done.map(|()| old).map_err(|error| at(error.into()))
}

fn check_resize(top: &FileLayer, size: u64, shrink: bool) -> Result<(), Reason> {
    if !top.metadata.file_type().is_file() {
        return Err(Reason::Kind("a device, whose size is what it is"));
    }
    if size < top.size && !shrink {
        let old = top.size;
        let lost = format!("it would lose what lies behind byte {size} of {old}; --shrink allows that");
        return Err(Reason::Size(lost));
    }
    if size < top.size && top.header.as_ref().is_some_and(|header| header.snapshots > 0) {
        return Err(Reason::Unsupported("snapshots, so that its disk cannot shrink".into()));
    }
    Ok(())
}
