use std::path::PathBuf;

use crate::acpi_tables::AcpiError;
use crate::boot::{BootError, FileError, FirmwareError};
use crate::config::ConfigError;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A value that no machine can have.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] guest_memory::MemoryError),
    /// No ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A file that cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that is no firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// An image that cannot be a disk.
    #[error("{} is no disk: {}", disk::Name(&.0.path), .0.reason)]
    Disk(disk::Error),
    /// A file that cannot be persistent memory.
    #[error("{} cannot be persistent memory: {reason}", disk::Name(path))]
    Pmem {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// More persistent memory than there are addresses for.
    #[error(
        "there is no room for {} as persistent memory: it takes {size} bytes from {start:#x} on, and the processor's \
         addresses end at {limit:#x}",
        disk::Name(path)
    )]
    PmemRoom {
        /// The file.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// First guest-physical address that is free.
        start: u64,
        /// Where addresses end.
        limit: u64,
    },
    /// What cannot be a shared folder.
    #[error("{} cannot be shared: {reason}", path.display())]
    Share {
        /// The folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A path that cannot be the socket device's.
    #[error("no socket for the guest at {}: {reason}", path.display())]
    Vsock {
        /// The path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// More devices than the bus has slots.
    #[error("{0} devices are too many: the PCI bus has 31 slots")]
    Slots(usize),
    /// More devices than there are places in memory or interrupts for.
    #[error("{count} devices in memory are too many: this machine has places and interrupts for {most}")]
    MmioSlots {
        /// Devices.
        count: usize,
        /// The most.
        most: usize,
    },
    /// A PCI function that cannot be: a defect.
    #[error(transparent)]
    Pci(#[from] devices::pci::ConfigError),
    /// A file that cannot be opened or written.
    #[error("cannot open {}: {source}", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// A kernel or an initrd that cannot be booted.
    #[error("cannot boot {}: {source}", kernel.display())]
    Boot {
        /// The kernel.
        kernel: PathBuf,
        /// What is wrong with it.
        source: BootError,
    },
    /// Two devices at one address: a defect, or a debug-exit port where a device is.
    #[error(transparent)]
    Bus(#[from] devices::bus::BusError),
    /// No CPU of that model.
    #[error("--cpu: {0}")]
    CpuModel(String),
    /// The engine is not there, or refuses.
    #[error(transparent)]
    Engine(#[from] engine::EngineError),
    /// A system call failed.
    #[error("the host gives no thread: {0}")]
    Host(#[from] std::io::Error),
}

impl From<disk::Error> for BuildError {
    fn from(error: disk::Error) -> Self {
        // Not as a cause: all of it is in the message.
        Self::Disk(error)
    }
}
