//! The guests in the user's cache folder.
//!
//! ```text
//! ~/.cache/ringside/guests/
//!     debian/            complete: it got this name by a rename
//!         manifest.json  what the others must be
//!         vmlinuz  vmlinux  initramfs.cpio
//!     .debian.XXXXXX/    being made; swept by the next fetch
//!     .lock              held while something is made or removed
//! ```

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::apt::{self, Package};
use super::manifest::{BZIMAGE, INITRAMFS, Manifest, ManifestFile, VMLINUX};
use super::{Guest, GuestError, GuestFiles, Progress, build, initramfs};

/// What the cache folder has of a guest.
enum Found {
    /// Nothing, or something that this program cannot use.
    Nothing,
    /// All of it.
    Whole(GuestFiles),
    /// All of it, with the init of another Ringside.
    OtherInit(Manifest),
}

/// The folder that holds the guests.
#[derive(Clone, Debug)]
pub struct Cache {
    guests: PathBuf,
}

/// The user's cache folder.
///
/// # Errors
/// [`GuestError::NoCacheFolder`] where the environment names none by an absolute path.
pub(super) fn user_folder() -> Result<PathBuf, GuestError> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("RINGSIDE_CACHE")
        .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("ringside")))
        .or_else(|| absolute("HOME").map(|path| path.join(".cache/ringside")))
        .ok_or(GuestError::NoCacheFolder)
}

/// Waits until no other process works on a folder; the lock holds until the file is dropped.
///
/// # Errors
/// [`GuestError::File`] where it cannot be written.
pub(super) fn lock_folder(folder: &Path, progress: &mut dyn Progress) -> Result<File, GuestError> {
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(GuestError::file("write", &path))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress.note("Waiting for another Ringside that works on the cache folder");
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| GuestError::file("lock", &path)(error.into()))?;
    }
    Ok(file)
}

impl Cache {
    /// The user's: `$RINGSIDE_CACHE`, else `$XDG_CACHE_HOME/ringside`, else `$HOME/.cache/ringside`.
    ///
    /// # Errors
    /// [`GuestError::NoCacheFolder`] where none of them is an absolute path.
    pub fn of_user() -> Result<Self, GuestError> {
        user_folder().map(Self::at)
    }

