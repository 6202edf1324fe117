use std::sync::Arc;

use engine::{Bus, CpuEvent, InterruptController, MsrFault, Space};

use super::fabric::InterruptFabric;
use super::lapic::{Acknowledged, LocalApic};

/// Bytes of the local APIC's page.
const PAGE: u64 = 4096;

/// One vCPU's interrupt hardware: its local APIC, and the rest behind it.
#[derive(Clone)]
pub struct LocalApicHandle {
    fabric: Arc<InterruptFabric>,
    index: usize,
    apic: Arc<LocalApic>,
}

impl LocalApicHandle {
    pub(super) fn new(fabric: Arc<InterruptFabric>, index: usize, apic: Arc<LocalApic>) -> Self {
        Self { fabric, index, apic }
    }

    /// The guest-physical address of the local APIC's page (4 KiB); `None` while the APIC is disabled or in x2APIC mode.
    pub fn base(&self) -> Option<u64> {
        self.apic.base()
    }

    /// Reads bytes of the page, `offset` bytes from its start.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.apic.mmio_read(offset, data);
    }

    /// Writes bytes of the page. Registers take 32-bit accesses at multiples of 16.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let effect = self.apic.mmio_write(offset, data);
        self.fabric.carry_out(self.index, effect);
    }

    /// Sets what this vCPU's TSC is ahead of [`engine::TimeSource::tsc`], modulo 2^64: whenever the guest writes its TSC or
    /// IA32_TSC_ADJUST, since an armed TSC deadline is a value of the guest's TSC.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.apic.set_tsc_offset(offset);
    }

    /// Whether IA32_APIC_BASE enables the APIC, as CPUID.01H:EDX.APIC tells.
    pub fn is_enabled(&self) -> bool {
        self.apic.is_enabled()
    }
}

impl InterruptController for LocalApicHandle {
    fn has_interrupt(&self) -> bool {
        self.apic.has_interrupt()
    }

    fn acknowledge(&self) -> Option<u8> {
        match self.apic.acknowledge() {
            Acknowledged::Nothing => None,
            Acknowledged::Vector(vector) => Some(vector),
            Acknowledged::External => Some(self.fabric.acknowledge_pic()),
        }
    }

    fn take_event(&self, nmi_allowed: bool) -> Option<CpuEvent> {
        self.apic.take_event(nmi_allowed)
    }

    fn task_priority(&self) -> u8 {
        self.apic.task_priority() >> 4
    }

    fn set_task_priority(&self, cr8: u8) {
        self.apic.set_task_priority(cr8 << 4);
    }

    fn performance_interrupt(&self) {
        self.apic.performance_interrupt();
    }

    fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        self.apic.read_msr(index)
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault> {
        let effect = self.apic.write_msr(index, value)?;
        self.fabric.carry_out(self.index, effect);
        Ok(())
    }
}

/// A vCPU's bus: the machine's, with the vCPU's own local APIC in front of it.
pub struct VcpuBus {
    lapic: LocalApicHandle,
    inner: Arc<dyn Bus>,
}

impl VcpuBus {
    /// Puts `lapic` in front of `inner`.
    pub fn new(lapic: LocalApicHandle, inner: Arc<dyn Bus>) -> Self {
        Self { lapic, inner }
    }

    /// Where in the page an access begins that lies within it.
    fn offset(&self, space: Space, address: u64, len: usize) -> Option<u64> {
        if space != Space::Memory {
            return None;
        }
        let offset = address.checked_sub(self.lapic.base()?)?;
        (offset < PAGE && len as u64 <= PAGE - offset).then_some(offset)
    }
}

impl Bus for VcpuBus {
    fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        match self.offset(space, address, data.len()) {
            Some(offset) => self.lapic.mmio_read(offset, data),
            None => self.inner.read(space, address, data),
        }
    }

    fn write(&self, space: Space, address: u64, data: &[u8]) {
        match self.offset(space, address, data.len()) {
            Some(offset) => self.lapic.mmio_write(offset, data),
            None => self.inner.write(space, address, data),
        }
    }
}
