//! The engines: which one runs the machine, and the interrupt controllers that come with it.

use std::sync::Arc;

use devices::bus::{BusError, MachineBus, Window};
use devices::clock::Timers;
use devices::interrupt::{ApicFeatures, InterruptFabric, VcpuBus};
use devices::irq::{IrqLine, IrqSink};
use devices::pci::MsiSink;
use devices::pit::{self, Pit};
use emulator::cpuid::{CpuidLeaf, feature};
use emulator::{CpuModel, LockstepVcpu, SoftVcpu, VcpuConfig};
use engine::{Attention, Bus, EngineError, Space, Vcpu};
use exits::Recorder;
use guest_memory::GuestMemory;
use kvm::{CpuidEntry, KvmVm};

use crate::config::{EngineChoice, MachineConfig, Translation};
use crate::error::BuildError;

/// A vCPU, and what it sees of the machine.
pub type VcpuAndBus = (Box<dyn Vcpu>, Arc<dyn Bus>);

/// What runs the vCPUs of one machine.
pub enum Engine {
    /// Ringside's own CPU, with the interrupt controllers and the PIT of `devices`.
    Soft(SoftMachine),
    /// `/dev/kvm`, with the kernel's.
    Kvm(KvmMachine),
}

/// A machine in KVM.
pub struct KvmMachine {
    vm: KvmVm,
    /// The CPU model, unless it is all that the host can do.
    model: Option<CpuModel>,
    tsc_frequency: u64,
}

/// What the software vCPUs of one machine share.
pub struct SoftMachine {
    memory: GuestMemory,
    timers: Timers,
    fabric: Arc<InterruptFabric>,
    model: Arc<CpuModel>,
    shared: Arc<emulator::Shared>,
    jit: Translation,
}

impl Engine {
    /// Takes the engine that `config` asks for.
    ///
    /// # Errors
    /// [`BuildError`] where it is not there, or has no such CPU.
    pub fn new(
        config: &MachineConfig,
        memory: &GuestMemory,
        timers: &Timers,
        attentions: &[Arc<Attention>],
    ) -> Result<Self, BuildError> {
        let unusable = match config.engine {
            EngineChoice::Soft => "not asked for".to_owned(),
            EngineChoice::Kvm | EngineChoice::Auto => match kvm::probe() {
                Ok(_) => return Ok(Self::Kvm(KvmMachine::new(config, memory, timers)?)),
                Err(reason) => reason,
            },
        };
        if config.engine == EngineChoice::Kvm {
            return Err(EngineError::Unavailable(format!("--engine kvm: {unusable}")).into());
        }
        log::info!("the software CPU runs the guest (/dev/kvm: {unusable})");
        let model = model(config)?;
        let features = ApicFeatures {
            physical_address_bits: u8::try_from(model.physical_bits()).unwrap_or(u8::MAX),
            x2apic: model.has(feature::X2APIC),
            tsc_deadline: model.has(feature::TSC_DEADLINE),
        };
        Ok(Self::Soft(SoftMachine {
            memory: memory.clone(),
            timers: timers.clone(),
            fabric: InterruptFabric::new(features, timers, attentions),
            model: Arc::new(model),
            shared: Arc::new(emulator::Shared::new(config.cpus)),
            jit: config.jit,
        }))
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Soft(_) => "soft",
            Self::Kvm(_) => "kvm",
        }
    }

    /// The interrupt controllers' input lines, by the ISA interrupts' numbers.
    pub fn irqs(&self) -> Arc<dyn IrqSink> {
        match self {
            Self::Soft(soft) => soft.fabric.clone(),
            Self::Kvm(kvm) => Arc::new(KvmLines(kvm.vm.clone())),
        }
    }

    /// Where functions send their interrupt messages.
    pub fn messages(&self) -> Arc<dyn MsiSink> {
        match self {
            Self::Soft(soft) => soft.fabric.clone(),
            Self::Kvm(kvm) => Arc::new(KvmLines(kvm.vm.clone())),
        }
    }

    /// Maps the shadow RAM as the memory has it now. The software CPU looks for itself.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn remap_shadow(&self) -> Result<(), EngineError> {
        match self {
            Self::Soft(_) => Ok(()),
            Self::Kvm(kvm) => kvm.vm.remap_shadow(),
        }
    }

    /// Whether the machine can sleep: the interrupt controllers of KVM are not put back into their state after power-up.
    pub fn can_sleep(&self) -> bool {
        matches!(self, Self::Soft(_))
    }

    /// Puts the interrupt controllers into the state in which a PC's firmware leaves them. No vCPU may be running.
    pub fn reset_controllers(&self) {
        if let Self::Soft(soft) = self {
            soft.fabric.reset();
            soft.fabric.enable_virtual_wire();
        }
    }

    /// Puts the interrupt controllers and the interval timer, whose line is `timer_line`, on the bus, where they are not
    /// the kernel's.
    ///
    /// # Errors
    /// [`BusError`] where another device is there.
    pub fn add_devices(&self, bus: &MachineBus, timer_line: IrqLine) -> Result<(), BusError> {
        let Self::Soft(soft) = self else { return Ok(()) };
        soft.fabric.attach(bus)?;
        soft.fabric.enable_virtual_wire();
        let timer = Pit::new(timer_line, &soft.timers);
        bus.insert(Space::Port, pit::BASE, pit::PORTS, "pit", timer.clone())?;
        let speaker =
            Window { space: Space::Port, base: pit::SPEAKER_PORT, len: 1, offset: pit::SPEAKER_OFFSET };
        bus.insert_window(speaker, "pit", timer)
    }

    /// A vCPU in its state after power-up, and what it sees of the machine: `bus`, behind its local APIC.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn vcpu(
        &self,
        id: u32,
        bus: Arc<MachineBus>,
        attention: Arc<Attention>,
        recorder: Option<Recorder>,
    ) -> Result<VcpuAndBus, EngineError> {
        match self {
            Self::Soft(soft) => soft.vcpu(id, bus, attention, recorder),
            Self::Kvm(kvm) => {
                let cpuid = kvm.cpuid(id);
                let config = kvm::VcpuConfig { id, attention, cpuid: &cpuid, recorder };
                Ok((Box::new(kvm.vm.create_vcpu(config)?), bus))
            }
        }
    }
}

