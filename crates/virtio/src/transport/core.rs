//! A device's state as its driver sees it, whatever the registers look like. *Basic Facilities of a Virtio Device*.
//!
//! ```text
//!   reset ──ACKNOWLEDGE, DRIVER──> negotiating ──FEATURES_OK──> queues are set up ──DRIVER_OK──> live
//!     ^                                                                                           │ a rule is broken
//!     └──────────────────────────── status := 0 ──────────────────── NEEDS_RESET <────────────────┘
//! ```

use bitflags::bitflags;

use crate::memory::DmaMemory;
use crate::queue::{Queue, QueueConfig, QueueError};
use crate::{Device, features};

bitflags! {
    /// The device status field.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Status: u8 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const NEEDS_RESET = 64;
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

/// One queue as the driver sets it up.
pub(crate) struct QueueSlot {
    /// The most entries.
    max: u16,
    /// What the driver wrote.
    pub(crate) config: QueueConfig,
    queue: Option<Queue>,
}

/// A device with its status, its features and its queues.
pub(crate) struct Core {
    device: Box<dyn Device>,
    memory: DmaMemory,
    pub(crate) status: Status,
    /// What the driver accepts.
    accepted: u64,
    /// Which half of the features the driver looks at, and writes.
    pub(crate) device_features_select: u32,
    pub(crate) driver_features_select: u32,
    pub(crate) queue_select: u16,
    slots: Vec<QueueSlot>,
}

impl Core {
    pub(crate) fn new(device: Box<dyn Device>, memory: DmaMemory) -> Self {
        let slots = device.queue_sizes().iter().map(|&max| QueueSlot::new(max)).collect();
        Self {
            device,
            memory,
            status: Status::empty(),
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

    fn offered(&self) -> u64 {
        self.device.features() | features::OFFERED
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
        if !self.status.contains(Status::FEATURES_OK) {
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

    /// The driver has set up the selected queue.
    pub(crate) fn enable_queue(&mut self) {
        if !self.status.contains(Status::FEATURES_OK) {
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
            Ok(queue) => slot.queue = Some(queue),
            Err(error) => self.fail(self.queue_select, &error),
        }
    }

    /// The driver writes the status: zero resets; other bits are only added. Gives what it is to be told.
    pub(crate) fn set_status(&mut self, value: u8) -> Vec<Event> {
        if value == 0 {
            self.reset();
            return Vec::new();
        }
        let before = self.status;
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
        self.status = status;
        if !status.contains(ready) || before.contains(Status::DRIVER_OK) {
            return Vec::new();
        }
        self.device.activate(self.accepted);
        // What the driver put into the queues before it was ready.
        (0..self.queues()).flat_map(|index| self.notified(index)).collect()
    }

    /// The driver notifies of a queue: takes what is in it. Gives what the driver is to be told.
    pub(crate) fn notified(&mut self, index: u16) -> Option<Event> {
        if !self.status.contains(Status::DRIVER_OK) || self.status.contains(Status::NEEDS_RESET) {
            return None;
        }
        let queue = self.slots.get_mut(usize::from(index))?.queue.as_mut()?;
        let done = self.device.process(index, queue).and_then(|()| queue.needs_notification());
        match done {
            Ok(notify) => notify.then_some(Event::Queue(index)),
            Err(error) => {
                self.fail(index, &error);
                Some(Event::Config)
            }
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
        self.device.reset();
        self.status = Status::empty();
        self.accepted = 0;
        (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
        for slot in &mut self.slots {
            *slot = QueueSlot::new(slot.max);
        }
    }

    /// The driver broke a rule: nothing happens any more until it resets the device.
    fn fail(&mut self, queue: u16, error: &QueueError) {
        log::warn!(
            "virtio device {}, queue {queue}: the driver gave {error}; it has to reset the device",
            self.device.id()
        );
        self.status |= Status::NEEDS_RESET;
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
