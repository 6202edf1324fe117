//! Files of the host as guest memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::access::Mapping;
use crate::bus_error::{self, Event, Watched};
use crate::{GuestMemory, MemoryError, Offset, PAGE_SIZE, Region};

/// A range of guest-physical addresses with a file behind it.
#[derive(Clone, Debug)]
pub struct FileRegion {
    /// Where; what the guest stores to a read-only one is discarded.
    pub region: Region,
    /// The file, which is kept open.
    pub file: Arc<File>,
    /// Bytes of the file that are there, from its beginning; what the region has more is RAM of zeros.
    pub len: u64,
    /// Whether what is stored goes into the file; else it stays in memory, and is forgotten with it.
    pub shared: bool,
}

/// What became of accesses that the file of a region could not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileState {
    /// Pages were lost: the file is shorter than it was, or cannot be read. Zeros are in their place, and what is
    /// stored there goes nowhere.
    pub lost: bool,
    /// A store waits for room on the file's disk.
    pub waiting: bool,
}

/// The files of a machine's memory.
#[derive(Debug, Default)]
pub(crate) struct Files {
    watched: Vec<Watched>,
    /// Raised when the state of one of them changes; there where there are files.
    event: Option<Event>,
}

impl Files {
    /// Maps files to their offsets.
    pub(crate) fn map<'a>(
        mapping: &Mapping,
        files: impl Iterator<Item = (Offset, &'a FileRegion)>,
    ) -> Result<Self, MemoryError> {
        let mut made = Self::default();
        for (offset, file) in files {
            let len = file.len.min(file.region.len);
            if len > 0 {
                mapping.map_file(offset, len.next_multiple_of(PAGE_SIZE), (&file.file, file.shared))?;
            }
            let event = match &made.event {
                Some(event) => event,
                None => made.event.insert(Event::new().map_err(MemoryError::File)?),
            };
            let start = mapping.host_address() + offset;
            let range = start..start + len.next_multiple_of(PAGE_SIZE);
            made.watched.push(Watched::new(range, file, event).map_err(MemoryError::File)?);
        }
        Ok(made)
    }
}

impl GuestMemory {
    /// The state of the file regions, in their order.
    pub fn file_states(&self) -> Vec<FileState> {
        self.ram.files.watched.iter().map(Watched::state).collect()
    }

    /// The state of the file behind an address; `None` where there is none.
    pub fn file_state(&self, address: u64) -> Option<FileState> {
        let of_file = self.regions.iter().filter(|p| p.of_file);
        let mut files = of_file.zip(&self.ram.files.watched);
        let found = files.find(|(p, _)| address.wrapping_sub(p.region.start) < p.region.len);
        found.map(|(_, watched)| watched.state())
    }

    /// Readable once one of those states has changed, until [`Self::take_file_event`]; `None` without files.
    pub fn file_event(&self) -> Option<BorrowedFd<'_>> {
        self.ram.files.event.as_ref().map(AsFd::as_fd)
    }

    /// Takes the news that a state has changed.
    pub fn take_file_event(&self) {
        if let Some(event) = &self.ram.files.event {
            event.take();
        }
    }

    /// The machine ends: stores do not wait for room on a file's disk any more, they are lost.
    pub fn end_waiting(&self) {
        self.ram.files.watched.iter().for_each(Watched::give_up);
    }
}

