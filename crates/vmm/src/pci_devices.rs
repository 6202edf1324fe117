//! The machine's PCI functions besides the host bridge: which there are, and what they are connected to.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::{Device, MachineBus};
use devices::irq::{IrqLine, IrqSink, SharedLine, Sharing};
use devices::pci::{Address, Ecam, MsiSink, PciBus};
use engine::Space;
use guest_memory::GuestMemory;
use rustix::fs::{FlockOperation, flock};
use virtio::block::{Block, Disk, SECTOR};
use virtio::memory::DmaMemory;
use virtio::rng::Rng;
use virtio::transport::pci::{Connections, VirtioPci};

use crate::acpi_tables::pci_gsi;
use crate::config::{DiskConfig, MachineConfig};
use crate::error::BuildError;
use crate::layout;

/// The slots that functions can have; the host bridge has the first.
const SLOTS: std::ops::Range<u8> = 1..32;
/// The last bus that is decoded: there are no bridges.
pub const LAST_BUS: u8 = 0;

/// Makes the devices that `config` asks for, in the order of their slots.
///
/// # Errors
/// [`BuildError::Disk`] for an image that cannot be a disk, [`BuildError::Output`] where the host has no random bytes.
pub fn devices(config: &MachineConfig) -> Result<Vec<Box<dyn virtio::Device>>, BuildError> {
    let mut devices: Vec<Box<dyn virtio::Device>> = Vec::new();
    for disk in &config.disks {
        devices.push(Box::new(Block::new(Box::new(RawDisk::open(disk)?), &disk.serial)));
    }
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
    /// Where interrupt messages go.
    pub messages: Arc<dyn MsiSink>,
}

/// The virtio devices on their bus.
#[derive(Default)]
pub struct VirtioDevices(Vec<Arc<Mutex<VirtioPci>>>);

impl VirtioDevices {
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
            messages: wiring.messages.clone(),
            line: line.input(),
        };
        let function = VirtioPci::new(device, connections)?;
        functions.0.push(function.clone());
        pci.insert(Address::on_bus_0(slot, 0), function);
    }
    Ok(functions)
}

/// A disk whose bytes are a file's.
#[derive(Debug)]
struct RawDisk {
    file: File,
    len: u64,
    read_only: bool,
}

impl RawDisk {
    /// Opens an image, for itself alone where it may be written.
    fn open(config: &DiskConfig) -> Result<Self, BuildError> {
        let error = |reason: String| BuildError::Disk { path: config.path.clone(), reason };
        let host = |source: io::Error| error(source.to_string());
        let kind = std::fs::metadata(&config.path).map_err(host)?.file_type();
        if !kind.is_file() {
            let what = if kind.is_dir() { "a directory" } else { "a special file" };
            return Err(error(format!("it is {what}, not a file")));
        }
        let read_only = config.read_only;
        let file = File::options().read(true).write(!read_only).open(&config.path).map_err(host)?;
        let (lock, users) = match read_only {
            true => (FlockOperation::NonBlockingLockShared, "writes to it"),
            false => (FlockOperation::NonBlockingLockExclusive, "uses it"),
        };
        flock(&file, lock).map_err(|_| error(format!("another process {users}")))?;
        let len = file.metadata().map_err(host)?.len();
        check_size(&config.path, len)?;
        Ok(Self { file, len, read_only })
    }
}

fn check_size(path: &Path, len: u64) -> Result<(), BuildError> {
    let reason = match len {
        0 => "it is empty".to_owned(),
        len if len % SECTOR != 0 => format!("it has {len} bytes, no multiple of {SECTOR}"),
        _ => return Ok(()),
    };
    Err(BuildError::Disk { path: path.to_owned(), reason })
}

impl Disk for RawDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, read_only: bool) -> Result<RawDisk, String> {
        let config = DiskConfig { path: path.to_owned(), read_only, serial: String::new() };
        RawDisk::open(&config).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_a_disk_and_what_is_written_is_in_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2048).unwrap();
        let mut disk = open(file.path(), false).unwrap();
        disk.write(512, &[7; 512]).unwrap();
        disk.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[512..1024], [7; 512]);
        assert_eq!(disk.len(), 2048);
        let mut read = [0; 2];
        disk.read(1023, &mut read).unwrap();
        assert_eq!(read, [7, 0]);
    }

    #[test]
    fn a_disk_has_one_writer_or_several_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let writer = open(file.path(), false).unwrap();
        for read_only in [false, true] {
            let refused = open(file.path(), read_only).unwrap_err();
            assert!(refused.contains("another process"), "{refused}");
        }
        drop(writer);
        let (_one, _two) = (open(file.path(), true).unwrap(), open(file.path(), true).unwrap());
        assert!(open(file.path(), false).is_err());
    }

    #[test]
    fn what_is_no_disk_is_refused_with_the_reason() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (len, why) in [(0, "is empty"), (513, "no multiple of 512")] {
            file.as_file().set_len(len).unwrap();
            let refused = open(file.path(), true).unwrap_err();
            assert!(refused.contains(why) && refused.contains(file.path().to_str().unwrap()), "{refused}");
        }
        assert!(open(Path::new("/"), true).unwrap_err().contains("a directory"));
        assert!(open(Path::new("/dev/zero"), true).unwrap_err().contains("a special file"));
        assert!(open(Path::new("/nonexistent"), true).unwrap_err().contains("No such file"));
    }
}
