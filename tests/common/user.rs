//! `ringside` as an ordinary user's program, also where root runs the tests.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::debian_file;

/// Whose number an ordinary user has where root runs the tests: nobody's.
const NOBODY: u32 = 65534;

/// An ordinary user: who runs the tests, or nobody.
pub struct OrdinaryUser {
    /// The command and the guest, where that user can read them.
    folder: Option<tempfile::TempDir>,
}

impl OrdinaryUser {
    /// The user, with the default guest at hand.
    ///
    /// # Panics
    /// Where the guest cannot be fetched or copied.
    pub fn new() -> Self {
        let kernel = debian_file("vmlinux");
        if !is_root() {
            return Self { folder: None };
        }
        let folder = tempfile::tempdir().expect("a folder");
        open_to_all(folder.path());
        let guest = folder.path().join("guests/debian");
        std::fs::create_dir_all(&guest).expect("a folder");
        for entry in std::fs::read_dir(kernel.parent().expect("its folder")).expect("the guest") {
            let from = entry.expect("an entry").path();
            copy(&from, &guest.join(from.file_name().expect("a name")));
        }
        copy(Path::new(env!("CARGO_BIN_EXE_ringside")), &folder.path().join("ringside"));
        Self { folder: Some(folder) }
    }

    /// `ringside`, run by that user.
    pub fn ringside(&self) -> Command {
        let Some(folder) = &self.folder else { return super::ringside() };
        let mut command = Command::new(folder.path().join("ringside"));
        command.stdin(Stdio::null()).env_remove("TERM").env("RINGSIDE_CACHE", folder.path());
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        command
    }

    /// Gives the user a file or folder.
    pub fn give(&self, path: &Path) {
        if self.folder.is_some() {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("root can");
        }
    }

    /// A folder of the user's, in one that everybody may enter.
    pub fn own_folder(&self) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        open_to_all(folder.path());
        let own = folder.path().join("own");
        std::fs::create_dir(&own).expect("a folder");
        self.give(&own);
        (folder, own)
    }
}

/// Whether root runs the tests.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Lets everybody enter and read.
pub fn open_to_all(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        return;
    }
    std::fs::copy(from, to).expect("a copy");
    open_to_all(to);
}
