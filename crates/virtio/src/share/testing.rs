//! What the tests of both protocols share: a folder with something outside of it, and requests without a guest.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::ownership::Ids;
use super::serve::{Payload, Reply, Server};
use super::*;

/// What the tests share by.
pub(crate) const SETTINGS: Settings =
    Settings { read_only: false, memory: 0, descriptors: 300, keep_all: false };

/// A folder that is shared, and one beside it.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["shared", "outside"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("outside/secret"), "secret").unwrap();
        Self { folder }
    }

    /// A path in the shared folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("shared").join(name)
    }

    /// A path beside it.
    pub(crate) fn outside(&self, name: &str) -> PathBuf {
        self.folder.path().join("outside").join(name)
    }

    /// Shares it as an ordinary user's.
    pub(crate) fn share(&self) -> Folder {
        self.share_with(SETTINGS)
    }

    pub(crate) fn share_with(&self, settings: Settings) -> Folder {
        Folder::open_as(&self.path(""), settings, Ids { root: false, ..Ids::of_process() }).unwrap()
    }

    /// Holds that nothing outside has changed.
    pub(crate) fn check_outside(&self) {
        let names: Vec<_> =
            std::fs::read_dir(self.outside("")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(std::fs::read(self.outside("secret")).unwrap(), b"secret");
        assert_eq!(std::fs::read_dir(self.folder.path()).unwrap().count(), 2);
    }
}

/// A request whose bytes are here.
pub(crate) struct Bytes {
    pub(crate) request: Vec<u8>,
    pub(crate) answer: Vec<u8>,
}

fn borrowed(file: BorrowedFd<'_>) -> File {
    File::from(file.try_clone_to_owned().unwrap())
}

impl Payload for Bytes {
    fn store(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize> {
        let data = self.request.get(skip..).unwrap_or_default();
        i64::try_from(offset).map_err(|_| Errno::INVAL)?;
        borrowed(file)
            .write_at(&data[..len.min(data.len())], offset)
            .map_err(|e| Errno::from_io_error(&e).unwrap())
    }

    fn load(&mut self, skip: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> Result<usize> {
        i64::try_from(offset).map_err(|_| Errno::INVAL)?;
        self.answer = vec![0; skip + len];
        borrowed(file)
            .read_at(&mut self.answer[skip..], offset)
            .map_err(|e| Errno::from_io_error(&e).unwrap())
    }

    fn fetch(&mut self, skip: usize, data: &mut [u8]) -> Result<usize> {
        let from = self.request.get(skip..).unwrap_or_default();
        let len = from.len().min(data.len());
        data[..len].copy_from_slice(&from[..len]);
        Ok(len)
    }
}

/// Sends a request; the whole answer, or why there is none.
pub(crate) fn send(server: &dyn Server, request: &[u8]) -> std::result::Result<Vec<u8>, Reply> {
    let mut payload = Bytes { request: request.to_vec(), answer: Vec::new() };
    let head = server.head_len(&request[..request.len().min(64)]).min(request.len());
    match server.handle(&request[..head], 1 << 16, &mut payload) {
        Reply::Bytes { mut bytes, loaded } => {
            let start = bytes.len();
            bytes.extend_from_slice(payload.answer.get(start..start + loaded).unwrap_or_default());
            Ok(bytes)
        }
        other => Err(other),
    }
}

/// Numbers that look random, the same each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// One of these.
    pub(crate) fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// How many descriptors this process has open for a folder.
pub(crate) fn descriptors_below(path: &std::path::Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|link| link.starts_with(path))
        .count()
}
