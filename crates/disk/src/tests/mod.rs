//! What images hold, what is refused, and what QEMU says of it.

mod bad_images;
mod contents;
mod qemu;

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Creation, Disk, Error, Format, Options, create, open};

/// A folder with images.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        create(&Creation::new(&path, Format::of_name(&path), size)).unwrap();
        path
    }
}

/// The reason for which an image is not opened; one line.
#[track_caller]
fn refusal(options: &Options) -> String {
    let error = open(options).err().expect("it must be refused").to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

fn bytes(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}

fn whole(path: &Path) -> Result<Vec<u8>, Error> {
    let disk = open(&Options::reading(path))?;
    Ok(bytes(&*disk, 0, disk.size() as usize))
}

/// Numbers that look random, and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}
