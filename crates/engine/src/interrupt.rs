/// An event other than a maskable interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuEvent {
    /// INIT: reset to the wait-for-SIPI state (the boot processor: to its reset vector).
    Init,
    /// Start-up IPI with its vector: real mode at `vector << 12`.
    Sipi(u8),
    /// Non-maskable interrupt.
    Nmi,
}

/// The access has to raise #GP(0) in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such register, or a value that it refuses")]
pub struct MsrFault;

/// One vCPU's view of the interrupt hardware: its local APIC and the PIC behind it.
///
/// Whoever makes something deliverable also raises [`crate::Signals::INTERRUPT`] on the vCPU's
/// [`crate::Attention`]; the vCPU then asks here.
pub trait InterruptController: Send + Sync {
    /// Whether [`Self::acknowledge`] would give a vector now. Does not look at the CPU's interrupt flag.
    fn has_interrupt(&self) -> bool;
    /// The interrupt-acknowledge cycle: takes the highest-priority interrupt above the processor priority.
    fn acknowledge(&self) -> Option<u8>;
    /// Takes the next INIT, SIPI or NMI. NMIs are asked for only while they are not blocked.
    fn take_event(&self, nmi_allowed: bool) -> Option<CpuEvent>;
    /// The task priority as CR8 has it, 0 to 15.
    fn task_priority(&self) -> u8;
    /// Sets the task priority from CR8.
    fn set_task_priority(&self, cr8: u8);
    /// The performance counters' interrupt: what their entry of the local vector table says, which then masks itself.
    fn performance_interrupt(&self);
    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`MsrFault`] where the local APIC has no such register in its mode.
    fn read_msr(&self, index: u32) -> Result<u64, MsrFault>;
    /// Writes one of them.
    ///
    /// # Errors
    /// [`MsrFault`] for a register that is not there or a reserved bit.
    fn write_msr(&self, index: u32, value: u64) -> Result<(), MsrFault>;
}
