//! Opening an image: every file of it is looked at before any of them is used.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions, file};

use crate::error::{Error, Name, Reason};
use crate::lock::lock;
use crate::qcow2::{self, Header, Qcow2Disk};
use crate::raw::{QCOW2_MAGIC, RawDisk};
use crate::{Disk, SECTOR, temporary};

/// The most backing files below each other.
const MAX_DEPTH: usize = 64;

/// What the bytes of a file mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// They are the disk's.
    Raw,
    /// Clusters and tables.
    Qcow2,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.name() == name)
    }

    /// The format that a new file of that name has where none is told: qcow2 for `.qcow2`, else raw.
    pub fn of_name(path: &Path) -> Self {
        let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
        match extension.as_deref().and_then(|extension| extension.to_str()) {
            Some("qcow2" | "qcow") => Self::Qcow2,
            _ => Self::Raw,
        }
    }
}

/// What happens to data on their way between the disk and its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// They are in the host's page cache.
    #[default]
    Writeback,
    /// They go past it.
    Direct,
}

/// Which image is opened, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The image.
    pub path: PathBuf,
    /// Its format; found out where it is not told.
    pub format: Option<Format>,
    /// Whether it is only read.
    pub read_only: bool,
    /// Whether what is written is kept apart, and forgotten in the end.
    pub snapshot: bool,
    /// Whether the host's page cache is used.
    pub cache: Cache,
}

impl Options {
    /// An image to be read and written.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: None, read_only: false, snapshot: false, cache: Cache::Writeback }
    }

    /// The same, to be read.
    pub fn reading(path: impl Into<PathBuf>) -> Self {
        Self { read_only: true, ..Self::new(path) }
    }
}

/// Opens a disk; what it is made of is locked until it is dropped.
///
/// # Errors
/// Which file cannot be used, and why.
pub fn open(options: &Options) -> Result<Box<dyn Disk>, Error> {
    let write = !options.read_only && !options.snapshot;
    let direct = options.cache == Cache::Direct;
    let layers = Access { write, locked: true }.layers(&options.path, options.format)?;
    let top = &layers[0];
    let (path, cluster_size, len) = (top.path.clone(), top.cluster_size(), top.size);
    if len == 0 {
        return Err(Reason::Empty.at(&path));
    }
    if len % SECTOR != 0 {
        return Err(Reason::Odd(len).at(&path));
    }
    let host = |error| Reason::Host(error).at(&path);
    // Past the page cache nothing is there at once.
    let cached =
        if direct { Ok(Vec::new()) } else { layers.iter().map(|layer| layer.file.try_clone()).collect() };
    let mut cached: Vec<File> = cached.map_err(host)?;
    if options.snapshot {
        let base = stack(layers, false, direct)?;
        let (overlay, file) = temporary::overlay(base, len).map_err(host)?;
        if !direct {
            cached.insert(0, file);
        }
        let disk = Qcow2Disk::new(overlay, false, temporary::CLUSTER_SIZE as u64);
        return Ok(Box::new(disk.cached(cached)));
    }
    if top.header.is_none() {
        let [top] = <[FileLayer; 1]>::try_from(layers).map_err(|_| Reason::Depth(0).at(&path))?;
        return raw(top, options).map_err(|reason| reason.at(&path));
    }
    let markable = top.header.as_ref().is_some_and(|header| write && header.version >= 3);
    let mark = if markable { Some(open_again(&top.file)) } else { None };
    let disk = Qcow2Disk::new(stack(layers, write, direct)?, !write, cluster_size).cached(cached);
    Ok(match mark {
        Some(file) => Box::new(disk.marked(file.map_err(host)?)),
        None => Box::new(disk),
    })
}

/// A file that is used as it is, byte for byte.
#[derive(Debug)]
pub struct PlainFile {
    /// The file, which is locked until it is closed.
    pub file: File,
    /// Its bytes.
    pub len: u64,
    /// Whether it is a block device, which has the size that it has.
    pub is_device: bool,
}

/// Opens a file for what is no disk and takes it for itself as one: several readers, or one writer. It may be empty.
///
/// # Errors
/// What kind of file it is instead, who has it, or the host's.
pub fn open_plain(path: &Path, write: bool) -> Result<PlainFile, Error> {
    let open = || {
        let (file, metadata) = open_file(path, write)?;
        lock(&file, write)?;
        let len = file_size(&file, &file.metadata()?)?;
        Ok(PlainFile { file, len, is_device: metadata.file_type().is_block_device() })
    };
    open().map_err(|reason: Reason| reason.at(path))
}

