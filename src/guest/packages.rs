//! Debian packages in the user's cache folder, unpacked: what the tests start besides kernels, such as firmware.
//!
//! ```text
//! ~/.cache/ringside/packages/
//!     seabios/share/seabios/bios.bin   a package's regular files, without a leading usr/
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::cache::user_folder;
use super::deb::{self, Walk};
use super::{GuestError, Progress, apt};

/// The most bytes of one file.
const MAX_FILE: u64 = 256 << 20;

/// Finds packages in the cache folder, or fetches them; gives their folders in the same order. Every file may be
/// executed: which of them are programs is not kept.
///
/// # Errors
/// [`GuestError`] where a package cannot be fetched or the folder cannot be written.
pub fn unpack(names: &[&str], progress: &mut dyn Progress) -> Result<Vec<PathBuf>, GuestError> {
    let packages = user_folder()?.join("packages");
    fs::create_dir_all(&packages).map_err(GuestError::file("create", &packages))?;
    let missing: Vec<&str> = names.iter().copied().filter(|name| !packages.join(name).exists()).collect();
    if !missing.is_empty() {
        let work = tempfile::Builder::new().prefix(".fetch.").tempdir_in(&packages);
        let work = work.map_err(GuestError::file("write", &packages))?;
        for package in apt::fetch_named(&missing, work.path(), progress)? {
            let made = work.path().join("unpacked").join(&package.name);
            write_files(&package.file, &made)?;
            let target = packages.join(&package.name);
            match fs::rename(&made, &target) {
                // Another process was as fast.
                Err(_) if target.exists() => {}
                renamed => renamed.map_err(GuestError::file("write", &target))?,
            }
        }
    }
    Ok(names.iter().map(|name| packages.join(name)).collect())
}

fn write_files(deb: &Path, into: &Path) -> Result<(), GuestError> {
    fs::create_dir_all(into).map_err(GuestError::file("create", into))?;
    let mut bytes = Vec::new();
    deb::for_each_file(deb, |file| {
        let path = into.join(file.path);
        file.read(&mut bytes, MAX_FILE)?;
        fs::create_dir_all(path.parent().ok_or(io::ErrorKind::InvalidData)?)?;
        fs::write(&path, &bytes)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        Ok(Walk::On)
    })
}
