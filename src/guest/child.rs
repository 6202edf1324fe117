//! Child processes that end with this process where a signal ends it: apt starts programs of its own, and none of them
//! shall go on when its user has pressed Ctrl-C.
//!
//! Each child leads a process group. The terminal's signals therefore do not reach it: whoever follows them calls
//! [`end_all`].

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process_group};

/// The groups that run.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// A child and what it has started; it is no longer followed once it was waited for.
pub(super) struct Group {
    child: Child,
}

impl Group {
    /// Starts a program as the leader of a group.
    ///
    /// # Errors
    /// The host's.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        // No signal gets between the start and the entry.
        let mut running = running();
        let child = command.process_group(0).spawn()?;
        running.push(Pid::from_child(&child));
        Ok(Self { child })
    }

    /// Its output, once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Its error output, once.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The host's.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let id = Pid::from_child(&self.child);
        running().retain(|running| *running != id);
    }
}

/// Tells every child that runs, and what it has started, to end. For a process that is about to end itself.
pub fn end_all() {
    for id in &*running() {
        // One that has ended by itself needs no telling.
        let _ = kill_process_group(*id, Signal::TERM);
    }
}

fn running() -> MutexGuard<'static, Vec<Pid>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}
