//! Debian's binary packages: an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*` (deb(5)).
//!
//! Nothing is unpacked to the disk: [`for_each_file`] walks the regular files and [`for_each_entry`] all that a package
//! has, and whoever asks keeps what it wants.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path};
use std::rc::Rc;

use super::GuestError;

/// More than any package of the catalog unpacks to, in bytes: what a broken archive may at most make us read.
const MAX_UNPACKED: u64 = 4 << 30;
/// More than any package's control files have, in bytes.
const MAX_CONTROL: u64 = 16 << 20;
/// What an `ar` archive begins with.
const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
/// Bytes of an `ar` member's header.
const AR_HEADER: usize = 60;

/// What the visitor of a package's files wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// The next file.
    On,
    /// No more.
    Stop,
}

/// One regular file of a package.
pub struct PackagedFile<'a> {
    /// Its path without a leading `./`, `/` or `usr/`: Debian moved `/lib` and `/bin` below `/usr` between releases.
    pub path: &'a str,
    /// Bytes.
    pub size: u64,
    /// Bytes of the package that have been read so far, of all that it has.
    pub consumed: u64,
    reader: &'a mut dyn Read,
}

impl PackagedFile<'_> {
    /// Reads the whole file into `into`, which is cleared first.
    ///
    /// # Errors
    /// Where the file has more than `limit` bytes, or the archive ends early.
    pub fn read(&mut self, into: &mut Vec<u8>, limit: u64) -> io::Result<()> {
        if self.size > limit {
            let message = format!("{} has {} bytes, more than {limit}", self.path, self.size);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        into.clear();
        self.reader.take(limit).read_to_end(into)?;
        if into.len() as u64 == self.size { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// Calls `visit` for each regular file in the package, in the archive's order.
///
/// # Errors
/// [`GuestError::Package`] for what is not a package, is cut or holds a path that leaves its root, and what `visit`
/// gives.
pub fn for_each_file(
    deb: &Path,
    mut visit: impl FnMut(&mut PackagedFile<'_>) -> io::Result<Walk>,
) -> Result<(), GuestError> {
    let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = File::open(deb).map_err(GuestError::file("read", deb))?;
    walk(file, &mut visit).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => GuestError::package(name, "it is cut short"),
        _ => GuestError::package(name, error),
    })
}

/// What an entry of a package is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A symbolic link with its target.
    Link(String),
    /// Another name of the file at this path of the package.
    SameAs(String),
}

/// One entry of a package.
pub struct Entry<'a> {
    /// Its path below the root, without a leading `./` and a trailing `/`.
    pub path: &'a str,
    /// What it is.
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    /// Bytes of a file.
    pub size: u64,
    /// Its content.
    pub reader: &'a mut dyn Read,
}

/// Calls `visit` for each entry of the package, in the archive's order; devices and the like are left out.
///
/// # Errors
/// As [`for_each_file`].
pub fn for_each_entry(
    deb: &Path,
    mut visit: impl FnMut(&mut Entry<'_>) -> io::Result<()>,
) -> Result<(), GuestError> {
    let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut walk = || -> io::Result<()> {
        let mut archive = tar::Archive::new(member(open(deb)?, "data.tar")?.take(MAX_UNPACKED));
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let path = path_below_root(&path)?.trim_end_matches('/');
            let target = entry.link_name_bytes().map(|target| String::from_utf8_lossy(&target).into_owned());
            let kind = match (entry.header().entry_type(), target) {
                (tar::EntryType::Directory, _) => Kind::Folder,
                (tar::EntryType::Symlink, Some(target)) => Kind::Link(target),
                (tar::EntryType::Link, Some(target)) => Kind::SameAs(path_below_root(&target)?.to_owned()),
                (kind, _) if kind.is_file() => Kind::File,
                _ => continue,
            };
            let (mode, size) = (entry.header().mode()? & 0o7777, entry.size());
            visit(&mut Entry { path, kind, mode, size, reader: &mut entry })?;
        }
        io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop)
    };
    walk().map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => GuestError::package(name, "it is cut short"),
        _ => GuestError::package(name, error),
    })
}

/// Reads a maintainer script, such as `postinst`; `None` where the package has none.
///
/// # Errors
/// As [`for_each_file`].
pub fn read_script(deb: &Path, script: &str) -> Result<Option<String>, GuestError> {
    let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let read = || -> io::Result<Option<String>> {
        let mut archive = tar::Archive::new(member(open(deb)?, "control.tar")?.take(MAX_CONTROL));
        for entry in archive.entries()? {
            let entry = entry?;
            if path_below_root(&String::from_utf8_lossy(&entry.path_bytes()))? == script {
                let mut bytes = Vec::new();
                entry.take(MAX_CONTROL).read_to_end(&mut bytes)?;
                return Ok(Some(String::from_utf8_lossy(&bytes).into_owned()));
            }
        }
        Ok(None)
    };
    read().map_err(|error| GuestError::package(name, error))
}

