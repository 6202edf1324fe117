//! What a machine is made from: plain data, checked as a whole before anything is built.

use std::path::PathBuf;

use crate::boot::Protocol;
use crate::layout::{self, LayoutError};
pub use crate::layout::{MAX_MEMORY, MIN_MEMORY};

/// The most vCPUs that a machine can have.
pub const MAX_CPUS: u32 = 64;

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
    pub boot: BootConfig,
    /// The port whose value ends the run, where there is one.
    pub debug_exit: Option<u16>,
    /// Whether there is the device that suites of unit tests expect.
    pub testdev: bool,
    /// Whether exits are counted.
    pub ledger: bool,
}

/// What is booted, and how.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// The kernel: a bzImage or an ELF file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
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
    /// A command line that would end early.
    #[error("the kernel's command line holds a NUL character at byte {0}")]
    CmdlineNul(usize),
}

impl MachineConfig {
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
        match self.boot.cmdline.find('\0') {
            Some(at) => Err(ConfigError::CmdlineNul(at)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            memory: 64 << 20,
            cpus: 1,
            cpu: "host".into(),
            engine: EngineChoice::Soft,
            jit: Translation::On,
            boot: BootConfig {
                kernel: "vmlinuz".into(),
                initrd: None,
                overlay: Vec::new(),
                cmdline: String::new(),
                protocol: Protocol::Auto,
            },
            debug_exit: None,
            testdev: false,
            ledger: false,
        }
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
        let mut nul = config();
        nul.boot.cmdline = "a\0b".into();
        assert_eq!(nul.check(), Err(ConfigError::CmdlineNul(1)));
    }
}
