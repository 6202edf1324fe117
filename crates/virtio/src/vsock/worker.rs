//! The thread that moves data between the queues and the host's sockets.
//!
//! What waits for a buffer of the guest is bounded: one operation of a kind for each connection, and [`MAX_RESETS`]
//! answers to packets of no connection. Where those are full, no more of the guest's packets are taken until it makes
//! room for answers.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Sockets;
use super::connection::{Connection, State, Taken};
use super::packet::{HEADER, HOST_CID, Header, STREAM, op, shutdown};
use crate::QueueHandle;
use crate::queue::{Chain, QueueError};

/// The most connections, those that are being made included.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// The most resets that wait.
const MAX_RESETS: usize = 256;
/// The first port of the host's programs.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Bytes of data in a packet at most.
const MAX_DATA: usize = 64 << 10;
/// Packets of the guest that are taken before others get their turn.
const BURST: usize = 64;

/// Names of what the thread waits for; connections have theirs from 2 on.
const DOORBELL: u64 = 0;
const LISTENER: u64 = 1;

/// The two ports of a connection: the host's and the guest's.
type Ports = (u32, u32);

/// Wakes the thread, and ends it.
pub(super) struct Doorbell {
    fd: OwnedFd,
    stop: AtomicBool,
}

impl Doorbell {
    pub fn new() -> io::Result<Arc<Self>> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self { fd, stop: AtomicBool::new(false) }))
    }

    pub fn ring(&self) {
        // It fails where the counter is full: then it rings already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }
}

/// The queues, where the driver uses them.
pub(super) struct Queues {
    pub receive: QueueHandle,
    pub transmit: QueueHandle,
}

pub(super) struct Worker {
    guest_cid: u64,
    sockets: Arc<Sockets>,
    doorbell: Arc<Doorbell>,
    queues: Queues,
    epoll: OwnedFd,
    /// By the name that the thread waits with.
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<Ports, u64>,
    /// Those that may have something for the guest, each once.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    /// A buffer of the guest that was taken and not used yet.
    spare: Option<Chain>,
    /// The guest has packets that were not taken yet.
    more: bool,
    next_name: u64,
    next_port: u32,
    data: Vec<u8>,
}

impl Worker {
    pub fn new(
        guest_cid: u64,
        sockets: Arc<Sockets>,
        doorbell: Arc<Doorbell>,
        queues: Queues,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let input = epoll::EventFlags::IN;
        epoll::add(&epoll, &doorbell.fd, epoll::EventData::new_u64(DOORBELL), input)?;
        epoll::add(&epoll, &sockets.listener, epoll::EventData::new_u64(LISTENER), input)?;
        Ok(Self {
            guest_cid,
            sockets,
            doorbell,
            queues,
            epoll,
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            spare: None,
            more: true,
            next_name: LISTENER + 1,
            next_port: FIRST_HOST_PORT,
            data: vec![0; HEADER + MAX_DATA],
        })
    }

