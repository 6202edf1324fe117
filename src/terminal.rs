//! The user's terminal: put into raw mode for the guest, and always put back.
//!
//! The settings to go back to are kept in one place in the process, so that a guard that is dropped, a panic on any
//! thread and a signal all restore the same ones, and restoring twice does no harm.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

struct Saved {
    fd: OwnedFd,
    cooked: Termios,
    raw: Termios,
}

static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

/// A terminal in raw mode: keys come one by one, unchanged, without echo and signals. Dropping it restores it.
#[derive(Debug)]
#[must_use = "dropping it ends the raw mode"]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal behind `fd` into raw mode; `None` where it is no terminal.
    ///
    /// # Errors
    /// The host's, where it is a terminal that cannot be set.
    pub fn enter(fd: impl AsFd) -> io::Result<Option<Self>> {
        if !fd.as_fd().is_terminal() {
            return Ok(None);
        }
        let fd = fd.as_fd().try_clone_to_owned()?;
        let cooked = tcgetattr(&fd)?;
        let mut raw = cooked.clone();
        raw.make_raw();
        let mut saved = lock();
        tcsetattr(&fd, OptionalActions::Now, &raw)?;
        *saved = Some(Saved { fd, cooked, raw });
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether standard input is a terminal, which has a size.
pub fn has_size() -> bool {
    tcgetwinsize(io::stdin()).is_ok()
}

/// The terminal's columns and rows; those of old where there is none, or it does not know.
pub fn size() -> (u16, u16) {
    let known = tcgetwinsize(io::stdin()).map_or((0, 0), |size| (size.ws_col, size.ws_row));
    let or = |value, default| if value == 0 { default } else { value };
    (or(known.0, 80), or(known.1, 24))
}

/// Restores the terminal where it is in raw mode.
pub fn restore() {
    if let Some(saved) = lock().take() {
        // At once: waiting for the output would wait for ever where nobody reads, and what is written already was
        // treated by the raw mode. A terminal that has gone away needs no restoring.
        let _ = tcsetattr(&saved.fd, OptionalActions::Now, &saved.cooked);
    }
}

/// Puts the terminal into raw mode again, where it should be: after a stop, the shell has changed it.
pub fn resume() {
    if let Some(saved) = &*lock() {
        let _ = tcsetattr(&saved.fd, OptionalActions::Now, &saved.raw);
    }
}

/// Restores the terminal before a panic is told, on whichever thread.
pub fn restore_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        tell(info);
    }));
}

/// Writes lines for the user to stderr, as the terminal's present mode needs them. Where nobody reads, they are lost.
pub fn say(text: &str) {
    let raw = lock().is_some();
    let text = if raw { text.replace('\n', "\r\n") } else { text.to_owned() };
    let _ = io::stderr().write_all(text.as_bytes());
}

fn lock() -> MutexGuard<'static, Option<Saved>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::OFlags;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    /// A terminal of our own: the user's end and the program's end.
    fn pty() -> (OwnedFd, OwnedFd) {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let program =
            rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty()).unwrap();
        (user, program)
    }

    fn is_raw(fd: &OwnedFd) -> bool {
        !tcgetattr(fd)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    // One test, for there is one terminal in the process.
    #[test]
    fn the_terminal_is_raw_while_the_guard_lives_and_restored_by_drop_and_panic() {
        let (_user, program) = pty();
        let before = tcgetattr(&program).unwrap();
        assert!(!is_raw(&program));

        let guard = RawMode::enter(&program).unwrap().unwrap();
        assert!(is_raw(&program));
        drop(guard);
        assert_eq!(tcgetattr(&program).unwrap().local_modes, before.local_modes);
        assert_eq!(tcgetattr(&program).unwrap().output_modes, before.output_modes);

        restore_on_panic();
        let guard = RawMode::enter(&program).unwrap().unwrap();
        let _ = std::thread::spawn(|| panic!("meant to fail")).join();
        assert!(!is_raw(&program), "a panic on another thread leaves the terminal raw");
        drop(guard);
        assert!(!is_raw(&program));

        assert!(RawMode::enter(std::fs::File::open("/dev/null").unwrap()).unwrap().is_none());
    }
}
