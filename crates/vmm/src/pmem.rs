//! Persistent memory: files of the host, opened and locked, laid out above the RAM, and made into devices.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use guest_memory::{FileRegion, FileState, GuestMemory, Region};
use virtio::pmem::{Pmem, PmemOptions, Sync};

use crate::config::ConfigError;
use crate::error::BuildError;
use crate::layout;
use crate::outcome::Ending;
use crate::unix_socket::readable;

/// The most persistent memories of a machine.
pub const MAX_PMEM: usize = 16;
/// Bytes of which each has a multiple: systems manage such memory in pieces of so many.
pub const PMEM_UNIT: u64 = 2 << 20;
/// What is compared with zeros at a time.
const CHUNK: u64 = 64 << 10;

/// A file that is memory of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PmemConfig {
    /// The file.
    pub path: PathBuf,
    /// Bytes that it is to have: it is made, or made larger. Else it is there, and is as large as it is.
    pub size: Option<u64>,
    /// Whether what the guest stores is discarded.
    pub read_only: bool,
    /// Whether what the guest stores is forgotten in the end.
    pub snapshot: bool,
}

/// Refuses what no machine can have.
///
/// # Errors
/// The first of it.
pub(crate) fn check(pmem: &[PmemConfig]) -> Result<(), ConfigError> {
    if pmem.len() > MAX_PMEM {
        return Err(ConfigError::PmemCount(pmem.len()));
    }
    let odd = pmem.iter().find_map(|pmem| pmem.size.filter(|&size| size == 0 || size % PMEM_UNIT != 0));
    odd.map_or(Ok(()), |size| Err(ConfigError::PmemSize(size)))
}

/// The files of a machine's persistent memory, in their order. When this goes, those that were made larger for it and
/// have nothing there get their size back.
#[derive(Debug, Default)]
pub(crate) struct PmemFiles(Vec<PmemFile>);

#[derive(Debug)]
struct PmemFile {
    config: PmemConfig,
    file: Arc<File>,
    /// Bytes of it that are mapped.
    len: u64,
    /// Where the guest finds it.
    range: Range<u64>,
    /// Its bytes before it was made larger for the guest.
    grown_from: Option<u64>,
}

/// Opens and locks the files, and finds room for them above `memory` bytes of RAM, below `limit`.
///
/// # Errors
/// [`BuildError::Pmem`] for a file that cannot be memory, [`BuildError::PmemRoom`].
pub(crate) fn open(configs: &[PmemConfig], memory: u64, limit: u64) -> Result<PmemFiles, BuildError> {
    let mut files = PmemFiles::default();
    let mut start = layout::pmem_start(memory);
    for config in configs {
        let failed = |reason: String| BuildError::Pmem { path: config.path.clone(), reason };
        let mut file = open_file(config).map_err(failed)?;
        let size = (file.range.end).next_multiple_of(PMEM_UNIT);
        let end = start.checked_add(size).filter(|&end| end <= limit);
        let end = end.ok_or(BuildError::PmemRoom { path: config.path.clone(), size, start, limit })?;
        file.range = start..end;
        start = end;
        files.0.push(file);
    }
    Ok(files)
}

/// Opens one file, which has its bytes as its range for the time being.
fn open_file(config: &PmemConfig) -> Result<PmemFile, String> {
    let PmemConfig { path, size, read_only, snapshot } = config;
    let write = !read_only && !snapshot;
    if size.is_some() && write && !path.exists() {
        File::options().write(true).create_new(true).open(path).map_err(|error| error.to_string())?;
    }
    let plain = disk::open_plain(path, write).map_err(|error| error.reason.to_string())?;
    let before = plain.len;
    let len = match *size {
        Some(size) if size < before => {
            return Err(format!("it has {before} bytes already, more than size={size}: leave size= out"));
        }
        Some(size) => size,
        None if before == 0 => return Err("it is empty: size= says how large it is to be".into()),
        None => before.checked_next_multiple_of(PMEM_UNIT).ok_or("it has too many bytes")?,
    };
    let mut grown_from = None;
    if write && len != before {
        if plain.is_device {
            return Err(format!(
                "it is a device of {before} bytes, no multiple of {PMEM_UNIT}: share it with readonly=on or snapshot=on"
            ));
        }
        plain.file.set_len(len).map_err(|error| format!("it cannot be made larger: {error}"))?;
        if size.is_none() {
            log::info!("{}: {before} bytes are made {len}", disk::Name(path));
            grown_from = Some(before);
        }
    }
    let mapped = if write { len } else { before };
    let file = Arc::new(plain.file);
    Ok(PmemFile { config: config.clone(), file, len: mapped, range: 0..len, grown_from })
}

