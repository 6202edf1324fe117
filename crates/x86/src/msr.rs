//! Model-specific registers. SDM vol. 4, *Architectural MSRs*; KVM's paravirtual ones from the kernel's
//! `Documentation/virt/kvm/x86/msr.rst`.
#![allow(missing_docs)]

pub const IA32_TSC: u32 = 0x10;
pub const IA32_PLATFORM_ID: u32 = 0x17;
pub const IA32_APIC_BASE: u32 = 0x1b;
pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
pub const IA32_TSC_ADJUST: u32 = 0x3b;
pub const IA32_SPEC_CTRL: u32 = 0x48;
pub const IA32_PRED_CMD: u32 = 0x49;
pub const IA32_BIOS_SIGN_ID: u32 = 0x8b;
pub const IA32_PMC0: u32 = 0xc1;
pub const IA32_MTRRCAP: u32 = 0xfe;
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
pub const IA32_FLUSH_CMD: u32 = 0x10b;
pub const IA32_SYSENTER_CS: u32 = 0x174;
pub const IA32_SYSENTER_ESP: u32 = 0x175;
pub const IA32_SYSENTER_EIP: u32 = 0x176;
pub const IA32_MCG_CAP: u32 = 0x179;
pub const IA32_MCG_STATUS: u32 = 0x17a;
pub const IA32_PERFEVTSEL0: u32 = 0x186;
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
pub const IA32_DEBUGCTL: u32 = 0x1d9;
pub const IA32_MTRR_PHYSBASE0: u32 = 0x200;
pub const IA32_MTRR_FIX64K_00000: u32 = 0x250;
pub const IA32_MTRR_FIX16K_80000: u32 = 0x258;
pub const IA32_MTRR_FIX16K_A0000: u32 = 0x259;
pub const IA32_MTRR_FIX4K_C0000: u32 = 0x268;
pub const IA32_MTRR_FIX4K_F8000: u32 = 0x26f;
pub const IA32_PAT: u32 = 0x277;
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
pub const IA32_FIXED_CTR0: u32 = 0x309;
pub const IA32_PERF_CAPABILITIES: u32 = 0x345;
pub const IA32_FIXED_CTR_CTRL: u32 = 0x38d;
pub const IA32_PERF_GLOBAL_STATUS: u32 = 0x38e;
pub const IA32_PERF_GLOBAL_CTRL: u32 = 0x38f;
pub const IA32_PERF_GLOBAL_OVF_CTRL: u32 = 0x390;
/// IA32_PMC0 in its full width.
pub const IA32_A_PMC0: u32 = 0x4c1;
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub const IA32_PKRS: u32 = 0x6e1;
/// The first of the x2APIC's registers: the xAPIC's offset divided by 16 is added to it.
pub const X2APIC_BASE: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const IA32_XSS: u32 = 0xda0;
pub const IA32_EFER: u32 = 0xc000_0080;
pub const IA32_STAR: u32 = 0xc000_0081;
pub const IA32_LSTAR: u32 = 0xc000_0082;
pub const IA32_CSTAR: u32 = 0xc000_0083;
pub const IA32_FMASK: u32 = 0xc000_0084;
pub const IA32_FS_BASE: u32 = 0xc000_0100;
pub const IA32_GS_BASE: u32 = 0xc000_0101;
pub const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const IA32_TSC_AUX: u32 = 0xc000_0103;

pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
pub const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
pub const KVM_EOI_EN: u32 = 0x4b56_4d04;
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

/// The name of a register that has one here: "IA32_TSC_DEADLINE".
pub const fn name(index: u32) -> Option<&'static str> {
    macro_rules! names {
        ($($name:ident),* $(,)?) => {
            match index {
                $($name => Some(stringify!($name)),)*
                0x800..=0x8ff => super::apic::x2apic_name(index),
                _ => None,
            }
        };
    }
    names!(
        IA32_TSC,
        IA32_PLATFORM_ID,
        IA32_APIC_BASE,
        IA32_FEATURE_CONTROL,
        IA32_TSC_ADJUST,
        IA32_SPEC_CTRL,
        IA32_PRED_CMD,
        IA32_BIOS_SIGN_ID,
        IA32_MTRRCAP,
        IA32_ARCH_CAPABILITIES,
        IA32_FLUSH_CMD,
        IA32_SYSENTER_CS,
        IA32_SYSENTER_ESP,
        IA32_SYSENTER_EIP,
        IA32_MCG_CAP,
        IA32_MCG_STATUS,
        IA32_MISC_ENABLE,
        IA32_DEBUGCTL,
        IA32_MTRR_FIX64K_00000,
        IA32_MTRR_FIX16K_80000,
        IA32_MTRR_FIX16K_A0000,
        IA32_MTRR_FIX4K_C0000,
        IA32_MTRR_FIX4K_F8000,
        IA32_PAT,
        IA32_MTRR_DEF_TYPE,
        IA32_PERFEVTSEL0,
        IA32_PMC0,
        IA32_FIXED_CTR0,
        IA32_PERF_CAPABILITIES,
        IA32_FIXED_CTR_CTRL,
        IA32_PERF_GLOBAL_STATUS,
        IA32_PERF_GLOBAL_CTRL,
        IA32_PERF_GLOBAL_OVF_CTRL,
        IA32_A_PMC0,
        IA32_TSC_DEADLINE,
        IA32_XSS,
        IA32_EFER,
        IA32_STAR,
        IA32_LSTAR,
        IA32_CSTAR,
        IA32_FMASK,
        IA32_FS_BASE,
        IA32_GS_BASE,
        IA32_KERNEL_GS_BASE,
        IA32_TSC_AUX,
        KVM_WALL_CLOCK,
        KVM_SYSTEM_TIME,
        KVM_WALL_CLOCK_NEW,
        KVM_SYSTEM_TIME_NEW,
        KVM_ASYNC_PF_EN,
        KVM_STEAL_TIME,
        KVM_EOI_EN,
        KVM_POLL_CONTROL,
    )
}
