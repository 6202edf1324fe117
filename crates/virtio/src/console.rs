//! The console: a terminal for the guest, and further ports that carry bytes between it and the host. *Console Device*.
//!
//! ```text
//!  transmit queue ──> at most 64 KiB that wait ──> PortHandle::read    a thread of the machine, for each port
//!  receive queue  <── PortHandle::write
//!  control queues <─> which ports there are, their names, who has opened them, the terminal's size
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};
use crate::{Activation, ConfigHandle, Device, QueueHandle, features, read_config_bytes};

/// Its device id.
const ID: u16 = 3;
/// Entries of each queue.
const SIZE: u16 = 64;
/// The most ports of one device.
pub const MAX_PORTS: usize = 16;
/// Bytes of a port's output that wait for the host.
const CAPACITY: usize = 64 << 10;
/// Messages to the driver that wait for its buffers: what a driver can cause is bounded.
const MAX_MESSAGES: usize = 1024;

/// Feature bits.
mod feature {
    pub(super) const SIZE: u64 = 1 << 0;
    pub(super) const MULTIPORT: u64 = 1 << 1;
    pub(super) const EMERGENCY_WRITE: u64 = 1 << 2;
}

/// The control queues, behind the first port's two.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
/// Offset in the configuration space of the byte for emergencies.
const EMERGENCY: u64 = 8;

/// What a control message is about.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}
/// Bytes of a control message before what only some have.
const MESSAGE: usize = 8;

/// What a port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A terminal.
    Console,
    /// A channel of this name.
    Channel(String),
}

/// What the device, its ports' handles and the machine share.
struct Shared {
    state: Mutex<State>,
    /// Output came, or room, or the end.
    changed: Condvar,
}

struct State {
    ports: Vec<Port>,
    /// Columns and rows of the terminal.
    size: (u16, u16),
    multiport: bool,
    config: Option<ConfigHandle>,
    control_receive: Option<QueueHandle>,
    control_transmit: Option<QueueHandle>,
    /// Messages that the driver has no buffers for yet.
    messages: VecDeque<Vec<u8>>,
    /// No more output is waited for.
    closed: bool,
}

struct Port {
    kind: PortKind,
    receive: Option<QueueHandle>,
    transmit: Option<QueueHandle>,
    /// Output of the guest that the host has not read.
    output: VecDeque<u8>,
    /// A request that did not fit into it, and how much of it did.
    partial: Option<(Chain, u64)>,
    /// Who has opened it.
    guest_open: bool,
    host_open: bool,
}

impl Port {
    /// Whether the guest takes what is sent to it.
    fn is_open(&self, multiport: bool) -> bool {
        // A driver with control queues tells when it has opened a port, also the terminal; one without has just that.
        let opened = self.guest_open || !multiport;
        opened && self.receive.as_ref().is_some_and(QueueHandle::is_live)
    }

    /// Takes what the guest sends, as far as there is room.
    fn pump(&mut self) {
        let Some(queue) = self.transmit.clone() else { return };
        while self.output.len() < CAPACITY || !self.host_open {
            let Some((chain, offset)) = self.partial.take().or_else(|| Some((queue.pop()?, 0))) else {
                return;
            };
            if !chain.writable().is_empty() {
                return queue.fail("the driver gave a buffer to write on a transmit queue");
            }
            // What nobody on the host reads is lost, as on a line that is not plugged in.
            let room = if self.host_open { CAPACITY - self.output.len() } else { 0 };
            let mut part = vec![0; room.min((chain.readable_len() - offset) as usize)];
            if chain.read(queue.memory(), offset, &mut part).is_err() {
                return queue.fail("the driver gave memory that is not there");
            }
            self.output.extend(&part);
            let offset = offset + part.len() as u64;
            if offset < chain.readable_len() && self.host_open {
                self.partial = Some((chain, offset));
            } else {
                queue.complete(&chain, 0);
            }
        }
    }
}