    /// One in a folder, which need not exist yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { guests: folder.into().join("guests") }
    }

    fn folder(&self, guest: &Guest) -> PathBuf {
        self.guests.join(guest.name)
    }

    /// Finds a guest without fetching; `None` where it was never fetched or another Ringside made it.
    ///
    /// # Errors
    /// [`GuestError::Damaged`] where files are missing or changed.
    pub fn load(&self, guest: &Guest) -> Result<Option<GuestFiles>, GuestError> {
        Ok(match self.find(guest)? {
            Found::Whole(files) => Some(files),
            Found::Nothing | Found::OtherInit(_) => None,
        })
    }

    fn find(&self, guest: &Guest) -> Result<Found, GuestError> {
        let folder = self.folder(guest);
        if !folder.exists() {
            return Ok(Found::Nothing);
        }
        let damaged = |reason: String| GuestError::Damaged { folder: folder.clone(), reason };
        let Some(manifest) = Manifest::read(&folder).map_err(damaged)? else { return Ok(Found::Nothing) };
        manifest.check(guest, &folder).map_err(damaged)?;
        if !manifest.is_current() {
            return Ok(Found::OtherInit(manifest));
        }
        Ok(Found::Whole(GuestFiles {
            kernel: folder.join(if manifest.has(VMLINUX) { VMLINUX } else { BZIMAGE }),
            bzimage: folder.join(BZIMAGE),
            initrd: folder.join(INITRAMFS),
            cmdline: super::default_cmdline(),
            version: manifest.version,
        }))
    }

    /// Finds a guest, or fetches it.
    ///
    /// # Errors
    /// [`GuestError`] where it cannot be fetched or the folder cannot be written.
    pub fn fetch(&self, guest: &Guest, progress: &mut dyn Progress) -> Result<GuestFiles, GuestError> {
        self.fetch_with(guest, progress, |folder, progress| {
            let packages = apt::fetch(guest, folder, progress)?;
            Ok([packages.kernel, packages.busybox])
        })
    }

    /// [`Self::fetch`] with the packages, kernel first, from anywhere.
    fn fetch_with(
        &self,
        guest: &Guest,
        progress: &mut dyn Progress,
        get: impl FnOnce(&Path, &mut dyn Progress) -> Result<[Package; 2], GuestError>,
    ) -> Result<GuestFiles, GuestError> {
        if let Ok(Found::Whole(files)) = self.find(guest) {
            return Ok(files);
        }
        fs::create_dir_all(&self.guests)
            .map_err(GuestError::file("create the cache folder", &self.guests))?;
        let _lock = self.lock(progress)?;
        // Another start may have fetched it meanwhile.
        match self.find(guest) {
            Ok(Found::Whole(files)) => return Ok(files),
            Ok(Found::OtherInit(manifest)) => return self.renew_init(guest, manifest),
            Ok(Found::Nothing) => {}
            Err(error) => progress.note(&format!("{error}: fetching it again")),
        }
        self.sweep();
        let work = tempfile::Builder::new()
            .prefix(&format!(".{}.", guest.name))
            .tempdir_in(&self.guests)
            .map_err(GuestError::file("create a folder in", &self.guests))?;
        let made = make(guest, work.path(), progress, get)?;
        self.publish(guest, &made)?;
        drop(work);
        self.must_be_there(guest)
    }

    /// Replaces the part of the initramfs that came with another Ringside. Called under the lock.
    fn renew_init(&self, guest: &Guest, mut manifest: Manifest) -> Result<GuestFiles, GuestError> {
        let folder = self.folder(guest);
        let (path, new) = (folder.join(INITRAMFS), folder.join("initramfs.new"));
        let old = File::open(&path).map_err(GuestError::file("read", &path))?;
        build::write_file(&new, |out| {
            io::copy(&mut old.take(manifest.base), out)?;
            out.write_all(&initramfs::system())
        })?;
        // Between the two files a reader finds the guest damaged, comes here and waits for the lock.
        fs::rename(&new, &path).map_err(GuestError::file("write", &path))?;
        manifest.replace(ManifestFile::describe(&folder, INITRAMFS)?);
        manifest.write(&folder)?;
        self.must_be_there(guest)
    }

    fn must_be_there(&self, guest: &Guest) -> Result<GuestFiles, GuestError> {
        self.load(guest)?.ok_or_else(|| GuestError::Damaged {
            folder: self.folder(guest),
            reason: "it vanished while it was made".to_owned(),
        })
    }

    /// Gives a finished folder its name. There is no moment in which an unfinished one has it.
    fn publish(&self, guest: &Guest, made: &Path) -> Result<(), GuestError> {
        let folder = self.folder(guest);
        if folder.exists() {
            let old = self.guests.join(format!(".{}.old", guest.name));
            fs::rename(&folder, &old).map_err(GuestError::file("rename", &folder))?;
        }
        fs::rename(made, &folder).map_err(GuestError::file("rename", made))?;
        self.sweep();
        Ok(())
    }

    /// Waits until no other process works on the folder.
    fn lock(&self, progress: &mut dyn Progress) -> Result<File, GuestError> {
        lock_folder(&self.guests, progress)
    }

    /// Removes what an interrupted fetch left. Called under the lock.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.guests) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let unfinished = name.to_str().is_some_and(|name| name.starts_with('.') && name != ".lock");
            if unfinished && let Err(error) = fs::remove_dir_all(entry.path()) {
                log::warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }

    /// Removes a guest: whether it was there.
    ///
    /// # Errors
    /// [`GuestError::File`].
    pub fn remove(&self, guest: &Guest) -> Result<bool, GuestError> {
        let folder = self.folder(guest);
        if !folder.exists() {
            return Ok(false);
        }
        let _lock = self.lock(&mut super::Silent)?;
        // A reader sees all of it or nothing.
        let old = self.guests.join(format!(".{}.old", guest.name));
        fs::rename(&folder, &old).map_err(GuestError::file("remove", &folder))?;
        self.sweep();
        Ok(true)
    }

    /// Bytes that a guest takes on the disk.
    pub fn bytes(&self, guest: &Guest) -> u64 {
        let entries = fs::read_dir(self.folder(guest)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
    }
}

