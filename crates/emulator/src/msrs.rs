//! Model-specific registers: the values that stand nowhere else in the processor's state, and what they accept.
//! SDM vol. 4, *Architectural MSRs*. RDMSR and WRMSR themselves are in `instructions::msr`.

mod clock;
mod memory_types;

pub use clock::Clock;
pub use memory_types::MemoryTypes;

/// Banks of machine-check registers. Nothing is ever reported in them.
pub const MACHINE_CHECK_BANKS: usize = 4;

/// Revision of the microcode, as IA32_BIOS_SIGN_ID tells it in its upper half.
pub const MICROCODE_REVISION: u64 = 1;

/// Values of model-specific registers. Plain data; `Cpu::write_msr` checks what comes in.
#[derive(Clone, Debug, PartialEq)]
pub struct Msrs {
    /// Added to the machine's time-stamp counter, in ticks.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_STAR: the selectors of SYSCALL and SYSRET.
    pub star: u64,
    /// IA32_LSTAR: where SYSCALL goes.
    pub lstar: u64,
    /// IA32_CSTAR, which Intel's processors keep and do not use.
    pub cstar: u64,
    /// IA32_FMASK: the flags that SYSCALL clears.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE: what SWAPGS exchanges with the base of GS.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_XSS: the supervisor states of XSAVES, of which there are none.
    pub xss: u64,
    /// IA32_SPEC_CTRL: kept, and without effect, since nothing is speculated across privileges.
    pub spec_ctrl: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_PKRS: the rights of supervisor pages' protection keys.
    pub pkrs: u32,
    /// PAT and the MTRRs.
    pub memory_types: MemoryTypes,
    /// IA32_MCG_STATUS.
    pub machine_check_status: u64,
    /// IA32_MCi_CTL, STATUS, ADDR and MISC.
    pub machine_check: [[u64; 4]; MACHINE_CHECK_BANKS],
    /// KVM's paravirtual clock.
    pub clock: Clock,
}

impl Msrs {
    /// The values after power-up, with the memory types that firmware would have left.
    pub fn reset() -> Self {
        Self {
            tsc_offset: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            misc_enable: misc_enable::FAST_STRINGS | misc_enable::NO_BTS | misc_enable::NO_PEBS,
            xss: 0,
            spec_ctrl: 0,
            debugctl: 0,
            pkrs: 0,
            memory_types: MemoryTypes::reset(),
            machine_check_status: 0,
            machine_check: [[0; 4]; MACHINE_CHECK_BANKS],
            clock: Clock::default(),
        }
    }
}

impl Default for Msrs {
    fn default() -> Self {
        Self::reset()
    }
}

/// Bits of IA32_MISC_ENABLE.
pub mod misc_enable {
    /// Fast strings.
    pub const FAST_STRINGS: u64 = 1;
    /// There are performance counters; read-only.
    pub const COUNTERS: u64 = 1 << 7;
    /// Branch-trace storage is unavailable; read-only.
    pub const NO_BTS: u64 = 1 << 11;
    /// Event-based sampling is unavailable; read-only.
    pub const NO_PEBS: u64 = 1 << 12;
    /// Basic leaves of CPUID end with 02H.
    pub const LIMIT_CPUID: u64 = 1 << 22;
    /// There is no execute-disable bit.
    pub const XD_DISABLE: u64 = 1 << 34;
    /// What software may change: besides those above thermal control, SpeedStep, MONITOR and xTPR messages, which are
    /// kept and do nothing.
    pub const WRITABLE: u64 = FAST_STRINGS | 1 << 3 | 1 << 16 | 1 << 18 | LIMIT_CPUID | 1 << 23 | XD_DISABLE;
    /// What keeps its value whatever is written.
    pub const READ_ONLY: u64 = COUNTERS | NO_BTS | NO_PEBS;
}