impl PmemFiles {
    /// What the machine's memory has of them.
    pub(crate) fn regions(&self) -> Vec<FileRegion> {
        let region = |file: &PmemFile| FileRegion {
            region: Region {
                start: file.range.start,
                len: file.range.end - file.range.start,
                read_only: file.config.read_only,
            },
            file: file.file.clone(),
            len: file.len,
            shared: file.is_written(),
        };
        self.0.iter().map(region).collect()
    }

    /// The devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Box<dyn virtio::Device>> + '_ {
        self.0.iter().map(|file| -> Box<dyn virtio::Device> {
            Box::new(Pmem::new(PmemOptions {
                range: file.range.clone(),
                read_only: file.config.read_only,
                label: file.name(),
                sync: file.sync(),
            }))
        })
    }

    /// Starts the thread that tells of what becomes of the files while the machine runs; `None` where there are none.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub(crate) fn watch(&self, memory: &GuestMemory, ending: &Ending) -> io::Result<Option<JoinHandle<()>>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let names: Vec<_> = self.0.iter().map(PmemFile::name).collect();
        let (memory, ending) = (memory.clone(), ending.clone());
        let watch = move || {
            let mut told = vec![FileState::default(); names.len()];
            while !ending.has_come() {
                if memory.file_event().is_some_and(|event| readable(&event)) {
                    memory.take_file_event();
                    tell(&names, &mut told, &memory.file_states());
                }
            }
        };
        std::thread::Builder::new().name("pmem-files".into()).spawn(watch).map(Some)
    }
}

/// Tells what has changed.
fn tell(names: &[String], told: &mut [FileState], now: &[FileState]) {
    for ((name, told), now) in names.iter().zip(told).zip(now) {
        if now.lost && !told.lost {
            log::error!(
                "{name}: pages of it cannot be had any more: it was cut off, or its disk fails; the guest has zeros there"
            );
        }
        match (told.waiting, now.waiting) {
            (false, true) => log::error!("{name}: no room on its disk; the guest waits until there is some"),
            (true, false) if !now.lost => log::warn!("{name}: there is room again"),
            _ => {}
        }
        *told = *now;
    }
}

impl PmemFile {
    fn name(&self) -> String {
        disk::Name(&self.config.path).to_string()
    }

    /// Whether what the guest stores goes into it.
    fn is_written(&self) -> bool {
        !self.config.read_only && !self.config.snapshot
    }

    /// What makes it durable: nothing where nothing is kept.
    fn sync(&self) -> Sync {
        let (file, len) = (self.file.clone(), self.len);
        if !self.is_written() {
            return Box::new(|| Ok(()));
        }
        let is_device = file.metadata().is_ok_and(|metadata| !metadata.is_file());
        Box::new(move || {
            let now = file.metadata()?.len();
            if !is_device && now < len {
                return Err(io::Error::other(format!("somebody has cut it off at {now} of {len} bytes")));
            }
            file.sync_data()
        })
    }

    /// Whether there is nothing but zeros from `from` on.
    fn is_zero_from(&self, from: u64) -> io::Result<bool> {
        let mut bytes = vec![0; CHUNK as usize];
        let mut at = from;
        while at < self.len {
            let part = &mut bytes[..(self.len - at).min(CHUNK) as usize];
            self.file.read_exact_at(part, at)?;
            if part.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            at += part.len() as u64;
        }
        Ok(true)
    }
}

