//! A device's state as its driver sees it, whatever the registers look like. *Basic Facilities of a Virtio Device*.
//!
//! ```text
//!   reset ──ACKNOWLEDGE, DRIVER──> negotiating ──FEATURES_OK──> queues are set up ──DRIVER_OK──> live
//!     ^                                                                                           │ a rule is broken
//!     └──────────────────────────── status := 0 ──────────────────── NEEDS_RESET <────────────────┘
//! ```

use bitflags::bitflags;

use std::sync::Arc;

use crate::handle::{ConfigHandle, Link, QueueHandle};
use crate::memory::DmaMemory;
use crate::queue::{Queue, QueueConfig, QueueError};
use crate::{Activation, Device, features};

bitflags! {
    /// The device status field. *Device Status Field*.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The guest has found the device.
        const ACKNOWLEDGE = 1;
        /// It has a driver for it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// The features are negotiated.
        const FEATURES_OK = 8;
        /// The device does nothing any more until it is reset.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}

/// What the driver is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A queue has used buffers.
    Queue(u16),
    /// The configuration or the status changed.
    Config,
}

/// How a transport tells the driver of something. It is called with a queue's lock held and from any thread.
pub trait Interrupts: Send + Sync {
    /// Raises the event's interrupt.
    fn raise(&self, event: Event);
}

/// One queue as the driver sets it up.
pub(crate) struct QueueSlot {
    /// The most entries.
    max: u16,
    /// What the driver wrote.
    pub(crate) config: QueueConfig,
    queue: Option<QueueHandle>,
}

/// A device with its status, its features and its queues.
pub(crate) struct Core {
    device: Box<dyn Device>,
    memory: DmaMemory,
    /// Features that are not offered although they could be.
    withheld: u64,
    link: Arc<Link>,
    /// What the driver accepts.
    accepted: u64,
    /// Which half of the features the driver looks at, and writes.
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    pub(crate) queue_select: u16,
    slots: Vec<QueueSlot>,
}

impl Core {
    pub(crate) fn new(
        device: Box<dyn Device>,
        memory: DmaMemory,
        withheld: u64,
        interrupts: Arc<dyn Interrupts>,
    ) -> Self {
        let slots = device.queue_sizes().iter().map(|&max| QueueSlot::new(max)).collect();
        let link = Link::new(device.id(), interrupts);
        Self {
            device,
            memory,
            withheld,
            link,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            slots,
        }
    }

    pub(crate) fn device_id(&self) -> u16 {
        self.device.id()
    }

    pub(crate) fn queues(&self) -> u16 {
        self.slots.len() as u16
    }

    pub(crate) fn status(&self) -> Status {
        self.link.status()
    }

    /// A number that changes with the device's configuration space.
    pub(crate) fn config_generation(&self) -> u32 {
        self.link.generation()
    }

    fn offered(&self) -> u64 {
        (self.device.features() | features::OFFERED) & !self.withheld
    }

    /// The half of the offered features that the driver selected.
    pub(crate) fn device_features(&self) -> u32 {
        half(self.offered(), self.device_features_select)
    }

    /// The half of the accepted features that the driver selected.
    pub(crate) fn driver_features(&self) -> u32 {
        half(self.accepted, self.driver_features_select)
    }

    /// The driver accepts features. They cannot be changed any more once it said so.
    pub(crate) fn set_driver_features(&mut self, value: u32) {
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if !self.status().contains(Status::FEATURES_OK) {
            self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    /// The selected queue.
    pub(crate) fn slot(&self) -> Option<&QueueSlot> {
        self.slots.get(usize::from(self.queue_select))
    }

    /// The selected queue's configuration, while it may be changed.
    pub(crate) fn slot_config(&mut self) -> Option<&mut QueueConfig> {
        let slot = self.slots.get_mut(usize::from(self.queue_select))?;
        slot.queue.is_none().then_some(&mut slot.config)
    }

    /// The driver has set up the selected queue, as it may once features are negotiated and before it is ready.
    pub(crate) fn enable_queue(&mut self) {
        let allowed = Status::FEATURES_OK | Status::DRIVER_OK | Status::NEEDS_RESET;
        if self.status() & allowed != Status::FEATURES_OK {
            return;
        }
        let Some(slot) = self.slots.get_mut(usize::from(self.queue_select)) else { return };
        if slot.queue.is_some() {
            return;
        }
        let made = match slot.config.size > slot.max {
            true => Err(QueueError::Size(slot.config.size)),
            false => Queue::new(&slot.config, self.accepted, &self.memory),
        };
        match made {
            Ok(queue) => slot.queue = Some(QueueHandle::new(self.queue_select, queue, self.link.clone())),
            Err(error) => self.link.fail(self.queue_select, &format_args!("the driver gave {error}")),
        }
    }

    /// The driver takes the selected queue away.
    pub(crate) fn disable_queue(&mut self) {
        let slot = self.slots.get_mut(usize::from(self.queue_select));
        if let Some(queue) = slot.and_then(|slot| slot.queue.take()) {
            queue.close();
        }
    }

    /// The driver writes the status: zero resets; other bits are only added.
    pub(crate) fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let before = self.status();
        let mut status = Status::from_bits_truncate(value) - Status::NEEDS_RESET | before;
        if status.contains(Status::FEATURES_OK) && !before.contains(Status::FEATURES_OK) {
            let known = self.accepted & !self.offered() == 0;
            if !known || self.accepted & features::VERSION_1 == 0 {
                status -= Status::FEATURES_OK;
            }
        }
        let ready = Status::FEATURES_OK | Status::DRIVER_OK;
        if !status.contains(ready) {
            status -= Status::DRIVER_OK;
        }
        self.link.add_status(status);
        let live = status.contains(ready) && !status.contains(Status::NEEDS_RESET);
        if !live || before.contains(Status::DRIVER_OK) {
            return;
        }
        self.device.activate(Activation {
            features: self.accepted,
            queues: self.slots.iter().map(|slot| slot.queue.clone()).collect(),
            config: ConfigHandle(self.link.clone()),
        });
        // What the driver put into the queues before it was ready.
        for index in 0..self.queues() {
            self.notified(index);
        }
    }

    /// The driver notifies of a queue.
    pub(crate) fn notified(&mut self, index: u16) {
        let live = Status::DRIVER_OK | Status::NEEDS_RESET;
        if self.status() & live != Status::DRIVER_OK {
            return;
        }
        if self.slots.get(usize::from(index)).is_some_and(QueueSlot::is_enabled) {
            self.device.notify(index);
        }
    }

    pub(crate) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub(crate) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The driver's or the machine's reset.
    pub(crate) fn reset(&mut self) {
        // First nobody reaches the rings any more, then nobody does anything for the device.
        for slot in &mut self.slots {
            if let Some(queue) = slot.queue.take() {
                queue.close();
            }
            *slot = QueueSlot::new(slot.max);
        }
        self.device.reset();
        self.link.clear_status();
        self.accepted = 0;
        (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
    }
}

impl QueueSlot {
    fn new(max: u16) -> Self {
        Self { max, config: QueueConfig { size: max, ..QueueConfig::default() }, queue: None }
    }

    /// The most entries that it can have.
    pub(crate) fn max(&self) -> u16 {
        self.max
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.queue.is_some()
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