/// Bits of a guest-physical address.
///
/// # Errors
/// [`BuildError::CpuModel`].
pub fn physical_bits(config: &MachineConfig) -> Result<u32, BuildError> {
    Ok(model(config)?.physical_bits())
}

fn model(config: &MachineConfig) -> Result<CpuModel, BuildError> {
    CpuModel::parse(&config.cpu, config.cpus).map_err(|error| BuildError::CpuModel(error.to_string()))
}

impl KvmMachine {
    fn new(config: &MachineConfig, memory: &GuestMemory, timers: &Timers) -> Result<Self, BuildError> {
        let model = if matches!(config.cpu.as_str(), "host" | "max") { None } else { Some(model(config)?) };
        Ok(Self { vm: KvmVm::new(memory)?, model, tsc_frequency: timers.time().tsc_frequency() })
    }

    /// The CPUID table of vCPU `id`; empty for all that the host can do.
    fn cpuid(&self, id: u32) -> Vec<CpuidEntry> {
        let leaves = self.model.iter().flat_map(|model| model.leaves(id, self.tsc_frequency));
        leaves
            .map(|CpuidLeaf { leaf, subleaf, eax, ebx, ecx, edx }| CpuidEntry {
                leaf,
                subleaf,
                eax,
                ebx,
                ecx,
                edx,
            })
            .collect()
    }
}

impl SoftMachine {
    fn vcpu(
        &self,
        id: u32,
        bus: Arc<MachineBus>,
        attention: Arc<Attention>,
        recorder: Option<Recorder>,
    ) -> Result<VcpuAndBus, EngineError> {
        let Some(apic) = self.fabric.local_apic(id as usize) else {
            return Err(EngineError::Unavailable(format!("vCPU {id} has no local APIC")));
        };
        let config = VcpuConfig {
            id,
            memory: self.memory.clone(),
            interrupts: Arc::new(apic.clone()),
            time: self.timers.time().clone(),
            attention,
            cpu: self.model.clone(),
            recorder,
            shared: self.shared.clone(),
            jit: self.jit != Translation::Off,
        };
        let vcpu: Box<dyn Vcpu> = match self.jit {
            Translation::Lockstep => Box::new(LockstepVcpu::new(config)?),
            Translation::Off | Translation::On => Box::new(SoftVcpu::new(config)?),
        };
        Ok((vcpu, Arc::new(VcpuBus::new(apic, bus))))
    }
}

/// The lines of KVM's interrupt controllers.
struct KvmLines(KvmVm);

impl IrqSink for KvmLines {
    fn set_line(&self, line: u32, level: bool) {
        if let Err(error) = self.0.set_irq_line(line, level) {
            log::error!("interrupt line {line}: {error}");
        }
    }
}

impl MsiSink for KvmLines {
    fn send(&self, address: u64, data: u32) {
        if let Err(error) = self.0.signal_msi(address, data) {
            log::debug!("interrupt message {data:#x} to {address:#x}: {error}");
        }
    }
}
