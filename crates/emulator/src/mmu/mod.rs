//! From linear addresses to RAM and devices: the walk of the guest's page tables, the translation cache, and the
//! accesses that go through it.

mod access;
mod keys;
mod paging;
mod tlb;
mod walk;

pub use access::{Place, Target};
pub use keys::Keys;
pub use paging::{Format, Paging, Sizes};
pub use tlb::{ENTRY_MASK, ENTRY_PAGE, ENTRY_READ, ENTRY_WRITE, FOLD, Tlb, ViewState};
pub use walk::Translation;

use guest_memory::Offset;
use x86::{Cr0, Cr4};

use crate::cpu::Cpu;
use crate::cpuid::feature;

/// What an access is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or the load of a read-modify-write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Whose rights an access has: what the translation cache keeps apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum View {
    /// CPL 0 to 2, or an implicit access to a system table; SMAP holds.
    Supervisor = 0,
    /// CPL 0 to 2 where SMAP does not hold, because RFLAGS.AC is set or CR4.SMAP is clear.
    SupervisorUnguarded = 1,
    /// CPL 3.
    User = 2,
    /// CPL 3 with alignment checks. Nothing is cached for it, so that every access goes the slow way, which checks.
    UserAligned = 3,
}

impl View {
    /// Whether the access is one of CPL 3.
    pub fn is_user(self) -> bool {
        matches!(self, Self::User | Self::UserAligned)
    }
}

/// No page: for [`Mmu::executing`].
pub const NO_PAGE: Offset = Offset::MAX;

/// The memory-management unit's state.
pub struct Mmu {
    /// The translation cache.
    pub tlb: Tlb,
    /// How the guest's tables are to be read.
    pub paging: Paging,
    /// The present explicit view.
    pub view: View,
    /// The pages that the running block was decoded from: a store there stops the block first.
    pub executing: [Offset; 2],
}

impl Mmu {
    /// With an empty cache and paging off.
    pub fn new() -> Self {
        Self { tlb: Tlb::new(), paging: Paging::default(), view: View::Supervisor, executing: [NO_PAGE; 2] }
    }

    /// The view that instructions are fetched with: RFLAGS.AC is of no concern to them.
    #[inline(always)]
    pub fn fetch_view(&self) -> View {
        if self.view == View::SupervisorUnguarded { View::Supervisor } else { self.view }
    }

    /// Follows a change of CPL or RFLAGS.AC.
    pub fn set_view(&mut self, cpl: u8, ac: bool) {
        self.view = match (cpl == 3, ac || !self.paging.smap) {
            (true, _) if ac && self.paging.alignment_mask => View::UserAligned,
            (true, _) => View::User,
            (false, true) => View::SupervisorUnguarded,
            (false, false) => View::Supervisor,
        };
    }
}

impl Default for Mmu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// Follows a change of CR0, CR3, CR4 or EFER that may change translations: all cached ones are dropped.
    pub fn update_paging(&mut self) {
        let old = self.mmu.paging;
        let sizes = Sizes {
            physical_bits: self.wires.model.physical_bits(),
            huge_pages: self.wires.model.has(feature::PDPE1GB),
        };
        self.mmu.paging = Paging::new(self.cr0, self.cr3, self.cr4, self.efer, sizes);
        self.mmu.paging.keys = self.keys();
        self.mmu.paging.pointers = old.pointers;
        if self.mmu.paging.format == Format::Pae && old.format != Format::Pae {
            self.mmu.paging.pointers = self.read_directory_pointers(self.cr3);
        }
        self.mmu.tlb.flush_all();
        self.mmu.tlb.switch(self.pcid(), true);
        self.update_mode();
    }

    /// A load of CR3 with the same paging mode. SDM vol. 3, *Invalidation of TLBs and Paging-Structure Caches*.
    pub fn switch_address_space(&mut self, keep: bool) {
        self.mmu.paging.set_root(self.cr3);
        self.mmu.tlb.switch(self.pcid(), keep && self.cr4.contains(Cr4::PCIDE));
    }

    /// The present process-context identifier; 0 while they are off.
    fn pcid(&self) -> u16 {
        if self.cr4.contains(Cr4::PCIDE) { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// The four topmost entries of PAE paging as they stand in memory. Where no RAM is they are all ones.
    pub(crate) fn read_directory_pointers(&self, cr3: u64) -> [u64; 4] {
        let entry =
            |n: u64| self.memory.load_physical::<u64>((cr3 & 0xffff_ffe0) + 8 * n).unwrap_or(u64::MAX);
        [entry(0), entry(1), entry(2), entry(3)]
    }

    /// Whether paging is on.
    pub fn paging_enabled(&self) -> bool {
        self.cr0.contains(Cr0::PG)
    }

    /// Whether a base address or a system-call target may be this: what registers hold is compared with the widest
    /// addresses that the processor has, whichever it uses at the moment.
    pub fn is_canonical_for_registers(&self, address: u64) -> bool {
        x86::paging::is_canonical(address, self.wires.model.linear_bits())
    }
}

#[cfg(test)]
mod tests;
