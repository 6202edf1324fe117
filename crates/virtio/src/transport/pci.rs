//! Virtio over PCI, without what was before version 1. *Virtio Over PCI Bus*.
//!
//! All registers are in one memory window:
//!
//! ```text
//! 0x0000  common configuration       0x4000  MSI-X table
//! 0x1000  interrupt status           0x6000  MSI-X pending bits
//! 0x2000  the device's own
//! 0x3000  notifications, 4 bytes a queue
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::bus::{Device as Registers, MachineBus, SharedDevice};
use devices::irq::IrqLine;
use devices::pci::{
    BarKind, ConfigError, ConfigSpace, ConfigWrite, Header, MappedBars, MsiSink, Msix, MsixPlace,
    PciFunction, bar_of,
};

use super::core::{Core, Event, Interrupts};
use crate::memory::DmaMemory;
use crate::{Device, device_name};

const VENDOR: u16 = 0x1af4;
/// The PCI device id of virtio's device 0.
const FIRST_DEVICE: u16 = 0x1040;
/// The one base address register.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const BLOCK: u32 = 0x1000;
/// What the blocks of the window are.
const COMMON: u32 = 0;
const ISR: u32 = 1;
const DEVICE: u32 = 2;
const NOTIFY: u32 = 3;
const TABLE: u32 = 4;
const PENDING: u32 = 6;
/// Bytes between the queues' notification registers.
const NOTIFY_STRIDE: u32 = 4;

/// The vendor capability: its id, its kinds.
const CAPABILITY: u8 = 0x09;
mod kind {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    /// A way to the window through the configuration space.
    pub(super) const PCI: u8 = 5;
}
/// Offsets in the capability of [`kind::PCI`].
const ACCESS_BAR: u16 = 4;
const ACCESS_OFFSET: u16 = 8;
const ACCESS_LENGTH: u16 = 12;
const ACCESS_DATA: u16 = 16;

/// The common configuration's registers.
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const QUEUE_NOTIFY_DATA: u64 = 0x38;
    /// Bytes in all.
    pub(super) const SIZE: usize = 0x3c;
}
/// No vector: what it would tell is not told.
const NO_VECTOR: u16 = 0xffff;
/// The interrupt status: a queue, the configuration.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What a function is connected to.
pub struct Connections {
    /// Where its registers are mapped.
    pub bus: Arc<MachineBus>,
    /// The guest's RAM.
    pub memory: DmaMemory,
    /// Features that are not offered although they could be.
    pub withheld: u64,
    /// Where its interrupt messages go.
    pub messages: Arc<dyn MsiSink>,
    /// Its INTx line.
    pub line: IrqLine,
}

/// What raises the function's interrupts. It has a lock of its own, because those who work on the queues raise them too.
struct Signals {
    config: ConfigSpace,
    msix: Msix,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    line: IrqLine,
}

impl Signals {
    /// Tells the driver of something, by a message or by the interrupt line.
    fn raise(&mut self, event: Event) {
        let (vector, bit) = match event {
            Event::Queue(index) => {
                (self.queue_vectors.get(usize::from(index)).copied().unwrap_or(NO_VECTOR), ISR_QUEUE)
            }
            Event::Config => (self.config_vector, ISR_CONFIG),
        };
        if self.msix.is_enabled(&self.config) {
            self.msix.signal(&self.config, vector);
        } else {
            self.isr |= bit;
            self.update_line();
        }
    }

    fn update_line(&mut self) {
        let asserted = self.isr != 0 && !self.msix.is_enabled(&self.config);
        let level = self.config.set_interrupt(asserted);
        self.line.set(level);
    }

    /// What a reset of the device makes of its interrupts.
    fn forget(&mut self) {
        self.config_vector = NO_VECTOR;
        self.queue_vectors.fill(NO_VECTOR);
        self.isr = 0;
        self.update_line();
    }

    /// A vector as it can be, else none.
    fn vector(&self, value: u64) -> u16 {
        u16::try_from(value).ok().filter(|&vector| vector < self.msix.vectors()).unwrap_or(NO_VECTOR)
    }
}

