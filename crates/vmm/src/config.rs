//! What a machine is made from: plain data, checked as a whole before anything is built.

use std::path::PathBuf;
use std::time::Duration;

use devices::fw_cfg::MAX_NAME;

use crate::boot::Protocol;
use crate::layout::{self, LayoutError};
pub use crate::layout::{MAX_MEMORY, MIN_MEMORY};
pub use crate::pmem::{MAX_PMEM, PMEM_UNIT, PmemConfig};
pub use crate::shares::{MAX_TAG as MAX_SHARE_TAG, ShareCache, ShareConfig, ShareKind};
pub use virtio::balloon::BalloonOptions;
pub use virtio::block::Limits;
pub use virtio::features::OPTIONAL as VIRTIO_FEATURES;
pub use virtio::vsock::GUEST_CIDS;

/// The most vCPUs that a machine can have.
pub const MAX_CPUS: u32 = 64;

/// The most files that can be given to the firmware configuration device.
pub const MAX_FW_CFG_FILES: usize = 256;

/// A whole machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// RAM in bytes.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u32,
    /// CPU model with its features: `host,-avx512f`.
    pub cpu: String,
    /// What runs the vCPUs.
    pub engine: EngineChoice,
    /// What the software CPU does with hot code.
    pub jit: Translation,
    /// What is booted.
    pub boot: Boot,
    /// How virtio devices are reached.
    pub transport: Transport,
    /// Virtio features that are not offered although they could be: of [`VIRTIO_FEATURES`].
    pub virtio_withheld: u64,
    /// Disks, in their order.
    pub disks: Vec<DiskConfig>,
    /// Files that are memory of the guest, in their order.
    pub pmem: Vec<PmemConfig>,
    /// Folders of the host.
    pub shares: Vec<ShareConfig>,
    /// Whether the guest gets random bytes from the host.
    pub rng: bool,
    /// The size of the terminal that is a virtio console, in columns and rows, where there is one.
    pub console: Option<(u16, u16)>,
    /// Further ports of the virtio console.
    pub ports: Vec<PortConfig>,
    /// The balloon, where there is one.
    pub balloon: Option<BalloonConfig>,
    /// Sockets between the guest and the host, where there are any.
    pub vsock: Option<VsockConfig>,
    /// More files of the firmware configuration device.
    pub fw_cfg: Vec<FwCfgFile>,
    /// Where the debug console leads, where there is one.
    pub debug_console: Option<PathBuf>,
    /// The port whose value ends the run, where there is one.
    pub debug_exit: Option<u16>,
    /// Whether there is the device that suites of unit tests expect.
    pub testdev: bool,
    /// Whether exits are counted.
    pub ledger: bool,
}

/// What the boot processor begins with.
#[derive(Clone, Debug)]
pub enum Boot {
    /// A kernel, loaded by the machine.
    Kernel(BootConfig),
    /// Firmware, which looks for what to boot.
    Firmware(FirmwareConfig),
}

/// Firmware.
#[derive(Clone, Debug)]
pub struct FirmwareConfig {
    /// The BIOS image.
    pub image: PathBuf,
    /// How long it offers its boot menu; zero for not at all.
    pub boot_menu: Duration,
}

/// A file of the firmware configuration device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FwCfgFile {
    /// Its name there.
    pub name: String,
    /// Where its contents come from.
    pub source: FwCfgSource,
}

/// Where the contents of a file come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FwCfgSource {
    /// A file of the host.
    File(PathBuf),
    /// These bytes, without a NUL.
    Text(String),
}

/// A port of the virtio console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its name in the guest, below `/dev/virtio-ports`.
    pub name: String,
    /// Where it leads on the host.
    pub path: PathBuf,
    /// What is there.
    pub backend: PortBackend,
}

/// What a port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortBackend {
    /// A file that gets what the guest sends.
    File,
    /// A Unix socket, for one client at a time.
    Socket,
    /// A pseudo-terminal, to which the path is a link.
    Pty,
}

/// A balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Its size, and what it can do.
    pub options: BalloonOptions,
    /// The Unix socket by which it is asked for another size.
    pub control: Option<PathBuf>,
}

/// How virtio devices are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// On the PCI bus.
    #[default]
    Pci,
    /// In memory, told of by ACPI, or by the kernel's command line where that has `acpi=off`.
    Mmio,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image, and how it is opened.
    pub image: disk::Options,
    /// What the guest is told as its serial number; 20 bytes count.
    pub serial: String,
    /// How much it may do.
    pub limits: Limits,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's address: of [`GUEST_CIDS`].
    pub cid: u32,
    /// Where programs of the host connect; with `_PORT` behind it, where those of the guest are connected to.
    pub path: PathBuf,
}

