//! The leaves of CPUID: what each register of each leaf holds. SDM vol. 2, *CPUID—CPU Identification*; the
//! hypervisor's from the kernel's `Documentation/virt/kvm/x86/cpuid.rst`.

use x86::Xcr0;

use super::feature::{self, Word};
use super::{CpuModel, CpuidContext};
use crate::native::Component;
use crate::pmu;

/// "GenuineIntel" in EBX, EDX and ECX.
pub(super) const GENUINE_INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

/// The last of them where IA32_MISC_ENABLE limits them, for software that is older than the others.
const LAST_LIMITED: u32 = 2;
/// The last of the basic leaves. Intel's processors answer it for leaves that they do not have, too.
const LAST_BASIC: u32 = 0x1f;
/// The first of the hypervisor's leaves: its signature.
const HYPERVISOR: u32 = 0x4000_0000;
/// Which of KVM's paravirtual features there are.
const KVM_FEATURES: u32 = 0x4000_0001;
/// The frequencies of the TSC and the APIC, by VMware's convention. The last of the hypervisor's leaves.
const FREQUENCIES: u32 = 0x4000_0010;
/// The first of the extended leaves.
const EXTENDED: u32 = 0x8000_0000;
/// The last of them.
const LAST_EXTENDED: u32 = 0x8000_0008;

/// "KVMKVMKVM" in EBX, ECX and EDX.
const KVM: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
/// The paravirtual features that are here: the clock by its old and new registers, ports that need no delay, and a
/// clock that never goes back between vCPUs.
const KVM_CLOCK: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24;

/// Leaf 01H ECX: CR4.OSXSAVE is set.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 07H EBX: FDP is updated by exceptions only that are not masked (FDP_EXCPTN_ONLY), FCS and FDS are always zero.
const X87_POINTERS: u32 = 1 << 6 | 1 << 13;
/// Leaf 07H ECX: CR4.PKE is set.
const OSPKE: u32 = 1 << 4;
/// Leaf 01H EDX: there is more than one logical processor, and EBX says of how many there may be (HTT).
const SEVERAL: u32 = 1 << 28;

/// Bytes of a cache line: CLFLUSH flushes one.
const LINE: u32 = 64;
/// The frequency of the core crystal clock, which drives the local APIC's timer, in Hz.
const CRYSTAL: u64 = 1_000_000_000;
/// Bytes of the x87 and SSE part of an XSAVE area, with the header.
const XSAVE_LEGACY: usize = 576;

/// One cache, for leaf 04H.
struct Cache {
    /// 1: data, 2: instructions, 3: both.
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
    /// Whether all vCPUs share it.
    shared: bool,
}

/// The same on every host, so that a guest sees the same machine everywhere: 32 KiB, 32 KiB, 1 MiB and 16 MiB.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 3, level: 2, ways: 16, sets: 1024, shared: false },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384, shared: true },
];

impl CpuModel {
    /// EAX, EBX, ECX and EDX of a leaf and subleaf.
    pub fn cpuid(&self, context: &CpuidContext, leaf: u32, subleaf: u32) -> [u32; 4] {
        match leaf {
            HYPERVISOR..=0x4fff_ffff => self.hypervisor_leaf(context, leaf),
            EXTENDED..=LAST_EXTENDED => self.extended_leaf(context, leaf),
            _ => self.basic_leaf(context, leaf.min(last_basic(context)), subleaf),
        }
    }

    fn basic_leaf(&self, context: &CpuidContext, leaf: u32, subleaf: u32) -> [u32; 4] {
        let word = |word| self.features.word(word);
        match leaf {
            0 => [last_basic(context), GENUINE_INTEL[0], GENUINE_INTEL[2], GENUINE_INTEL[1]],
            1 => self.version(context),
            // No descriptors of caches and TLBs here: see leaves 04H and 18H.
            2 => [0x00fe_ff01, 0, 0, 0],
            4 => self.cache(subleaf),
            6 => [word(Word::Leaf6Eax), 0, 0, 0],
            7 if subleaf == 0 => {
                let ebx = word(Word::Leaf7Ebx) | X87_POINTERS;
                let ospke = if context.ospke { OSPKE } else { 0 };
                [1, ebx, word(Word::Leaf7Ecx) | ospke, word(Word::Leaf7Edx)]
            }
            7 if subleaf == 1 => [word(Word::Leaf7Sub1Eax), 0, 0, 0],
            0xa => self.counters(),
            0xb | 0x1f => self.topology(context, subleaf),
            0xd => self.xsave(context, subleaf),
            0x15 => crystal_leaf(context.tsc_hz),
            0x16 => {
                let mhz = (context.tsc_hz / 1_000_000).min(0xffff) as u32;
                [mhz, mhz, 100, 0]
            }
            // Monitor, thermal, cache access, resource control, SGX, trace: nothing of it.
            _ => [0; 4],
        }
    }

