//! One connection between a program of the guest and a Unix socket of the host.
//!
//! ```text
//!  a socket of the host connects:  Greeting ──CONNECT port──> Requested ──RESPONSE──> Established
//!  a program of the guest:                            REQUEST, and the host's socket took it ──^
//! ```
//!
//! Each side may only send what the other has room for (*Buffer Space Management*): what it said it has in all, less
//! what was sent and not yet passed on. Counters are 32 bits and wrap.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::packet::{HOST_CID, Header, STREAM, op};

/// Bytes of the guest's that wait for the host's socket at most.
pub(super) const BUFFER: u32 = 256 << 10;
/// The longest `CONNECT port\n`.
const MAX_GREETING: usize = 32;
/// How long a guest may take to answer a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host's program is saying where it wants to go.
    Greeting,
    /// The guest is asked.
    Requested,
    /// Data may go both ways.
    Established,
}

/// What became of an attempt to read from the host's socket.
pub(super) enum Taken {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
    /// The host sends nothing any more.
    End,
}

pub(super) struct Connection {
    pub host_port: u32,
    pub guest_port: u32,
    pub state: State,
    pub stream: UnixStream,
    /// What the host's program has said so far.
    greeting: Vec<u8>,
    /// When it is given up.
    pub deadline: Option<Instant>,
    /// What the thread waits for on the socket; `None` where it is not registered.
    pub registered: Option<EventFlags>,
    /// The socket has something to read, or its end.
    pub readable: bool,
    /// Operations that the guest has not been told yet, the first one first: at most one of a kind.
    pub control: VecDeque<(u16, u32)>,
    /// Bytes from the guest that the socket did not take yet.
    pending: VecDeque<u8>,
    /// The guest sends nothing any more; it receives nothing any more.
    pub guest_sends_no_more: bool,
    pub guest_receives_no_more: bool,
    /// The host's program sends nothing any more, and the guest was told.
    pub host_sends_no_more: bool,
    /// Bytes sent to the guest, what it has passed on of them, and what it has room for in all.
    sent: u32,
    peer_forwarded: u32,
    peer_buffer: u32,
    /// Whether it was asked for news of that since.
    asked_for_credit: bool,
    /// Bytes passed on to the socket, and what the guest was last told of them.
    forwarded: u32,
    told_forwarded: u32,
}

impl Connection {
    /// A connection whose other end on the host is `stream`, which does not block.
    pub fn new(stream: UnixStream, state: State) -> Self {
        Self {
            host_port: 0,
            guest_port: 0,
            state,
            stream,
            greeting: Vec::new(),
            deadline: None,
            registered: None,
            readable: false,
            control: VecDeque::new(),
            pending: VecDeque::new(),
            guest_sends_no_more: false,
            guest_receives_no_more: false,
            host_sends_no_more: false,
            sent: 0,
            peer_forwarded: 0,
            peer_buffer: 0,
            asked_for_credit: false,
            forwarded: 0,
            told_forwarded: 0,
        }
    }

    /// Reads `CONNECT port\n`, and nothing behind it. `None` while it is not complete.
    ///
    /// # Errors
    /// Where the host's program says anything else, or goes away.
    pub fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if self.greeting.len() < MAX_GREETING => self.greeting.push(byte[0]),
                Ok(_) => return Err(ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let line = std::str::from_utf8(&self.greeting).unwrap_or_default().trim_end_matches('\r');
        let port = line.split_once(' ').filter(|(word, _)| word.eq_ignore_ascii_case("connect"));
        let port = port.and_then(|(_, port)| port.trim().parse().ok());
        port.map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// The guest is asked for a connection.
    pub fn request(&mut self, host_port: u32, guest_port: u32) {
        (self.host_port, self.guest_port) = (host_port, guest_port);
        self.state = State::Requested;
        self.deadline = Some(Instant::now() + PATIENCE);
        self.tell(op::REQUEST, 0);
    }

    /// The guest has said yes: the host's program is told by which port.
    ///
    /// # Errors
    /// The socket's.
    pub fn accepted(&mut self) -> io::Result<()> {
        (self.state, self.deadline) = (State::Established, None);
        let line = format!("OK {}\n", self.host_port);
        // A socket that nothing was written to has room for a line.
        if self.stream.write(line.as_bytes())? == line.len() {
            Ok(())
        } else {
            Err(ErrorKind::WriteZero.into())
        }
    }

    /// Queues an operation for the guest; one that waits already gets the flags too.
    pub fn tell(&mut self, op: u16, flags: u32) {
        match self.control.iter_mut().find(|(other, _)| *other == op) {
            Some((_, old)) => *old |= flags,
            None => self.control.push_back((op, flags)),
        }
    }

    /// What the guest says of its buffer in each packet.
    pub fn learn(&mut self, header: &Header) {
        (self.peer_buffer, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        self.asked_for_credit = false;
    }

    /// Bytes that the guest has room for.
    pub fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The guest's buffer is full: it is asked, until it says something, no more than once to tell when it is not.
    pub fn ask_for_credit(&mut self) -> (u16, u32) {
        self.asked_for_credit = true;
        (op::CREDIT_REQUEST, 0)
    }

    /// Whether the guest has heard of it.
    pub fn is_known_to_guest(&self) -> bool {
        self.state != State::Greeting && !self.control.iter().any(|(waiting, _)| *waiting == op::REQUEST)
    }

    /// Whether there is something to read for the guest, and it may have it or has to be asked for room.
    pub fn may_read(&self) -> bool {
        self.readable && self.wants_data() && (self.credit() > 0 || !self.asked_for_credit)
    }

    fn wants_data(&self) -> bool {
        self.state == State::Established && !self.host_sends_no_more && !self.guest_receives_no_more
    }

    /// Reads data for the guest.
    ///
    /// # Errors
    /// The socket's.
    pub fn read(&mut self, data: &mut [u8]) -> io::Result<Taken> {
        loop {
            return match self.stream.read(data) {
                Ok(0) => Ok(Taken::End),
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    Ok(Taken::Data(count))
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    Ok(Taken::Nothing)
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Room for the guest's data; it may not send more.
    pub fn room(&self) -> usize {
        BUFFER as usize - self.pending.len()
    }

    /// Takes data from the guest; it lies within [`Self::room`].
    ///
    /// # Errors
    /// The socket's.
    pub fn take(&mut self, data: &[u8]) -> io::Result<()> {
        self.pending.extend(data);
        self.flush()
    }

    /// Passes on what the socket takes now.
    ///
    /// # Errors
    /// The socket's.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            match self.stream.write(front) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.pending.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.pending.is_empty() && self.guest_sends_no_more {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        // The guest learns of room by any packet; where none goes its way it gets one before it has to wait.
        if self.forwarded.wrapping_sub(self.told_forwarded) > BUFFER / 2 && !self.is_drained_and_done() {
            self.tell(op::CREDIT_UPDATE, 0);
        }
        Ok(())
    }

    /// Whether the guest sends nothing any more, and the socket has all of it.
    pub fn is_drained_and_done(&self) -> bool {
        self.pending.is_empty() && self.guest_sends_no_more
    }

    /// What to wait for on the socket; `None` for nothing.
    pub fn interest(&self) -> Option<EventFlags> {
        let wants = self.state == State::Greeting || self.wants_data();
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, wants && !self.readable);
        flags.set(EventFlags::OUT, !self.pending.is_empty());
        (!flags.is_empty()).then_some(flags)
    }

    /// The header of a packet for the guest.
    pub fn header(&mut self, guest_cid: u64, (op, flags): (u16, u32), len: u32) -> Header {
        self.told_forwarded = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
        }
    }
}