    /// Works until the doorbell says stop.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let queue = self.queues.receive.clone();
        while !self.doorbell.stop.load(Ordering::SeqCst) {
            let turn = queue.turn();
            self.take_packets();
            self.give_packets();
            drop(turn);
            events.clear();
            if let Err(error) =
                epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), self.timeout().as_ref())
                && error != rustix::io::Errno::INTR
            {
                log::error!("virtio-vsock: cannot wait for sockets: {error}; it ends");
                return;
            }
            for event in &events {
                self.happened(event.data.u64(), event.flags);
            }
            self.give_up_late_ones();
        }
    }

    /// How long to wait: not at all where there is more to do, and to the next deadline.
    fn timeout(&self) -> Option<rustix::time::Timespec> {
        let zero = || rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        if self.more && self.resets.len() < MAX_RESETS {
            return Some(zero());
        }
        let next = self.connections.values().filter_map(|connection| connection.deadline).min()?;
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Some(left.try_into().unwrap_or_else(|_| zero()))
    }

    fn happened(&mut self, name: u64, flags: epoll::EventFlags) {
        match name {
            DOORBELL => {
                let _ = rustix::io::read(&self.doorbell.fd, &mut [0; 8]);
                self.more = true;
            }
            LISTENER => self.accept(),
            _ => self.socket_event(name, flags),
        }
    }

    /// A program of the host has connected.
    fn accept(&mut self) {
        match self.sockets.listener.accept() {
            Ok((stream, _)) if self.connections.len() < MAX_CONNECTIONS => {
                if stream.set_nonblocking(true).is_ok() {
                    self.insert(Connection::new(stream, State::Greeting));
                }
            }
            Ok(_) => log::warn!("virtio-vsock: a host's connection is refused: there are {MAX_CONNECTIONS}"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of file descriptors: the connection stays where it is, and would wake us at once again.
                log::warn!("virtio-vsock: cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn insert(&mut self, connection: Connection) -> u64 {
        let name = self.next_name;
        self.next_name += 1;
        self.connections.insert(name, connection);
        self.rearm(name);
        name
    }

    fn remove(&mut self, name: u64) {
        if let Some(connection) = self.connections.remove(&name) {
            self.by_ports.remove(&(connection.host_port, connection.guest_port));
            if connection.registered.is_some() {
                let _ = epoll::delete(&self.epoll, &connection.stream);
            }
        }
    }

    /// Ends a connection at once: the guest gets a reset.
    fn abort(&mut self, name: u64) {
        if let Some(connection) = self.connections.get_mut(&name) {
            if connection.is_known_to_guest() {
                self.resets.push_back(connection.header(self.guest_cid, (op::RST, 0), 0));
            }
            self.remove(name);
        }
    }

    /// Waits for what the connection needs now.
    fn rearm(&mut self, name: u64) {
        let Some(connection) = self.connections.get_mut(&name) else { return };
        let (before, wanted) = (connection.registered, connection.interest());
        let data = epoll::EventData::new_u64(name);
        let done = match (before, wanted) {
            (before, wanted) if before == wanted => Ok(()),
            (None, Some(flags)) => epoll::add(&self.epoll, &connection.stream, data, flags),
            (Some(_), Some(flags)) => epoll::modify(&self.epoll, &connection.stream, data, flags),
            (_, None) => epoll::delete(&self.epoll, &connection.stream),
        };
        connection.registered = wanted;
        if let Err(error) = done {
            log::warn!("virtio-vsock: cannot wait for a socket: {error}");
            self.abort(name);
        }
    }

    fn socket_event(&mut self, name: u64, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(&name) else { return };
        if connection.state == State::Greeting {
            return self.greet(name);
        }
        let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if flags.intersects(epoll::EventFlags::IN | gone) {
            connection.readable = true;
        }
        let flushed = match flags.intersects(epoll::EventFlags::OUT | gone) {
            true => connection.flush(),
            false => Ok(()),
        };
        match flushed {
            Ok(()) => self.settle(name),
            Err(_) => self.abort(name),
        }
    }

    fn greet(&mut self, name: u64) {
        let Some(connection) = self.connections.get_mut(&name) else { return };
        match connection.read_greeting() {
            Ok(None) => {}
            Ok(Some(guest_port)) => {
                let host_port = self.free_port(guest_port);
                if let Some(connection) = self.connections.get_mut(&name) {
                    connection.request(host_port, guest_port);
                    self.by_ports.insert((host_port, guest_port), name);
                    self.settle(name);
                }
            }
            Err(_) => self.remove(name),
        }
    }

    /// A port for a program of the host; there are many more of them than connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// After a connection changed: what it waits for, whether it has something for the guest, and whether it is over.
    fn settle(&mut self, name: u64) {
        let Some(connection) = self.connections.get_mut(&name) else { return };
        if connection.state == State::Established
            && connection.is_drained_and_done()
            && (connection.guest_receives_no_more
                || connection.host_sends_no_more && connection.control.is_empty())
        {
            return self.abort(name);
        }
        if (!connection.control.is_empty() || connection.may_read()) && !self.ready.contains(&name) {
            self.ready.push_back(name);
        }
        self.rearm(name);
    }

    fn give_up_late_ones(&mut self) {
        let now = Instant::now();
        let late = |connection: &Connection| connection.deadline.is_some_and(|deadline| deadline <= now);
        let names: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| late(connection))
            .map(|(&name, _)| name)
            .collect();
        for name in names {
            self.abort(name);
        }
    }

    /// Takes what the guest sends.
    fn take_packets(&mut self) {
        for _ in 0..BURST {
            if self.resets.len() >= MAX_RESETS {
                return;
            }
            let Some(chain) = self.queues.transmit.pop() else {
                self.more = false;
                return;
            };
            match self.packet(&chain) {
                Ok(()) => self.queues.transmit.complete(&chain, 0),
                Err(error) => self.queues.transmit.fail(format_args!("the driver gave {error}")),
            }
        }
    }

    fn packet(&mut self, chain: &Chain) -> Result<(), QueueError> {
        let memory = self.queues.transmit.memory().clone();
        let mut bytes = [0; HEADER];
        if chain.read(&memory, 0, &mut bytes)? < HEADER {
            return Err(QueueError::Request("a packet of less than a header"));
        }
        let header = Header::parse(&bytes);
        let len = header.len as usize;
        let whole = len <= MAX_DATA && chain.readable_len() >= (HEADER + len) as u64;
        let to_host = header.src_cid == self.guest_cid && header.dst_cid == HOST_CID;
        if !whole || !to_host || header.kind != STREAM {
            self.refuse(&header);
            return Ok(());
        }
        let mut data = std::mem::take(&mut self.data);
        let read = chain.read(&memory, HEADER as u64, &mut data[..len]);
        if read.is_ok() {
            self.operation(&header, &data[..len]);
        }
        self.data = data;
        read.map(drop)
    }

    /// Answers a packet of no connection.
    fn refuse(&mut self, header: &Header) {
        if let Some(&name) = self.by_ports.get(&(header.dst_port, header.src_port)) {
            self.remove(name);
        }
        if header.op != op::RST {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: self.guest_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    fn operation(&mut self, header: &Header, data: &[u8]) {
        let found = self.by_ports.get(&(header.dst_port, header.src_port)).copied();
        let Some(name) = found else {
            return if header.op == op::REQUEST { self.requested(header) } else { self.refuse(header) };
        };
        let Some(connection) = self.connections.get_mut(&name) else { return };
        connection.learn(header);
        let done = match (header.op, connection.state) {
            (op::RST, _) => return self.remove(name),
            (op::RESPONSE, State::Requested) => connection.accepted(),
            (op::RW, State::Established)
                if data.len() <= connection.room() && !connection.guest_sends_no_more =>
            {
                connection.take(data)
            }
            (op::SHUTDOWN, State::Established) => {
                connection.guest_sends_no_more |= header.flags & shutdown::SEND != 0;
                connection.guest_receives_no_more |= header.flags & shutdown::RECEIVE != 0;
                connection.flush()
            }
            (op::CREDIT_UPDATE, State::Established) => Ok(()),
            (op::CREDIT_REQUEST, State::Established) => {
                connection.tell(op::CREDIT_UPDATE, 0);
                Ok(())
            }
            _ => return self.refuse(header),
        };
        match done {
            Ok(()) => self.settle(name),
            Err(_) => self.abort(name),
        }
    }

    /// A program of the guest wants to connect to one of the host.
    fn requested(&mut self, header: &Header) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return self.refuse(header);
        }
        match connect_to(&self.sockets.path_of(header.dst_port)) {
            Ok(stream) => {
                let mut connection = Connection::new(stream, State::Established);
                (connection.host_port, connection.guest_port) = (header.dst_port, header.src_port);
                connection.learn(header);
                connection.tell(op::RESPONSE, 0);
                let name = self.insert(connection);
                self.by_ports.insert((header.dst_port, header.src_port), name);
                self.settle(name);
            }
            Err(error) => {
                log::debug!("virtio-vsock: the guest's connection to port {}: {error}", header.dst_port);
                self.refuse(header);
            }
        }
    }

    /// Gives the guest what there is for it, while it has buffers.
    fn give_packets(&mut self) {
        for _ in 0..BURST {
            if self.resets.is_empty() && self.ready.is_empty() {
                return;
            }
            let Some(chain) = self.spare.take().or_else(|| self.queues.receive.pop()) else { return };
            if chain.writable_len() < HEADER as u64 {
                return self.queues.receive.fail("the driver gave a buffer of less than a header");
            }
            match self.next_packet((chain.writable_len() - HEADER as u64) as usize) {
                Some((header, len)) => self.give(&chain, &header, len),
                None => self.spare = Some(chain),
            }
        }
        self.more = true;
    }

    /// The next packet for the guest; its data, of at most `room` bytes, is in `self.data`. `None` where what was ready
    /// had nothing.
    fn next_packet(&mut self, room: usize) -> Option<(Header, usize)> {
        if let Some(header) = self.resets.pop_front() {
            return Some((header, 0));
        }
        let name = self.ready.pop_front()?;
        let packet = self.packet_of(name, room);
        self.settle(name);
        packet
    }

    fn packet_of(&mut self, name: u64, room: usize) -> Option<(Header, usize)> {
        let connection = self.connections.get_mut(&name)?;
        if let Some(control) = connection.control.pop_front() {
            return Some((connection.header(self.guest_cid, control, 0), 0));
        }
        if !connection.may_read() {
            return None;
        }
        let credit = connection.credit() as usize;
        if credit == 0 {
            let control = connection.ask_for_credit();
            return Some((connection.header(self.guest_cid, control, 0), 0));
        }
        let len = room.min(credit).min(MAX_DATA);
        match connection.read(&mut self.data[..len]) {
            Ok(Taken::Data(count)) => {
                Some((connection.header(self.guest_cid, (op::RW, 0), count as u32), count))
            }
            Ok(Taken::Nothing) => None,
            Ok(Taken::End) => {
                connection.host_sends_no_more = true;
                let flags = shutdown::SEND;
                Some((connection.header(self.guest_cid, (op::SHUTDOWN, flags), 0), 0))
            }
            Err(_) => {
                self.abort(name);
                None
            }
        }
    }

    fn give(&mut self, chain: &Chain, header: &Header, len: usize) {
        let memory = self.queues.receive.memory().clone();
        let written = chain
            .write(&memory, 0, &header.bytes())
            .and_then(|_| chain.write(&memory, HEADER as u64, &self.data[..len]));
        match written {
            Ok(_) => self.queues.receive.complete(chain, (HEADER + len) as u32),
            Err(error) => self.queues.receive.fail(format_args!("the driver gave {error}")),
        }
    }
}

/// Connects to a socket of the host without waiting.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(socket.as_fd(), &SocketAddrUnix::new(path.as_os_str().as_bytes())?)?;
    Ok(socket.into())
}