/// The host's side of one port, for any thread. Clones are for the same port.
#[derive(Clone)]
pub struct PortHandle {
    shared: Arc<Shared>,
    index: usize,
}

impl PortHandle {
    /// Waits for output of the guest and appends it to `data`. False where there is no more: after [`Self::close`].
    pub fn read(&self, data: &mut Vec<u8>) -> bool {
        let mut state = self.shared.lock();
        loop {
            let port = &mut state.ports[self.index];
            if !port.output.is_empty() {
                data.extend(port.output.drain(..));
                port.pump();
                return true;
            }
            if state.closed {
                return false;
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits as [`Self::read`] does, but not longer than this.
    pub fn read_within(&self, data: &mut Vec<u8>, limit: Duration) -> bool {
        let mut state = self.shared.lock();
        if state.ports[self.index].output.is_empty() && !state.closed {
            let waited = self.shared.changed.wait_timeout(state, limit);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let port = &mut state.ports[self.index];
        data.extend(port.output.drain(..));
        port.pump();
        !(data.is_empty() && state.closed)
    }

    /// Gives bytes to the guest; how many it took.
    pub fn write(&self, data: &[u8]) -> usize {
        let state = self.shared.lock();
        let port = &state.ports[self.index];
        let Some(queue) = port.receive.as_ref().filter(|_| port.is_open(state.multiport)) else { return 0 };
        let done = queue.with(|queue| {
            let mut done = 0;
            while done < data.len() {
                let Some(chain) = queue.pop()? else { break };
                let count = chain.write(queue.memory(), 0, &data[done..])?;
                if count == 0 {
                    return Err(QueueError::Request("a buffer for input without room"));
                }
                queue.complete(&chain, count as u32)?;
                done += count;
            }
            Ok(done)
        });
        done.unwrap_or(0)
    }

    /// Whether the guest takes what is written.
    pub fn is_open(&self) -> bool {
        let state = self.shared.lock();
        state.ports[self.index].is_open(state.multiport)
    }

    /// Waits until something may have changed for this port, but not longer than this.
    pub fn wait(&self, limit: Duration) {
        let state = self.shared.lock();
        drop(self.shared.changed.wait_timeout(state, limit));
    }

    /// Somebody on the host reads and writes the port, or does not any more: the guest's output is lost then.
    pub fn set_host_open(&self, open: bool) {
        let mut state = self.shared.lock();
        let port = &mut state.ports[self.index];
        if std::mem::replace(&mut port.host_open, open) == open {
            return;
        }
        if !open {
            port.output.clear();
        }
        port.pump();
        state.send(message(self.index, event::PORT_OPEN, open.into(), &[]));
    }
}

/// The host's side of the device. Clones are for the same one.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// The terminal has this size now.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut state = self.0.lock();
        state.size = (columns, rows);
        if state.multiport {
            state.send_size();
        }
        if let Some(config) = state.config.clone() {
            drop(state);
            config.changed();
        }
    }

    /// A port by its number.
    pub fn port(&self, index: usize) -> Option<PortHandle> {
        let there = index < self.0.lock().ports.len();
        there.then(|| PortHandle { shared: self.0.clone(), index })
    }

    /// The machine ends: who reads a port gets what is left, and then the end.
    pub fn close(&self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A control message for a port.
fn message(port: usize, event: u16, value: u16, more: &[u8]) -> Vec<u8> {
    let mut bytes = (port as u32).to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(more);
    bytes
}

impl State {
    /// Sends a message to the driver, or keeps it until there is a buffer for it.
    fn send(&mut self, message: Vec<u8>) {
        if self.multiport && self.messages.len() < MAX_MESSAGES {
            self.messages.push_back(message);
            self.flush();
        }
    }

    fn flush(&mut self) {
        let Some(queue) = self.control_receive.clone() else { return };
        while let Some(message) = self.messages.front() {
            let Some(chain) = queue.pop() else { return };
            match chain.write(queue.memory(), 0, message) {
                Ok(written) if written == message.len() => queue.complete(&chain, written as u32),
                _ => return queue.fail("the driver gave a buffer too small for a control message"),
            }
            self.messages.pop_front();
        }
    }

    /// Columns first, as the specification has it. Linux took rows first until 6.15, and its stable kernels of 2025.
    fn send_size(&mut self) {
        let (columns, rows) = self.size;
        let size = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        let consoles = self.ports.iter().position(|port| port.kind == PortKind::Console);
        if let Some(index) = consoles {
            self.send(message(index, event::RESIZE, 0, &size));
        }
    }

    /// Carries out what a control message of the driver says.
    fn receive(&mut self, memory: &DmaMemory, chain: &Chain) -> Result<(), QueueError> {
        let mut bytes = [0; MESSAGE];
        if chain.read(memory, 0, &mut bytes)? < MESSAGE {
            return Err(QueueError::Request("a control message of less than 8 bytes"));
        }
        let word = u64::from_le_bytes(bytes);
        let (index, event, value) = (word as u32 as usize, (word >> 32) as u16, (word >> 48) as u16);
        match event {
            event::DEVICE_READY if value == 1 => {
                for port in 0..self.ports.len() {
                    self.send(message(port, event::PORT_ADD, 1, &[]));
                }
            }
            event::PORT_READY if value == 1 => self.introduce(index),
            event::PORT_OPEN => {
                log::debug!("virtio-console: the guest has port {index} open: {value}");
                if let Some(port) = self.ports.get_mut(index) {
                    port.guest_open = value != 0;
                }
            }
            // A driver that could not add the device or a port, or messages of a later version.
            _ => log::debug!("virtio-console: the driver says {event} of port {index}: {value}"),
        }
        Ok(())
    }

    /// The driver knows the port now: it hears what it is.
    fn introduce(&mut self, index: usize) {
        let Some(port) = self.ports.get(index) else { return };
        let open = port.host_open;
        match port.kind.clone() {
            PortKind::Console => {
                self.send(message(index, event::CONSOLE_PORT, 1, &[]));
                self.send_size();
            }
            PortKind::Channel(name) => {
                self.send(message(index, event::PORT_NAME, 1, &[name.as_bytes(), &[0]].concat()));
            }
        }
        if open {
            self.send(message(index, event::PORT_OPEN, 1, &[]));
        }
    }

    /// The port that a queue is of, and whether it is the one that the guest sends by.
    fn port_of(&mut self, queue: u16) -> Option<(&mut Port, bool)> {
        let index = match queue {
            0 | 1 => 0,
            _ => usize::from(queue / 2).checked_sub(1)?,
        };
        self.ports.get_mut(index).map(|port| (port, queue % 2 == 1))
    }
}

/// A console with its ports.
pub struct Console {
    shared: Arc<Shared>,
    sizes: Vec<u16>,
}

impl Console {
    /// A device with these ports, at most [`MAX_PORTS`]: a console first, where there is one. `size` is the terminal's
    /// columns and rows.
    pub fn new(kinds: Vec<PortKind>, size: (u16, u16)) -> (Self, ConsoleHandle) {
        let port = |kind: PortKind| Port {
            host_open: kind == PortKind::Console,
            kind,
            receive: None,
            transmit: None,
            output: VecDeque::new(),
            partial: None,
            guest_open: false,
        };
        let ports: Vec<_> = kinds.into_iter().take(MAX_PORTS).map(port).collect();
        let queues = 2 * ports.len() + 2;
        let state = State {
            ports,
            size,
            multiport: false,
            config: None,
            control_receive: None,
            control_transmit: None,
            messages: VecDeque::new(),
            closed: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let handle = ConsoleHandle(shared.clone());
        (Self { shared, sizes: vec![SIZE; queues] }, handle)
    }

    /// The configuration space: columns, rows, ports, the byte for emergencies.
    fn config(&self) -> [u8; 12] {
        let state = self.shared.lock();
        let mut bytes = [0; 12];
        bytes[..2].copy_from_slice(&state.size.0.to_le_bytes());
        bytes[2..4].copy_from_slice(&state.size.1.to_le_bytes());
        bytes[4..8].copy_from_slice(&(state.ports.len() as u32).to_le_bytes());
        bytes
    }
}

impl Device for Console {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        // Also for a terminal alone: without control queues nothing tells when the driver has opened it, and Linux's
        // throws away what arrives before.
        feature::SIZE | feature::EMERGENCY_WRITE | feature::MULTIPORT | features::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    /// A byte for emergencies comes out of the first port, whatever state the driver is in.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let (EMERGENCY, &[byte, ..]) = (offset, data) else { return };
        let mut state = self.shared.lock();
        if let Some(port) = state.ports.first_mut().filter(|port| port.output.len() < CAPACITY) {
            port.output.push_back(byte);
            self.shared.changed.notify_all();
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut state = self.shared.lock();
        state.multiport = activation.features & feature::MULTIPORT != 0;
        if state.multiport {
            state.control_receive = activation.queue(CONTROL_RECEIVE);
            state.control_transmit = activation.queue(CONTROL_TRANSMIT);
        }
        for (index, queue) in (0..).zip(activation.queues) {
            let control = index == CONTROL_RECEIVE || index == CONTROL_TRANSMIT;
            if let Some((port, transmit)) = state.port_of(index).filter(|_| !control) {
                *(if transmit { &mut port.transmit } else { &mut port.receive }) = queue;
            }
        }
        state.config = Some(activation.config);
    }

    fn notify(&mut self, index: u16) {
        let mut state = self.shared.lock();
        match index {
            CONTROL_RECEIVE if state.multiport => state.flush(),
            CONTROL_TRANSMIT if state.multiport => {
                if let Some(queue) = state.control_transmit.clone() {
                    queue.serve(|memory, chain| state.receive(memory, chain).map(|()| 0));
                }
            }
            _ => {
                if let Some((port, true)) = state.port_of(index) {
                    port.pump();
                }
            }
        }
        // Output, or room for input.
        self.shared.changed.notify_all();
    }

    fn reset(&mut self) {
        let mut state = self.shared.lock();
        for port in &mut state.ports {
            (port.receive, port.transmit, port.partial, port.guest_open) = (None, None, None, false);
        }
        (state.config, state.control_receive, state.control_transmit) = (None, None, None);
        state.messages.clear();
        state.multiport = false;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::{INDIRECT_DESC, RING_PACKED};
    use crate::testing::{BUFFERS, Rig};
    use crate::transport::{Event, Status};

    fn alone(negotiated: u64) -> (Rig, ConsoleHandle, PortHandle) {
        let (console, handle) = Console::new(vec![PortKind::Console], (80, 25));
        let port = handle.port(0).unwrap();
        (Rig::new(Box::new(console), 16, negotiated | feature::SIZE | features::IN_ORDER), handle, port)
    }

    /// A console and a channel, introduced to a driver that has said that it is ready.
    fn several() -> (Rig, ConsoleHandle) {
        let kinds = vec![PortKind::Console, PortKind::Channel("org.example.0".into())];
        let (console, handle) = Console::new(kinds, (80, 25));
        let mut rig =
            Rig::new(Box::new(console), 16, feature::SIZE | feature::MULTIPORT | features::IN_ORDER);
        for slot in 0..16 {
            rig.send(CONTROL_RECEIVE, &[(BUFFERS + 0x1000 + 64 * slot, 64, true)]);
        }
        (rig, handle)
    }

    fn say(rig: &mut Rig, port: usize, event: u16, value: u16) {
        rig.drivers[0].put(BUFFERS, &message(port, event, value, &[]));
        rig.send(CONTROL_TRANSMIT, &[(BUFFERS, 8, false)]);
        rig.wait_used(CONTROL_TRANSMIT);
    }

    /// The messages of the device since the last call, from the first of its buffers on.
    fn heard(rig: &mut Rig, from: &mut u64) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        while let Some((_, len)) = rig.drivers[usize::from(CONTROL_RECEIVE)].used() {
            messages.push(rig.drivers[0].bytes(BUFFERS + 0x1000 + 64 * *from, len as usize));
            *from += 1;
        }
        messages
    }

    #[test]
    fn bytes_go_both_ways() {
        for format in [0, RING_PACKED, INDIRECT_DESC] {
            let (mut rig, _, port) = alone(format);
            rig.drivers[0].put(BUFFERS, b"hello world");
            rig.send(1, &[(BUFFERS, 6, false), (BUFFERS + 6, 5, false)]);
            let mut output = Vec::new();
            assert!(port.read(&mut output));
            assert_eq!(output, b"hello world");
            assert!(port.is_open());
            assert_eq!(port.write(b"nobody has a buffer"), 0);
            rig.send(0, &[(BUFFERS, 4, true)]);
            rig.send(0, &[(BUFFERS + 4, 4, true)]);
            assert_eq!(port.write(b"input"), 5);
            assert_eq!((rig.wait_used(0).1, rig.wait_used(0).1), (4, 1));
            assert_eq!(rig.drivers[0].bytes(BUFFERS, 5), b"input");
        }
    }

    #[test]
    fn output_that_nobody_reads_waits_in_the_ring_beyond_a_bound() {
        let (mut rig, handle, port) = alone(0);
        let len = 50_000u32;
        for byte in [1, 2, 3] {
            rig.drivers[0].put(BUFFERS + 0x1_0000 * u64::from(byte), &vec![byte; len as usize]);
            rig.send(1, &[(BUFFERS + 0x1_0000 * u64::from(byte), len, false)]);
        }
        assert!(rig.drivers[1].used().is_some() && rig.drivers[1].used().is_none());
        let mut output = Vec::new();
        while output.len() < 3 * len as usize {
            assert!(port.read(&mut output));
        }
        assert!(
            (0..3).all(|at| output[at * len as usize..][..len as usize]
                .iter()
                .all(|&byte| byte == at as u8 + 1))
        );
        handle.close();
        assert!(!port.read(&mut output));
    }

    #[test]
    fn a_terminal_alone_takes_nothing_before_the_driver_has_opened_it() {
        let (console, handle) = Console::new(vec![PortKind::Console], (80, 25));
        let offered = console.features();
        let mut rig = Rig::new(Box::new(console), 16, offered);
        let port = handle.port(0).unwrap();
        rig.send(0, &[(BUFFERS + 0x100, 64, true)]);
        assert_eq!((port.is_open(), port.write(b"early")), (false, 0));
        say(&mut rig, 0, event::PORT_OPEN, 1);
        assert_eq!((port.is_open(), port.write(b"input")), (true, 5));
    }

    #[test]
    fn a_terminal_alone_is_resized_by_the_configuration() {
        let (mut rig, handle, _) = alone(0);
        assert_eq!(rig.config(0, 8), [80, 0, 25, 0, 1, 0, 0, 0]);
        handle.resize(300, 40);
        assert_eq!((rig.config(0, 4), rig.take_events()), (vec![44, 1, 40, 0], vec![Event::Config]));
    }

    #[test]
    fn a_byte_for_emergencies_comes_out_before_there_is_a_driver() {
        let (console, handle) = Console::new(vec![PortKind::Console], (80, 25));
        let mut console: Box<dyn Device> = Box::new(console);
        console.write_config(EMERGENCY, &[b'!', 0, 0, 0]);
        let mut output = Vec::new();
        assert!(handle.port(0).unwrap().read(&mut output));
        assert_eq!(output, b"!");
    }

    #[test]
    fn ports_are_added_named_sized_opened_and_closed() {
        let ((mut rig, handle), mut from) = (several(), 0);
        say(&mut rig, 0, event::DEVICE_READY, 1);
        let add = |port| message(port, event::PORT_ADD, 1, &[]);
        assert_eq!(heard(&mut rig, &mut from), [add(0), add(1)]);
        say(&mut rig, 0, event::PORT_READY, 1);
        let size = message(0, event::RESIZE, 0, &[80, 0, 25, 0]);
        let open = message(0, event::PORT_OPEN, 1, &[]);
        assert_eq!(heard(&mut rig, &mut from), [message(0, event::CONSOLE_PORT, 1, &[]), size, open]);
        say(&mut rig, 1, event::PORT_READY, 1);
        assert_eq!(heard(&mut rig, &mut from), [message(1, event::PORT_NAME, 1, b"org.example.0\0")]);
        let port = handle.port(1).unwrap();
        port.set_host_open(true);
        assert_eq!(heard(&mut rig, &mut from), [message(1, event::PORT_OPEN, 1, &[])]);
        assert!(!port.is_open() && handle.port(2).is_none());
        say(&mut rig, 1, event::PORT_OPEN, 1);
        rig.send(4, &[(BUFFERS, 8, true)]);
        assert_eq!((port.is_open(), port.write(b"in")), (true, 2));
        rig.drivers[0].put(BUFFERS, b"out");
        rig.send(5, &[(BUFFERS, 3, false)]);
        let mut output = Vec::new();
        assert!(port.read(&mut output) && output == b"out");
        port.set_host_open(false);
        rig.send(5, &[(BUFFERS, 3, false)]);
        rig.wait_used(5);
        assert!(port.read_within(&mut output, Duration::from_millis(1)) && output == b"out", "it is lost");
        say(&mut rig, 1, event::PORT_OPEN, 0);
        assert!(!port.is_open());
    }

    #[test]
    fn messages_wait_for_buffers_but_not_without_bound() {
        let (console, _) = Console::new(vec![PortKind::Channel("a".into())], (0, 0));
        let mut rig = Rig::new(Box::new(console), 16, feature::MULTIPORT | features::IN_ORDER);
        for _ in 0..3 * MAX_MESSAGES {
            say(&mut rig, 0, event::DEVICE_READY, 1);
        }
        let mut count = 0;
        for _ in 0..3 * MAX_MESSAGES {
            rig.send(CONTROL_RECEIVE, &[(BUFFERS + 0x1000, 64, true)]);
            match rig.drivers[usize::from(CONTROL_RECEIVE)].used() {
                Some(_) => count += 1,
                None => break,
            }
        }
        assert_eq!(count, MAX_MESSAGES);
    }

    #[test]
    fn buffers_that_are_the_wrong_way_round_or_too_small_break_the_rules() {
        let broken = |rig: &Rig| rig.status().contains(Status::NEEDS_RESET);
        let (mut rig, ..) = alone(0);
        rig.send(1, &[(BUFFERS, 8, true)]);
        assert!(broken(&rig));
        let (mut rig, _, port) = alone(0);
        rig.send(0, &[(BUFFERS, 8, false)]);
        assert_eq!((port.write(b"x"), broken(&rig)), (0, true));
        let (mut rig, _) = several();
        rig.send(CONTROL_TRANSMIT, &[(BUFFERS, 7, false)]);
        assert!(broken(&rig));
        let (console, _) = Console::new(vec![PortKind::Channel("a".into())], (0, 0));
        let mut rig = Rig::new(Box::new(console), 16, feature::MULTIPORT | features::IN_ORDER);
        rig.send(CONTROL_RECEIVE, &[(BUFFERS, 7, true)]);
        rig.drivers[0].put(BUFFERS, &message(0, event::DEVICE_READY, 1, &[]));
        rig.send(CONTROL_TRANSMIT, &[(BUFFERS, 8, false)]);
        assert!(broken(&rig));
    }
}
