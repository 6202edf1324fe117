//! Debian packages in a guest: fetched with all that they depend on, and put behind the guest's initramfs as a second
//! archive. No script of theirs runs; what those would have made and programs need is made by [`alternatives`].
//!
//! ```text
//! ~/.cache/ringside/software/
//!     debian-0123456789abcdef/   a guest with a set of packages; it got this name by a rename
//!         manifest.json          which packages, and what the file must be
//!         initramfs.cpio         the guest's own, then the packages
//!     apt/                       apt's lists, and the packages as they were downloaded
//!     .lock                      held while something is made or removed
//! ```

mod alternatives;
mod layout;
mod tree;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::{lock_folder, user_folder};
use super::manifest::{INITRAMFS, MANIFEST, ManifestFile};
use super::{GuestError, GuestFiles, Progress, apt, build};

/// Raised when an archive's making changes: older ones are then made anew.
const FORMAT: u32 = 1;

/// The shell that runs commands where there are packages: busybox's would take its own `gzip` before a package's.
const SHELL: &str = "dash";

/// A guest's initramfs with packages behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Software {
    /// The guest's initramfs, then the packages.
    pub initrd: PathBuf,
    /// Bytes of the packages' part, unpacked as it is.
    pub bytes: u64,
    /// What is in it, as `NAME VERSION`.
    pub packages: Vec<String>,
}

/// What a folder holds.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// What was asked for.
    names: Vec<String>,
    /// What came, as `NAME VERSION`.
    packages: Vec<String>,
    /// The guest's own initramfs, whose copy the file begins with.
    guest: ManifestFile,
    /// Bytes of that copy.
    guest_bytes: u64,
    file: ManifestFile,
}

/// Finds or makes the initramfs of a guest (`files`, of the catalog's name `guest`) with `names` and what they need.
///
/// # Errors
/// [`GuestError`] for packages that cannot be had, with apt's own sentence, and where the cache folder cannot be written.
pub fn with_packages(
    guest: &str,
    files: &GuestFiles,
    names: &[String],
    progress: &mut dyn Progress,
) -> Result<Software, GuestError> {
    let wanted = names.iter().cloned().chain([SHELL.to_owned()]);
    let names: Vec<String> = wanted.collect::<BTreeSet<_>>().into_iter().collect();
    let root = user_folder()?.join("software");
    let folder = root.join(folder_name(guest, &names));
    if let Some(manifest) = load(&folder).filter(|manifest| manifest.is_of(files)) {
        return Ok(manifest.software(&folder));
    }
    fs::create_dir_all(&root).map_err(GuestError::file("create the cache folder", &root))?;
    let _lock = lock_folder(&root, progress)?;
    let manifest = match load(&folder) {
        // Another start may have made it meanwhile.
        Some(manifest) if manifest.is_of(files) => manifest,
        Some(manifest) => renew(&folder, files, manifest)?,
        None => make(&root, &folder, files, &names, progress)?,
    };
    Ok(manifest.software(&folder))
}

/// Fetches the packages of a whole system: the essential and required ones, `names`, and what all of them need.
///
/// # Errors
/// As [`with_packages`].
pub(super) fn fetch_system(names: &[String], progress: &mut dyn Progress) -> Result<apt::System, GuestError> {
    let root = user_folder()?.join("software");
    fs::create_dir_all(&root).map_err(GuestError::file("create the cache folder", &root))?;
    let _lock = lock_folder(&root, progress)?;
    apt::fetch_system(names, &root.join("apt"), progress)
}

/// Removes every set of packages and what apt has downloaded; gives the bytes that were freed.
///
/// # Errors
/// [`GuestError::File`].
pub fn remove_all() -> Result<u64, GuestError> {
    let root = user_folder()?.join("software");
    if !root.exists() {
        return Ok(0);
    }
    let _lock = lock_folder(&root, &mut super::Silent)?;
    let bytes = bytes_below(&root);
    let entries = fs::read_dir(&root).map_err(GuestError::file("read", &root))?;
    for entry in entries.flatten().filter(|entry| entry.file_name() != ".lock") {
        fs::remove_dir_all(entry.path()).map_err(GuestError::file("remove", &entry.path()))?;
    }
    Ok(bytes)
}