/// Writes the package with its members decompressed, at the writer's position; gives the bytes written.
///
/// # Errors
/// As [`for_each_file`], and where the writer fails.
pub fn unpack(deb: &Path, out: &mut (impl Write + Seek)) -> Result<u64, GuestError> {
    let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut write = || -> io::Result<u64> {
        let start = out.stream_position()?;
        out.write_all(AR_MAGIC)?;
        unpacked_member(out, "debian-binary", &mut &b"2.0\n"[..])?;
        unpacked_member(out, "control.tar", &mut member(open(deb)?, "control.tar")?.take(MAX_CONTROL))?;
        unpacked_member(out, "data.tar", &mut member(open(deb)?, "data.tar")?.take(MAX_UNPACKED))?;
        Ok(out.stream_position()? - start)
    };
    write().map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => GuestError::package(name, "it is cut short"),
        _ => GuestError::package(name, error),
    })
}

/// Writes a member whose length is known only afterwards.
fn unpacked_member(out: &mut (impl Write + Seek), name: &str, data: &mut dyn Read) -> io::Result<()> {
    let start = out.stream_position()?;
    out.write_all(&[b' '; AR_HEADER])?;
    let size = io::copy(data, out)?;
    if size % 2 != 0 {
        out.write_all(b"\n")?;
    }
    let end = out.stream_position()?;
    out.seek(SeekFrom::Start(start))?;
    // Name, time, owner, group, mode, size, end of the header.
    writeln!(out, "{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`", 0, 0, 0, 100644)?;
    out.seek(SeekFrom::Start(end)).map(drop)
}

fn open(deb: &Path) -> io::Result<Counted> {
    Ok(Counted { file: File::open(deb)?, consumed: Rc::default() })
}

fn walk(file: File, visit: &mut dyn FnMut(&mut PackagedFile<'_>) -> io::Result<Walk>) -> io::Result<()> {
    let consumed = Rc::new(Cell::new(0));
    let data = member(Counted { file, consumed: consumed.clone() }, "data.tar")?;
    // What is longer looks cut.
    let mut archive = tar::Archive::new(data.take(MAX_UNPACKED));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = clean_path(&path)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let size = entry.size();
        let mut file = PackagedFile { path, size, consumed: consumed.get(), reader: &mut entry };
        if visit(&mut file)? == Walk::Stop {
            return Ok(());
        }
    }
    // Past the archive's end stands the compression's checksum.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop)
}

/// The path below the package's root; an error for one that leaves it.
fn clean_path(path: &str) -> io::Result<&str> {
    let below = path_below_root(path)?;
    Ok(below.strip_prefix("usr/").unwrap_or(below))
}

/// The same with its `usr/`.
fn path_below_root(path: &str) -> io::Result<&str> {
    let below = path.trim_start_matches("./").trim_start_matches('/');
    let harmless = |component| matches!(component, Component::Normal(_) | Component::CurDir);
    if !Path::new(below).components().all(harmless) {
        return Err(invalid(format!("the path {path:?} leaves the package")));
    }
    Ok(below)
}

/// A file that counts what is read from it, or skipped.
struct Counted {
    file: File,
    consumed: Rc<Cell<u64>>,
}

impl Counted {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Current(i64::try_from(bytes).map_err(invalid)?))?;
        self.consumed.set(self.consumed.get().saturating_add(bytes));
        Ok(())
    }
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(into)?;
        self.consumed.set(self.consumed.get() + len as u64);
        Ok(len)
    }
}

/// Finds the member whose name begins so (`data.tar`, `control.tar`) and decompresses it.
fn member(mut file: Counted, beginning: &str) -> io::Result<Box<dyn Read>> {
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    if &magic != AR_MAGIC {
        return Err(invalid("it is no Debian package"));
    }
    loop {
        let mut header = [0; AR_HEADER];
        file.read_exact(&mut header)?;
        let field =
            |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim_end().to_owned();
        let size: u64 = field(48..58).parse().map_err(|_| invalid("its archive has a bad header"))?;
        let name = field(0..16);
        let name = name.trim_end_matches('/');
        if let Some(compression) = name.strip_prefix(beginning) {
            return decompress(compression, BufReader::with_capacity(1 << 16, file.take(size)));
        }
        file.skip(size + size % 2)?;
    }
}

