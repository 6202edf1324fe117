//! What a guest's folder holds, written beside it as JSON: the means to tell a whole guest from a damaged one.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::apt::Package;
use super::build::{self, Built};
use super::{Guest, GuestError, initramfs};

/// Raised when what is in a guest's folder changes its meaning: older ones are then fetched anew.
pub const FORMAT: u32 = 3;
/// The manifest's name.
pub const MANIFEST: &str = "manifest.json";
/// The packed kernel's name.
pub const BZIMAGE: &str = "vmlinuz";
/// The unpacked kernel's name.
pub const VMLINUX: &str = "vmlinux";
/// The initramfs's name.
pub const INITRAMFS: &str = "initramfs.cpio";
/// The longest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// What a guest's folder holds.
#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the Ringside that made it.
    pub format: u32,
    /// The guest's name.
    pub guest: String,
    /// The kernel's release.
    pub release: String,
    /// The kernel package's version.
    pub version: String,
    /// Bytes of the initramfs that were made of the packages; what follows came with the program.
    pub base: u64,
    /// The hash of what came with the program.
    pub system: String,
    /// Modules in the initramfs.
    pub modules: Vec<String>,
    /// Wanted modules that the kernel has built in.
    pub builtin: Vec<String>,
    /// Wanted modules that the kernel does not have.
    pub missing: Vec<String>,
    /// What it was made of.
    pub packages: Vec<ManifestPackage>,
    /// The files beside the manifest.
    pub files: Vec<ManifestFile>,
}

/// What every format has.
#[derive(Deserialize)]
struct Versioned {
    format: u32,
}

/// A package that the guest was made of.
#[derive(Debug, Serialize, Deserialize)]
pub struct ManifestPackage {
    name: String,
    version: String,
    sha256: String,
}

/// A file as it was written: where size and time are the same, so is its content.
#[derive(Debug, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its name in the folder.
    pub name: String,
    size: u64,
    modified_ns: i128,
    sha256: String,
}

impl Manifest {
    /// Describes a guest's finished folder.
    ///
    /// # Errors
    /// [`GuestError::File`] where a file cannot be read.
    pub fn describe(
        guest: &Guest,
        folder: &Path,
        built: &Built,
        packages: &[Package],
    ) -> Result<Self, GuestError> {
        let names = [BZIMAGE, VMLINUX, INITRAMFS].into_iter().filter(|name| folder.join(name).exists());
        let files: Vec<ManifestFile> =
            names.map(|name| ManifestFile::describe(folder, name)).collect::<Result<_, _>>()?;
        let described = |package: &Package| ManifestPackage {
            name: package.name.clone(),
            version: package.version.clone(),
            sha256: package.sha256.clone(),
        };
        let system = initramfs::system();
        let initramfs = files.iter().find(|file| file.name == INITRAMFS).map_or(0, |file| file.size);
        Ok(Self {
            format: FORMAT,
            guest: guest.name.to_owned(),
            release: built.release.clone(),
            version: packages.first().map(|package| package.version.clone()).unwrap_or_default(),
            base: initramfs.saturating_sub(system.len() as u64),
            system: sha256(&system),
            modules: built.modules.clone(),
            builtin: built.builtin.clone(),
            missing: built.missing.clone(),
            packages: packages.iter().map(described).collect(),
            files,
        })
    }

    /// Reads the manifest in a folder: `None` where another Ringside's has another format; what is wrong with it otherwise.
    pub fn read(folder: &Path) -> Result<Option<Self>, String> {
        let mut text = String::new();
        File::open(folder.join(MANIFEST))
            .and_then(|file| file.take(MAX_MANIFEST).read_to_string(&mut text))
            .map_err(|error| format!("{MANIFEST}: {error}"))?;
        let bad = |error: serde_json::Error| format!("{MANIFEST}: {error}");
        let Versioned { format } = serde_json::from_str(&text).map_err(bad)?;
        if format == FORMAT { serde_json::from_str(&text).map(Some).map_err(bad) } else { Ok(None) }
    }

    /// Writes the manifest into a folder.
    ///
    /// # Errors
    /// [`GuestError::File`].
    pub fn write(&self, folder: &Path) -> Result<(), GuestError> {
        let path = folder.join(MANIFEST);
        build::write_file(&path, |out| {
            let text = serde_json::to_string_pretty(self)?;
            out.write_all(text.as_bytes())
        })
    }

    /// Compares the folder with the manifest: what is wrong with it.
    pub fn check(&self, guest: &Guest, folder: &Path) -> Result<(), String> {
        if self.guest != guest.name {
            return Err(format!("its manifest is that of {:?}", self.guest));
        }
        if let Some(name) = [BZIMAGE, INITRAMFS].into_iter().find(|name| !self.has(name)) {
            return Err(format!("its manifest does not name {name}"));
        }
        self.files.iter().try_for_each(|file| file.check(folder))
    }

    /// Whether the guest has a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.name == name)
    }

    /// Describes the initramfs anew, with this program's init in it.
    pub fn replace(&mut self, initramfs: ManifestFile) {
        self.files.retain(|file| file.name != INITRAMFS);
        self.files.push(initramfs);
        self.system = sha256(&initramfs::system());
    }

    /// Whether the initramfs has the init of this program.
    pub fn is_current(&self) -> bool {
        self.system == sha256(&initramfs::system())
    }
}

impl ManifestFile {
    /// Describes a file.
    ///
    /// # Errors
    /// [`GuestError::File`] where it cannot be read.
    pub fn describe(folder: &Path, name: &str) -> Result<Self, GuestError> {
        let path = folder.join(name);
        let read = |path: &Path| -> std::io::Result<Self> {
            let meta = fs::metadata(path)?;
            let sha256 = sha256_of_file(path)?;
            Ok(Self { name: name.to_owned(), size: meta.len(), modified_ns: modified_ns(&meta), sha256 })
        };
        read(&path).map_err(GuestError::file("read", &path))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Compares size and time; a copied cache folder has other times, and then the content decides.
    pub fn check(&self, folder: &Path) -> Result<(), String> {
        if ![BZIMAGE, VMLINUX, INITRAMFS].contains(&self.name.as_str()) {
            return Err(format!("{MANIFEST} names {:?}", self.name));
        }
        let path = folder.join(&self.name);
        let meta = fs::metadata(&path).map_err(|error| format!("{}: {error}", self.name))?;
        if !meta.is_file() || meta.len() != self.size {
            return Err(format!("{} has {} bytes instead of {}", self.name, meta.len(), self.size));
        }
        if modified_ns(&meta) == self.modified_ns {
            return Ok(());
        }
        match sha256_of_file(&path) {
            Ok(sum) if sum == self.sha256 => Ok(()),
            Ok(_) => Err(format!("{} has changed", self.name)),
            Err(error) => Err(format!("{}: {error}", self.name)),
        }
    }
}

fn modified_ns(meta: &fs::Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn sha256_of_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..len]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