impl Drop for PmemFile {
    fn drop(&mut self) {
        let Some(before) = self.grown_from else { return };
        let restored = match self.is_zero_from(before) {
            Ok(true) => self.file.set_len(before),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = restored {
            log::warn!("{}: it keeps the size of {} bytes: {error}", self.name(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const LIMIT: u64 = 1 << 36;

    fn config(path: &Path) -> PmemConfig {
        PmemConfig { path: path.to_owned(), ..PmemConfig::default() }
    }

    fn file(folder: &Path, bytes: usize) -> PathBuf {
        let path = folder.join(format!("file-{bytes}"));
        std::fs::write(&path, vec![7; bytes]).unwrap();
        path
    }

    fn len(path: &Path) -> u64 {
        path.metadata().unwrap().len()
    }

    fn refused(config: PmemConfig) -> String {
        open(&[config], 1 << 30, LIMIT).expect_err("refused").to_string()
    }

    #[test]
    fn files_lie_above_all_ram_one_after_another_in_pieces_of_2_mib() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [file(folder.path(), 5 << 20), file(folder.path(), 2 << 20)];
        let files = open(&paths.each_ref().map(|path| config(path)), 5 << 30, LIMIT).unwrap();
        let places: Vec<_> =
            files.regions().iter().map(|r| (r.region.start, r.region.len, r.shared)).collect();
        assert_eq!(places, [(6 << 30, 6 << 20, true), ((6 << 30) + (6 << 20), 2 << 20, true)]);
        assert_eq!(files.devices().map(|device| device.id()).collect::<Vec<_>>(), [27, 27]);
        let low = open(&[config(&paths[1])], 64 << 20, LIMIT).unwrap_err().to_string();
        assert!(low.contains("uses it"), "{low}");
        drop(files);
        let low = open(&[config(&paths[1])], 64 << 20, LIMIT).unwrap();
        assert_eq!(low.regions()[0].region.start, 4 << 30);
    }

    #[test]
    fn a_file_of_an_odd_size_has_it_again_unless_something_is_in_what_was_added() {
        let folder = tempfile::tempdir().unwrap();
        for touched in [false, true] {
            let path = file(folder.path(), 3_000_001);
            let files = open(&[config(&path)], 1 << 30, LIMIT).unwrap();
            assert_eq!(len(&path), 4 << 20);
            if touched {
                files.0[0].file.write_all_at(&[1], (4 << 20) - 1).unwrap();
            }
            drop(files);
            assert_eq!(len(&path), if touched { 4 << 20 } else { 3_000_001 });
        }
    }

    #[test]
    fn what_is_not_written_keeps_its_size_and_has_zeros_behind_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), 5000);
        let kinds = [(true, false), (false, true)];
        // Two readers may have it.
        let both = kinds.map(|(read_only, snapshot)| PmemConfig { read_only, snapshot, ..config(&path) });
        let files = open(&both, 1 << 30, LIMIT).unwrap();
        for (region, (read_only, _)) in files.regions().iter().zip(kinds) {
            assert_eq!((region.len, region.region.len, region.shared), (5000, PMEM_UNIT, false));
            assert_eq!(region.region.read_only, read_only);
        }
        assert!(refused(config(&path)).contains("another process uses it"));
        drop(files);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 5000]);
    }

    #[test]
    fn a_size_makes_a_file_or_makes_it_larger() {
        let folder = tempfile::tempdir().unwrap();
        let sized = |path: &Path, size| PmemConfig { size: Some(size), ..config(path) };
        let new = folder.path().join("new");
        drop(open(&[sized(&new, 4 << 20)], 1 << 30, LIMIT).unwrap());
        assert_eq!(len(&new), 4 << 20);
        drop(open(&[sized(&new, 8 << 20)], 1 << 30, LIMIT).unwrap());
        assert_eq!(len(&new), 8 << 20);
        assert!(refused(sized(&new, 2 << 20)).contains("leave size= out"));
        assert_eq!(len(&new), 8 << 20);
    }

    #[test]
    fn what_cannot_be_memory_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let empty = file(folder.path(), 0);
        for (path, why) in [
            (folder.path().to_owned(), "a directory"),
            (fifo, "a special file"),
            ("/dev/zero".into(), "a special file"),
            (empty, "it is empty"),
            (folder.path().join("missing"), "No such file"),
        ] {
            let told = refused(config(&path));
            assert!(told.contains(why) && told.contains(path.to_str().unwrap()), "{told}");
        }
        let large = folder.path().join("large");
        File::create(&large).unwrap().set_len(1 << 37).unwrap();
        let told = refused(config(&large));
        assert!(told.contains("no room"), "{told}");
    }

    #[test]
    fn sizes_and_counts_that_no_machine_has_are_refused() {
        let sized = |size| PmemConfig { size: Some(size), ..PmemConfig::default() };
        assert_eq!(check(&[sized(2 << 20), PmemConfig::default()]), Ok(()));
        for size in [0, 4096, (2 << 20) + 1] {
            assert_eq!(check(&[sized(size)]), Err(ConfigError::PmemSize(size)));
        }
        assert_eq!(check(&vec![sized(2 << 20); 17]), Err(ConfigError::PmemCount(17)));
    }
}
