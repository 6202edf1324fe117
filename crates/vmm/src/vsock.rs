//! The socket device's end on the host: a Unix socket at a path, for as long as the machine is there.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use virtio::vsock::{MAX_SOCKET_PATH, Vsock};

use crate::config::VsockConfig;
use crate::error::BuildError;
use crate::unix_socket::{self, OwnedPath};

/// Makes the device, and the socket that programs of the host connect to.
///
/// # Errors
/// [`BuildError::Vsock`] for a path that cannot be a socket's, or where somebody else is. A socket that nobody listens on
/// any more, as a killed process leaves it, is replaced.
pub fn device(config: &VsockConfig) -> Result<(Vsock, OwnedPath), BuildError> {
    let made = || {
        let (listener, socket) = listen(&config.path)?;
        Ok((Vsock::new(config.cid, listener, &config.path)?, socket))
    };
    made().map_err(|error: io::Error| BuildError::Vsock {
        path: config.path.clone(),
        reason: error.to_string(),
    })
}

fn listen(path: &Path) -> io::Result<(UnixListener, OwnedPath)> {
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        let reason =
            format!("the path has {len} bytes, and at most {MAX_SOCKET_PATH} leave room for a port's number");
        return Err(io::Error::other(reason));
    }
    unix_socket::listen(path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_socket_is_there_while_it_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let config = VsockConfig { cid: 3, path: path.clone() };
        let (_device, socket) = device(&config).unwrap();
        let refused = device(&config).err().unwrap().to_string();
        assert!(refused.contains("another process") && refused.contains(path.to_str().unwrap()), "{refused}");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_place_for_a_socket_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: PathBuf| device(&VsockConfig { cid: 3, path }).err().unwrap().to_string();
        let file = folder.path().join("file");
        fs::write(&file, "kept").unwrap();
        assert!(refused(file.clone()).contains("no socket"));
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        assert!(refused(folder.path().join("missing/vm")).contains("No such file"));
        assert!(refused(folder.path().join("x".repeat(100))).contains("room for a port's number"));
    }
}
