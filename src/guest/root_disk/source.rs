//! What the installation reads: one file, attached to the machine as a second disk.
//!
//! ```text
//! seed      a tar of the essential packages' files, so that there is something for dpkg to run in
//! batch …   tars of packages in the order in which they are to be unpacked
//! ```
//!
//! Each begins at a multiple of [`BLOCK`]. The packages' members are decompressed: the host does that several times
//! faster than the guest, and the file is thrown away afterwards.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use super::super::deb::{self, Entry, Kind};
use super::super::{GuestError, Progress};
use super::Cancelled;

/// What segments begin at multiples of, in bytes; `install.sh` reads in these units.
const BLOCK: u64 = 64 << 10;
/// Bytes of packages that are unpacked at a time, where one alone does not have more: they wait in the guest's RAM.
const BATCH: u64 = 64 << 20;
/// The folders of a Debian root that are links to those of the same name below `usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// What dpkg does not need before it unpacks it itself.
const NOT_NEEDED: [&str; 5] =
    ["usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/zoneinfo/"];

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// First block and number of blocks of each segment, the seed first.
    pub segments: Vec<(u64, u64)>,
    /// Bytes of each package, decompressed; in the order of the packages.
    pub sizes: Vec<u64>,
}

impl Source {
    /// Bytes of the longest segment of packages.
    pub fn longest_batch(&self) -> u64 {
        self.segments.iter().skip(1).map(|segment| segment.1 * BLOCK).max().unwrap_or(0)
    }
}

/// Writes `debs` to `file`, with those that `is_seed` picks also as a tree.
///
/// # Errors
/// [`GuestError::Package`] for a package that is broken, [`GuestError::Cancelled`], and where the file cannot be written.
pub fn write(
    file: File,
    debs: &[PathBuf],
    is_seed: impl Fn(usize) -> bool,
    progress: &mut dyn Progress,
    cancelled: &Cancelled<'_>,
) -> Result<Source, GuestError> {
    let mut writer = Writer { out: BufWriter::with_capacity(1 << 20, file), source: Source::default() };
    let seed: Vec<_> = debs.iter().enumerate().filter(|(at, _)| is_seed(*at)).map(|(_, deb)| deb).collect();
    let size = |deb: &PathBuf| fs::metadata(deb).map_or(0, |meta| meta.len());
    let total = debs.iter().chain(seed.iter().copied()).map(size).sum();
    progress.begin(&format!("Unpacking {} packages", debs.len()), Some(total));
    let mut done = 0;
    let mut step = |deb: &PathBuf| {
        done += size(deb);
        progress.advance(done);
        cancelled.check()
    };
    let mut all = || {
        writer.seed(&seed, &mut step)?;
        writer.batches(debs, &mut step)
    };
    let result = all();
    progress.end();
    result?;
    writer.finish()
}

struct Writer {
    out: BufWriter<File>,
    source: Source,
}

/// Called after each package.
type Step<'a> = &'a mut dyn FnMut(&PathBuf) -> Result<(), GuestError>;

impl Writer {
    fn seed(&mut self, debs: &[&PathBuf], step: Step<'_>) -> Result<(), GuestError> {
        let mut tar = tar::Builder::new(&mut self.out);
        for name in MERGED {
            folder(&mut tar, &format!("usr/{name}")).map_err(failed)?;
            link(&mut tar, tar::EntryType::Symlink, name, &format!("usr/{name}")).map_err(failed)?;
        }
        for deb in debs {
            deb::for_each_entry(deb, |entry| seed_entry(&mut tar, entry))?;
            step(deb)?;
        }
        tar.finish().map_err(failed)?;
        drop(tar);
        self.end_segment().map_err(failed)
    }

