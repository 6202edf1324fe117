//! Virtio devices in memory, for machines and kernels that are to do without PCI: where each has its window and its
//! interrupt, and how the guest is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use devices::bus::MachineBus;
use devices::irq::{IrqLine, SharedLine, Sharing};
use engine::Space;
use guest_memory::PAGE_SIZE;
use virtio::memory::DmaMemory;
use virtio::transport::mmio::{VirtioMmio, WINDOW};

use crate::acpi_tables::{MmioSlot, pci_gsi};
use crate::config::{Boot, MachineConfig, Transport};
use crate::error::BuildError;
use crate::layout;
use crate::pci_devices::{VirtioDevices, Wiring};

/// Interrupts of a PC that no other device has, for guests without ACPI, which know no others.
const FREE_IRQS: [u32; 7] = [5, 10, 11, 14, 15, 6, 7];

/// Where `count` devices are: nowhere, unless `config` wants them in memory.
///
/// # Errors
/// [`BuildError::MmioSlots`] for more than there are windows or interrupts.
pub fn slots(config: &MachineConfig, count: usize) -> Result<Vec<MmioSlot>, BuildError> {
    if config.transport == Transport::Pci {
        return Ok(Vec::new());
    }
    let shared = |number: usize| pci_gsi(number as u8, 0);
    let without_acpi = is_without_acpi(config);
    let windows = ((layout::VIRTIO_MMIO.end - layout::VIRTIO_MMIO.start) / PAGE_SIZE) as usize;
    let most = if without_acpi { FREE_IRQS.len() } else { windows };
    if count > most {
        return Err(BuildError::MmioSlots { count, most });
    }
    let bases = layout::VIRTIO_MMIO.step_by(PAGE_SIZE as usize);
    let slot = |(number, base)| {
        let gsi = if without_acpi { FREE_IRQS[number] } else { shared(number) };
        MmioSlot { base, gsi }
    };
    Ok((0..count).zip(bases).map(slot).collect())
}

/// What the kernel's command line has to say of them: nothing where ACPI does.
pub fn kernel_arguments(config: &MachineConfig, slots: &[MmioSlot]) -> String {
    if !is_without_acpi(config) {
        return String::new();
    }
    let argument = |slot: &MmioSlot| format!(" virtio_mmio.device={WINDOW:#x}@{:#x}:{}", slot.base, slot.gsi);
    slots.iter().map(argument).collect()
}

/// Whether the kernel is told not to look at the ACPI tables.
fn is_without_acpi(config: &MachineConfig) -> bool {
    match &config.boot {
        Boot::Kernel(boot) => boot.cmdline.split_whitespace().any(|word| word == "acpi=off"),
        Boot::Firmware(_) => false,
    }
}

/// Puts each device at its slot.
///
/// # Errors
/// [`BuildError::Bus`] where something else is.
pub fn attach(
    bus: &Arc<MachineBus>,
    wiring: &Wiring<'_>,
    slots: &[MmioSlot],
    devices: Vec<Box<dyn virtio::Device>>,
) -> Result<VirtioDevices, BuildError> {
    let mut attached = VirtioDevices::default();
    let mut lines: BTreeMap<u32, Arc<SharedLine>> = BTreeMap::new();
    for (slot, device) in slots.iter().zip(devices) {
        let line = lines
            .entry(slot.gsi)
            .or_insert_with(|| SharedLine::new(IrqLine::new(wiring.irqs.clone(), slot.gsi), Sharing::Level))
            .input();
        let name = virtio::device_name(device.id());
        let memory = DmaMemory::new(wiring.memory.clone());
        let device = Arc::new(Mutex::new(VirtioMmio::new(device, memory, wiring.withheld, line)));
        bus.insert(Space::Memory, slot.base, WINDOW, name, device.clone())?;
        attached.add(device);
    }
    Ok(attached)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_config;

    fn mmio(cmdline: &str) -> MachineConfig {
        MachineConfig { transport: Transport::Mmio, ..test_config(cmdline) }
    }

    #[test]
    fn devices_share_the_interrupts_that_acpi_tells_of() {
        let config = mmio("console=ttyS0");
        let slots = slots(&config, 10).unwrap();
        assert_eq!(slots[0], MmioSlot { base: 0xfec1_0000, gsi: 16 });
        assert_eq!(slots[9], MmioSlot { base: 0xfec1_9000, gsi: 17 });
        assert_eq!(kernel_arguments(&config, &slots), "");
        let pci = MachineConfig { transport: Transport::Pci, ..config };
        assert_eq!(super::slots(&pci, 10).unwrap(), []);
    }

    #[test]
    fn without_acpi_each_has_an_interrupt_of_its_own() {
        let config = mmio("quiet acpi=off");
        let slots = slots(&config, 2).unwrap();
        let arguments = " virtio_mmio.device=0x200@0xfec10000:5 virtio_mmio.device=0x200@0xfec11000:10";
        assert_eq!(kernel_arguments(&config, &slots), arguments);
        let refused = super::slots(&config, 8).unwrap_err().to_string();
        assert!(refused.starts_with("8 devices") && refused.ends_with("for 7"), "{refused}");
        assert!(super::slots(&mmio(""), 65).is_err());
    }
}
