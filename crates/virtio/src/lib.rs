//! Paravirtual devices, as *Virtual I/O Device (VIRTIO) Version 1.2* has them.
//!
//! ```text
//!                                    activate(queues), notify(index), reset()
//!  guest's driver ──registers──> transport (pci, mmio) ── Core ──> Device: block, rng, …
//!        │                             ^   status, features           │ on the vCPU's thread, or on one of its own
//!        │                             └──── interrupts ──── QueueHandle, ConfigHandle
//!        └──rings in guest memory────────────────────────> Queue (split, packed)
//! ```
//!
//! A [`Device`] sees requests, never rings or registers: [`transport`] negotiates and notifies, [`queue`] reads and
//! writes the rings. When the driver is ready the device is given a [`QueueHandle`] for each queue. Handles may go to any
//! thread: what is completed through them raises the queue's interrupt where the driver wants one. A device that can
//! answer at once does so in [`Device::notify`], with [`QueueHandle::serve`]. [`share`] is what the two devices with folders of the host have in common.
//!
//! Everything in guest memory is hostile: a ring that breaks the rules ends in [`queue::QueueError`], which puts the
//! device into the state that asks the driver for a reset, with the reason in the log, and never more. Devices know no
//! terminal, file or thread of the machine; what they need of the host is passed in.
//!
//! Lock order: the transport's registers (held during each method of [`Device`]), a device's own, a queue's, the
//! transport's interrupts, the interrupt controllers'.

pub mod balloon;
pub mod block;
pub mod console;
pub mod features;
pub mod fs;
#[cfg(test)]
mod fuzz;
mod handle;
pub mod memory;
pub mod p9;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod share;
pub mod transport;
pub mod vsock;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use handle::{ConfigHandle, QueueHandle};

/// What a device is behind its transport.
pub trait Device: Send {
    /// Its device id. *Device Types*.
    fn id(&self) -> u16;
    /// Feature bits of its own, below 24 and from 50 on, and [`features::IN_ORDER`] where it uses buffers in the order in
    /// which it got them; the others of rings and transport are added to them.
    fn features(&self) -> u64;
    /// The most entries of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Reads its configuration space; zeros where there is none.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    /// Writes its configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver is ready. [`Device::notify`] follows for each of the queues.
    fn activate(&mut self, activation: Activation);
    /// The driver has put something into queue `index`, which is one of those that [`Device::activate`] gave.
    fn notify(&mut self, index: u16);
    /// The driver or the machine resets the device, or the machine ends. The queues' handles do nothing any more; it
    /// comes back when nobody reaches guest memory on the device's behalf any more.
    fn reset(&mut self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The features that the driver accepted of those that were offered.
    pub features: u64,
    /// The queues by index, where the driver uses them: as many as [`Device::queue_sizes`] has.
    pub queues: Vec<Option<QueueHandle>>,
    /// Tells the driver of changes of the configuration space.
    pub config: ConfigHandle,
}

impl Activation {
    /// The handle of a queue, where the driver uses it.
    pub fn queue(&self, index: u16) -> Option<QueueHandle> {
        self.queues.get(usize::from(index)).cloned().flatten()
    }
}

/// Copies what there is of a configuration space at `offset`, and zeros behind its end.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = config.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}

/// A kind of device by its name, as the log and the ledger have it.
pub fn device_name(id: u16) -> &'static str {
    match id {
        1 => "virtio-net",
        2 => "virtio-blk",
        3 => "virtio-console",
        4 => "virtio-rng",
        5 => "virtio-balloon",
        9 => "virtio-9p",
        19 => "virtio-vsock",
        26 => "virtio-fs",
        27 => "virtio-pmem",
        _ => "virtio",
    }
}
