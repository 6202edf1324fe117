//! The model-specific registers that are part of a vCPU's saved state.

use engine::EngineError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use x86::msr;

use crate::error::host;

/// Those that a guest sets and that stand nowhere else in [`engine::VcpuState`], in the order in which they are restored:
/// the TSC before the deadline that is measured in it.
const SAVED: &[u32] = &[
    msr::IA32_TSC,
    msr::IA32_TSC_ADJUST,
    msr::IA32_APIC_BASE,
    msr::IA32_FEATURE_CONTROL,
    msr::IA32_SPEC_CTRL,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_MCG_STATUS,
    msr::IA32_MISC_ENABLE,
    msr::IA32_DEBUGCTL,
    msr::IA32_PAT,
    msr::IA32_MTRR_DEF_TYPE,
    msr::IA32_MTRR_FIX64K_00000,
    msr::IA32_MTRR_FIX16K_80000,
    msr::IA32_MTRR_FIX16K_A0000,
    msr::IA32_XSS,
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_KERNEL_GS_BASE,
    msr::IA32_TSC_AUX,
    msr::KVM_WALL_CLOCK_NEW,
    msr::KVM_SYSTEM_TIME_NEW,
    msr::KVM_ASYNC_PF_EN,
    msr::KVM_STEAL_TIME,
    msr::KVM_EOI_EN,
    msr::KVM_POLL_CONTROL,
    msr::IA32_TSC_DEADLINE,
];

/// Pairs of variable-range MTRRs: 8 in KVM.
const VARIABLE_RANGES: u32 = 16;

/// Which of the saved registers this vCPU has. To be asked once its CPUID is set.
pub(crate) fn present(vcpu: &VcpuFd) -> Vec<u32> {
    let variable = msr::IA32_MTRR_PHYSBASE0..msr::IA32_MTRR_PHYSBASE0 + VARIABLE_RANGES;
    let fixed = msr::IA32_MTRR_FIX4K_C0000..=msr::IA32_MTRR_FIX4K_F8000;
    let (deadline, others) = SAVED.split_last().map_or((None, SAVED), |(last, rest)| (Some(*last), rest));
    let all = others.iter().copied().chain(variable).chain(fixed).chain(deadline);
    all.filter(|&index| read(vcpu, &[index]).is_ok_and(|found| found.len() == 1)).collect()
}

/// Reads registers; stops at the first that the vCPU does not have.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, EngineError> {
    let wanted: Vec<_> = indices.iter().map(|&index| entry(index, 0)).collect();
    let mut list = list(&wanted)?;
    let count = vcpu.get_msrs(&mut list).map_err(host("KVM_GET_MSRS"))?;
    Ok(list.as_slice().iter().take(count).map(|found| (found.index, found.data)).collect())
}

/// Writes registers in the order given.
///
/// A register that this KVM or this CPUID model does not have is passed over where it would be cleared: a state saved
/// elsewhere may name it.
pub(crate) fn write(vcpu: &VcpuFd, mut values: &[(u32, u64)]) -> Result<(), EngineError> {
    while !values.is_empty() {
        // KVM takes fewer than this many at once.
        let batch = &values[..values.len().min(128)];
        let entries: Vec<_> = batch.iter().map(|&(index, value)| entry(index, value)).collect();
        let done = vcpu.set_msrs(&list(&entries)?).map_err(host("KVM_SET_MSRS"))?;
        match batch.get(done) {
            None => values = &values[batch.len()..],
            Some((_, 0)) => values = &values[done + 1..],
            Some((index, value)) => {
                let name = msr::name(*index).unwrap_or("unknown");
                return Err(EngineError::BadState(format!(
                    "KVM refuses {value:#x} in MSR {index:#x} ({name})"
                )));
            }
        }
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries).map_err(|e| EngineError::BadState(format!("{} MSRs: {e:?}", entries.len())))
}
