//! A disk with Debian on it, made from Debian's packages by an ordinary user.
//!
//! ```text
//!  host                                              guest (the default one)
//!  apt ──> packages ──> source: one file with ──────> install.sh: mkfs.ext4, a seed tree, dpkg
//!          fetched      all of them, decompressed     │ status lines
//!  the disk, under a temporary name <─────────────────┘
//!  └─ renamed once all of it has succeeded
//! ```
//!
//! Nothing of a package runs on the host. The disk has no partitions and no boot loader: [`is_root`] knows it by its
//! label, and `ringside run` boots it with the default guest's kernel, whose init goes on from it.

mod install;
mod source;

use std::fs::File;
use std::path::{Path, PathBuf};

use disk::{Creation, Disk, Format, Options};
use rustix::fs::statvfs;
use tempfile::NamedTempFile;
use vmm::Controls;

use super::{GuestError, Progress, apt, software};
pub use install::Login;

/// The file system's label.
pub const LABEL: &str = "ringside-root";
/// The least size of a disk, in bytes.
pub const MIN_SIZE: u64 = 1 << 30;
/// The most, in bytes: what ext4 has with its defaults.
pub const MAX_SIZE: u64 = 16 << 40;
/// Bytes of the file system's own structures, and what has to be free on a system that is to be worked with.
const OVERHEAD: u64 = 256 << 20;

/// What every disk has besides the essential and required packages.
const PACKAGES: &[&str] = &[
    "apt",
    "dbus",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "nano",
    "netbase",
    "procps",
    "systemd",
    "systemd-sysv",
    "udev",
    apt::MERGED_ALREADY,
];

/// What is to be made.
#[derive(Clone, Debug)]
pub struct RootDisk {
    /// Debian packages besides those of every disk.
    pub packages: Vec<String>,
    /// Bytes of the disk; a multiple of a MiB.
    pub size: u64,
    /// The machine's name.
    pub hostname: String,
    /// Who may log in.
    pub login: Login,
}

/// Asks whether to go on.
#[derive(Clone, Copy)]
pub struct Cancelled<'a>(pub &'a dyn Fn() -> bool);

impl Cancelled<'_> {
    /// Nobody cancels.
    pub fn never() -> Self {
        Self(&|| false)
    }

    fn check(&self) -> Result<(), GuestError> {
        if (self.0)() { Err(GuestError::Cancelled) } else { Ok(()) }
    }
}

/// Who is told of a build, and who may end it.
pub struct Observer<'a> {
    /// What is done.
    pub progress: &'a mut dyn Progress,
    /// Whether to go on.
    pub cancelled: Cancelled<'a>,
    /// Called when everything is fetched and files of our own begin, which have to be removed where the build ends early.
    pub fetched: &'a dyn Fn(),
    /// Called with the machine that installs, so that it can be stopped.
    pub started: &'a dyn Fn(Controls),
}

/// Makes `output`, an image of this format, which appears once all of it is done.
///
/// # Errors
/// [`GuestError`] for packages that cannot be had, a disk that is too small for them, and where the installation fails;
/// nothing is left behind then.
pub fn build(
    disk: &RootDisk,
    output: &Path,
    format: Format,
    observer: &mut Observer<'_>,
) -> Result<(), GuestError> {
    let folder = folder_of(output);
    // Before anything is fetched: whether something can be written there at all.
    drop(temporary(&folder, output)?);
    let mut names: Vec<String> = PACKAGES.iter().map(|&name| name.to_owned()).collect();
    names.extend(disk.login.user.is_some().then(|| "sudo".to_owned()));
    names.extend(disk.packages.iter().cloned());
    let system = software::fetch_system(&names, observer.progress)?;
    (observer.fetched)();

    let packed: u64 = system.packages.iter().map(|package| bytes_of(&package.file)).sum();
    // Packages unpack to about four times their size.
    check_space(&folder, packed * 8)?;
    let debs: Vec<PathBuf> = system.packages.iter().map(|package| package.file.clone()).collect();
    let is_seed = |at: usize| system.essential.contains(&system.packages[at].name);
    let file = tempfile::tempfile_in(&folder).map_err(GuestError::file("write", &folder))?;
    let copy = file.try_clone().map_err(GuestError::file("write", &folder))?;
    let source = source::write(copy, &debs, is_seed, observer.progress, &observer.cancelled)?;
    let needed = source.sizes.iter().sum::<u64>() / 10 * 11 + OVERHEAD;
    if needed > disk.size {
        return Err(GuestError::Install { reason: too_small(needed, disk.size) });
    }

    let image = temporary(&folder, output)?;
    let creation = Creation { replace: true, ..Creation::new(image.path(), format, disk.size) };
    disk::create(&creation).map_err(failed)?;
    let names: Vec<String> = system.packages.into_iter().map(|package| package.name).collect();
    let job = install::Job {
        disk,
        image: Options { format: Some(format), ..Options::new(image.path()) },
        source: &file,
        layout: &source,
        packages: &names,
    };
    install::run(&job, observer)?;
    let written = File::open(image.path()).and_then(|file| {
        // As any new file, not as one that was temporary.
        file.set_permissions(image.as_file().metadata()?.permissions())?;
        file.sync_all()
    });
    written.map_err(GuestError::file("write", output))?;
    observer.cancelled.check()?;
    image.persist(output).map_err(|error| GuestError::file("write", output)(error.error))?;
    Ok(())
}

