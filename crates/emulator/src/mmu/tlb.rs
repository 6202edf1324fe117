//! The translation cache: direct-mapped, one part for each view, tagged with the address space.

use super::{Access, View};
use guest_memory::Offset;

/// Entries in each view's part.
const ENTRIES: usize = 1024;
const VIEWS: usize = 4;
const PAGE: u64 = !0xfff;
/// No linear page has this tag: its context is never given out.
const INVALID: u64 = u64::MAX;
/// Contexts are the 12 bits below a page's address in a tag.
const LAST_CONTEXT: u64 = 0xffe;

/// One page's translation. A tag is the linear page with the context in its low bits, or [`INVALID`].
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Entry {
    read: u64,
    write: u64,
    fetch: u64,
    /// Added to a linear address it gives the [`Offset`] in RAM.
    addend: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, fetch: INVALID, addend: 0 };

/// The address spaces whose translations are kept: PCID and the context that tags them.
#[derive(Clone, Copy, Debug, Default)]
struct Space {
    pcid: u16,
    context: u64,
}

/// What a page may be used for without looking again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Loads.
    pub read: bool,
    /// Stores: writable, dirty, not watched.
    pub write: bool,
    /// Instruction fetches.
    pub fetch: bool,
}

/// The translation cache.
pub struct Tlb {
    entries: Box<[Entry; ENTRIES * VIEWS]>,
    context: u64,
    next_context: u64,
    spaces: [Space; 8],
    next_space: usize,
    /// One bit for each hash of a 2-MiB page in which part of a large page is cached.
    large: [u64; 64],
    /// Changes whenever what is cached for instruction fetches may be stale although the context is the same.
    fetch_epoch: u32,
    /// One bit for each hash of a page that code was found in since the epoch began.
    fetched: [u64; 64],
}

impl Tlb {
    /// An empty cache.
    pub fn new() -> Self {
        let entries = vec![EMPTY; ENTRIES * VIEWS].into_boxed_slice();
        Self {
            entries: entries.try_into().unwrap_or_else(|_| unreachable!("the length is right")),
            context: 1,
            next_context: 2,
            spaces: [Space { pcid: 0, context: 1 }; 8],
            next_space: 1,
            large: [0; 64],
            fetch_epoch: 0,
            fetched: [0; 64],
        }
    }

    /// The tag of the present address space, below 4096.
    #[inline(always)]
    pub fn context(&self) -> u64 {
        self.context
    }

    /// See [`Tlb::invalidate_page`]: whatever was remembered of fetches under another epoch is to be forgotten.
    #[inline(always)]
    pub fn fetch_epoch(&self) -> u32 {
        self.fetch_epoch
    }

    /// Someone remembers where the code at `linear` lies, until the epoch ends.
    pub fn note_fetch(&mut self, linear: u64) {
        let (word, bit) = Self::bit(linear >> 12);
        self.fetched[word] |= bit;
    }

    fn end_fetch_epoch(&mut self) {
        self.fetch_epoch = self.fetch_epoch.wrapping_add(1);
        self.fetched = [0; 64];
    }

    #[inline(always)]
    fn index(view: View, linear: u64) -> usize {
        (view as usize * ENTRIES + (linear >> 12) as usize % ENTRIES) % (ENTRIES * VIEWS)
    }

    /// Where `size` bytes at `linear` lie, for a load. `None` also where they cross into the next page.
    #[inline(always)]
    pub fn read(&self, view: View, linear: u64, size: u64) -> Option<Offset> {
        let entry = &self.entries[Self::index(view, linear)];
        let tag = linear.wrapping_add(size - 1) & PAGE | self.context;
        (entry.read == tag).then(|| linear.wrapping_add(entry.addend))
    }

    /// The same for a store.
    #[inline(always)]
    pub fn write(&self, view: View, linear: u64, size: u64) -> Option<Offset> {
        let entry = &self.entries[Self::index(view, linear)];
        let tag = linear.wrapping_add(size - 1) & PAGE | self.context;
        (entry.write == tag).then(|| linear.wrapping_add(entry.addend))
    }

    /// The same for an instruction fetch of one byte.
    #[inline(always)]
    pub fn fetch(&self, view: View, linear: u64) -> Option<Offset> {
        let entry = &self.entries[Self::index(view, linear)];
        (entry.fetch == linear & PAGE | self.context).then(|| linear.wrapping_add(entry.addend))
    }

    /// Remembers that the page of `linear` lies at the page of `offset`. `large`: it is part of a page above 4 KiB.
    pub fn insert(&mut self, view: View, linear: u64, offset: Offset, allowed: Allowed, large: bool) {
        let tag = linear & PAGE | self.context;
        let addend = (offset & PAGE).wrapping_sub(linear & PAGE);
        let entry = &mut self.entries[Self::index(view, linear)];
        if [entry.read, entry.write, entry.fetch].iter().all(|&t| t != tag) || entry.addend != addend {
            *entry = Entry { addend, ..EMPTY };
        }
        for (slot, allowed) in [
            (&mut entry.read, allowed.read),
            (&mut entry.write, allowed.write),
            (&mut entry.fetch, allowed.fetch),
        ] {
            if allowed {
                *slot = tag;
            }
        }
        if large {
            let (word, bit) = Self::large_bit(linear);
            self.large[word] |= bit;
        }
    }

