//! Who may have an image open: one writer, or several readers.
//!
//! Two kinds of locks, both of the open file, so that they end with the process whatever becomes of it: `flock` for the
//! whole file, and byte locks as QEMU takes them on the images of its machines. There, each permission has a byte from 100
//! on that those lock who use it, and one from 200 on that those lock who do not let others use it; all with shared
//! locks. Who wants an image takes his and then looks whether the opposite ones are held by others.

#![allow(unsafe_code)] // fcntl with a struct: no wrapper has the locks of open files

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::Reason;

/// The first byte of the permissions that are used, and of those that are not shared.
const USED: i64 = 100;
const UNSHARED: i64 = 200;
/// The permissions' numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How often the locks are tried, and how long it is between two tries: a process that ends, or has just forked, holds them a
/// moment longer.
const TRIES: u32 = 15;
const BETWEEN: Duration = Duration::from_millis(20);

/// Takes the locks of a reader or a writer, until the file is closed.
pub(crate) fn lock(file: &File, write: bool) -> Result<(), Reason> {
    for _ in 1..TRIES {
        match try_lock(file, write) {
            Err(Reason::InUse(_)) => std::thread::sleep(BETWEEN),
            done => return done,
        }
    }
    try_lock(file, write)
}

fn try_lock(file: &File, write: bool) -> Result<(), Reason> {
    let (operation, users) = match write {
        false => (FlockOperation::NonBlockingLockShared, "writes to it"),
        true => (FlockOperation::NonBlockingLockExclusive, "uses it"),
    };
    match flock(file, operation) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(Reason::InUse(users)),
        // A file system without locks: whoever has two machines there has to look after it.
        Err(error) => log::warn!("an image cannot be locked on its file system: {error}"),
    }
    let used: &[i64] = if write { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let unshared = [WRITE, RESIZE];
    let bytes = |base: i64, permissions: &[i64]| permissions.iter().map(|p| base + p).collect::<Vec<_>>();
    for byte in [bytes(USED, used), bytes(UNSHARED, &unshared)].concat() {
        if take(file, byte).is_err() {
            return Ok(());
        }
    }
    for byte in [bytes(UNSHARED, used), bytes(USED, &unshared)].concat() {
        if is_held(file, byte).unwrap_or(false) {
            return Err(Reason::InUse(users));
        }
    }
    Ok(())
}

fn request(kind: libc::c_int, byte: i64) -> libc::flock {
    // The process id has to be zero for locks of open files.
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Locks a byte, shared.
fn take(file: &File, byte: i64) -> io::Result<()> {
    let request = request(libc::F_RDLCK, byte);
    // SAFETY: the file is open and the struct is whole and outlives the call, which only reads it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file has locked a byte.
fn is_held(file: &File, byte: i64) -> io::Result<bool> {
    let mut request = request(libc::F_WRLCK, byte);
    // SAFETY: the file is open and the struct is whole and outlives the call, which writes to nothing else.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut request) } {
        0 => Ok(i32::from(request.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}