/// Bytes that packages take in the cache folder.
pub fn bytes() -> u64 {
    user_folder().map_or(0, |folder| bytes_below(&folder.join("software")))
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// `debian-0123456789abcdef`: the guest, and the names' hash.
fn folder_name(guest: &str, names: &[String]) -> String {
    let hash = Sha256::digest(names.join(" "));
    let hash: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{guest}-{hash}")
}

/// The manifest of a folder that is whole.
fn load(folder: &Path) -> Option<Manifest> {
    let text = fs::read_to_string(folder.join(MANIFEST)).ok()?;
    let manifest: Manifest = serde_json::from_str(&text).ok()?;
    if manifest.format != FORMAT {
        return None;
    }
    match manifest.file.check(folder) {
        Ok(()) => Some(manifest),
        Err(problem) => {
            log::warn!("{}: {problem}: making it again", folder.display());
            None
        }
    }
}

impl Manifest {
    /// Whether the file begins with the guest's initramfs of today.
    fn is_of(&self, files: &GuestFiles) -> bool {
        files.initrd.parent().is_some_and(|folder| self.guest.check(folder).is_ok())
    }

    fn software(&self, folder: &Path) -> Software {
        Software {
            initrd: folder.join(INITRAMFS),
            bytes: self.file.size().saturating_sub(self.guest_bytes),
            packages: self.packages.clone(),
        }
    }

    fn write(&self, folder: &Path) -> Result<(), GuestError> {
        build::write_file(&folder.join(MANIFEST), |out| Ok(serde_json::to_writer_pretty(out, self)?))
    }
}

/// Describes the guest's initramfs.
fn guest_file(files: &GuestFiles) -> Result<ManifestFile, GuestError> {
    let folder = files.initrd.parent().unwrap_or(Path::new("/"));
    ManifestFile::describe(folder, INITRAMFS)
}

/// Fetches and unpacks. Called under the lock.
fn make(
    root: &Path,
    folder: &Path,
    files: &GuestFiles,
    names: &[String],
    progress: &mut dyn Progress,
) -> Result<Manifest, GuestError> {
    let packages = apt::fetch_with_dependencies(names, &root.join("apt"), progress)?;
    let work = tempfile::Builder::new().prefix(".making.").tempdir_in(root);
    let work = work.map_err(GuestError::file("create a folder in", root))?;
    let debs: Vec<PathBuf> = packages.iter().map(|package| package.file.clone()).collect();
    let size = |deb: &PathBuf| fs::metadata(deb).map_or(0, |meta| meta.len());
    progress.begin(&format!("Unpacking {} packages", debs.len()), Some(debs.iter().map(size).sum()));
    let mut result = Ok(());
    let mut guest_bytes = 0;
    build::write_file(&work.path().join(INITRAMFS), |out| {
        guest_bytes = io::copy(&mut File::open(&files.initrd)?, out)?;
        result = tree::write(&debs, out, progress);
        Ok(())
    })?;
    progress.end();
    result?;
    let manifest = Manifest {
        format: FORMAT,
        names: names.to_vec(),
        packages: packages.iter().map(|package| format!("{} {}", package.name, package.version)).collect(),
        guest: guest_file(files)?,
        guest_bytes,
        file: ManifestFile::describe(work.path(), INITRAMFS)?,
    };
    manifest.write(work.path())?;
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(GuestError::file("remove", folder))?;
    }
    fs::rename(work.keep(), folder).map_err(GuestError::file("rename to", folder))?;
    Ok(manifest)
}

/// Puts the guest's initramfs of today before the same packages. Called under the lock.
fn renew(folder: &Path, files: &GuestFiles, mut manifest: Manifest) -> Result<Manifest, GuestError> {
    let (path, new) = (folder.join(INITRAMFS), folder.join("initramfs.new"));
    let mut guest_bytes = 0;
    build::write_file(&new, |out| {
        guest_bytes = io::copy(&mut File::open(&files.initrd)?, out)?;
        let mut old = File::open(&path)?;
        old.seek(SeekFrom::Start(manifest.guest_bytes))?;
        io::copy(&mut old.take(u64::MAX), out).map(drop)
    })?;
    fs::rename(&new, &path).map_err(GuestError::file("write", &path))?;
    manifest.guest = guest_file(files)?;
    manifest.guest_bytes = guest_bytes;
    manifest.file = ManifestFile::describe(folder, INITRAMFS)?;
    manifest.write(folder)?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sets_folder_does_not_depend_on_the_order_of_its_names_but_on_each_of_them() {
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_ne!(folder_name("debian", &names("a b")), folder_name("debian", &names("ab")));
        assert_ne!(folder_name("debian", &names("a")), folder_name("debian-cloud", &names("a")));
        assert!(folder_name("debian", &names("a b")).starts_with("debian-"));
    }

    fn guest_in(folder: &Path, bytes: &[u8]) -> GuestFiles {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(INITRAMFS), bytes).unwrap();
        let file = |name: &str| folder.join(name);
        GuestFiles {
            kernel: file("vmlinux"),
            bzimage: file("vmlinuz"),
            initrd: file(INITRAMFS),
            cmdline: String::new(),
            version: "1".into(),
        }
    }

    fn made(folder: &Path, files: &GuestFiles, packages: &[u8]) -> Manifest {
        fs::create_dir_all(folder).unwrap();
        let guest = fs::read(&files.initrd).unwrap();
        fs::write(folder.join(INITRAMFS), [&guest[..], packages].concat()).unwrap();
        let manifest = Manifest {
            format: FORMAT,
            names: vec!["a".into()],
            packages: vec!["a 1".into()],
            guest: guest_file(files).unwrap(),
            guest_bytes: guest.len() as u64,
            file: ManifestFile::describe(folder, INITRAMFS).unwrap(),
        };
        manifest.write(folder).unwrap();
        manifest
    }

    #[test]
    fn a_guest_with_a_newer_init_keeps_its_packages() {
        let folder = tempfile::tempdir().unwrap();
        let set = folder.path().join("set");
        let files = guest_in(&folder.path().join("guest"), b"old init");
        made(&set, &files, b"packages");
        assert!(load(&set).unwrap().is_of(&files));
        let files = guest_in(&folder.path().join("guest"), b"init of another length");
        let manifest = load(&set).unwrap();
        assert!(!manifest.is_of(&files));
        let software = renew(&set, &files, manifest).unwrap().software(&set);
        assert_eq!(fs::read(&software.initrd).unwrap(), b"init of another lengthpackages");
        assert_eq!(software.bytes, 8);
        assert!(load(&set).unwrap().is_of(&files));
    }

    #[test]
    fn an_archive_that_was_cut_or_changed_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let set = folder.path().join("set");
        let files = guest_in(&folder.path().join("guest"), b"init");
        made(&set, &files, b"packages");
        for damage in [&b"initpack"[..], b"initpackagez", b""] {
            fs::write(set.join(INITRAMFS), damage).unwrap();
            assert!(load(&set).is_none(), "{damage:?}");
        }
    }
}
