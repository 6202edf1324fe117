//! A machine in KVM: memory slots, interrupt controllers, interrupt lines.
#![allow(unsafe_code)] // Memory slots.

use std::ops::Range;
use std::sync::Arc;

use engine::EngineError;
use guest_memory::GuestMemory;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::cpuid::{self, CpuidEntry};
use crate::error::host;
use crate::{KvmVcpu, VcpuConfig};

/// Guest-physical addresses of three pages that KVM needs on Intel's processors for a task state segment, and of the page
/// below them for an identity map, both of its own making. Between the local APIC and the firmware's 16 MiB.
const TSS_ADDRESS: usize = 0xfeff_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// A machine on `/dev/kvm`. Clones share it.
///
/// KVM brings the PIC, the I/O APIC, the local APICs and the PIT (with port 0x61): devices at their addresses would never
/// be asked.
#[derive(Clone)]
pub struct KvmVm {
    pub(crate) shared: Arc<Shared>,
}

/// What the machine and each of its vCPUs keep alive.
pub(crate) struct Shared {
    pub(crate) vm: VmFd,
    /// What CPUID can offer on this host.
    pub(crate) supported_cpuid: Vec<CpuidEntry>,
    /// The guest's RAM must stay mapped as long as anything can run in it.
    memory: GuestMemory,
}

/// Whether KVM models the interrupt controllers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Irqchip {
    Kernel,
    /// None at all: HLT comes back.
    None,
}

impl KvmVm {
    /// A machine with this memory.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM does not open or refuses. See [`crate::probe`] for a reason fit for a user.
    pub fn new(memory: &GuestMemory) -> Result<Self, EngineError> {
        Self::with_irqchip(memory, Irqchip::Kernel)
    }

    pub(crate) fn with_irqchip(memory: &GuestMemory, irqchip: Irqchip) -> Result<Self, EngineError> {
        let kvm = Kvm::new().map_err(host("open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(host("KVM_SET_TSS_ADDR"))?;
        if irqchip == Irqchip::Kernel {
            create_irqchip(&vm)?;
        }
        map_memory(&vm, memory)?;
        let supported_cpuid = cpuid::supported(&kvm)?;
        Ok(Self { shared: Arc::new(Shared { vm, memory: memory.clone(), supported_cpuid }) })
    }

    /// A virtual CPU, in its state after power-up; those other than number 0 wait for their SIPI.
    ///
    /// # Errors
    /// [`EngineError`] where KVM refuses.
    pub fn create_vcpu(&self, config: VcpuConfig<'_>) -> Result<KvmVcpu, EngineError> {
        KvmVcpu::new(self.shared.clone(), config)
    }

    /// What CPUID can offer on this host.
    pub fn supported_cpuid(&self) -> &[CpuidEntry] {
        &self.shared.supported_cpuid
    }

    /// Sets the level of an interrupt line: 0 to 15 reach the PIC and the I/O APIC, 16 to 23 the I/O APIC alone.
    ///
    /// # Errors
    /// [`EngineError::Host`] for a line that does not exist.
    pub fn set_irq_line(&self, line: u32, active: bool) -> Result<(), EngineError> {
        self.shared.vm.set_irq_line(line, active).map_err(host("KVM_IRQ_LINE"))
    }

    /// Maps the shadow RAM as the memory has it now.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM refuses.
    pub fn remap_shadow(&self) -> Result<(), EngineError> {
        map_shadow(&self.shared.vm, &self.shared.memory)
    }

    /// Sends a message-signalled interrupt. Gives whether a local APIC took it.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM refuses the message.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<bool, EngineError> {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        self.shared.vm.signal_msi(message).map(|taken| taken > 0).map_err(host("KVM_SIGNAL_MSI"))
    }

    /// Nanoseconds of the machine's paravirtual clock.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM has none.
    pub fn clock(&self) -> Result<u64, EngineError> {
        self.shared.vm.get_clock().map(|data| data.clock).map_err(host("KVM_GET_CLOCK"))
    }

    /// Sets the paravirtual clock, in nanoseconds: a resumed machine goes on where it stopped.
    ///
    /// # Errors
    /// [`EngineError::Host`] where KVM has none.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), EngineError> {
        let data = kvm_bindings::kvm_clock_data { clock: nanoseconds, ..Default::default() };
        self.shared.vm.set_clock(&data).map_err(host("KVM_SET_CLOCK"))
    }
}