impl Interrupts for Mutex<Signals> {
    fn raise(&self, event: Event) {
        self.lock().unwrap_or_else(PoisonError::into_inner).raise(event);
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    signals: Arc<Mutex<Signals>>,
    bars: MappedBars,
    core: Core,
    /// Offset of the capability of [`kind::PCI`].
    access: u16,
    this: Weak<Mutex<Self>>,
}

impl VirtioPci {
    /// A function with `device` behind it.
    ///
    /// # Errors
    /// [`ConfigError`] for a device of more queues than there are vectors.
    pub fn new(device: Box<dyn Device>, connections: Connections) -> Result<Arc<Mutex<Self>>, ConfigError> {
        let Connections { bus, memory, withheld, messages, line } = connections;
        let (id, queues) = (device.id(), device.queue_sizes().len() as u16);
        let header = Header {
            vendor: VENDOR,
            device: FIRST_DEVICE + id,
            class: class(id),
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: 0x40 + id,
            interrupt_pin: 1,
            multifunction: false,
        };
        let mut config = ConfigSpace::new(&header);
        config.add_bar(BAR.into(), BarKind::Memory64, BAR_SIZE)?;
        let place = MsixPlace { bar: BAR, table: TABLE * BLOCK, pending: PENDING * BLOCK };
        let msix = Msix::new(&mut config, queues.saturating_add(1), place, messages)?;
        for (kind, block) in [(kind::COMMON, COMMON), (kind::ISR, ISR), (kind::DEVICE, DEVICE)] {
            config.add_capability(CAPABILITY, &capability(kind, block, &[]), &[])?;
        }
        let stride = NOTIFY_STRIDE.to_le_bytes();
        config.add_capability(CAPABILITY, &capability(kind::NOTIFY, NOTIFY, &stride), &[])?;
        let mut writable = [0; 18];
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let access = config.add_capability(CAPABILITY, &access_capability(), &writable)?.into();
        let (config_vector, isr, queue_vectors) = (NO_VECTOR, 0, vec![NO_VECTOR; queues.into()]);
        let signals = Signals { config, msix, config_vector, queue_vectors, isr, line };
        let signals = Arc::new(Mutex::new(signals));
        let core = Core::new(device, memory, withheld, signals.clone());
        let bars = MappedBars::new(&bus, device_name(id));
        Ok(Arc::new_cyclic(|this| Mutex::new(Self { signals, bars, core, access, this: this.clone() })))
    }

    fn signals(&self) -> MutexGuard<'_, Signals> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reset of the machine: the window is nowhere, and nothing is negotiated.
    fn power_up(&mut self) {
        self.core.reset();
        self.bars.unmap();
        let mut signals = self.signals();
        signals.config.reset();
        signals.msix.reset();
        signals.forget();
    }

    /// All of the common configuration as it reads now.
    fn common(&self) -> [u8; common::SIZE] {
        let mut bytes = [0; common::SIZE];
        let signals = self.signals();
        let mut put = |at: u64, value: u64, len: usize| {
            bytes[at as usize..at as usize + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        put(common::DEVICE_FEATURE_SELECT, self.core.device_features_select.into(), 4);
        put(common::DEVICE_FEATURE, self.core.device_features().into(), 4);
        put(common::DRIVER_FEATURE_SELECT, self.core.driver_features_select.into(), 4);
        put(common::DRIVER_FEATURE, self.core.driver_features().into(), 4);
        put(common::CONFIG_MSIX_VECTOR, signals.config_vector.into(), 2);
        put(common::NUM_QUEUES, self.core.queues().into(), 2);
        put(common::DEVICE_STATUS, self.core.status().bits().into(), 1);
        put(common::CONFIG_GENERATION, self.core.config_generation().into(), 1);
        put(common::QUEUE_SELECT, self.core.queue_select.into(), 2);
        let index = self.core.queue_select;
        if let Some(slot) = self.core.slot() {
            put(common::QUEUE_SIZE, slot.config.size.into(), 2);
            put(common::QUEUE_MSIX_VECTOR, signals.queue_vectors[usize::from(index)].into(), 2);
            put(common::QUEUE_ENABLE, slot.is_enabled().into(), 2);
            put(common::QUEUE_NOTIFY_OFF, index.into(), 2);
            put(common::QUEUE_DESC, slot.config.descriptors, 8);
            put(common::QUEUE_DRIVER, slot.config.driver, 8);
            put(common::QUEUE_DEVICE, slot.config.device, 8);
            put(common::QUEUE_NOTIFY_DATA, index.into(), 2);
        }
        bytes
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len().min(8)].copy_from_slice(&data[..data.len().min(8)]);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (_, 8) => {
                self.write_common(offset, &data[..4]);
                self.write_common(offset + 4, &data[4..]);
            }
            (common::DEVICE_FEATURE_SELECT, 4) => self.core.device_features_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, 4) => self.core.driver_features_select = value as u32,
            (common::DRIVER_FEATURE, 4) => self.core.set_driver_features(value as u32),
            (common::CONFIG_MSIX_VECTOR, 2) => {
                let mut signals = self.signals();
                signals.config_vector = signals.vector(value);
            }
            (common::DEVICE_STATUS, 1) => self.write_status(value as u8),
            (common::QUEUE_SELECT, 2) => self.core.queue_select = value as u16,
            (common::QUEUE_MSIX_VECTOR, 2) => {
                let mut signals = self.signals();
                let (index, vector) = (usize::from(self.core.queue_select), signals.vector(value));
                if let Some(of_queue) = signals.queue_vectors.get_mut(index) {
                    *of_queue = vector;
                }
            }
            (common::QUEUE_ENABLE, 2) if value == 1 => self.core.enable_queue(),
            (common::QUEUE_SIZE, 2) => {
                if let Some(config) = self.core.slot_config() {
                    config.size = value as u16;
                }
            }
            (common::QUEUE_DESC..common::QUEUE_NOTIFY_DATA, 4) => self.write_address(offset, value as u32),
            _ => {}
        }
    }