    /// Drops what allows stores to the page at an offset, in every view and context. Gives whether there was any.
    pub fn drop_writes(&mut self, offset: Offset) -> bool {
        let mut found = false;
        for entry in self.entries.iter_mut().filter(|e| e.write != INVALID) {
            if (entry.write & PAGE).wrapping_add(entry.addend) == offset & PAGE {
                entry.write = INVALID;
                found = true;
            }
        }
        found
    }

    /// INVLPG: drops the page of `linear` in every view, with the whole of the large page where it is part of one.
    pub fn invalidate_page(&mut self, linear: u64) {
        let (word, bit) = Self::bit(linear >> 12);
        if self.fetched[word] & bit != 0 {
            self.end_fetch_epoch();
        }
        let (word, bit) = Self::large_bit(linear);
        if self.large[word] & bit != 0 {
            self.flush_all();
            return;
        }
        for view in [View::Supervisor, View::SupervisorUnguarded, View::User] {
            let entry = &mut self.entries[Self::index(view, linear)];
            let tags = [entry.read, entry.write, entry.fetch];
            if tags.iter().any(|&tag| (tag ^ linear) & PAGE == 0) {
                *entry = EMPTY;
            }
        }
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        let pcid = self.spaces.iter().find(|s| s.context == self.context).map_or(0, |s| s.pcid);
        self.spaces = [Space { pcid: u16::MAX, context: 0 }; 8];
        self.large = [0; 64];
        self.start_space(pcid);
    }

    /// Drops the translations of one PCID.
    pub fn flush_pcid(&mut self, pcid: u16) {
        let current = self.context;
        let Some(space) = self.spaces.iter_mut().find(|s| s.context != 0 && s.pcid == pcid) else { return };
        let was_current = space.context == current;
        *space = Space { pcid: u16::MAX, context: 0 };
        if was_current {
            self.start_space(pcid);
        }
    }

    /// Makes the address space of a PCID the present one; keeps what is cached of it where asked to.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        if let Some(space) = self.spaces.iter_mut().find(|s| s.context != 0 && s.pcid == pcid) {
            if keep {
                self.context = space.context;
                return;
            }
            *space = Space { pcid: u16::MAX, context: 0 };
        }
        self.start_space(pcid);
    }

    fn start_space(&mut self, pcid: u16) {
        if self.next_context > LAST_CONTEXT {
            self.entries.fill(EMPTY);
            self.spaces = [Space { pcid: u16::MAX, context: 0 }; 8];
            self.large = [0; 64];
            self.next_context = 1;
            self.end_fetch_epoch();
        }
        self.context = self.next_context;
        self.next_context += 1;
        self.spaces[self.next_space % 8] = Space { pcid, context: self.context };
        self.next_space += 1;
    }

    fn large_bit(linear: u64) -> (usize, u64) {
        Self::bit(linear >> 21)
    }

    /// A page number's place in a set of 4096 bits.
    fn bit(page: u64) -> (usize, u64) {
        let hash = (page ^ page >> 12) as usize % 4096;
        (hash / 64, 1 << (hash % 64))
    }

    /// For tests and counters: whether an access would find its translation here.
    pub fn holds(&self, view: View, linear: u64, access: Access) -> bool {
        match access {
            Access::Read => self.read(view, linear, 1).is_some(),
            Access::Write => self.write(view, linear, 1).is_some(),
            Access::Fetch => self.fetch(view, linear).is_some(),
        }
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Allowed = Allowed { read: true, write: true, fetch: true };

    #[test]
    fn an_access_that_crosses_into_the_next_page_is_a_miss() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, 0x5000, ALL, false);
        tlb.insert(View::User, 0x2000, 0x6000, ALL, false);
        assert_eq!(tlb.read(View::User, 0x1ff8, 8), Some(0x5ff8));
        assert_eq!(tlb.read(View::User, 0x1ff9, 8), None);
        assert_eq!(tlb.read(View::Supervisor, 0x1000, 1), None);
    }

    #[test]
    fn a_kept_address_space_keeps_its_translations() {
        let mut tlb = Tlb::new();
        tlb.switch(1, false);
        tlb.insert(View::User, 0x1000, 0x5000, ALL, false);
        tlb.switch(2, true);
        assert!(!tlb.holds(View::User, 0x1000, Access::Read));
        tlb.switch(1, true);
        assert!(tlb.holds(View::User, 0x1000, Access::Read));
        tlb.switch(1, false);
        assert!(!tlb.holds(View::User, 0x1000, Access::Read));
    }

    #[test]
    fn invalidating_part_of_a_large_page_drops_all_of_it() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x20_1000, 0x5000, ALL, true);
        tlb.insert(View::User, 0x20_2000, 0x6000, ALL, true);
        tlb.invalidate_page(0x20_3000);
        assert!(!tlb.holds(View::User, 0x20_1000, Access::Read));
        assert!(!tlb.holds(View::User, 0x20_2000, Access::Fetch));
    }

    #[test]
    fn contexts_run_out_without_reviving_old_translations() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, 0x5000, ALL, false);
        for _ in 0..10_000 {
            tlb.flush_all();
            assert!(!tlb.holds(View::User, 0x1000, Access::Read));
        }
    }

    #[test]
    fn dropping_writes_leaves_loads() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, 0x5000, ALL, false);
        assert!(tlb.drop_writes(0x5123) && !tlb.drop_writes(0x5123));
        assert_eq!(tlb.write(View::User, 0x1000, 1), None);
        assert_eq!(tlb.read(View::User, 0x1000, 1), Some(0x5000));
    }
}
