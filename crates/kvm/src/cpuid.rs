//! CPUID: what the machine's model says, as far as KVM and the host processor can give it.

use engine::EngineError;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::error::host;

/// What CPUID returns for one leaf and subleaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None` where the leaf does not look at it.
    pub subleaf: Option<u32>,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// KVM's own leaves: its signature, and its paravirtual features (clock, hypercalls).
const KVM_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0001;
/// Leaf 1 ECX: the local APIC's timer has a TSC-deadline mode. KVM tells of it by a capability.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;

/// What KVM offers on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<Vec<CpuidEntry>, EngineError> {
    let table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
    let mut entries: Vec<_> = table.as_slice().iter().map(from_kvm).collect();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        entries.iter_mut().filter(|e| e.leaf == 1).for_each(|e| e.ecx |= TSC_DEADLINE);
    }
    Ok(entries)
}

/// The table of one vCPU: the model's values with the features that KVM lacks taken out, KVM's own leaves where the
/// model has none, and the vCPU's APIC ID. An empty model stands for all that the host can do.
pub(crate) fn for_vcpu(
    model: &[CpuidEntry],
    supported: &[CpuidEntry],
    apic_id: u32,
) -> Result<CpuId, EngineError> {
    let mut entries: Vec<CpuidEntry> = if model.is_empty() {
        supported.to_vec()
    } else {
        let own = model.iter().map(|entry| intersected(*entry, supported));
        let has = |leaf| model.iter().any(|entry| entry.leaf == leaf);
        own.chain(supported.iter().copied().filter(|e| KVM_LEAVES.contains(&e.leaf) && !has(e.leaf)))
            .collect()
    };
    entries.iter_mut().for_each(|entry| personalize(entry, apic_id));
    let table: Vec<_> = entries.iter().map(to_kvm).collect();
    CpuId::from_entries(&table)
        .map_err(|_| EngineError::BadState(format!("{} CPUID entries are too many for KVM", table.len())))
}

/// A model's entry without the feature bits that KVM does not offer. What is not a set of features stays.
fn intersected(entry: CpuidEntry, supported: &[CpuidEntry]) -> CpuidEntry {
    let offered = supported
        .iter()
        .find(|s| s.leaf == entry.leaf && s.subleaf.unwrap_or(0) == entry.subleaf.unwrap_or(0))
        .copied()
        .unwrap_or_default();
    let mask = feature_bits(entry.leaf, entry.subleaf.unwrap_or(0));
    CpuidEntry {
        eax: entry.eax & (offered.eax | !mask[0]),
        ebx: entry.ebx & (offered.ebx | !mask[1]),
        ecx: entry.ecx & (offered.ecx | !mask[2]),
        edx: entry.edx & (offered.edx | !mask[3]),
        ..entry
    }
}

/// Which bits of EAX, EBX, ECX and EDX say that the processor has a feature.
const fn feature_bits(leaf: u32, subleaf: u32) -> [u32; 4] {
    const ALL: u32 = u32::MAX;
    match (leaf, subleaf) {
        (1, _) => [0, 0, ALL, ALL],
        // MWAIT's, thermal and power features.
        (5 | 6, _) => [ALL, ALL, ALL, ALL],
        // EAX of subleaf 0 is the number of subleaves.
        (7, 0) => [0, ALL, ALL, ALL],
        (7, _) => [ALL, ALL, ALL, ALL],
        // The states of XCR0; the sizes are for KVM to compute.
        (0xd, 0) => [ALL, 0, 0, ALL],
        (0xd, 1) => [ALL, 0, ALL, ALL],
        (0xa | 0x12 | 0x14 | 0x19, _) => [ALL, ALL, ALL, ALL],
        (0x4000_0001, _) => [ALL, 0, 0, ALL],
        (0x8000_0001, _) => [0, 0, ALL, ALL],
        (0x8000_0007, _) => [0, 0, 0, ALL],
        (0x8000_0008, _) => [0, ALL, 0, 0],
        _ => [0; 4],
    }
}

/// Puts the vCPU's APIC ID where CPUID tells it. SDM vol. 2, *CPUID*.
fn personalize(entry: &mut CpuidEntry, apic_id: u32) {
    match entry.leaf {
        1 => {
            entry.ebx = entry.ebx & 0x00ff_ffff | apic_id << 24;
            entry.ecx |= HYPERVISOR;
        }
        0xb | 0x1f => entry.edx = apic_id,
        _ => {}
    }
}

fn from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidEntry {
        leaf: entry.function,
        subleaf: indexed.then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

fn to_kvm(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.leaf,
        index: entry.subleaf.unwrap_or(0),
        flags: if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: [CpuidEntry; 3] = [
        CpuidEntry { leaf: 1, subleaf: None, eax: 0x111, ebx: 0, ecx: 0xff, edx: 0xf0 },
        CpuidEntry { leaf: 7, subleaf: Some(0), eax: 1, ebx: 0xf, ecx: 0, edx: 0 },
        CpuidEntry { leaf: 0x4000_0001, subleaf: None, eax: 0x9, ebx: 0, ecx: 0, edx: 0 },
    ];

    fn table(model: &[CpuidEntry], apic_id: u32) -> Vec<CpuidEntry> {
        for_vcpu(model, &OFFERED, apic_id).unwrap().as_slice().iter().map(from_kvm).collect()
    }

    #[test]
    fn features_are_those_of_the_model_and_of_the_host() {
        let one = CpuidEntry { leaf: 1, eax: 0x222, ebx: 0x800, ecx: 0x101, edx: 0x30, ..Default::default() };
        let seven = CpuidEntry { leaf: 7, subleaf: Some(0), ebx: 0x11, ecx: 5, ..Default::default() };
        let found = table(&[one, seven], 3);
        assert_eq!(found[0].eax, 0x222, "a version is no feature");
        assert_eq!((found[0].ecx, found[0].edx), (0x01 | HYPERVISOR, 0x30));
        assert_eq!((found[1].ebx, found[1].ecx), (0x01, 0));
    }

    #[test]
    fn a_leaf_that_the_host_lacks_has_no_features() {
        let extended = CpuidEntry { leaf: 0x8000_0001, eax: 7, ecx: 0xff, edx: 0xff, ..Default::default() };
        let found = table(&[extended], 0);
        assert_eq!((found[0].eax, found[0].ecx, found[0].edx), (7, 0, 0));
    }

    #[test]
    fn each_vcpu_has_its_apic_id() {
        let model = [
            CpuidEntry { leaf: 1, ebx: 0xaa00_0800, ..Default::default() },
            CpuidEntry { leaf: 0xb, subleaf: Some(1), ..Default::default() },
        ];
        let found = table(&model, 5);
        assert_eq!((found[0].ebx, found[1].edx), (0x0500_0800, 5));
    }

    #[test]
    fn kvms_leaves_are_added_where_the_model_has_none() {
        let found = table(&[CpuidEntry { leaf: 0, ..Default::default() }], 0);
        assert_eq!(found[1], OFFERED[2]);
        let own = CpuidEntry { leaf: 0x4000_0001, eax: 0x3, ..Default::default() };
        assert_eq!(table(&[own], 0), [CpuidEntry { eax: 1, ..own }]);
    }

    #[test]
    fn an_empty_model_is_the_host() {
        assert_eq!(table(&[], 0)[1], OFFERED[1]);
    }
}