/// The most files that all machines of a process can have as memory at a time.
pub(crate) fn too_many() -> io::Error {
    io::Error::other(format!("{} files are guest memory already", bus_error::MOST))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::time::{Duration, Instant};

    use super::*;

    const START: u64 = 0x1_0000;

    fn file(bytes: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Arc::new(file)
    }

    fn contents(mut file: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// A page of RAM, and a region of `pages` pages at [`START`].
    fn memory(file: &Arc<File>, pages: u64, (read_only, shared): (bool, bool)) -> GuestMemory {
        let ram = Region { start: 0, len: PAGE_SIZE, read_only: false };
        let region = Region { start: START, len: pages * PAGE_SIZE, read_only };
        let len = file.metadata().unwrap().len();
        let files = [FileRegion { region, file: file.clone(), len, shared }];
        GuestMemory::with_files(&[ram], &files).unwrap()
    }

    fn offset(memory: &GuestMemory, address: u64) -> Offset {
        memory.locate(address).unwrap().offset
    }

    #[test]
    fn a_files_bytes_are_memory_and_stores_go_into_it() {
        let file = file(&[7; 2 * PAGE_SIZE as usize]);
        let memory = memory(&file, 2, (false, true));
        assert_eq!(memory.load::<u8>(offset(&memory, START + 5000)), 7);
        memory.store(offset(&memory, START + 4096), 0x0102_0304u32);
        assert_eq!(contents(&file)[4096..4101], [4, 3, 2, 1, 7]);
        assert_eq!(memory.regions().count(), 1, "it is no RAM");
        assert_eq!((memory.all_regions().count(), memory.ram_len()), (2, PAGE_SIZE));
        assert!(memory.discard(START, PAGE_SIZE).is_err(), "nobody takes its pages away");
    }

    #[test]
    fn what_is_not_shared_stays_in_memory_and_what_is_read_only_says_so() {
        for read_only in [false, true] {
            let file = file(&[7; PAGE_SIZE as usize]);
            let memory = memory(&file, 1, (read_only, false));
            assert_eq!(memory.locate(START).unwrap().read_only, read_only);
            memory.store(offset(&memory, START), 1u8);
            assert_eq!(memory.load::<u16>(offset(&memory, START)), 0x701);
            assert_eq!(contents(&file), [7; PAGE_SIZE as usize]);
        }
    }

    #[test]
    fn behind_the_files_end_is_ram_of_zeros() {
        let file = file(&[7; 5000]);
        let memory = memory(&file, 4, (false, false));
        assert_eq!(memory.load::<u16>(offset(&memory, START + 4999)), 7);
        memory.store(offset(&memory, START + 3 * PAGE_SIZE), 9u8);
        assert_eq!(memory.load::<u64>(offset(&memory, START + 3 * PAGE_SIZE)), 9);
    }

    #[test]
    fn a_file_that_is_cut_off_reads_as_zeros_and_the_loss_is_told() {
        let file = file(&[7; 64 * PAGE_SIZE as usize]);
        let memory = memory(&file, 64, (false, true));
        assert_eq!(memory.file_states(), [FileState::default()]);
        file.set_len(PAGE_SIZE + 100).unwrap();
        assert_eq!(memory.load::<u8>(offset(&memory, START + PAGE_SIZE)), 7, "the last page is there still");
        memory.store(offset(&memory, START + 9 * PAGE_SIZE), 5u32);
        assert_eq!(memory.load::<u64>(offset(&memory, START + 9 * PAGE_SIZE)), 5, "memory in its place");
        assert_eq!(memory.load::<u64>(offset(&memory, START + 2 * PAGE_SIZE)), 0);
        let mut bytes = [1; 8];
        memory.read_bytes(offset(&memory, START + 63 * PAGE_SIZE), &mut bytes);
        assert_eq!(bytes, [0; 8]);
        assert_eq!(memory.file_states(), [FileState { lost: true, waiting: false }]);
        assert_eq!((memory.file_state(0), memory.file_state(START + 5).is_some()), (None, true));
        assert!(memory.file_event().is_some());
        memory.take_file_event();
        assert_eq!(file.metadata().unwrap().len(), PAGE_SIZE + 100);
    }

    #[test]
    fn several_threads_may_meet_a_missing_page_at_once() {
        let file = file(&[7; 256 * PAGE_SIZE as usize]);
        let memory = memory(&file, 256, (false, true));
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let memory = &memory;
                scope.spawn(move || {
                    for page in 0..256 {
                        let at = offset(memory, START + page * PAGE_SIZE + 8 * thread);
                        memory.store(at, thread + 1);
                        assert_eq!(memory.load::<u64>(at), thread + 1);
                    }
                });
            }
        });
        assert!(memory.file_states()[0].lost);
    }

    #[test]
    fn a_store_waits_for_room_on_the_disk_until_the_machine_ends() {
        let folder = tempfile::tempdir().unwrap();
        let Some(_mounted) = SmallDisk::mount(folder.path()) else {
            eprintln!("skipped: this user cannot mount a file system that is full");
            return;
        };
        let path = folder.path().join("file");
        let file = Arc::new(File::options().create_new(true).read(true).write(true).open(&path).unwrap());
        file.set_len(1 << 20).unwrap();
        let memory = memory(&file, 256, (false, true));
        let filler = folder.path().join("filler");
        while File::options().create(true).append(true).open(&filler).unwrap().write_all(&[0; 4096]).is_ok() {
        }
        let until = |what: &str, there: &dyn Fn(FileState) -> bool| {
            let limit = Instant::now() + Duration::from_secs(20);
            while !there(memory.file_states()[0]) {
                assert!(Instant::now() < limit, "{what}");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        std::thread::scope(|scope| {
            let store = |page: u64| {
                let memory = &memory;
                scope.spawn(move || memory.store(offset(memory, START + page * PAGE_SIZE), 5u8))
            };
            let stored = store(3);
            until("it does not wait", &|state| state.waiting);
            std::fs::remove_file(&filler).unwrap();
            stored.join().unwrap();
            until("it waits on", &|state| !state.waiting);
            assert_eq!((contents(&file)[3 * 4096], memory.file_states()[0].lost), (5, false));
            std::fs::write(&filler, [0; 4096]).unwrap();
            while File::options().append(true).open(&filler).unwrap().write_all(&[0; 4096]).is_ok() {}
            let stored = store(9);
            until("it does not wait", &|state| state.waiting);
            memory.end_waiting();
            stored.join().unwrap();
        });
        assert_eq!(memory.file_states()[0], FileState { lost: true, waiting: false });
    }

    /// A file system in memory with room for a few pages.
    struct SmallDisk(std::path::PathBuf);

    impl SmallDisk {
        fn mount(at: &std::path::Path) -> Option<Self> {
            let mut mount = std::process::Command::new("mount");
            let done = mount.args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(at).output().ok()?;
            done.status.success().then(|| Self(at.to_owned()))
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}