/// Makes a guest's folder inside `work`.
fn make(
    guest: &Guest,
    work: &Path,
    progress: &mut dyn Progress,
    get: impl FnOnce(&Path, &mut dyn Progress) -> Result<[Package; 2], GuestError>,
) -> Result<PathBuf, GuestError> {
    let (download, made) = (work.join("apt"), work.join("guest"));
    for folder in [&download, &made] {
        fs::create_dir(folder).map_err(GuestError::file("create", folder))?;
    }
    let [kernel, busybox] = get(&download, progress)?;
    let built = build::build(&kernel.file, &busybox.file, &made, progress)?;
    unpack_kernel(&made, progress)?;
    if !built.missing.is_empty() {
        log::info!("the kernel {} does not have the modules {}", built.release, built.missing.join(", "));
    }
    Manifest::describe(guest, &made, &built, &[kernel, busybox])?.write(&made)?;
    Ok(made)
}

/// Unpacks the kernel now, so that no start has to. One that cannot be unpacked still boots by its own stub.
fn unpack_kernel(made: &Path, progress: &mut dyn Progress) -> Result<(), GuestError> {
    let path = made.join(BZIMAGE);
    let packed = fs::read(&path).map_err(GuestError::file("read", &path))?;
    match vmm::boot::unpack_kernel(&packed) {
        Ok(unpacked) => build::write_file(&made.join(VMLINUX), |out| out.write_all(&unpacked)),
        Err(error) => {
            progress.note(&format!("the kernel stays packed: {error}"));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::catalog::GUESTS;
    use super::super::manifest::MANIFEST;
    use super::super::testing::packages_in;
    use super::super::{Silent, catalog};
    use super::*;

    const DEBIAN: &Guest = &GUESTS[0];

    fn fetched(cache: &Cache) -> Result<GuestFiles, GuestError> {
        cache.fetch_with(DEBIAN, &mut Silent, |folder, _| Ok(packages_in(folder)))
    }

    fn must_not_fetch(_: &Path, _: &mut dyn Progress) -> Result<[Package; 2], GuestError> {
        panic!("it was there already")
    }

    #[test]
    fn a_guest_is_made_once_and_found_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("deep/er"));
        assert_eq!(cache.load(DEBIAN).unwrap(), None);
        let files = fetched(&cache).unwrap();
        assert_eq!(files.version, "6.1.1-2");
        assert_eq!(files.kernel, files.bzimage, "what is no bzImage cannot be unpacked");
        assert!(files.initrd.ends_with("guests/debian/initramfs.cpio"));
        assert_eq!(cache.fetch_with(DEBIAN, &mut Silent, must_not_fetch).unwrap(), files);
        let manifest = Manifest::read(&folder.path().join("deep/er/guests/debian")).unwrap().unwrap();
        assert_eq!(manifest.modules, ["failover", "v", "virtio_net"]);
        assert_eq!(manifest.builtin, ["ext4"]);
        assert!(manifest.missing.contains(&"e1000".to_owned()));
        let initramfs = fs::read(&files.initrd).unwrap();
        let has = |text: &str| initramfs.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(has("kernel/net/virtio_net.ko: kernel/v/v.ko kernel/a/failover.ko\n"));
        assert!(cache.bytes(DEBIAN) > 0 && cache.load(&GUESTS[1]).unwrap().is_none());
    }

    #[test]
    fn a_changed_file_is_damage_and_is_fetched_again_but_a_copy_is_as_good() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let files = fetched(&cache).unwrap();
        let write = |bytes: &[u8]| fs::write(&files.bzimage, bytes).unwrap();
        write(b"no real kernel");
        assert!(cache.load(DEBIAN).unwrap().is_some(), "the same bytes at another time");
        for (bytes, reason) in
            [(&b"no real"[..], "7 bytes instead of 14"), (b"no REAL kernel", "has changed")]
        {
            write(bytes);
            let error = cache.load(DEBIAN).unwrap_err().to_string();
            assert!(error.contains("is damaged") && error.contains(reason), "{error}");
            assert_eq!(fetched(&cache).unwrap(), files);
        }
        fs::remove_file(&files.initrd).unwrap();
        assert!(cache.load(DEBIAN).is_err());
    }

    #[test]
    fn a_manifest_that_is_broken_or_names_other_files_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        fetched(&cache).unwrap();
        let path = folder.path().join("guests/debian").join(MANIFEST);
        let good = fs::read_to_string(&path).unwrap();
        for bad in [
            String::new(),
            good[..good.len() / 2].to_owned(),
            good.replace(INITRAMFS, "../../../etc/passwd"),
            good.replace("\"guest\": \"debian\"", "\"guest\": \"other\""),
        ] {
            fs::write(&path, &bad).unwrap();
            assert!(matches!(cache.load(DEBIAN), Err(GuestError::Damaged { .. })), "{bad}");
        }
        fs::write(&path, "{\"format\": 0, \"unlike\": \"ours\"}").unwrap();
        assert_eq!(cache.load(DEBIAN).unwrap(), None, "an older Ringside's");
    }

    #[test]
    fn what_an_interrupted_fetch_left_is_swept_and_a_failed_one_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let stale = folder.path().join("guests/.debian.Xy12");
        fs::create_dir_all(stale.join("apt")).unwrap();
        fs::write(stale.join("apt/half"), b"half").unwrap();
        let failed = cache.fetch_with(DEBIAN, &mut Silent, |folder, _| {
            let [mut kernel, busybox] = packages_in(folder);
            fs::File::options().write(true).open(&kernel.file).unwrap().set_len(kernel.size / 2).unwrap();
            kernel.size /= 2;
            Ok([kernel, busybox])
        });
        assert!(failed.unwrap_err().to_string().contains("cut short"));
        let left: Vec<_> = fs::read_dir(folder.path().join("guests")).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].file_name(), ".lock");
    }

    #[test]
    fn another_ringsides_init_is_replaced_without_fetching() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let files = fetched(&cache).unwrap();
        let initramfs = fs::read(&files.initrd).unwrap();
        let guest = folder.path().join("guests/debian");
        let mut manifest = Manifest::read(&guest).unwrap().unwrap();
        let mut other = initramfs[..manifest.base as usize].to_vec();
        other.extend(b"an init of old");
        fs::write(&files.initrd, other).unwrap();
        manifest.replace(ManifestFile::describe(&guest, INITRAMFS).unwrap());
        manifest.system = "another".to_owned();
        manifest.write(&guest).unwrap();
        assert_eq!(cache.load(DEBIAN).unwrap(), None);
        assert_eq!(cache.fetch_with(DEBIAN, &mut Silent, must_not_fetch).unwrap(), files);
        assert_eq!(fs::read(&files.initrd).unwrap(), initramfs);
    }

    #[test]
    fn a_removed_guest_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        assert!(!cache.remove(DEBIAN).unwrap());
        fetched(&cache).unwrap();
        assert!(cache.remove(DEBIAN).unwrap());
        assert_eq!((cache.load(DEBIAN).unwrap(), cache.bytes(DEBIAN)), (None, 0));
    }

    #[test]
    fn two_starts_at_once_fetch_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let count = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let get = |folder: &Path, _: &mut dyn Progress| {
                        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        Ok(packages_in(folder))
                    };
                    cache.fetch_with(DEBIAN, &mut Silent, get).unwrap();
                });
            }
        });
        assert_eq!(count.into_inner(), 1);
    }

    #[test]
    fn a_cache_folder_that_cannot_be_written_is_a_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = fetched(&Cache::at(&file)).unwrap_err().to_string();
        assert!(error.contains("cannot create the cache folder") && error.contains("file/guests"), "{error}");
        // Permissions do not bind root.
        if !rustix::process::geteuid().is_root() {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o500)).unwrap();
            let error = fetched(&Cache::at(folder.path())).unwrap_err().to_string();
            assert!(error.contains("Permission denied"), "{error}");
        }
    }

    #[test]
    fn a_package_without_a_kernel_or_a_busybox_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let swapped = cache.fetch_with(DEBIAN, &mut Silent, |folder, _| {
            let [kernel, busybox] = packages_in(folder);
            Ok([busybox, kernel])
        });
        assert!(swapped.unwrap_err().to_string().contains("no busybox"));
        let twice = cache.fetch_with(DEBIAN, &mut Silent, |folder, _| {
            let [_, busybox] = packages_in(folder);
            Ok([busybox.clone(), busybox])
        });
        assert!(twice.unwrap_err().to_string().contains("no kernel"));
        assert!(catalog::find("debian").is_ok());
    }
}
