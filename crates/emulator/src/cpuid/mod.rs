//! CPU models: which features a machine's processors have, and what CPUID says of them.
//!
//! A model is text, as in `Skylake-Server,-avx512f,+sha_ni,phys-bits=36`: a name, features added and taken away from left
//! to right, and how wide physical addresses are if not as the host's. Its features that the host has to execute ([`feature::Origin::Host`]) are a subset of the host's; those that
//! Ringside's code brings are there on any host. The same set decides what CPUID tells ([`CpuModel::cpuid`]), which
//! instructions there are ([`CpuModel::allows`]), and which bits CR4 and XCR0 have.
//!
//! All models say `GenuineIntel`, because system calls, model-specific registers and virtualization behave as Intel's.
//! ```
//! let model = emulator::CpuModel::parse("x86-64-v1,+pcid", 2).unwrap();
//! assert!(model.has(emulator::cpuid::feature::PCID));
//! ```

mod allowed;
pub mod feature;
mod host;
mod leaves;
mod named;

use feature::{Feature, Features, Origin};
use host::Host;

/// The name of the model that has all that the host and Ringside offer.
const HOST: &str = "host";
/// The same by another name.
const MAX: &str = "max";
/// Physical addresses are at most this wide, in bits: enough for any machine, and within four-level paging's reach.
const MOST_PHYSICAL_BITS: u32 = 46;
/// And at least this wide, as with PAE and PSE-36.
const LEAST_PHYSICAL_BITS: u32 = 36;
/// What their number follows.
const PHYSICAL_BITS: &str = "phys-bits=";

/// The processors of a machine.
#[derive(Clone, Debug)]
pub struct CpuModel {
    /// Its name without the modifiers.
    name: &'static str,
    /// Leaf 01H EAX.
    signature: u32,
    features: Features,
    /// How many there are.
    cpus: u32,
    physical_bits: u32,
}

/// What CPUID's answers depend on besides the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuidContext {
    /// The vCPU's APIC id.
    pub apic_id: u32,
    /// The time-stamp counter's frequency in Hz.
    pub tsc_hz: u64,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// CR4.PKE.
    pub ospke: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_APIC_BASE.EN is clear: there is no local APIC.
    pub without_apic: bool,
    /// IA32_MISC_ENABLE: the basic leaves end with 02H.
    pub limited: bool,
    /// IA32_MISC_ENABLE: pages cannot be marked as not executable.
    pub without_nx: bool,
}

/// What CPUID says in one leaf and subleaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
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

/// Why a text is no CPU model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuModelError {
    /// No such model.
    #[error("no CPU model {name:?}; {}", suggestion(close))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// Names that are like it, or all where none is.
        close: Vec<&'static str>,
    },
    /// No such feature.
    #[error("no CPU feature {name:?}; {}", suggestion(close))]
    UnknownFeature {
        /// What was asked for.
        name: String,
        /// Names that are like it, or all where none is.
        close: Vec<&'static str>,
    },
    /// A feature that other processors have.
    #[error("the CPU feature {0} is not available: no model has it")]
    NotOffered(&'static str),
    /// Neither `+feature` nor `-feature`.
    #[error("{0:?} in the CPU model is neither +FEATURE nor -FEATURE")]
    BadModifier(String),
    /// Not a possible number of address bits.
    #[error(
        "{0:?} in the CPU model is no number of physical-address bits from {LEAST_PHYSICAL_BITS} to \
         {MOST_PHYSICAL_BITS}"
    )]
    BadPhysicalBits(String),
    /// An attempt to take away what x86-64 is made of.
    #[error("the CPU feature {0} cannot be taken away: every x86-64 processor has it")]
    Indispensable(&'static str),
    /// The host would have to execute what it does not have.
    #[error("the CPU model {model} needs {}, which this host does not have; take it away with -FEATURE, or use \"host\"", missing.join(", "))]
    HostLacks {
        /// The model's name.
        model: &'static str,
        /// The features.
        missing: Vec<&'static str>,
    },
}

fn suggestion(close: &[&str]) -> String {
    format!("is it one of these? {}", close.join(", "))
}

impl CpuModel {
    /// The model that `text` describes, for a machine of `cpus` vCPUs: `NAME[,+FEATURE][,-FEATURE]…[,phys-bits=N]`.
    /// `max` is `host`.
    ///
    /// # Errors
    /// [`CpuModelError`], for unknown names, for features that the host lacks and for impossible numbers.
    pub fn parse(text: &str, cpus: u32) -> Result<Self, CpuModelError> {
        let mut items = text.split(',').map(str::trim);
        let name = items.next().unwrap_or_default();
        let named = named::by_name(name);
        let is_host = [HOST, MAX].iter().any(|host| name.eq_ignore_ascii_case(host));
        let available = Features::available();
        let (name, mut features) = match named {
            Some(model) => (model.name, model.features()),
            None if is_host => (HOST, available),
            None => {
                return Err(CpuModelError::UnknownModel {
                    name: name.to_owned(),
                    close: close(name, Self::names()),
                });
            }
        };
        let mut physical_bits = Host::get().physical_bits().clamp(LEAST_PHYSICAL_BITS, MOST_PHYSICAL_BITS);
        for item in items.filter(|item| !item.is_empty()) {
            match item.strip_prefix(PHYSICAL_BITS) {
                Some(number) => physical_bits = parse_physical_bits(number)?,
                None => modify(&mut features, item)?,
            }
        }
        let missing: Vec<_> = features.iter().filter(|f| !available.has(*f)).map(|f| f.name).collect();
        if !missing.is_empty() {
            return Err(CpuModelError::HostLacks { model: name, missing });
        }
        let signature = match named {
            Some(model) => model.signature,
            None => Host::get().intel_signature().unwrap_or_else(|| named::nearest_signature(&features)),
        };
        Ok(Self { name, signature, features, cpus: cpus.max(1), physical_bits })
    }