    fn batches(&mut self, debs: &[PathBuf], step: Step<'_>) -> Result<(), GuestError> {
        let mut begin = self.out.stream_position().map_err(failed)?;
        for (number, deb) in debs.iter().enumerate() {
            let start = self.out.stream_position().map_err(failed)?;
            let header = self.out.write_all(&[0; 512]);
            header.map_err(failed)?;
            let bytes = deb::unpack(deb, &mut self.out)?;
            self.source.sizes.push(bytes);
            // Their names are in the order in which dpkg is to take them.
            self.end_file(start, &format!("{number:05}.deb"), bytes).map_err(failed)?;
            step(deb)?;
            let end = self.out.stream_position().map_err(failed)?;
            if end - begin >= BATCH || number + 1 == debs.len() {
                self.out.write_all(&[0; 1024]).and_then(|()| self.end_segment()).map_err(failed)?;
                begin = self.out.stream_position().map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Writes a file's header before its bytes, now that their number is known, and pads it.
    fn end_file(&mut self, start: u64, name: &str, bytes: u64) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_path(name)?;
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_cksum();
        self.out.seek(SeekFrom::Start(start))?;
        self.out.write_all(header.as_bytes())?;
        self.out.seek(SeekFrom::Start(start + 512 + bytes))?;
        let padding = bytes.next_multiple_of(512) - bytes;
        self.out.write_all(&[0; 512][..padding as usize])
    }

    fn end_segment(&mut self) -> io::Result<()> {
        let end = self.out.stream_position()?;
        let first = self.source.segments.last().map_or(0, |(first, count)| first + count);
        let blocks = (end - first * BLOCK).div_ceil(BLOCK);
        self.out.seek(SeekFrom::Start((first + blocks) * BLOCK))?;
        self.source.segments.push((first, blocks));
        Ok(())
    }

    fn finish(mut self) -> Result<Source, GuestError> {
        let end = self.source.segments.last().map_or(0, |(first, count)| (first + count) * BLOCK);
        let file = self.out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.set_len(end).map_err(failed)?;
        self.source.segments.shrink_to_fit();
        Ok(self.source)
    }
}

fn failed(error: io::Error) -> GuestError {
    GuestError::file("write", std::path::Path::new("a temporary file beside the disk"))(error)
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn folder(tar: &mut tar::Builder<impl Write>, path: &str) -> io::Result<()> {
    tar.append_data(&mut header(tar::EntryType::Directory, 0o755, 0), path, io::empty())
}

fn link(
    tar: &mut tar::Builder<impl Write>,
    kind: tar::EntryType,
    path: &str,
    target: &str,
) -> io::Result<()> {
    tar.append_link(&mut header(kind, 0o777, 0), path, target)
}

/// Where an entry lies once `/bin` and the like are links; `None` for the folders that those links stand for.
fn merged(path: &str) -> Option<String> {
    match path.split_once('/') {
        Some((first, _)) if MERGED.contains(&first) => Some(format!("usr/{path}")),
        None if MERGED.contains(&path) => None,
        _ => Some(path.to_owned()),
    }
}

fn seed_entry(tar: &mut tar::Builder<impl Write>, entry: &mut Entry<'_>) -> io::Result<()> {
    let Some(path) = merged(entry.path).filter(|path| !path.is_empty()) else { return Ok(()) };
    if NOT_NEEDED.iter().any(|folder| path.starts_with(folder)) {
        return Ok(());
    }
    match &entry.kind {
        Kind::Folder => {
            tar.append_data(&mut header(tar::EntryType::Directory, entry.mode, 0), path, io::empty())
        }
        Kind::Link(target) => link(tar, tar::EntryType::Symlink, &path, target),
        Kind::SameAs(target) => match merged(target) {
            Some(target) => link(tar, tar::EntryType::Link, &path, &target),
            None => Ok(()),
        },
        Kind::File => {
            let mut header = header(tar::EntryType::Regular, entry.mode, entry.size);
            tar.append_data(&mut header, path, entry.reader.take(entry.size))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::super::Silent;
    use super::super::super::testing::{TarEntry, deb_of, deb_of_entries};
    use super::*;

    /// Path → content or link target of a segment.
    fn segment(bytes: &[u8], (first, blocks): (u64, u64)) -> BTreeMap<String, Vec<u8>> {
        let range = (first * BLOCK) as usize..((first + blocks) * BLOCK) as usize;
        let mut archive = tar::Archive::new(&bytes[range]);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let mut data = entry.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default();
            entry.read_to_end(&mut data).unwrap();
            (path, data)
        });
        entries.collect()
    }

    fn written(debs: &[Vec<u8>], seeds: &[usize]) -> (Source, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (at, deb) in debs.iter().enumerate() {
            paths.push(folder.path().join(format!("{at}.deb")));
            fs::write(&paths[at], deb).unwrap();
        }
        let path = folder.path().join("source");
        let file = File::create(&path).unwrap();
        let source = write(file, &paths, |at| seeds.contains(&at), &mut Silent, &Cancelled::never()).unwrap();
        (source, fs::read(path).unwrap())
    }

    #[test]
    fn the_seed_is_a_merged_tree_and_every_package_comes_decompressed() {
        let long = format!("./usr/share/{}/file", "x".repeat(150));
        let first = deb_of_entries(
            &[
                TarEntry::Folder("./bin/"),
                TarEntry::File("./bin/tool", 0o755, b"program"),
                TarEntry::Same("./usr/bin/other", "./bin/tool"),
                TarEntry::Link("./usr/bin/link", "../lib/x"),
                TarEntry::File("./usr/share/doc/tool/copyright", 0o644, b"text"),
                TarEntry::File(&long, 0o644, b"long"),
            ],
            "echo",
        );
        let second = deb_of(".xz", &[("./etc/other", b"content")]);
        let (source, bytes) = written(&[first, second], &[0]);
        assert_eq!(source.segments.len(), 2);
        let seed = segment(&bytes, source.segments[0]);
        assert_eq!((&seed["bin"][..], &seed["lib64"][..]), (&b"usr/bin"[..], &b"usr/lib64"[..]));
        assert_eq!(
            (&seed["usr/bin/tool"][..], &seed["usr/bin/other"][..]),
            (&b"program"[..], &b"usr/bin/tool"[..])
        );
        assert_eq!(seed["usr/bin/link"], b"../lib/x");
        assert_eq!(seed[&long[2..]], b"long");
        assert!(!seed.keys().any(|name| name.contains("copyright") || name.contains("etc/other")));
        let batch = segment(&bytes, source.segments[1]);
        assert_eq!(batch.keys().collect::<Vec<_>>(), ["00000.deb", "00001.deb"]);
        assert_eq!(batch["00001.deb"].len() as u64, source.sizes[1]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.deb");
        fs::write(&path, &batch["00001.deb"]).unwrap();
        let mut found = Vec::new();
        deb::for_each_entry(&path, |entry| {
            let mut data = Vec::new();
            entry.reader.read_to_end(&mut data)?;
            found.push((entry.path.to_owned(), data));
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [("etc/other".to_owned(), b"content".to_vec())]);
    }

    #[test]
    fn packages_are_unpacked_in_batches_that_fit_into_memory() {
        let big = deb_of(".xz", &[("./a", &vec![7; 40 << 20])]);
        let (source, bytes) = written(&[big.clone(), big.clone(), big], &[]);
        assert_eq!(source.segments.len(), 3, "the seed, two packages, one package");
        assert_eq!(bytes.len() as u64, source.segments.iter().map(|segment| segment.1 * BLOCK).sum::<u64>());
        assert!((80 << 20..81 << 20).contains(&source.longest_batch()));
    }

    #[test]
    fn a_broken_package_is_named_and_a_cancelled_build_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.deb");
        fs::write(&path, b"!<arch>\nrest").unwrap();
        let file = || File::create(folder.path().join("source")).unwrap();
        let error = write(file(), std::slice::from_ref(&path), |_| false, &mut Silent, &Cancelled::never());
        assert!(error.unwrap_err().to_string().contains("some.deb"));
        fs::write(&path, deb_of("", &[("./a", b"b")])).unwrap();
        let yes = || true;
        let error = write(file(), &[path], |_| false, &mut Silent, &Cancelled(&yes));
        assert!(matches!(error, Err(GuestError::Cancelled)));
    }
}