    /// One half of an address of the selected queue.
    fn write_address(&mut self, offset: u64, value: u32) {
        let Some(config) = self.core.slot_config() else { return };
        let address = match offset & !7 {
            common::QUEUE_DESC => &mut config.descriptors,
            common::QUEUE_DRIVER => &mut config.driver,
            _ => &mut config.device,
        };
        let shift = 8 * (offset & 4);
        *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn write_status(&mut self, value: u8) {
        self.core.set_status(value);
        if value == 0 {
            self.signals().forget();
        }
    }

    fn notify(&mut self, offset: u64) {
        // Without this the function must not reach memory.
        if !self.signals().config.is_bus_master() {
            return;
        }
        if let Ok(index) = u16::try_from(offset / u64::from(NOTIFY_STRIDE)) {
            self.core.notified(index);
        }
    }

    fn read_window(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % u64::from(BLOCK);
        match (offset / u64::from(BLOCK)) as u32 {
            COMMON => {
                let bytes = self.common();
                data.fill(0);
                for (to, from) in data.iter_mut().zip(bytes.iter().skip(within as usize)) {
                    *to = *from;
                }
            }
            ISR => {
                data.fill(0);
                if within == 0 {
                    let mut signals = self.signals();
                    data[0] = std::mem::take(&mut signals.isr);
                    signals.update_line();
                }
            }
            DEVICE => self.core.read_config(within, data),
            TABLE..PENDING => self.signals().msix.read_table(offset - u64::from(TABLE * BLOCK), data),
            PENDING => self.signals().msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_window(&mut self, offset: u64, data: &[u8]) {
        let within = offset % u64::from(BLOCK);
        match (offset / u64::from(BLOCK)) as u32 {
            COMMON => self.write_common(within, data),
            DEVICE => self.core.write_config(within, data),
            NOTIFY => self.notify(within),
            TABLE..PENDING => {
                let signals = &mut *self.signals();
                signals.msix.write_table(&signals.config, offset - u64::from(TABLE * BLOCK), data);
            }
            _ => {}
        }
    }

    /// Where an access through the configuration space goes in the window, and its length, where that is proper.
    fn access(&self) -> Option<(u64, usize)> {
        let word = |offset| self.signals().config.read(self.access + offset);
        let (bar, offset) = (word(ACCESS_BAR) as u8, u64::from(word(ACCESS_OFFSET)));
        let len = word(ACCESS_LENGTH);
        let proper = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len.into());
        (bar == BAR && proper && offset < BAR_SIZE).then_some((offset, len as usize))
    }
}

/// The PCI class of a device: storage, network, communication, or none of them.
fn class(id: u16) -> u32 {
    match id {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

/// A vendor capability after its id and link: the block of the window.
fn capability(kind: u8, block: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, kind, BAR, 0, 0, 0];
    body.extend((block * BLOCK).to_le_bytes());
    body.extend(BLOCK.to_le_bytes());
    body.extend(more);
    body
}

/// The capability through which firmware that cannot map the window reaches it: the driver fills it in.
fn access_capability() -> [u8; 18] {
    let mut body = [0; 18];
    (body[0], body[1]) = (20, kind::PCI);
    body
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, offset: u16) -> u32 {
        if offset == self.access + ACCESS_DATA
            && let Some((at, len)) = self.access()
        {
            let mut data = [0; 4];
            self.read_window(at, &mut data[..len]);
            return u32::from_le_bytes(data);
        }
        self.signals().config.read(offset)
    }

    fn write_config(&mut self, offset: u16, write: ConfigWrite) {
        if offset == self.access + ACCESS_DATA
            && let Some((at, len)) = self.access()
        {
            self.write_window(at, &write.value.to_le_bytes()[..len]);
            return;
        }
        let this = self.this.upgrade();
        let signals = &mut *self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        signals.config.write(offset, write);
        if let Some(this) = this {
            let registers: SharedDevice = this;
            self.bars.update(&signals.config, &registers);
        }
        signals.msix.send_unmasked(&signals.config);
        signals.update_line();
    }
}

impl Registers for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (_, offset) = bar_of(offset);
        self.read_window(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (_, offset) = bar_of(offset);
        self.write_window(offset, data);
    }

    fn power_cycle(&mut self) {
        self.power_up();
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match (bar_of(offset).1 / u64::from(BLOCK)) as u32 {
            COMMON => "COMMON_CFG",
            ISR => "ISR",
            DEVICE => "DEVICE_CFG",
            NOTIFY => "NOTIFY",
            TABLE..PENDING => "MSIX_TABLE",
            PENDING => "MSIX_PBA",
            _ => "none",
        }
    }
}

#[cfg(test)]
mod tests;