    /// The names of all models.
    pub fn names() -> Vec<&'static str> {
        std::iter::once(HOST).chain(named::ALL.iter().map(|model| model.name)).collect()
    }

    /// The names of the models that this host can run as they are.
    pub fn usable_names() -> Vec<&'static str> {
        Self::names().into_iter().filter(|name| Self::parse(name, 1).is_ok()).collect()
    }

    /// Its name without the modifiers.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its features.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Whether it has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// Bits of a physical address.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Bits of a linear address.
    pub fn linear_bits(&self) -> u32 {
        if self.has(feature::LA57) { 57 } else { 48 }
    }

    /// All leaves, for an engine that wants a table: OSXSAVE is clear and the XSAVE sizes are those of reset. The
    /// hypervisor's leaves are not in it: who executes CPUID is the hypervisor. Nor are the performance counters, of which
    /// each engine has its own.
    pub fn leaves(&self, apic_id: u32, tsc_hz: u64) -> Vec<CpuidLeaf> {
        let context = CpuidContext {
            apic_id,
            tsc_hz,
            osxsave: false,
            ospke: false,
            xcr0: 1,
            ..CpuidContext::default()
        };
        let leaf = |leaf: u32, subleaf: Option<u32>| {
            let [eax, ebx, mut ecx, edx] = self.cpuid(&context, leaf, subleaf.unwrap_or(0));
            if leaf == 1 {
                ecx &= !(1 << feature::PDCM.bit);
            }
            CpuidLeaf { leaf, subleaf, eax, ebx, ecx, edx }
        };
        let range =
            |number: u32, subleaves: std::ops::Range<u32>| subleaves.map(move |sub| leaf(number, Some(sub)));
        let plain = |numbers: std::ops::RangeInclusive<u32>| numbers.map(|number| leaf(number, None));
        let states = (2..64).filter(|n| self.xsave_states().bits() >> n & 1 != 0);
        plain(0..=2)
            .chain(range(4, 0..5))
            .chain([leaf(6, None)])
            .chain(range(7, 0..2))
            .chain(range(0xb, 0..3))
            .chain(range(0xd, 0..2))
            .chain(states.map(|n| leaf(0xd, Some(n))))
            .chain(plain(0x15..=0x16))
            .chain(range(0x1f, 0..3))
            .chain(plain(0x8000_0000..=0x8000_0008))
            .collect()
    }
}

fn parse_physical_bits(text: &str) -> Result<u32, CpuModelError> {
    let bits = text.parse().ok().filter(|bits| (LEAST_PHYSICAL_BITS..=MOST_PHYSICAL_BITS).contains(bits));
    bits.ok_or_else(|| CpuModelError::BadPhysicalBits(text.to_owned()))
}

/// Applies `+feature` or `-feature`.
fn modify(features: &mut Features, item: &str) -> Result<(), CpuModelError> {
    let (add, name) = match (item.strip_prefix('+'), item.strip_prefix('-')) {
        (Some(name), _) => (true, name),
        (_, Some(name)) => (false, name),
        _ => return Err(CpuModelError::BadModifier(item.to_owned())),
    };
    if let Some(known) = feature::NOT_OFFERED.iter().find(|known| known.eq_ignore_ascii_case(name)) {
        return if add { Err(CpuModelError::NotOffered(known)) } else { Ok(()) };
    }
    let Some(feature) = feature::by_name(name) else {
        let names = feature::ALL.iter().map(|feature| feature.name).collect();
        return Err(CpuModelError::UnknownFeature { name: name.to_owned(), close: close(name, names) });
    };
    match (add, feature.origin) {
        (true, _) => features.add(feature),
        (false, Origin::Base) => return Err(CpuModelError::Indispensable(feature.name)),
        (false, _) => features.remove(feature),
    }
    Ok(())
}

/// The names that are like `name`, the closest first; all where none is.
fn close(name: &str, names: Vec<&'static str>) -> Vec<&'static str> {
    let name = name.to_ascii_lowercase();
    // A longer one is garbage, and comparing takes time by its length.
    let is_comparable = (2..=40).contains(&name.chars().count());
    let mut near: Vec<(usize, &str)> = names
        .iter()
        .filter(|_| is_comparable)
        .map(|known| (distance(&name, &known.to_ascii_lowercase()), *known))
        .filter(|(distance, known)| {
            *distance <= 2.max(known.len() / 3) || known.to_ascii_lowercase().contains(&name)
        })
        .collect();
    near.sort();
    near.truncate(5);
    if near.is_empty() { names } else { near.into_iter().map(|(_, known)| known).collect() }
}

/// How many characters have to be changed, added or taken away to make one text the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
