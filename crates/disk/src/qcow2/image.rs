//! An open qcow2 image: `imago`'s, with its panics and the locking between discards and all else.
//!
//! Refcounts reach the file later than what refers to clusters. While an image is written it is therefore marked as not
//! closed properly: after a kill whoever opens it next makes the refcounts anew, from the tables.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError, RwLock};

use imago::file::File;
use imago::{FormatAccess, Mapping, ShallowMapping, Storage};

use crate::{Close, Direct, Disk, Extent, Geometry, InPlace};

/// A disk in a qcow2 image, with all of its backing files.
#[derive(Debug)]
pub(crate) struct Qcow2Disk {
    /// Read-locked for what keeps mappings valid, write-locked for what does not.
    image: RwLock<FormatAccess<File>>,
    len: u64,
    read_only: bool,
    cluster_size: u32,
    /// Of an image that can be marked.
    mark: Option<Mark>,
    /// The files of the image and of what is below it, where the page cache is used.
    files: Vec<fs::File>,
}

/// The mark of an image that was not closed properly.
#[derive(Debug)]
struct Mark {
    /// The image.
    file: fs::File,
    is_set: Mutex<bool>,
}

/// Where it is in the header, and which bit it is.
const MARK_OFFSET: u64 = 79;
const MARK_BIT: u8 = 1;

impl Mark {
    /// Sets the mark before the first change.
    fn set(&self) -> io::Result<()> {
        let mut is_set = self.is_set.lock().unwrap_or_else(PoisonError::into_inner);
        if !*is_set {
            self.put(MARK_BIT)?;
            *is_set = true;
        }
        Ok(())
    }

    /// Whether it is set, as far as can be said without waiting.
    fn is_set(&self) -> bool {
        self.is_set.try_lock().is_ok_and(|is_set| *is_set)
    }

    /// Takes the mark away.
    fn clear(&self) -> io::Result<()> {
        let mut is_set = self.is_set.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *is_set) { self.put(0) } else { Ok(()) }
    }

    fn put(&self, bit: u8) -> io::Result<()> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, MARK_OFFSET)?;
        self.file.write_all_at(&[byte[0] & !MARK_BIT | bit], MARK_OFFSET)?;
        self.file.sync_data()
    }
}

impl Qcow2Disk {
    pub(crate) fn new(image: FormatAccess<File>, read_only: bool, cluster_size: u64) -> Self {
        let len = image.size();
        let (image, cluster_size) = (RwLock::new(image), cluster_size as u32);
        Self { image, len, read_only, cluster_size, mark: None, files: Vec::new() }
    }

    /// With the files of the image and of its backing files, in their order: what is in the page cache can be moved at once.
    pub(crate) fn cached(mut self, files: Vec<fs::File>) -> Self {
        self.files = files;
        self
    }

    /// Marks the image, whose file this is, from the first change until it is closed.
    pub(crate) fn marked(mut self, file: fs::File) -> Self {
        self.mark = Some(Mark { file, is_set: Mutex::new(false) });
        self
    }

    /// Something is about to change.
    fn changes(&self) -> io::Result<()> {
        self.mark.as_ref().map_or(Ok(()), Mark::set)
    }

    /// Does something that keeps the clusters where they are.
    fn shared<T>(&self, action: impl FnOnce(&FormatAccess<File>) -> io::Result<T>) -> io::Result<T> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        caught(|| action(&image))
    }

    /// Does something that moves clusters or frees them.
    pub(crate) fn alone<T>(
        &self,
        action: impl FnOnce(&mut FormatAccess<File>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        caught(|| action(&mut image))
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::error!("a qcow2 image cannot be closed properly: {error}");
        }
    }
}

impl Close for Qcow2Disk {
    fn close(&self) -> io::Result<()> {
        // What could not be flushed leaves the mark.
        self.mark.as_ref().map_or(Ok(()), |mark| self.flush().and_then(|()| mark.clear()))
    }
}

/// Which file of an image has bytes of the disk in one piece, and where. To be written they have to be the image's own.
fn place(
    image: &FormatAccess<File>,
    (mut offset, len): (u64, u64),
    write: bool,
) -> io::Result<Option<(usize, u64)>> {
    let (mut layer, mut depth) = (image, 0);
    loop {
        let (mapping, mapped) = layer.get_shallow_mapping(offset, len)?;
        if mapped < len {
            return Ok(None);
        }
        match mapping {
            ShallowMapping::Raw { storage, offset, writable, .. } => {
                // The library must know how long the file is.
                let fits = || Ok::<_, io::Error>(offset.saturating_add(len) <= storage.size()?);
                let usable = !write || (depth == 0 && writable && fits()?);
                return Ok(usable.then_some((depth, offset)));
            }
            ShallowMapping::Indirect { layer: below, offset: at, .. } => (layer, offset) = (below, at),
            _ => return Ok(None),
        }
        depth += 1;
    }
}

/// A panic in the library for an image whose tables contradict each other is an error like all others.
pub(crate) fn caught<T>(action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(action))
        .unwrap_or_else(|_| Err(io::Error::other("the image's tables contradict each other")))
}

impl InPlace for Qcow2Disk {
    fn is_cached(&self) -> bool {
        !self.files.is_empty()
    }

    fn in_place(
        &self,
        bytes: (u64, u64),
        write: bool,
        action: &mut dyn FnMut(&fs::File, u64) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        if self.files.is_empty() || write && !self.mark.as_ref().is_none_or(Mark::is_set) {
            return None;
        }
        // Whoever moves or frees clusters waits until this is done.
        let image = self.image.try_read().ok()?;
        let (depth, offset) = caught(|| place(&image, bytes, write)).ok()??;
        Some(action(self.files.get(depth)?, offset))
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn direct(&self) -> Option<Direct<'_>> {
        None
    }

    fn geometry(&self) -> Geometry {
        Geometry { logical: 512, physical: 4096, granularity: self.cluster_size }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.shared(|image| image.read(data, offset))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.changes()?;
        self.shared(|image| image.write(data, offset))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.shared(|image| {
            image.flush()?;
            image.sync()
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.changes()?;
        match self.alone(|image| image.discard_to_any(offset, len)) {
            // A hint; version 2 cannot.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.changes()?;
        if unmap {
            match self.alone(|image| image.discard_to_zero(offset, len)) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        self.shared(|image| image.write_zeroes(offset, len))
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let (mapping, len) = self.shared(|image| {
            let (mapping, len) = image.get_mapping(offset, self.len.saturating_sub(offset))?;
            Ok((matches!(mapping, Mapping::Zero { .. }), len))
        })?;
        Ok(Extent { len, zeros: mapping })
    }
}
