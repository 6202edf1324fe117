//! SIGBUS: what the host sends a thread that reaches a page whose file cannot give it.
//!
//! ```text
//!  the page lies behind the file's end now   ──> pages of zeros from there on: the data is lost, and the state says so
//!  there is no room for it on the disk       ──> the thread waits for room; the state says so meanwhile
//!  the file cannot be read or written there  ──> a page of zeros: lost, too
//!  it is none of ours                        ──> as before the handler was there
//! ```
//!
//! Any thread may be here: a vCPU in translated code, a device that copies. The handler uses system calls and atomics
//! alone, and comes back to the same instruction, which finds memory then.
#![allow(unsafe_code)] // The signal handler and its system calls.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::PAGE_SIZE;
use crate::files::{FileRegion, FileState, too_many};

/// The most ranges that are watched at a time, in all of the process.
pub(crate) const MOST: usize = 64;
/// Between two looks for room on a disk.
const PAUSE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// A page that there is room for and that cannot be had after so many tries is lost.
const TRIES: u32 = 16;

/// A range that is watched, as the handler sees it. Where nothing is, the length is zero.
struct Slot {
    /// Host address and bytes.
    start: AtomicU64,
    len: AtomicU64,
    file: AtomicI32,
    event: AtomicI32,
    /// Whether stores go into the file.
    shared: AtomicBool,
    /// From this host address on all is memory of zeros already.
    replaced_from: AtomicU64,
    replacing: AtomicBool,
    lost: AtomicBool,
    /// Threads that wait.
    waiting: AtomicU32,
    /// Nobody is to wait any more.
    ends: AtomicBool,
    /// The page that was last made room for, and how often in a row.
    last_page: AtomicU64,
    tries: AtomicU32,
}

impl Slot {
    const fn empty() -> Self {
        Self {
            start: AtomicU64::new(0),
            len: AtomicU64::new(0),
            file: AtomicI32::new(-1),
            event: AtomicI32::new(-1),
            shared: AtomicBool::new(false),
            replaced_from: AtomicU64::new(u64::MAX),
            replacing: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            ends: AtomicBool::new(false),
            last_page: AtomicU64::new(u64::MAX),
            tries: AtomicU32::new(0),
        }
    }

    fn contains(&self, address: u64) -> bool {
        let len = self.len.load(Ordering::Acquire);
        address.wrapping_sub(self.start.load(Ordering::Acquire)) < len
    }

    /// Makes the page of an address one that can be reached; whether that was possible.
    fn repair(&self, address: u64) -> bool {
        let page = address & !(PAGE_SIZE - 1);
        let offset = page - self.start.load(Ordering::Acquire);
        let end = self.file_len().next_multiple_of(PAGE_SIZE);
        if offset >= end {
            return self.replace(page - (offset - end), u64::MAX);
        }
        let is_new = self.last_page.swap(page, Ordering::SeqCst) != page;
        let tries = if is_new { 0 } else { self.tries.load(Ordering::SeqCst) };
        self.tries.store(tries + 1, Ordering::SeqCst);
        if tries < TRIES && self.shared.load(Ordering::SeqCst) && self.make_room(offset) {
            return true;
        }
        self.replace(page, PAGE_SIZE)
    }

    /// Bytes of the file now; zero where the host does not tell.
    fn file_len(&self) -> u64 {
        // SAFETY: a struct of integers, and a call that writes nothing else; the file is open while it is watched.
        unsafe {
            let mut status: libc::stat = std::mem::zeroed();
            match libc::fstat(self.file.load(Ordering::SeqCst), &mut status) {
                0 => status.st_size as u64,
                _ => 0,
            }
        }
    }

    /// Has the file's disk keep room for a page, and waits until there is some; whether there is in the end.
    fn make_room(&self, offset: u64) -> bool {
        let mut waits = false;
        let made = loop {
            if self.ends.load(Ordering::SeqCst) {
                break false;
            }
            let (file, keep) = (self.file.load(Ordering::SeqCst), libc::FALLOC_FL_KEEP_SIZE);
            // SAFETY: the file is open while it is watched; the call reaches no memory.
            let done = unsafe { libc::fallocate(file, keep, offset as i64, PAGE_SIZE as i64) };
            // SAFETY: this thread's own variable.
            match if done == 0 { 0 } else { unsafe { *libc::__errno_location() } } {
                0 => break true,
                libc::EINTR => {}
                libc::ENOSPC | libc::EDQUOT => {
                    if !std::mem::replace(&mut waits, true) {
                        self.waiting.fetch_add(1, Ordering::SeqCst);
                        self.tell();
                    }
                    // SAFETY: a pause; it reads the constant alone.
                    unsafe { libc::nanosleep(&PAUSE, std::ptr::null_mut()) };
                }
                _ => break false,
            }
        };
        if waits {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            self.tell();
        }
        made
    }

