//! The socket device: connections between programs of the guest and Unix sockets of the host. *Socket Device*.
//!
//! The host's side is the hybrid protocol that Firecracker defined:
//!
//! ```text
//!  a program of the host connects to PATH and writes "CONNECT 1234\n"; once a program of the guest that listens on port
//!  1234 has taken it, it reads "OK <its own port>\n", and from then on what the guest sends
//!
//!  a program of the guest connects to port 1234 of the host (CID 2): the device connects to the socket PATH_1234
//! ```
//!
//! One thread moves the data (`worker`); each connection knows its state and how much each side has room for
//! (`connection`). A packet that breaks the protocol ends its connection with a reset, a ring or a buffer that breaks the
//! rules stops the device; a guest that does not read makes the host's programs wait, and none of it takes more memory
//! than a fixed amount for each of a bounded number of connections.

mod connection;
mod packet;
#[cfg(test)]
mod tests;
mod worker;

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::{Activation, Device, features, read_config_bytes};
use worker::{Doorbell, Queues, Worker};

/// Its device id.
const ID: u16 = 19;
/// Entries of the queues: for the guest to receive, to transmit, and for events.
const SIZES: [u16; 3] = [256, 256, 64];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The feature bit of stream sockets.
const FEATURE_STREAM: u64 = 1;
/// The most bytes of a Unix socket's path, with what is appended to it and the byte that ends it.
const MAX_PATH: usize = 108;
/// What may be appended: `_4294967295`.
const SUFFIX: usize = 11;

/// The addresses that a guest can have: others have a meaning of their own. *Socket Device, Device configuration layout*.
pub const GUEST_CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

/// The longest path that the host's socket can have, in bytes.
pub const MAX_SOCKET_PATH: usize = MAX_PATH - 1 - SUFFIX;

/// The host's side.
pub(crate) struct Sockets {
    /// Where programs of the host connect.
    pub(crate) listener: UnixListener,
    path: PathBuf,
}

impl Sockets {
    /// The socket that a port of the host stands for.
    pub(crate) fn path_of(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path.into()
    }
}

/// A socket device.
pub struct Vsock {
    guest_cid: u64,
    sockets: Arc<Sockets>,
    worker: Option<(Arc<Doorbell>, JoinHandle<()>)>,
}

impl Vsock {
    /// A device for the guest with this address, whose host's side is `listener`, at `path`.
    ///
    /// # Errors
    /// The host's.
    pub fn new(guest_cid: u32, listener: UnixListener, path: &Path) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let sockets = Arc::new(Sockets { listener, path: path.to_owned() });
        Ok(Self { guest_cid: guest_cid.into(), sockets, worker: None })
    }

    fn start(&self, queues: Queues) -> std::io::Result<(Arc<Doorbell>, JoinHandle<()>)> {
        let doorbell = Doorbell::new()?;
        let worker = Worker::new(self.guest_cid, self.sockets.clone(), doorbell.clone(), queues)?;
        let thread = std::thread::Builder::new().name("vsock".into()).spawn(move || worker.run())?;
        Ok((doorbell, thread))
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM | features::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        let queues = activation.queue(RECEIVE).zip(activation.queue(TRANSMIT));
        let Some((receive, transmit)) = queues else { return };
        let broken = transmit.clone();
        match self.start(Queues { receive, transmit }) {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => broken.fail(format_args!("the host gives no thread for it: {error}")),
        }
    }

    fn notify(&mut self, _index: u16) {
        if let Some((doorbell, _)) = &self.worker {
            doorbell.ring();
        }
    }

    fn reset(&mut self) {
        if let Some((doorbell, thread)) = self.worker.take() {
            doorbell.stop();
            let _ = thread.join();
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