/// A module of a Multiboot image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// The file.
    pub path: PathBuf,
    /// What the image is told after its path; empty for nothing.
    pub arguments: String,
}

/// What is booted, and how.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// The kernel: a bzImage or an ELF file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Files with their arguments, which a Multiboot image has as its modules after the initrd.
    pub modules: Vec<ModuleConfig>,
    /// A cpio archive that is appended to it.
    pub overlay: Vec<u8>,
    /// The kernel's command line.
    pub cmdline: String,
    /// How the kernel is entered.
    pub protocol: Protocol,
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// `/dev/kvm` where it works, else the software CPU.
    #[default]
    Auto,
    /// The software CPU.
    Soft,
    /// `/dev/kvm`, or an error.
    Kvm,
}

/// What the software CPU does with hot code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Translation {
    /// It interprets it as all other.
    Off,
    /// It translates it.
    #[default]
    On,
    /// It does both, and compares after each block. For one vCPU.
    Lockstep,
}

/// What no machine can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too little or too much memory.
    #[error(transparent)]
    Memory(#[from] LayoutError),
    /// No vCPU, or too many.
    #[error("{0} vCPUs: a machine has 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// Several vCPUs cannot be compared: which of two stores comes first is not recorded.
    #[error("--jit lockstep compares one vCPU, not {0}")]
    Lockstep(u32),
    /// It is the software CPU that has a translator.
    #[error("--jit lockstep compares the software CPU with itself: it needs --engine soft")]
    LockstepEngine,
    /// A name that the firmware configuration device cannot have.
    #[error(
        "{0:?} is no name for a file of fw_cfg: it has 1 to {MAX_NAME} bytes of ASCII without control characters"
    )]
    FwCfgName(String),
    /// The same name twice.
    #[error("fw_cfg has two files of the name {0:?}")]
    FwCfgTwice(String),
    /// More files than there are keys for in practice.
    #[error("{0} files for fw_cfg are too many: the most is {MAX_FW_CFG_FILES}")]
    FwCfgCount(usize),
    /// A tag that a shared folder cannot have.
    #[error(
        "{0:?} is no tag for a share: it has 1 to {MAX_SHARE_TAG} letters, digits and - _ . +, and begins with a letter or digit"
    )]
    ShareTag(String),
    /// The same tag twice.
    #[error("two shares have the tag {0:?}")]
    ShareTwice(String),
    /// More persistent memories than a machine has.
    #[error("{0} files for persistent memory: a machine has at most {MAX_PMEM}")]
    PmemCount(usize),
    /// A size that persistent memory cannot have.
    #[error("persistent memory has a multiple of {PMEM_UNIT} bytes (2M), not {0}")]
    PmemSize(u64),
    /// More ports than a console has.
    #[error("a console with {0} ports: it has at most {max}, the terminal included", max = virtio::console::MAX_PORTS)]
    Ports(usize),
    /// Two ports of one name.
    #[error("two ports have the name {0:?}")]
    PortTwice(String),
    /// A balloon of all the memory or more.
    #[error("a balloon of {size} bytes leaves nothing of {memory} bytes of memory")]
    Balloon {
        /// Bytes of the balloon.
        size: u64,
        /// Bytes of RAM.
        memory: u64,
    },
    /// A command line that would end early.
    #[error("the kernel's command line holds a NUL character at byte {0}")]
    CmdlineNul(usize),
}

impl MachineConfig {
    /// A machine of one vCPU and the least memory, with no more devices than every machine has.
    pub fn new(boot: Boot) -> Self {
        Self {
            memory: MIN_MEMORY,
            cpus: 1,
            cpu: "host".into(),
            engine: EngineChoice::default(),
            jit: Translation::default(),
            boot,
            transport: Transport::default(),
            virtio_withheld: 0,
            disks: Vec::new(),
            pmem: Vec::new(),
            shares: Vec::new(),
            rng: false,
            console: None,
            ports: Vec::new(),
            balloon: None,
            vsock: None,
            fw_cfg: Vec::new(),
            debug_console: None,
            debug_exit: None,
            testdev: false,
            ledger: false,
        }
    }