    /// Puts zeros in the place of pages from a host address on; whether the host gave them.
    fn replace(&self, from: u64, len: u64) -> bool {
        while self.replacing.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let end = self.start.load(Ordering::SeqCst) + self.len.load(Ordering::SeqCst);
        let len = len.min(end - from);
        // Two threads may come for the same page; what the first has stored there since is to stay.
        let mut done = self.replaced_from.load(Ordering::SeqCst) <= from;
        if !done {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: pages of the watched range, which belongs to guest memory that is alive: its owner forgets the
            // slot first. Guest memory may change at any time.
            let mapped = unsafe { libc::mmap(from as *mut _, len as usize, prot, flags, -1, 0) };
            done = mapped != libc::MAP_FAILED;
            if done && from + len == end {
                self.replaced_from.store(from, Ordering::SeqCst);
            }
            self.lost.store(true, Ordering::SeqCst);
        }
        self.replacing.store(false, Ordering::Release);
        self.tell();
        done
    }

    fn tell(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of this frame; the event is open while the slot is used.
        unsafe { libc::write(self.event.load(Ordering::SeqCst), one.as_ptr().cast(), one.len()) };
    }
}

static SLOTS: [Slot; MOST] = [const { Slot::empty() }; MOST];
/// Which of them are taken.
static TAKEN: Mutex<[bool; MOST]> = Mutex::new([false; MOST]);
/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A range that the handler looks after while this is there.
#[derive(Debug)]
pub(crate) struct Watched {
    slot: usize,
    _file: Arc<File>,
}

impl Watched {
    /// Watches host addresses behind which the file is mapped from its beginning.
    pub(crate) fn new(range: Range<u64>, file: &FileRegion, event: &Event) -> io::Result<Self> {
        install()?;
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = taken.iter().position(|taken| !taken).ok_or_else(too_many)?;
        taken[number] = true;
        let slot = &SLOTS[number];
        slot.start.store(range.start, Ordering::SeqCst);
        slot.file.store(file.file.as_raw_fd(), Ordering::SeqCst);
        slot.event.store(event.0.as_raw_fd(), Ordering::SeqCst);
        slot.shared.store(file.shared, Ordering::SeqCst);
        slot.replaced_from.store(u64::MAX, Ordering::SeqCst);
        slot.last_page.store(u64::MAX, Ordering::SeqCst);
        slot.lost.store(false, Ordering::SeqCst);
        slot.ends.store(false, Ordering::SeqCst);
        slot.len.store(range.end - range.start, Ordering::SeqCst);
        Ok(Self { slot: number, _file: file.file.clone() })
    }

    pub(crate) fn state(&self) -> FileState {
        let slot = &SLOTS[self.slot];
        let waiting = slot.waiting.load(Ordering::SeqCst) > 0;
        FileState { lost: slot.lost.load(Ordering::SeqCst), waiting }
    }

    /// Nobody waits for room any more; whoever watches is told.
    pub(crate) fn give_up(&self) {
        SLOTS[self.slot].ends.store(true, Ordering::SeqCst);
        SLOTS[self.slot].tell();
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        SLOTS[self.slot].len.store(0, Ordering::SeqCst);
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.slot] = false;
    }
}

/// What can be waited for like a file, and raised by a signal handler.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: a call without memory, whose result is checked and owned by nobody else.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        match fd {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: just made.
            fd => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
        }
    }

    /// Takes what was raised.
    pub(crate) fn take(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes of this frame.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sets the handler, once for the process.
fn install() -> io::Result<()> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if *done {
        return Ok(());
    }
    // SAFETY: structs of integers; the handler only does what a signal handler may. What was there before is kept before
    // the handler is set.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = BEFORE.set(before);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    *done = true;
    Ok(())
}

extern "C" fn on_bus_error(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: this thread's own variable, and what the kernel gives a handler.
    let (errno, address) = unsafe { (*libc::__errno_location(), (*info).si_addr() as u64) };
    let repaired = SLOTS.iter().find(|slot| slot.contains(address)).is_some_and(|slot| slot.repair(address));
    if !repaired && let Some(before) = BEFORE.get() {
        // The instruction runs again, and what was there before is asked.
        // SAFETY: what the host gave when the handler was set.
        unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}