fn create_irqchip(vm: &VmFd) -> Result<(), EngineError> {
    vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(host("KVM_CREATE_PIT2"))?;
    let routes = KvmIrqRouting::from_entries(&routes())
        .map_err(|e| EngineError::Unavailable(format!("interrupt routes: {e:?}")))?;
    vm.set_gsi_routing(&routes).map_err(host("KVM_SET_GSI_ROUTING"))
}

/// Lines of the I/O APIC.
const IOAPIC_PINS: u32 = 24;
/// Lines of the two PICs.
const PIC_PINS: u32 = 16;
/// The I/O APIC's pin for the PIT, on line 0: pin 0 is the PIC's output. The MADT tells so.
const TIMER_PIN: u32 = 2;

/// Where each interrupt line leads: as on a PC, where line 2 is the PICs' own cascade.
fn routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| {
        let target = kvm_irq_routing_irqchip { irqchip, pin };
        let u = kvm_irq_routing_entry__bindgen_ty_1 { irqchip: target };
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
    };
    let pic = (0..PIC_PINS).filter(|&line| line != TIMER_PIN).map(|line| match line {
        0..8 => route(line, KVM_IRQCHIP_PIC_MASTER, line),
        _ => route(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
    });
    let ioapic = (0..IOAPIC_PINS).filter(|&line| line != TIMER_PIN).map(|line| {
        let pin = if line == 0 { TIMER_PIN } else { line };
        route(line, KVM_IRQCHIP_IOAPIC, pin)
    });
    pic.chain(ioapic).collect()
}

/// One slot for each region. Where KVM has no read-only slots such a region has none: its reads would miss.
fn map_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), EngineError> {
    let shadow = memory.shadow_area();
    for (slot, region) in (0..).zip(memory.all_regions()) {
        if shadow.as_ref().is_some_and(|area| area.start == region.start) {
            continue;
        }
        if region.read_only && !vm.check_extension(Cap::ReadonlyMem) {
            return Err(EngineError::Unavailable("this KVM has no read-only memory slots".to_owned()));
        }
        set_slot(vm, memory, slot, region.start..region.start + region.len)?;
    }
    map_shadow(vm, memory)
}

/// The first of the shadow RAM's slots, above those of the regions.
const SHADOW_SLOTS: u32 = 32;
/// Bytes of each: the host bridge's smallest segment.
const SHADOW_SEGMENT: u64 = 16 << 10;

/// One slot for each segment of the shadow RAM in which anything is.
fn map_shadow(vm: &VmFd, memory: &GuestMemory) -> Result<(), EngineError> {
    let Some(area) = memory.shadow_area() else { return Ok(()) };
    for (slot, start) in (SHADOW_SLOTS..).zip(area.step_by(SHADOW_SEGMENT as usize)) {
        // A slot is not moved to other bytes while it has some.
        set_slot(vm, memory, slot, start..start)?;
        if memory.locate(start).is_some() {
            set_slot(vm, memory, slot, start..start + SHADOW_SEGMENT)?;
        }
    }
    Ok(())
}

/// Maps guest-physical addresses, all of whose bytes lie where the first one does; an empty range takes the slot away.
fn set_slot(vm: &VmFd, memory: &GuestMemory, slot: u32, range: Range<u64>) -> Result<(), EngineError> {
    let (start, len) = (range.start, range.end - range.start);
    let mut region = kvm_userspace_memory_region { slot, guest_phys_addr: start, ..Default::default() };
    if len > 0 {
        let place = memory.locate(start).filter(|place| place.offset + len <= memory.len());
        let Some((place, address)) =
            place.and_then(|place| Some((place, memory.host_address(place.offset)?)))
        else {
            return Err(EngineError::BadState(format!("no memory behind the region at {start:#x}")));
        };
        region.flags = if place.read_only { KVM_MEM_READONLY } else { 0 };
        (region.memory_size, region.userspace_addr) = (len, address);
    }
    // SAFETY: the bytes from that address on are the guest's memory by the check above, which `Shared` keeps mapped as
    // long as the machine or one of its vCPUs exists. Nothing holds a reference to them.
    unsafe { vm.set_user_memory_region(region) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))
}
