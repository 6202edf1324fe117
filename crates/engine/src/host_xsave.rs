//! Where the host's processor keeps the parts of an XSAVE area. Intel's leave room for components that AMD's never had.
//! SDM vol. 1, *Standard Format of XSAVE Area*.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use crate::XSAVE_AREA_SIZE;

/// Components behind the legacy region: the number, and where [`crate::VectorState`] has it, in bytes.
const COMPONENTS: [(u32, usize, usize); 5] =
    [(2, 576, 256), (5, 1088, 64), (6, 1152, 512), (7, 1664, 1024), (9, 2688, 8)];
/// Bytes of the legacy region and the header, which are everywhere the same.
const LEGACY: usize = 576;
/// The leaf of CPUID that enumerates the components.
const LEAF: u32 = 0xd;

/// Where the host has the components of an area in the standard format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostXsave {
    /// For each of [`COMPONENTS`], where the host has it; `None` where it lacks it.
    at: [Option<usize>; COMPONENTS.len()],
}

impl HostXsave {
    /// As CPUID says.
    pub fn get() -> &'static Self {
        static HOST: OnceLock<HostXsave> = OnceLock::new();
        HOST.get_or_init(|| {
            let has_leaf = __cpuid(0).eax >= LEAF;
            let at = COMPONENTS.map(|(number, _, len)| {
                let leaf = has_leaf.then(|| __cpuid_count(LEAF, number))?;
                let fits = leaf.eax as usize == len && leaf.ebx as usize + len <= XSAVE_AREA_SIZE;
                fits.then_some(leaf.ebx as usize)
            });
            Self { at }
        })
    }

    /// Whether the host keeps them where [`crate::VectorState`] does.
    pub fn is_ours(&self) -> bool {
        self.at.iter().zip(COMPONENTS).all(|(host, (_, ours, _))| host.is_none_or(|host| host == ours))
    }

    /// An area of ours as the host has it.
    pub fn to_host(&self, ours: &[u8; XSAVE_AREA_SIZE]) -> [u8; XSAVE_AREA_SIZE] {
        self.moved(ours, |ours, host| (ours, host))
    }

    /// An area of the host's as we have it.
    pub fn from_host(&self, host: &[u8; XSAVE_AREA_SIZE]) -> [u8; XSAVE_AREA_SIZE] {
        self.moved(host, |ours, host| (host, ours))
    }

    fn moved(
        &self,
        area: &[u8; XSAVE_AREA_SIZE],
        way: impl Fn(usize, usize) -> (usize, usize),
    ) -> [u8; XSAVE_AREA_SIZE] {
        let mut moved = [0; XSAVE_AREA_SIZE];
        moved[..LEGACY].copy_from_slice(&area[..LEGACY]);
        for (host, (_, ours, len)) in self.at.iter().zip(COMPONENTS) {
            if let Some(host) = *host {
                let (from, to) = way(ours, host);
                moved[to..to + len].copy_from_slice(&area[from..from + len]);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_goes_there_and_comes_back() {
        let amd = HostXsave { at: [Some(576), Some(832), Some(896), Some(1408), Some(2432)] };
        let intel = HostXsave { at: COMPONENTS.map(|(_, at, _)| Some(at)) };
        let without = HostXsave { at: [Some(576), None, None, None, None] };
        let area: [u8; XSAVE_AREA_SIZE] = std::array::from_fn(|at| (at % 251) as u8);
        assert!(intel.is_ours() && without.is_ours() && !amd.is_ours());
        for layout in [amd, intel, without, *HostXsave::get()] {
            let back = layout.from_host(&layout.to_host(&area));
            assert_eq!(back[..LEGACY], area[..LEGACY]);
            for (host, (number, at, len)) in layout.at.iter().zip(COMPONENTS) {
                let expected = if host.is_some() { &area[at..at + len] } else { &[0; 1024][..len] };
                assert_eq!(&back[at..at + len], expected, "component {number}");
            }
        }
        assert_eq!(amd.to_host(&area)[832..896], area[1088..1152]);
    }
}