    /// Leaf 01H.
    fn version(&self, context: &CpuidContext) -> [u32; 4] {
        let osxsave = if context.osxsave { OSXSAVE } else { 0 };
        let several = if self.cpus > 1 { SEVERAL } else { 0 };
        let absent = if context.without_apic { 1 << feature::APIC.bit } else { 0 };
        let ids = self.cpus.next_power_of_two().min(255);
        [
            self.signature,
            context.apic_id << 24 | ids << 16 | (LINE / 8) << 8,
            self.features.word(Word::Leaf1Ecx) | osxsave,
            self.features.word(Word::Leaf1Edx) & !absent | several,
        ]
    }

    /// Leaf 04H.
    fn cache(&self, subleaf: u32) -> [u32; 4] {
        let Some(cache) = CACHES.get(subleaf as usize) else { return [0; 4] };
        let ids = self.cpus.next_power_of_two();
        let sharing = if cache.shared { ids.min(1 << 12) - 1 } else { 0 };
        let self_initializing = 1 << 8;
        let eax = (ids.min(64) - 1) << 26 | sharing << 14 | self_initializing | cache.level << 5 | cache.kind;
        [eax, (cache.ways - 1) << 22 | (LINE - 1), cache.sets - 1, 0]
    }

    /// Leaf 0AH.
    fn counters(&self) -> [u32; 4] {
        if !self.has(feature::ARCH_PERFMON) {
            return [0; 4];
        }
        let general = (pmu::GENERAL as u32) << 8 | pmu::WIDTH << 16 | pmu::EVENTS << 24;
        let fixed = pmu::FIXED as u32 | pmu::WIDTH << 5;
        [self.features.word(Word::CountersEax) | general, pmu::ABSENT_EVENTS, 0, fixed]
    }

    /// Leaves 0BH and 1FH: one package, of cores with one thread each.
    fn topology(&self, context: &CpuidContext, subleaf: u32) -> [u32; 4] {
        let (thread, core) = (1, 2);
        let id = context.apic_id;
        match subleaf {
            0 => [0, 1, thread << 8, id],
            1 => [self.cpus.next_power_of_two().trailing_zeros(), self.cpus, core << 8 | 1, id],
            _ => [0, 0, subleaf & 0xff, id],
        }
    }

    /// Leaf 0DH.
    fn xsave(&self, context: &CpuidContext, subleaf: u32) -> [u32; 4] {
        let states = self.xsave_states();
        if states.is_empty() {
            return [0; 4];
        }
        let enabled = Xcr0::from_bits_retain(context.xcr0) & states;
        let extended = || Component::ALL.iter().filter(|c| **c as u8 >= Component::Avx as u8);
        match subleaf {
            0 => [
                states.bits() as u32,
                standard_size(enabled),
                standard_size(states),
                (states.bits() >> 32) as u32,
            ],
            1 => {
                let sizes = extended().filter(|c| enabled.contains(c.bit())).map(|c| c.size());
                [self.features.word(Word::XsaveEax), (XSAVE_LEGACY + sizes.sum::<usize>()) as u32, 0, 0]
            }
            // None is a supervisor state, none is aligned in the compacted format.
            _ => match extended().find(|c| **c as u32 == subleaf && states.contains(c.bit())) {
                Some(component) => [component.size() as u32, component.offset() as u32, 0, 0],
                None => [0; 4],
            },
        }
    }

    fn hypervisor_leaf(&self, context: &CpuidContext, leaf: u32) -> [u32; 4] {
        match leaf {
            _ if !self.has(feature::HYPERVISOR) => [0; 4],
            HYPERVISOR => [FREQUENCIES, KVM[0], KVM[1], KVM[2]],
            KVM_FEATURES => [KVM_CLOCK, 0, 0, 0],
            FREQUENCIES => [khz(context.tsc_hz), khz(CRYSTAL), 0, 0],
            _ => [0; 4],
        }
    }

