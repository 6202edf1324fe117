//! The machine's PCI functions besides the host bridge: which there are, and what they are connected to.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::{MachineBus, SharedDevice};
use devices::irq::{IrqLine, IrqSink, SharedLine, Sharing};
use devices::pci::{Address, Ecam, MsiSink, PciBus};
use engine::Space;
use guest_memory::GuestMemory;
use virtio::block::{Block, BlockOptions};
use virtio::memory::DmaMemory;
use virtio::rng::Rng;
use virtio::transport::pci::{Connections, VirtioPci};

use crate::acpi_tables::pci_gsi;
use crate::config::MachineConfig;
use crate::error::BuildError;
use crate::layout;
use crate::pmem::PmemFiles;
use crate::shares;

/// The slots that functions can have; the host bridge has the first.
const SLOTS: std::ops::Range<u8> = 1..32;
/// The last bus that is decoded: there are no bridges.
pub const LAST_BUS: u8 = 0;

/// Makes the devices that `config` asks for, and those of its persistent memory, in the order of their slots.
///
/// # Errors
/// [`BuildError::Disk`] for an image that cannot be a disk, [`BuildError::Share`] for what is no folder, [`BuildError::Output`] where the host has no random bytes.
pub fn devices(config: &MachineConfig, pmem: &PmemFiles) -> Result<Vec<Box<dyn virtio::Device>>, BuildError> {
    let mut devices: Vec<Box<dyn virtio::Device>> = Vec::new();
    for disk in &config.disks {
        let options = BlockOptions {
            disk: disk::open(&disk.image)?,
            label: disk::Name(&disk.image.path).to_string(),
            serial: disk.serial.clone(),
            queues: config.cpus,
            limits: disk.limits,
        };
        devices.push(Box::new(Block::new(options)));
    }
    devices.extend(pmem.devices());
    devices.extend(shares::devices(&config.shares, config.memory)?);
    if config.rng {
        const SOURCE: &str = "/dev/urandom";
        let source = File::open(SOURCE);
        let source = source.map_err(|source| BuildError::Output { path: SOURCE.into(), source })?;
        devices.push(Box::new(Rng::new(Box::new(source))));
    }
    Ok(devices)
}

/// What functions are connected to.
pub struct Wiring<'a> {
    /// The guest's RAM.
    pub memory: &'a GuestMemory,
    /// The interrupt controllers' input lines.
    pub irqs: Arc<dyn IrqSink>,
    /// Virtio features that are not offered although they could be.
    pub withheld: u64,
    /// Where interrupt messages go.
    pub messages: Arc<dyn MsiSink>,
}

/// The virtio devices on their bus.
#[derive(Default)]
pub struct VirtioDevices(Vec<SharedDevice>);

impl VirtioDevices {
    pub(crate) fn add(&mut self, device: SharedDevice) {
        self.0.push(device);
    }

    /// The machine ends: comes back when none of them does anything for the guest any more.
    pub fn stop(&self) {
        for device in &self.0 {
            device.lock().unwrap_or_else(PoisonError::into_inner).power_cycle();
        }
    }
}

/// Puts the devices on the PCI bus, and its configuration space into memory.
///
/// # Errors
/// [`BuildError::Slots`] for more devices than there are slots.
pub fn attach(
    bus: &Arc<MachineBus>,
    pci: &Arc<PciBus>,
    wiring: &Wiring<'_>,
    devices: Vec<Box<dyn virtio::Device>>,
) -> Result<VirtioDevices, BuildError> {
    let ecam = Arc::new(Mutex::new(Ecam::new(pci.clone())));
    let window = (u64::from(LAST_BUS) + 1) * devices::pci::ECAM_BUS_SIZE;
    bus.insert(Space::Memory, layout::PCI_ECAM.start, window, "pci", ecam)?;
    if devices.len() > SLOTS.len() {
        return Err(BuildError::Slots(devices.len()));
    }
    let mut functions = VirtioDevices::default();
    let mut lines: BTreeMap<u32, Arc<SharedLine>> = BTreeMap::new();
    for (slot, device) in SLOTS.zip(devices) {
        let gsi = pci_gsi(slot, 0);
        let line = lines
            .entry(gsi)
            .or_insert_with(|| SharedLine::new(IrqLine::new(wiring.irqs.clone(), gsi), Sharing::Level));
        let connections = Connections {
            bus: bus.clone(),
            memory: DmaMemory::new(wiring.memory.clone()),
            withheld: wiring.withheld,
            messages: wiring.messages.clone(),
            line: line.input(),
        };
        let function = VirtioPci::new(device, connections)?;
        functions.add(function.clone());
        pci.insert(Address::on_bus_0(slot, 0), function);
    }
    Ok(functions)
}