    /// Looks for values that no machine can have.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> Result<(), ConfigError> {
        layout::regions(self.memory)?;
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.jit == Translation::Lockstep && self.cpus != 1 {
            return Err(ConfigError::Lockstep(self.cpus));
        }
        if self.jit == Translation::Lockstep && self.engine == EngineChoice::Kvm {
            return Err(ConfigError::LockstepEngine);
        }
        self.check_fw_cfg()?;
        crate::pmem::check(&self.pmem)?;
        crate::shares::check(&self.shares)?;
        self.check_virtio()?;
        let nul = match &self.boot {
            Boot::Kernel(boot) => boot.cmdline.find('\0'),
            Boot::Firmware(_) => None,
        };
        nul.map_or(Ok(()), |at| Err(ConfigError::CmdlineNul(at)))
    }

    fn check_virtio(&self) -> Result<(), ConfigError> {
        for (index, port) in self.ports.iter().enumerate() {
            if self.ports[..index].iter().any(|other| other.name == port.name) {
                return Err(ConfigError::PortTwice(port.name.clone()));
            }
        }
        match self.balloon.as_ref().map(|balloon| balloon.options.size) {
            Some(size) if size >= self.memory => Err(ConfigError::Balloon { size, memory: self.memory }),
            _ => Ok(()),
        }
    }

    fn check_fw_cfg(&self) -> Result<(), ConfigError> {
        if self.fw_cfg.len() > MAX_FW_CFG_FILES {
            return Err(ConfigError::FwCfgCount(self.fw_cfg.len()));
        }
        let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        for (index, FwCfgFile { name, .. }) in self.fw_cfg.iter().enumerate() {
            if name.is_empty() || name.len() > MAX_NAME || !plain(name) {
                return Err(ConfigError::FwCfgName(name.clone()));
            }
            if self.fw_cfg[..index].iter().any(|other| other.name == *name) {
                return Err(ConfigError::FwCfgTwice(name.clone()));
            }
        }
        Ok(())
    }
}

/// A machine for tests.
#[cfg(test)]
pub(crate) fn test_config(cmdline: &str) -> MachineConfig {
    MachineConfig { boot: tests::kernel(cmdline), ..tests::config() }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn kernel(cmdline: &str) -> Boot {
        Boot::Kernel(BootConfig {
            kernel: "vmlinuz".into(),
            initrd: None,
            modules: Vec::new(),
            overlay: Vec::new(),
            cmdline: cmdline.into(),
            protocol: Protocol::Auto,
        })
    }

    pub(super) fn config() -> MachineConfig {
        MachineConfig { memory: 64 << 20, engine: EngineChoice::Soft, ..MachineConfig::new(kernel("")) }
    }

    #[test]
    fn impossible_machines_are_refused_by_value() {
        assert_eq!(config().check(), Ok(()));
        for cpus in [0, 65, 300] {
            assert_eq!(MachineConfig { cpus, ..config() }.check(), Err(ConfigError::Cpus(cpus)));
        }
        let lockstep = MachineConfig { cpus: 2, jit: Translation::Lockstep, ..config() };
        assert_eq!(lockstep.check(), Err(ConfigError::Lockstep(2)));
        assert!(matches!(MachineConfig { memory: 0, ..config() }.check(), Err(ConfigError::Memory(_))));
        let nul = MachineConfig { boot: kernel("a\0b"), ..config() };
        assert_eq!(nul.check(), Err(ConfigError::CmdlineNul(1)));
    }

    #[test]
    fn ports_of_one_name_and_balloons_that_leave_nothing_are_refused() {
        let port = PortConfig { name: "a".into(), path: "x".into(), backend: PortBackend::File };
        let twice = MachineConfig { ports: vec![port.clone(), port], ..config() };
        assert_eq!(twice.check(), Err(ConfigError::PortTwice("a".into())));
        let options = BalloonOptions { size: 64 << 20, ..BalloonOptions::default() };
        let balloon = BalloonConfig { options, control: None };
        let all = MachineConfig { balloon: Some(balloon), ..config() };
        assert!(matches!(all.check(), Err(ConfigError::Balloon { .. })));
    }

    #[test]
    fn names_that_fw_cfg_cannot_have_are_refused() {
        let check = |names: &[&str]| {
            let file =
                |name: &&str| FwCfgFile { name: (*name).to_owned(), source: FwCfgSource::Text("x".into()) };
            MachineConfig { fw_cfg: names.iter().map(file).collect(), ..config() }.check()
        };
        let long = "n".repeat(MAX_NAME + 1);
        assert_eq!(check(&["opt/a", "opt/b", &long[1..]]), Ok(()));
        for name in ["", "a\nb", "\u{e4}", &long] {
            assert_eq!(check(&[name]), Err(ConfigError::FwCfgName(name.into())));
        }
        assert_eq!(check(&["opt/a", "opt/a"]), Err(ConfigError::FwCfgTwice("opt/a".into())));
        assert_eq!(check(&vec!["opt/a"; 257]), Err(ConfigError::FwCfgCount(257)));
    }
}
