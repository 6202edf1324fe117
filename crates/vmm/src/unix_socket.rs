//! Unix sockets of the machine in the host's file system: made before anything runs, gone when the machine is.
//!
//! A path where a process listens is that process's, and what is no socket is left alone: both are errors. A socket that
//! nobody listens on any more is what a killed process left, and is replaced.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::time::Timespec;

use crate::error::BuildError;
use crate::outcome::Ending;

/// How often those who wait look whether the run has ended.
const TICK: Duration = Duration::from_millis(100);

/// A name in the file system; it goes with this, unless something else has it by then.
#[derive(Debug)]
pub struct OwnedPath {
    path: PathBuf,
    /// Device and number of what was made there.
    identity: (u64, u64),
}

impl OwnedPath {
    /// Of what has just been made there.
    ///
    /// # Errors
    /// The host's, where it is not there.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Listens at `path`.
///
/// # Errors
/// Where something else is there, somebody listens there, or the host refuses.
pub fn listen(path: &Path) -> io::Result<(UnixListener, OwnedPath)> {
    let _alone = lock_folder(path);
    if let Ok(meta) = fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "it is there already, and no socket"));
        }
        if is_alive(path)? {
            return Err(io::Error::new(ErrorKind::AddrInUse, "another process listens there"));
        }
        log::info!("{}: nobody listens there any more; it is replaced", path.display());
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    Ok((listener, OwnedPath::new(path)?))
}

/// A listening socket in the file system, which goes when this does.
pub struct Listener {
    socket: UnixListener,
    path: OwnedPath,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet but a socket that nobody listens on any more.
    ///
    /// # Errors
    /// [`BuildError::Output`].
    pub fn bind(path: &Path) -> Result<Self, BuildError> {
        let failed = |source| BuildError::Output { path: path.to_owned(), source };
        let (socket, path) = listen(path).map_err(failed)?;
        Ok(Self { socket, path })
    }

    /// The next client; `None` when the run has ended.
    pub fn accept(&self, ending: &Ending) -> Option<UnixStream> {
        while !ending.has_come() {
            if readable(&self.socket) {
                match self.socket.accept() {
                    Ok((client, _)) => return Some(client),
                    Err(error) => log::warn!("{}: {error}", self.path.path().display()),
                }
            }
        }
        None
    }
}

/// Waits a moment for something to read.
pub fn readable(file: &impl AsFd) -> bool {
    let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
    let ready = poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&tick));
    match ready {
        Ok(count) => count > 0,
        Err(_) => {
            std::thread::sleep(Duration::from_millis(1));
            false
        }
    }
}

/// Keeps another start from replacing the same name at the same time, while this is there. Where the folder cannot be
/// locked, both do.
pub fn lock_folder(path: &Path) -> Option<File> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder).ok()?;
    flock(&folder, FlockOperation::LockExclusive).ok().map(|()| folder)
}

/// Whether somebody has the socket at a path. It is asked without waiting: one who is busy is alive.
fn is_alive(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(socket.as_fd(), &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(false),
        // Its queue is full, or it is a socket of another kind that somebody has bound.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn a_socket_is_there_while_it_is_used_and_one_that_nobody_has_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, owned) = listen(&path).unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("another process listens"));
        // A process that is killed leaves its socket behind.
        drop(listener);
        std::mem::forget(owned);
        let (listener, owned) = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(owned);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_or_somebodys_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "kept").unwrap();
        assert!(listen(&file).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(listen(&link).unwrap_err().to_string().contains("no socket"));
        let other = folder.path().join("datagrams");
        let _datagrams = UnixDatagram::bind(&other).unwrap();
        assert!(listen(&other).unwrap_err().to_string().contains("another process"));
        assert!(listen(&folder.path().join("missing/socket")).is_err());
    }

    #[test]
    fn one_that_is_too_busy_to_answer_is_alive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let _busy = UnixListener::bind(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            if connect(socket.as_fd(), &SocketAddrUnix::new(&path).unwrap()).is_err() {
                break;
            }
            waiting.push(socket);
        }
        assert!(listen(&path).unwrap_err().to_string().contains("another process"));
    }

    #[test]
    fn a_name_that_is_somebody_elses_by_now_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, owned) = listen(&path).unwrap();
        assert_eq!(owned.path(), path);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(owned);
        assert!(path.exists());
    }
}