fn failed(reason: impl ToString) -> GuestError {
    GuestError::Install { reason: reason.to_string() }
}

fn too_small(needed: u64, size: u64) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    format!(
        "the packages need a disk of {} MiB, and it has {} MiB: use a larger --size",
        mib(needed),
        mib(size)
    )
}

/// The folder that a file is in.
fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A file beside `output`, which is removed unless it gets a name. It may be read as any new file.
fn temporary(folder: &Path, output: &Path) -> Result<NamedTempFile, GuestError> {
    use std::os::unix::fs::PermissionsExt;
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(GuestError::file("write in", folder))
}

fn bytes_of(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |meta| meta.len())
}

/// Refuses to begin where the file system has not that many bytes left.
fn check_space(folder: &Path, bytes: u64) -> Result<(), GuestError> {
    let Ok(host) = statvfs(folder) else { return Ok(()) };
    let free = host.f_bavail.saturating_mul(host.f_frsize);
    if free >= bytes {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let reason = format!(
        "{} has {} MiB left, and about {} MiB are needed meanwhile",
        folder.display(),
        mib(free),
        mib(bytes)
    );
    Err(GuestError::Install { reason })
}

/// Where ext4's superblock begins. *ext4 Data Structures and Algorithms, The Super Block*.
const SUPERBLOCK: u64 = 1024;
/// Where it has its magic number, and that.
const MAGIC: (usize, [u8; 2]) = (0x38, [0x53, 0xef]);
/// Where it has the label, and its bytes.
const LABEL_AT: usize = 0x78;
const LABEL_BYTES: usize = 16;

/// Whether a disk was made by [`build`]; not where it cannot be read.
pub fn is_root(disk: &dyn Disk) -> bool {
    let mut block = [0; LABEL_AT + LABEL_BYTES];
    let mut label = [0; LABEL_BYTES];
    label[..LABEL.len()].copy_from_slice(LABEL.as_bytes());
    disk.size() > SUPERBLOCK + block.len() as u64
        && disk.read(SUPERBLOCK, &mut block).is_ok()
        && block[MAGIC.0..][..2] == MAGIC.1
        && block[LABEL_AT..][..LABEL_BYTES] == label
}

/// Whether a hostname is one label of letters, digits and hyphens. RFC 1123, *Host Names and Numbers*.
pub fn is_hostname(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Whether a name can be a user's on Debian: useradd(8), and not one that the system has.
pub fn is_user_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    (1..=32).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut bytes = vec![0; 4096];
        bytes[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x478..][..LABEL.len()].copy_from_slice(LABEL.as_bytes());
        change(&mut bytes);
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        is_root(&*disk::open(&Options::reading(file.path())).unwrap())
    }

    #[test]
    fn a_root_disk_is_known_by_its_file_system_and_label() {
        assert!(image(|_| {}));
        assert!(!image(|bytes| bytes[0x438] = 0));
        assert!(!image(|bytes| bytes[0x478] = b'x'));
        assert!(!image(|bytes| bytes[0x478 + LABEL.len()] = b'2'), "a longer label");
        assert!(!image(|bytes| bytes.truncate(1024)));
    }

    #[test]
    fn names_that_a_system_cannot_have_are_refused() {
        assert!(is_hostname("box-1") && is_hostname("0"));
        for bad in ["", "-a", "a-", "a.b", "A", "a b", "a'b", &"a".repeat(64)] {
            assert!(!is_hostname(bad), "{bad}");
        }
        assert!(is_user_name("ann_2") && is_user_name("_x"));
        for bad in ["", "2a", "a b", "a:b", "-x", "Ann", &"a".repeat(33)] {
            assert!(!is_user_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_before_anything_is_fetched() {
        let disk =
            RootDisk { packages: Vec::new(), size: MIN_SIZE, hostname: "a".into(), login: Login::default() };
        let mut observer = Observer {
            progress: &mut super::super::Silent,
            cancelled: Cancelled::never(),
            fetched: &|| panic!("nothing must be fetched"),
            started: &|_| panic!("no machine must start"),
        };
        let error = build(&disk, Path::new("/nonexistent/disk.img"), Format::Raw, &mut observer).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