    fn extended_leaf(&self, context: &CpuidContext, leaf: u32) -> [u32; 4] {
        let word = |word| self.features.word(word);
        let absent = if context.without_nx { 1 << feature::NX.bit } else { 0 };
        match leaf {
            EXTENDED => [LAST_EXTENDED, 0, 0, 0],
            0x8000_0001 => [0, 0, word(Word::ExtendedEcx), word(Word::ExtendedEdx) & !absent],
            0x8000_0002..=0x8000_0004 => self.brand(leaf - 0x8000_0002),
            // The L2 cache: 1 MiB, 16 ways (8 stands for them).
            0x8000_0006 => [0, 0, 1024 << 16 | 8 << 12 | LINE, 0],
            0x8000_0007 => [0, 0, 0, word(Word::PowerEdx)],
            0x8000_0008 => [self.linear_bits() << 8 | self.physical_bits(), word(Word::SizesEbx), 0, 0],
            _ => [0; 4],
        }
    }

    /// A third of the brand string, which is 48 bytes with its end.
    fn brand(&self, third: u32) -> [u32; 4] {
        let mut text = [0u8; 48];
        let brand = format!("Ringside virtual CPU ({})", self.name);
        text[..47].iter_mut().zip(brand.bytes()).for_each(|(to, from)| *to = from);
        let (words, _) = text.as_chunks::<4>();
        std::array::from_fn(|n| words.get(4 * third as usize + n).map_or(0, |word| u32::from_le_bytes(*word)))
    }
}

/// The last of the basic leaves, which answers for what lies beyond.
fn last_basic(context: &CpuidContext) -> u32 {
    if context.limited { LAST_LIMITED } else { LAST_BASIC }
}

/// Bytes of an XSAVE area of the standard format with these states.
fn standard_size(states: Xcr0) -> u32 {
    let ends = Component::ALL.iter().filter(|c| states.contains(c.bit())).map(|c| c.offset() + c.size());
    ends.fold(XSAVE_LEGACY, usize::max) as u32
}

fn khz(hz: u64) -> u32 {
    u32::try_from(hz / 1000).unwrap_or(u32::MAX)
}

/// Leaf 15H: a crystal of very nearly [`CRYSTAL`], and what the TSC's frequency is of it.
///
/// Software multiplies frequencies in kHz in 32 bits, so the fraction has to be of small numbers; the crystal takes
/// up what that leaves, so that the TSC, which is not measured again, is right to within a Hz.
fn crystal_leaf(tsc_hz: u64) -> [u32; 4] {
    let (numerator, denominator) = ratio(tsc_hz, CRYSTAL, 4000);
    if numerator == 0 {
        return [0; 4];
    }
    let crystal = u128::from(tsc_hz) * u128::from(denominator) / u128::from(numerator);
    [denominator, numerator, u32::try_from(crystal).unwrap_or(0), 0]
}

/// The fraction closest to `a / b` among its continued fraction's convergents of numbers up to `most`.
fn ratio(a: u64, b: u64, most: u64) -> (u32, u32) {
    let (mut rest, mut divisor) = (a, b);
    let (mut before, mut best) = ((1, 0), (a / b.max(1), 1));
    while divisor != 0 && rest % divisor != 0 {
        (rest, divisor) = (divisor, rest % divisor);
        let whole = rest / divisor;
        let next =
            (whole.saturating_mul(best.0).saturating_add(before.0), whole.saturating_mul(best.1) + before.1);
        if next.0.max(next.1) > most {
            break;
        }
        (before, best) = (best, next);
    }
    (u32::try_from(best.0).unwrap_or(u32::MAX), best.1 as u32)
}

#[cfg(test)]
mod tests {
    use super::{CRYSTAL, crystal_leaf};

    #[test]
    fn the_crystal_and_its_ratio_tell_the_time_stamp_counters_frequency() {
        for hz in [2_299_998_000u64, 2_400_000_000, 3_693_061_123, 999_999_999, 5_123_456_789, 2_000_666_666]
        {
            let [denominator, numerator, crystal, _] = crystal_leaf(hz).map(u64::from);
            assert!((crystal * numerator / denominator).abs_diff(hz) <= 10, "{hz} Hz");
            assert!(crystal.abs_diff(CRYSTAL) < CRYSTAL / 1000, "{crystal} Hz");
            assert!(numerator * crystal / 1000 <= u64::from(u32::MAX), "{numerator}/{denominator}");
        }
        assert_eq!(crystal_leaf(2_500_000_000), [2, 5, CRYSTAL as u32, 0]);
        assert_eq!(crystal_leaf(0), [0; 4]);
        assert_eq!(crystal_leaf(1000), [0; 4]);
    }
}
