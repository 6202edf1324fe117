//! The transfers: neighbours are gathered and moved together, at once where that needs no waiting, else through the ring,
//! else each by itself.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use guest_memory::{HostSlice, HostSlices};

use super::super::request::{Action, HEADER, Request};
use super::super::ring::Operation;
use super::super::{Shared, status};
use super::{Flight, Work};
use crate::memory::DmaMemory;

/// Bytes that are moved at a time through a buffer.
const CHUNK: usize = 256 << 10;
/// Neighbours become one transfer up to so many bytes and parts.
const GROUP_BYTES: u64 = 1 << 20;
const GROUP_PARTS: usize = 512;
/// Writes of whole blocks of so many bytes need not read first what they do not write.
const WHOLE: u64 = 4096;

/// Neighbouring requests that are one transfer.
pub(super) struct Group {
    pub(super) write: bool,
    pub(super) offset: u64,
    pub(super) slices: HostSlices,
    pub(super) requests: Vec<Request>,
}

impl Group {
    /// Whether a transfer is the continuation of this.
    fn is_followed_by(&self, (write, offset): (bool, u64), slices: &HostSlices) -> bool {
        let parts = self.slices.slices().len() + slices.slices().len();
        self.write == write
            && self.offset + self.slices.len() == offset
            && parts <= GROUP_PARTS
            && self.slices.len() + slices.len() <= GROUP_BYTES
    }
}

impl Work {
    /// Puts a request into the group, after starting that one where the request does not follow it. Gives back what is no
    /// transfer between file and memory.
    pub(super) fn gather(&mut self, request: Request) -> Option<Request> {
        let Self { shared, memory, slices, .. } = self;
        let Some((write, offset)) = place(shared, memory, &request, slices) else { return Some(request) };
        if !self.group.requests.is_empty() && !self.group.is_followed_by((write, offset), &self.slices) {
            self.start();
        }
        if self.group.requests.is_empty() {
            (self.group.write, self.group.offset) = (write, offset);
            std::mem::swap(&mut self.group.slices, &mut self.slices);
        } else {
            self.group.slices.append(&self.slices);
        }
        self.group.requests.push(request);
        None
    }

    /// Carries out the group if it needs no waiting: what is read is in the host's page cache, or what is written goes there.
    pub(super) fn quickly(&mut self) -> bool {
        let Group { write, offset, ref slices, .. } = self.group;
        let tries = if write { (offset | slices.len()).is_multiple_of(WHOLE) } else { self.reads_now };
        if !tries {
            return false;
        }
        let moved =
            self.shared.disk.in_place((offset, slices.len()), write, &mut |file, offset| match write {
                true => slices.write_to(file.as_fd(), Some(offset)),
                false => slices.read_now(file.as_fd(), offset),
            });
        let Some(moved) = moved else { return false };
        match moved {
            Ok(moved) if moved as u64 == slices.len() => {}
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) => {
                self.reads_now &= write;
                return false;
            }
            // The rest is not in the page cache, or whoever does it again finds out what is wrong.
            _ => return false,
        }
        if write && self.settle().is_err() {
            return false;
        }
        let mut requests = std::mem::take(&mut self.group.requests);
        requests.drain(..).for_each(|request| self.finish(request, status::OK));
        self.group.requests = requests;
        true
    }

    /// Carries the group out where that needs no waiting, or starts it, or does it one by one where there is no ring.
    pub(super) fn start(&mut self) {
        if self.group.requests.is_empty() || self.quickly() {
            self.group.slices.clear();
            return;
        }
        let requests = std::mem::take(&mut self.group.requests);
        let Some(ring) = &mut self.ring else {
            self.group.slices.clear();
            requests.into_iter().for_each(|request| self.one_by_one(request));
            return;
        };
        let Group { write, offset, .. } = self.group;
        let slices = std::mem::replace(&mut self.group.slices, self.memory.slices());
        let operation = if write { Operation::Write(offset) } else { Operation::Read(offset) };
        if let Err(error) = ring.push(operation, slices, Flight::Group { write, requests }) {
            self.shared.tell(format_args!("a transfer of the disk cannot be started: {error}"));
        }
    }

    /// A transfer by itself, on this thread, and tried again while the host has no space.
    pub(super) fn one_by_one(&mut self, request: Request) {
        let status = match request.action {
            Action::Read { offset } => self.retrying("read", |work| work.transfer(&request, offset)),
            Action::Write { offset } => {
                self.retrying("write", |work| work.transfer(&request, offset).and_then(|()| work.settle()))
            }
            _ => status::UNSUPPORTED,
        };
        self.finish(request, status);
    }

    /// Moves a request's bytes, directly or through the buffer.
    fn transfer(&mut self, request: &Request, offset: u64) -> io::Result<()> {
        if let Some(direct) = self.shared.disk.direct() {
            // Not in `self.slices`: those may be of the request behind this one.
            let mut slices = self.memory.slices();
            if let Some((write, offset)) = place(&self.shared, &self.memory, request, &mut slices) {
                return match write {
                    true => slices.write_all_at(direct.file.as_fd(), offset),
                    false => slices.read_exact_at(direct.file.as_fd(), offset),
                };
            }
        }
        let write = matches!(request.action, Action::Write { .. });
        self.in_parts(request.len, |work, at, part| {
            if write {
                request.chain.read(&work.memory, HEADER as u64 + at, part).map_err(io::Error::other)?;
                return work.shared.disk.write(offset + at, part);
            }
            work.shared.disk.read(offset + at, part)?;
            request.chain.write(&work.memory, at, part).map_err(io::Error::other)?;
            Ok(())
        })
    }

    /// Goes through so many bytes by means of the buffer.
    fn in_parts(
        &mut self,
        len: u64,
        mut action: impl FnMut(&mut Self, u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CHUNK, 0);
        let mut at = 0;
        let mut result = Ok(());
        while at < len && result.is_ok() {
            let part = (len - at).min(CHUNK as u64);
            result = action(self, at, &mut buffer[..part as usize]);
            at += part;
        }
        self.buffer = buffer;
        result
    }
}

/// Whether a request's bytes are written, and where, if they may be moved without a copy; `slices` are their memory then.
fn place(
    shared: &Shared,
    memory: &DmaMemory,
    request: &Request,
    slices: &mut HostSlices,
) -> Option<(bool, u64)> {
    let direct = shared.disk.direct();
    if direct.is_none() && !shared.disk.is_cached() {
        return None;
    }
    let (guarded, alignment) = direct.map_or((0, 1), |direct| (direct.guarded, direct.alignment));
    let (write, offset) = match request.action {
        Action::Read { offset } => (false, offset),
        Action::Write { offset } => (true, offset),
        _ => return None,
    };
    if write && offset < guarded {
        return None;
    }
    slices.clear();
    match write {
        true => request.chain.add_readable(memory, (HEADER as u64, request.len), slices),
        false => request.chain.add_writable(memory, (0, request.len), slices),
    }
    .ok()?;
    if alignment > 1 {
        let mask = alignment as u64 - 1;
        let aligned = |slice: &HostSlice| (slice.address() | slice.len() as u64) & mask == 0;
        if offset & mask != 0 || !slices.slices().iter().all(aligned) {
            return None;
        }
    }
    Some((write, offset))
}