/// Decompresses by the file name's ending: `.xz`, `.zst`, `.gz` or none.
fn decompress(ending: &str, packed: impl io::BufRead + 'static) -> io::Result<Box<dyn Read>> {
    Ok(match ending {
        "" => Box::new(packed),
        ".gz" => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
        ".zst" => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
        ".xz" => {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(4);
            let stream = liblzma::stream::MtStreamBuilder::new()
                .threads(threads as u32)
                .memlimit_threading(256 << 20)
                .memlimit_stop(1 << 30)
                .decoder()?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(packed, stream))
        }
        other => return Err(invalid(format!("its data is compressed as {other:?}, which is unknown here"))),
    })
}

/// Decompresses a kernel module by its path's ending; one that is not compressed is given back.
///
/// # Errors
/// For broken data, and where the module would have more than `limit` bytes.
pub fn unpack_module(path: &str, data: Vec<u8>, limit: u64) -> io::Result<Vec<u8>> {
    let ending = match path.rsplit_once(".ko") {
        Some((_, ending @ (".xz" | ".zst" | ".gz"))) => ending,
        _ => return Ok(data),
    };
    let mut unpacked = Vec::new();
    decompress(ending, io::Cursor::new(data))?.take(limit + 1).read_to_end(&mut unpacked)?;
    if unpacked.len() as u64 > limit { Err(invalid("it is too big")) } else { Ok(unpacked) }
}

fn invalid(message: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{deb_of, deb_with_path};
    use super::*;

    fn files_of(deb: &[u8]) -> Result<Vec<(String, Vec<u8>)>, GuestError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), deb).unwrap();
        let mut files = Vec::new();
        for_each_file(file.path(), |file| {
            let mut data = Vec::new();
            file.read(&mut data, 1 << 20)?;
            files.push((file.path.to_owned(), data));
            Ok(Walk::On)
        })?;
        Ok(files)
    }

    #[test]
    fn files_come_out_whatever_the_compression_and_wherever_the_root() {
        let packed = [("./boot/vmlinuz-1", &b"kernel"[..]), ("./usr/bin/busybox", b"box")];
        for ending in ["", ".gz", ".xz", ".zst"] {
            let files = files_of(&deb_of(ending, &packed)).unwrap();
            let expected = [("boot/vmlinuz-1", &b"kernel"[..]), ("bin/busybox", b"box")];
            assert_eq!(files.len(), 2, "{ending}");
            for (file, (path, data)) in files.iter().zip(expected) {
                assert_eq!((file.0.as_str(), file.1.as_slice()), (path, data), "{ending}");
            }
        }
    }

    #[test]
    fn a_package_cut_anywhere_is_an_error() {
        let kernel: Vec<u8> = (0..50_000u32).map(|n| ((n * n) >> 7) as u8).collect();
        for ending in ["", ".gz", ".xz", ".zst"] {
            let deb = deb_of(ending, &[("./boot/vmlinuz-1", &kernel)]);
            // The tar's end marker (1,024 zero bytes and padding) is all that may be missing.
            let end = if ending.is_empty() { deb.len() - 1024 } else { deb.len() - 1 };
            for len in (0..end).step_by(997).chain([7, 8, 60, 67, 68, end - 1]) {
                let result = files_of(&deb[..len.min(end)]);
                assert!(result.is_err(), "{ending} cut to {len} of {}", deb.len());
            }
        }
    }

    #[test]
    fn a_path_that_leaves_the_package_is_refused() {
        for path in ["../etc/passwd", "./lib/../../x", "usr/../../x"] {
            let error = files_of(&deb_with_path(path)).unwrap_err().to_string();
            assert!(error.contains("leaves the package"), "{path}: {error}");
        }
    }

    #[test]
    fn what_is_no_package_and_an_unknown_compression_are_refused() {
        assert!(files_of(b"not a package at all").is_err());
        let mut deb = deb_of("", &[]);
        let at = deb.windows(8).position(|w| w == b"data.tar").unwrap();
        deb[at + 8..at + 12].copy_from_slice(b".lz4");
        assert!(files_of(&deb).unwrap_err().to_string().contains("lz4"));
    }

    #[test]
    fn a_file_past_its_limit_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), deb_of(".gz", &[("./a", &[0; 5000])])).unwrap();
        let result = for_each_file(file.path(), |file| file.read(&mut Vec::new(), 4999).map(|()| Walk::On));
        assert!(result.unwrap_err().to_string().contains("more than 4999"));
    }

    #[test]
    fn a_compressed_module_that_unpacks_past_the_limit_is_refused() {
        let packed = zstd::encode_all(&[0u8; 100_000][..], 1).unwrap();
        assert_eq!(unpack_module("a.ko.zst", packed.clone(), 100_000).unwrap().len(), 100_000);
        assert!(unpack_module("a.ko.zst", packed, 99_999).is_err());
        assert_eq!(unpack_module("a.ko", vec![1], 10).unwrap(), [1]);
    }
}
