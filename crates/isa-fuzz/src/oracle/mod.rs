//! The host's processor as the oracle: a sandboxed child process executes one instruction after another.
//!
//! The child loads a case's whole state and jumps there; a jump behind the code leads back, or the signal that the code
//! raises. One that does not come back is given up. The only system calls that the child may make are the wait for more
//! cases and the return from the signal of its clock.
#![allow(unsafe_code)] // Shared memory, fork and wait.

mod child;
mod memory;
mod switch;

use std::sync::atomic::{AtomicU32, Ordering};

use engine::HostXsave;

use crate::case::{Case, Outcome};
use memory::SharedMemory;

/// Cases that go to the child at once.
pub const BATCH: usize = 128;
/// Seconds after which a batch is given up.
const PATIENCE: libc::time_t = 30;

/// Cases, and what came of them.
#[repr(C)]
struct Slot {
    /// 1 while the child has it, 0 while the parent does.
    submitted: AtomicU32,
    count: u32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// What both processes see.
#[repr(C)]
struct Shared {
    /// The index of the case that runs, for the parent to tell which one the child died of.
    current: AtomicU32,
    slots: [Slot; 2],
}

/// Why the oracle cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The host refused a system call.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The host lacks what the oracle is made of.
    #[error("the host does not let processes {0}")]
    Lacks(&'static str),
    /// The child died, or did not come back.
    #[error("the oracle was lost in the case {case} of its batch (status {status:#x})")]
    Lost {
        /// Which case of the batch.
        case: usize,
        /// As waitpid tells it; 0 where it was still running.
        status: i32,
    },
}

pub(crate) fn host_error(what: &'static str) -> OracleError {
    OracleError::Host { what, source: std::io::Error::last_os_error() }
}

/// The child process and the memory shared with it.
pub struct Oracle {
    shared: SharedMemory<Shared>,
    child: libc::pid_t,
    next: usize,
}

impl Oracle {
    /// Starts the child.
    ///
    /// # Errors
    /// The host refuses, or lacks FSGSBASE.
    pub fn start() -> Result<Self, OracleError> {
        // SAFETY: no preconditions.
        let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        if capabilities & 2 == 0 {
            return Err(OracleError::Lacks("write the bases of FS and GS"));
        }
        let shared = SharedMemory::<Shared>::new()?;
        let setup = child::Setup::new()?;
        // SAFETY: the child calls nothing that may wait for a thread that it does not have.
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(host_error("fork")),
            0 => child::run(setup, shared.as_ptr()),
            _ => Ok(Self { shared, child, next: 0 }),
        }
    }

    /// Hands cases to the child, [`BATCH`] at most, which executes them meanwhile. At most two batches may be on
    /// their way. Gives a ticket for [`Oracle::wait`].
    pub fn submit<'a>(&mut self, cases: impl Iterator<Item = &'a Case>) -> usize {
        let ticket = self.next;
        self.next ^= 1;
        // SAFETY: the slot is the parent's while `submitted` is 0, which `wait` has seen.
        let slot = unsafe { &mut (*self.shared.as_ptr()).slots[ticket] };
        slot.count = 0;
        let host = HostXsave::get();
        for (place, case) in slot.cases.iter_mut().zip(cases) {
            *place = *case;
            if !host.is_ours() {
                place.area.0 = host.to_host(&case.area.0);
            }
            slot.count += 1;
        }
        slot.submitted.store(1, Ordering::Release);
        wake(&slot.submitted);
        ticket
    }

    /// Waits for a batch. Gives the outcomes in the order of the cases.
    ///
    /// # Errors
    /// [`OracleError::Lost`].
    pub fn wait(&mut self, ticket: usize) -> Result<&[Outcome], OracleError> {
        let slot = self.shared.slot(ticket);
        while slot.submitted.load(Ordering::Acquire) != 0 {
            if wait_while(&slot.submitted, 1) {
                let mut status = 0;
                // SAFETY: plain system call on the own child.
                unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) };
                let case = self.shared.current() as usize;
                return Err(OracleError::Lost { case, status });
            }
        }
        // SAFETY: the slot is the parent's from here on; `slot` is not used any more.
        let slot = unsafe { &mut (*self.shared.as_ptr()).slots[ticket] };
        let outcomes = &mut slot.outcomes[..slot.count as usize];
        let host = HostXsave::get();
        if !host.is_ours() {
            outcomes.iter_mut().for_each(|outcome| outcome.area.0 = host.from_host(&outcome.area.0));
        }
        Ok(outcomes)
    }

    /// Executes one case.
    ///
    /// # Errors
    /// [`OracleError::Lost`].
    pub fn run_one(&mut self, case: &Case) -> Result<Outcome, OracleError> {
        let ticket = self.submit(std::iter::once(case));
        Ok(self.wait(ticket)?[0])
    }
}

impl SharedMemory<Shared> {
    fn slot(&self, number: usize) -> &Slot {
        // SAFETY: mapped as long as `self`; what the child writes is only looked at after `submitted` says so.
        unsafe { &(*self.as_ptr()).slots[number] }
    }

    fn current(&self) -> u32 {
        // SAFETY: mapped as long as `self`.
        unsafe { (*self.as_ptr()).current.load(Ordering::Relaxed) }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: plain system calls on the own child.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, &mut status, 0);
        }
    }
}

fn wake(word: &AtomicU32) {
    // SAFETY: plain system call on a word that outlives it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// Waits while the word holds a value. Tells whether the time ran out.
fn wait_while(word: &AtomicU32, value: u32) -> bool {
    let patience = libc::timespec { tv_sec: PATIENCE, tv_nsec: 0 };
    // SAFETY: plain system call on a word and a time that outlive it.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &patience) };
    result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ETIMEDOUT)
}