/// The same file once more, without locks of its own: those of the first end with that.
fn open_again(file: &File) -> io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn raw(layer: FileLayer, options: &Options) -> Result<Box<dyn Disk>, Reason> {
    let uncached = match options.cache {
        Cache::Writeback => None,
        Cache::Direct => Some(reopen_uncached(&layer.file, !options.read_only)?),
    };
    let disk = RawDisk::new(layer.file, layer.size, options.read_only, options.format.is_none())?;
    Ok(match uncached {
        Some(file) => Box::new(disk.uncached(file)),
        None => Box::new(disk),
    })
}

/// How the files of an image are opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// Whether the first of them is written; the backing files never are.
    pub(crate) write: bool,
    /// Whether they are locked.
    pub(crate) locked: bool,
}

/// One file of an image.
#[derive(Debug)]
pub(crate) struct FileLayer {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) metadata: Metadata,
    /// Of a qcow2 image.
    pub(crate) header: Option<Header>,
    /// The disk's bytes.
    pub(crate) size: u64,
}

impl FileLayer {
    pub(crate) fn format(&self) -> Format {
        if self.header.is_some() { Format::Qcow2 } else { Format::Raw }
    }

    fn cluster_size(&self) -> u64 {
        self.header.as_ref().map_or(0, Header::cluster_size)
    }

    /// The backing file's path and format.
    fn backing(&self) -> Result<Option<(PathBuf, Option<Format>)>, Reason> {
        let Some((name, header)) = self.header.as_ref().and_then(|h| Some((h.backing.as_ref()?, h))) else {
            return Ok(None);
        };
        // A colon before any slash is a protocol's: `json:`, `nbd:`.
        let plain = name.strip_prefix("file:").unwrap_or(name);
        if plain.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(Reason::Protocol(name.clone()));
        }
        let format = match header.backing_format.as_deref() {
            None => None,
            Some("file" | "host_device") => Some(Format::Raw),
            Some(name) => {
                Some(Format::from_name(name).ok_or_else(|| Reason::BackingFormat(name.to_owned()))?)
            }
        };
        Ok(Some((self.path.parent().unwrap_or(Path::new("")).join(plain), format)))
    }
}

impl Access {
    /// Opens an image and its backing files, the image first.
    pub(crate) fn layers(self, path: &Path, format: Option<Format>) -> Result<Vec<FileLayer>, Error> {
        let (layers, missing) = self.layers_so_far(path, format)?;
        missing.map_or(Ok(layers), Err)
    }

    /// The same, of an image with a backing file that cannot be used up to that one, and why it cannot.
    pub(crate) fn layers_so_far(
        self,
        path: &Path,
        format: Option<Format>,
    ) -> Result<(Vec<FileLayer>, Option<Error>), Error> {
        let mut layers = vec![self.layer(path, format)?];
        loop {
            match self.next(&layers) {
                Ok(Some(layer)) => layers.push(layer),
                Ok(None) => return Ok((layers, None)),
                Err(error) => return Ok((layers, Some(error))),
            }
        }
    }

    /// Opens the backing file of the last of these.
    fn next(self, layers: &[FileLayer]) -> Result<Option<FileLayer>, Error> {
        let (first, last) = (&layers[0], &layers[layers.len() - 1]);
        let Some((path, format)) = last.backing().map_err(|reason| reason.at(&last.path))? else {
            return Ok(None);
        };
        if layers.len() > MAX_DEPTH {
            return Err(Reason::Depth(MAX_DEPTH).at(&first.path));
        }
        let id = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        if let Ok(metadata) = path.metadata()
            && layers.iter().any(|layer| id(&layer.metadata) == id(&metadata))
        {
            return Err(Reason::Loop.at(&first.path));
        }
        Access { write: false, ..self }.layer(&path, format).map(Some)
    }

    /// Opens one file.
    fn layer(self, path: &Path, format: Option<Format>) -> Result<FileLayer, Error> {
        self.try_layer(path, format, true).map_err(|reason| reason.at(path))
    }

