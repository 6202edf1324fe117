//! Transfers through io_uring: submitted many at a time, and awaited together with the bell.

#![allow(unsafe_code)] // the kernel is given addresses of guest RAM, which it uses until the transfer is completed

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use guest_memory::HostSlices;
use io_uring::{IoUring, opcode, squeue, types};

/// Entries of the submission queue: as many as a queue has requests, and one for the bell.
const ENTRIES: u32 = 512;
/// What stands for the bell among the completions.
const BELL: u64 = u64::MAX;

/// Transfers on their way, with what was asked for.
pub(super) struct Ring<T> {
    ring: IoUring,
    file: RawFd,
    bell: RawFd,
    /// The bell is being listened to.
    listening: bool,
    flights: Vec<Option<(HostSlices, T)>>,
    free: Vec<usize>,
    /// Entries that the kernel has not been told of.
    unsubmitted: usize,
}

/// What is asked of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Bytes from there.
    Read(u64),
    /// Bytes to there.
    Write(u64),
    /// Durability.
    Flush,
}

impl<T> Ring<T> {
    /// A ring for transfers of one file. Both files have to outlive it.
    pub(super) fn new(file: &impl AsRawFd, bell: &impl AsRawFd) -> io::Result<Self> {
        let ring = IoUring::builder().build(ENTRIES)?;
        Ok(Self {
            ring,
            file: file.as_raw_fd(),
            bell: bell.as_raw_fd(),
            listening: false,
            flights: Vec::new(),
            free: Vec::new(),
            unsubmitted: 0,
        })
    }

    /// How many transfers are on their way.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Adds a transfer; [`Self::submit`] starts it.
    pub(super) fn push(&mut self, operation: Operation, slices: HostSlices, what: T) -> io::Result<()> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        let (vectors, count) = slices.as_iovecs();
        let file = types::Fd(self.file);
        let entry = match operation {
            Operation::Read(offset) => opcode::Readv::new(file, vectors, count as u32).offset(offset).build(),
            Operation::Write(offset) => {
                opcode::Writev::new(file, vectors, count as u32).offset(offset).build()
            }
            Operation::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        };
        // What the kernel uses lives from here on in the slot, until it is completed.
        self.flights[slot] = Some((slices, what));
        self.enter(entry.user_data(slot as u64))
    }

    fn enter(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the files are open as long as the ring, by its constructor's contract; the vectors and the RAM that they
            // name are kept by the entry's slot until its completion was seen, and `drop` waits for all of them.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.unsubmitted += 1;
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Starts what was added.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(count) => self.unsubmitted -= count.min(self.unsubmitted),
                Err(error) if retriable(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until a transfer is completed or the bell rings.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        if !self.listening {
            self.listening = true;
            let entry = opcode::PollAdd::new(types::Fd(self.bell), libc::POLLIN as u32).build();
            self.enter(entry.user_data(BELL))?;
        }
        self.submit()?;
        match self.ring.submit_and_wait(1) {
            Err(error) if !retriable(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes what is completed: the transfer, and how many bytes were moved or the kernel's error.
    pub(super) fn reap(&mut self, mut done: impl FnMut(HostSlices, T, io::Result<u64>)) {
        for entry in self.ring.completion() {
            if entry.user_data() == BELL {
                self.listening = false;
                continue;
            }
            let slot = entry.user_data() as usize;
            if let Some((slices, what)) = self.flights.get_mut(slot).and_then(Option::take) {
                self.free.push(slot);
                let result = u64::try_from(entry.result());
                done(slices, what, result.map_err(|_| io::Error::from_raw_os_error(-entry.result())));
            }
        }
    }
}

fn retriable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel must not reach guest RAM any more when this is gone.
        let _ = self.submit();
        while self.in_flight() > 0 {
            if let Err(error) = self.ring.submit_and_wait(1)
                && !retriable(&error)
            {
                log::error!("virtio-blk: transfers cannot be awaited: {error}");
                // Their memory stays.
                std::mem::forget(std::mem::take(&mut self.flights));
                return;
            }
            self.reap(|_, _, _| {});
        }
    }
}
