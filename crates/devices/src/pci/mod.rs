//! PCI: the bus of functions, and the two ways to their configuration space.
//!
//! ```text
//! ports 0xcf8/0xcfc ── ConfigPorts ──┐
//!                                    ├──> PciBus ──> PciFunction (by bus, device, function)
//! memory window ────── Ecam ─────────┘
//! ```
//!
//! A function keeps its registers in a [`ConfigSpace`], which knows headers, base address registers and capabilities; the
//! function itself acts on what a write changed: [`MappedBars`] moves its registers on the machine's bus, [`Msi`] and
//! [`Msix`] send what was unmasked. Lock order: the way in, the function, the machine's bus. "PCI Local Bus
//! Specification", *Configuration Space*; "PCI Express Base Specification", *Enhanced Configuration Access Mechanism*.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

mod config_ports;
mod config_space;
mod ecam;
mod host_bridge;
mod mapped_bars;
mod msi;
mod msix;

pub use config_ports::{CONFIG_BASE, CONFIG_PORTS, ConfigPorts};
pub use config_space::{Bar, BarKind, ConfigError, ConfigSpace, Header};
pub use ecam::{ECAM_BUS_SIZE, Ecam};
pub use host_bridge::{HostBridge, PamEffect, PamSegment};
pub use mapped_bars::{BAR_STRIDE, MappedBars, bar_of};
pub use msi::{Msi, MsiSink, RecordedMessages};
pub use msix::{ENTRY_SIZE as MSIX_ENTRY_SIZE, MAX_VECTORS, Msix, MsixPlace};

/// A write to a double word of configuration space: the value, and the bits of it whose bytes were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigWrite {
    /// The double word, in which only the bits of `mask` count.
    pub value: u32,
    /// All bits of the bytes that are written.
    pub mask: u32,
}

impl ConfigWrite {
    /// What a register of value `old` becomes where every bit can be written.
    pub fn merge(self, old: u32) -> u32 {
        old & !self.mask | self.value & self.mask
    }
}

/// A PCI function, as configuration accesses see it.
///
/// `offset` is that of a double word: a multiple of 4, below 256, or 4096 through [`Ecam`].
pub trait PciFunction: Send {
    /// Reads a double word.
    fn read_config(&mut self, offset: u16) -> u32;
    /// Writes some or all bytes of a double word.
    fn write_config(&mut self, offset: u16, write: ConfigWrite);
}

/// A function as the bus holds it: with its lock, which is also that of its registers in other spaces.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Where a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Address {
    /// A function of bus 0. Numbers beyond their range are cut to it.
    pub fn on_bus_0(device: u8, function: u8) -> Self {
        Self { bus: 0, device: device & 0x1f, function: function & 7 }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// The functions of the machine.
#[derive(Default)]
pub struct PciBus(RwLock<BTreeMap<Address, SharedFunction>>);

impl PciBus {
    /// A bus with nothing on it: not even a host bridge.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A bus with the host bridge at 00:00.0.
    pub fn with_host_bridge() -> Arc<Self> {
        Self::with(HostBridge::new())
    }

    /// A bus with this host bridge at 00:00.0.
    pub fn with(bridge: HostBridge) -> Arc<Self> {
        let bus = Self::new();
        bus.insert(Address::on_bus_0(0, 0), Arc::new(Mutex::new(bridge)));
        bus
    }

    /// Puts `function` at `address`; false, and nothing done, where there is one already.
    pub fn insert(&self, address: Address, function: SharedFunction) -> bool {
        let mut functions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match functions.entry(address) {
            std::collections::btree_map::Entry::Occupied(_) => false,
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(function);
                true
            }
        }
    }

    /// Takes the function at `address` away.
    pub fn remove(&self, address: Address) -> Option<SharedFunction> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&address)
    }

    /// Reads up to 4 bytes at `offset`, which do not leave their double word; ones where no function is.
    fn read(&self, address: Address, offset: u16, data: &mut [u8]) {
        match self.get(address) {
            None => data.fill(0xff),
            Some(function) => {
                let value = lock(&function).read_config(offset & !3);
                copy_lane(value, offset, data);
            }
        }
    }

    /// Writes up to 4 bytes at `offset`, which do not leave their double word.
    fn write(&self, address: Address, offset: u16, data: &[u8]) {
        if let Some(function) = self.get(address) {
            lock(&function).write_config(offset & !3, from_lane(offset, data));
        }
    }

    fn get(&self, address: Address) -> Option<SharedFunction> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }
}

fn lock(function: &SharedFunction) -> std::sync::MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes of a double word that begin at `offset` in it; ones beyond its end.
fn copy_lane(value: u32, offset: u16, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(usize::from(offset & 3) + index).copied().unwrap_or(0xff);
    }
}

/// The write of `data` at `offset` as one of the double word there.
fn from_lane(offset: u16, data: &[u8]) -> ConfigWrite {
    let mut write = ConfigWrite { value: 0, mask: 0 };
    for (index, &byte) in data.iter().enumerate().take(4 - usize::from(offset & 3)) {
        let shift = 8 * (usize::from(offset & 3) + index);
        write.value |= u32::from(byte) << shift;
        write.mask |= 0xff << shift;
    }
    write
}