    fn try_layer(self, path: &Path, format: Option<Format>, may_repair: bool) -> Result<FileLayer, Reason> {
        let (file, metadata) = open_file(path, self.write)?;
        if self.locked {
            lock(&file, self.write)?;
        }
        let format = match format {
            Some(format) => format,
            None => probe(&file)?,
        };
        let len = file_size(&file, &metadata)?;
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Header::read(&file)?),
        };
        if self.locked && may_repair && self.is_to_be_repaired(&file, header.as_ref())? {
            drop(file);
            repair_unclosed(path)?;
            return self.try_layer(path, Some(format), false);
        }
        if let Some(header) = &header
            && self.locked
        {
            header.allow_use()?;
            qcow2::check_reachable(&file, header, self.write)?;
        }
        let size = header.as_ref().map_or(len, |header| header.size);
        Ok(FileLayer { path: path.to_owned(), file, metadata, header, size })
    }
}

impl Access {
    /// Whether an image's refcounts have to be made anew before it is used: it says so, or, in version 2, in which it cannot,
    /// they are wrong.
    fn is_to_be_repaired(self, file: &File, header: Option<&Header>) -> Result<bool, Reason> {
        match header {
            Some(header) if header.is_corrupt() => Ok(false),
            Some(header) if header.version == 2 && self.write => qcow2::has_errors(file, header),
            Some(header) => Ok(header.is_dirty()),
            None => Ok(false),
        }
    }
}

/// Makes the refcounts of an image anew that was not closed properly.
fn repair_unclosed(path: &Path) -> Result<(), Reason> {
    let (_, after) = qcow2::repair(path).map_err(|error| match error.reason {
        Reason::Host(_) => Reason::Dirty,
        reason => reason,
    })?;
    if after.errors > 0 {
        return Err(Reason::Damaged(after.told.into_iter().next().unwrap_or_default()));
    }
    log::warn!("{} was not closed properly; its refcounts were made anew", Name(path));
    Ok(())
}

/// Opens a file, where it is one; a pipe or a socket is not even opened.
pub(crate) fn open_file(path: &Path, write: bool) -> Result<(File, Metadata), Reason> {
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Reason::Kind(if kind.is_dir() { "a directory" } else { "a special file" }));
    }
    let file = File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

/// The same file once more, past the host's page cache.
fn reopen_uncached(file: &File, write: bool) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(write).custom_flags(libc::O_DIRECT).open(path).map_err(no_way_past)
}

/// The error of a file that cannot go past the page cache.
fn no_way_past(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EINVAL) => {
            io::Error::other("its file system has no way past the host's cache: leave cache=direct out")
        }
        _ => error,
    }
}

/// A file's bytes; those of a device are where its end is.
pub(crate) fn file_size(file: &File, metadata: &Metadata) -> io::Result<u64> {
    match metadata.file_type().is_block_device() {
        true => Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?),
        false => Ok(metadata.len()),
    }
}

/// What a file's first bytes say that it is.
fn probe(file: &File) -> io::Result<Format> {
    let mut magic = [0; QCOW2_MAGIC.len()];
    match std::os::unix::fs::FileExt::read_exact_at(file, &mut magic, 0) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(Format::Raw),
    }
}

/// Puts an image on top of its backing files.
pub(crate) fn stack(
    mut layers: Vec<FileLayer>,
    write: bool,
    direct: bool,
) -> Result<FormatAccess<file::File>, Error> {
    let mut below = None;
    while let Some(layer) = layers.pop() {
        let (path, write) = (layer.path.clone(), write && layers.is_empty());
        let made = qcow2::caught(|| put(layer, below.take(), write, direct));
        below = Some(made.map_err(|error| Reason::Host(error).at(&path))?);
    }
    Ok(below.expect("an image has at least one file"))
}

fn put(
    layer: FileLayer,
    below: Option<FormatAccess<file::File>>,
    write: bool,
    direct: bool,
) -> io::Result<FormatAccess<file::File>> {
    let file = layer.file;
    if direct {
        // The same open file, so that its locks stay.
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::DIRECT)
            .map_err(|error| no_way_past(error.into()))?;
    }
    let options = StorageOpenOptions::new().filename(&layer.path).write(write).direct(direct);
    let storage = file::File::from_open_file(file, options)?;
    Ok(match layer.header {
        None => FormatAccess::new(Raw::open_image(storage, write)?),
        Some(_) => {
            let mut image = Qcow2::<file::File>::open_image(storage, write)?;
            image.set_data_file(None);
            image.set_backing(below);
            FormatAccess::new(image)
        }
    })
}
