use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::error::FileError;
use crate::layout;

/// Reads a kernel or an initrd.
///
/// # Errors
/// [`FileError`] for what is not a file, is empty, is larger than `limit` bytes (the guest's memory), or cannot be
/// read.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let kind = fs::metadata(path).map_err(failed)?;
    if !kind.is_file() {
        let what = if kind.is_dir() { "a directory" } else { "a special file" };
        return Err(FileError::NotAFile { path: path.to_owned(), what });
    }
    let limit = limit.min(layout::MAX_MEMORY);
    let too_large = |bytes| FileError::TooLarge { path: path.to_owned(), bytes, limit };
    if kind.len() > limit {
        return Err(too_large(kind.len()));
    }
    let mut bytes = Vec::new();
    let size = usize::try_from(kind.len()).map_err(|_| too_large(kind.len()))?;
    bytes.try_reserve_exact(size).map_err(|_| too_large(kind.len()))?;
    // The file may grow while it is read.
    let file = File::open(path).map_err(failed)?;
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 {
        0 => Err(FileError::Empty(path.to_owned())),
        len if len > limit => Err(too_large(len)),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_file_with_bytes_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("empty"), b"").unwrap();
        fs::write(path("five"), b"12345").unwrap();
        let text = |name: &str, limit| read_file(&path(name), limit).unwrap_err().to_string();
        assert!(text("", 10).ends_with("is a directory, not a file"));
        assert!(text("empty", 10).ends_with("empty is empty"));
        assert!(text("none", 10).contains("cannot read"), "{}", text("none", 10));
        assert!(
            text("five", 4).ends_with("five is too big for the memory: it has 5 bytes, there is room for 4")
        );
        assert_eq!(read_file(&path("five"), 5).unwrap(), b"12345");
        let special = read_file(Path::new("/dev/zero"), 10).unwrap_err();
        assert_eq!(special.to_string(), "/dev/zero is a special file, not a file");
    }
}
