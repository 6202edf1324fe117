//! The translation cache: for each address space and view a direct-mapped table of pages.
//!
//! Global pages outlive a change of the address space, and an operating system's own pages are global: all address spaces
//! share one table for [`View::Supervisor`]. What else gets into it is dropped when the space changes. Where that is
//! much, each space has a table of its own for that view as well.

use std::alloc::{Layout, handle_alloc_error};

use guest_memory::Offset;
use zerocopy::FromZeros;

use super::{Access, View};

use crate::mode::Mode;

/// Entries in each view's part of a table.
pub const ENTRIES: usize = 16384;
const VIEWS: usize = 4;
const VIEW: [View; VIEWS] = [View::Supervisor, View::SupervisorUnguarded, View::User, View::UserAligned];
const SIZE: usize = ENTRIES * VIEWS;
const LAYOUT: Layout = Layout::new::<[Entry; SIZE]>();
const PAGE: u64 = !0xfff;
/// Address spaces whose translations are kept.
const SPACES: usize = 8;
/// The table of [`View::Supervisor`] that the address spaces share.
const SHARED: usize = SPACES;
/// Pages in it that are not global, at most: with more, each space has a table of its own.
const MOST_PRIVATE: usize = 256;
/// Pages that took another's place, after which the entries are chosen by higher bits of the address as well.
const MOST_CONFLICTS: u64 = 1 << 20;
/// How far these are above those that choose the entries otherwise: what is as far apart as all entries cover gets places 64
/// pages apart.
pub const FOLD: u8 = 8;
/// Fills that a table remembers one by one; after more, a flush empties all of it.
const LOG: usize = 8192;

/// One page's translation, as translated code reads it too. A tag is the linear page, or [`no_page`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros)]
#[repr(C)]
pub struct Entry {
    read: u64,
    write: u64,
    fetch: u64,
    /// The host address of the page.
    page: u64,
}

/// Offsets of an entry's fields, in bytes: the tag for loads.
pub const ENTRY_READ: i32 = std::mem::offset_of!(Entry, read) as i32;
/// The tag for stores.
pub const ENTRY_WRITE: i32 = std::mem::offset_of!(Entry, write) as i32;
/// Masks a linear address, shifted right by 7, to its entry's offset in bytes.
pub const ENTRY_MASK: i32 = ((ENTRIES - 1) * size_of::<Entry>()) as i32;
/// The page's host address.
pub const ENTRY_PAGE: i32 = std::mem::offset_of!(Entry, page) as i32;

/// A tag that no linear address which looks at entry `index` can have: its low page bits are another entry's. It is zero
/// wherever it can be, so that entries which are never used take no memory of the host's.
const fn no_page(index: usize) -> u64 {
    if index.is_multiple_of(ENTRIES) { 1 << 12 } else { 0 }
}

const fn empty(index: usize) -> Entry {
    let none = no_page(index);
    Entry { read: none, write: none, fetch: none, page: 0 }
}

/// One address space's translations.
struct Table {
    pcid: Option<u16>,
    /// Names what is remembered of fetches from this space, see [`Tlb::fetch_regime`].
    fetches: u64,
    entries: Box<[Entry; SIZE]>,
    /// The entries that were filled since the last flush.
    log: Vec<u16>,
    /// Those of them whose pages have a protection key other than 0.
    keyed: Vec<u16>,
}

impl Table {
    fn new(fetches: u64) -> Self {
        let mut entries = <[Entry; SIZE]>::new_box_zeroed().unwrap_or_else(|_| handle_alloc_error(LAYOUT));
        (0..SIZE).step_by(ENTRIES).for_each(|index| entries[index] = empty(index));
        Self { pcid: None, fetches, entries, log: Vec::with_capacity(LOG), keyed: Vec::new() }
    }

    fn clear(&mut self) {
        each_filled(&mut self.entries, &self.log, |index, entry| *entry = empty(index));
        self.log.clear();
        self.keyed.clear();
    }

    /// Drops what allows loads and stores: of pages with a protection key, or of all.
    fn drop_data(&mut self, all: bool) {
        let filled = if all { &self.log } else { &self.keyed };
        each_filled(&mut self.entries, filled, |index, entry| {
            (entry.read, entry.write) = (no_page(index), no_page(index));
        });
        self.keyed.clear();
    }
}

/// The entries that a log names; where it is full, all that hold something: the others are only read.
fn each_filled(entries: &mut [Entry; SIZE], log: &[u16], mut act: impl FnMut(usize, &mut Entry)) {
    if log.len() < LOG {
        log.iter().for_each(|&index| act(index.into(), &mut entries[usize::from(index) % SIZE]));
    } else {
        let filled = entries.iter_mut().enumerate().filter(|(index, entry)| **entry != empty(*index));
        filled.for_each(|(index, entry)| act(index, entry));
    }
}

/// Where a page lies, and what the cache has to know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// The page's offset in RAM, or that of any byte in it.
    pub offset: Offset,
    /// What it may be used for.
    pub allowed: Allowed,
    /// Bits of an address within the guest's page, of which this may be a part: 12, 21, 22 or 30.
    pub size_bits: u8,
    /// The page's protection key, where a register says what the key allows; else 0.
    pub key: u8,
    /// Whether it is the same in every address space.
    pub global: bool,
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

/// Where the entries are that may allow stores to a page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// Nowhere else than at these tables and indices.
    At([Option<(u8, u16)>; STORED]),
    /// Who knows.
    Anywhere,
}

/// Places that are remembered for each page: a program's, the operating system's, and a second view's of that.
const STORED: usize = 3;

impl Default for Stored {
    fn default() -> Self {
        Self::At([None; STORED])
    }
}

/// What depends on the view in translated code; it takes this over when it changes the view itself.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct ViewState {
    /// The first entry of the view, as [`Tlb::base`] gives it.
    base: u64,
    /// Its table from RIP to translated code, in [`ViewState::mode`].
    targets: u64,
    /// The mode; [`ViewState::NO_MODE`] while no table is known.
    mode: u64,
}

impl ViewState {
    /// Offset of the table from RIP to code.
    pub const TARGETS: i32 = std::mem::offset_of!(ViewState, targets) as i32;
    /// Offset of the mode.
    pub const MODE: i32 = std::mem::offset_of!(ViewState, mode) as i32;
    const NO_MODE: u64 = u64::MAX;
}

/// A set of page numbers, with some that are not in it: they share a bit with others.
struct PageSet {
    bits: Box<[u64; Self::BITS / 64]>,
    is_empty: bool,
}

impl PageSet {
    /// With some thousand pages in it, one of ten to thirty others seems to be.
    const BITS: usize = 1 << 16;

    fn new() -> Self {
        Self { bits: Box::new([0; Self::BITS / 64]), is_empty: true }
    }

    /// A page's word and bit.
    fn place(page: u64) -> (usize, u64) {
        let hash = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - Self::BITS.trailing_zeros());
        (hash as usize / 64 % (Self::BITS / 64), 1 << (hash % 64))
    }

    fn insert(&mut self, page: u64) {
        let (word, bit) = Self::place(page);
        self.bits[word] |= bit;
        self.is_empty = false;
    }

    /// Whether a page is in it, or seems to be.
    fn may_have(&self, page: u64) -> bool {
        let (word, bit) = Self::place(page);
        self.bits[word] & bit != 0
    }

    fn clear(&mut self) {
        if !std::mem::replace(&mut self.is_empty, true) {
            self.bits.fill(0);
        }
    }
}

/// The translation cache.
pub struct Tlb {
    tables: Box<[Table; SPACES + 1]>,
    current: usize,
    /// Which table each view's entries are in.
    of_view: [usize; VIEWS],
    /// What translated code needs to know of the views.
    states: [ViewState; VIEWS],
    /// Whether [`View::Supervisor`] is shared.
    shares: bool,
    /// The entries of the shared table that are not global.
    private: Vec<u16>,
    /// Whether instructions may have been fetched through one of them.
    private_fetch: bool,
    /// The space that is given up next.
    next: usize,
    /// The 2-MiB pages in which part of a large page is cached.
    large: PageSet,
    /// The same of 1-GiB pages.
    huge: PageSet,
    /// The protection keys of the pages in it, one bit for each.
    keys: u16,
    /// The last name given to what is remembered of fetches.
    last_fetches: u64,
    /// The pages that code was found in since those names were given.
    fetched: PageSet,
    /// For each page of RAM, where an entry may allow stores to it.
    stored: Vec<Stored>,
    /// The host address of the RAM.
    ram: u64,
    /// How often a page was entered.
    fills: u64,
    /// How often it took the place of another.
    conflicts: u64,
    /// Whether entries are chosen by higher bits of the address as well: see [`Tlb::fold`].
    folded: bool,
}

impl Tlb {
    /// An empty cache.
    pub fn new() -> Self {
        let mut tlb = Self {
            tables: Box::new(std::array::from_fn(|n| Table::new(n as u64))),
            current: 0,
            of_view: [SHARED, 0, 0, 0],
            states: Default::default(),
            shares: true,
            private: Vec::new(),
            private_fetch: false,
            next: 1,
            large: PageSet::new(),
            huge: PageSet::new(),
            keys: 0,
            last_fetches: SPACES as u64 + 1,
            fetched: PageSet::new(),
            stored: Vec::new(),
            ram: 0,
            fills: 0,
            conflicts: 0,
            folded: false,
        };
        tlb.publish();
        tlb
    }

    /// Where what translated code needs to know of the views stands: [`ViewState`]s by view.
    pub const STATES_OFFSET: usize = std::mem::offset_of!(Tlb, states);

    /// Follows a change of tables or of their names.
    fn publish(&mut self) {
        for view in VIEW {
            let base = self.base(view) as u64;
            self.states[view as usize] = ViewState { base, targets: 0, mode: ViewState::NO_MODE };
        }
    }

    /// A table from RIP to code has another regime's entries now, or may get them.
    pub fn forget_targets(&mut self) {
        self.publish();
    }

    /// From now on translated code may change to this view, in this mode, with this table from RIP to code.
    pub fn set_targets(&mut self, view: View, mode: Mode, targets: u64) {
        let state = &mut self.states[view as usize % VIEWS];
        (state.targets, state.mode) = (targets, mode.0.into());
    }

    /// Names the translations for fetches, and their state: what was remembered of fetches with a view under a name is good
    /// whenever the name is the same.
    #[inline(always)]
    pub fn fetch_regime(&self, view: View) -> u64 {
        self.table(view).fetches
    }

    #[inline(always)]
    fn table(&self, view: View) -> &Table {
        &self.tables[self.of_view[view as usize % VIEWS]]
    }

    /// Someone remembers where the code at `linear` lies, under the present name.
    pub fn note_fetch(&mut self, linear: u64) {
        self.fetched.insert(linear >> 12);
    }

    fn rename_fetches(&mut self, table: usize) {
        self.last_fetches += 1;
        self.tables[table].fetches = self.last_fetches;
        self.publish();
    }

    #[inline(always)]
    fn index(&self, view: View, linear: u64) -> usize {
        let folded = if self.folded { linear ^ linear >> FOLD } else { linear };
        (view as usize * ENTRIES + (folded >> 12) as usize % ENTRIES) % SIZE
    }

    /// Whether entries are chosen by higher bits of the address as well: those [`FOLD`] bits above.
    pub fn is_folded(&self) -> bool {
        self.folded
    }

    /// Whether [`Tlb::fold`] is due: so many pages took another's place that arrays may lie at each other's distance.
    #[inline(always)]
    pub fn wants_fold(&self) -> bool {
        self.conflicts >= MOST_CONFLICTS && !self.folded
    }

    /// From now on, entries are chosen by higher bits of the address as well. Drops everything; translated code has to look
    /// in other places from now on.
    pub fn fold(&mut self) {
        self.flush_all();
        self.folded = true;
    }

    /// The first entry of a view in the present address space, for translated code.
    pub fn base(&self, view: View) -> *const Entry {
        self.table(view).entries[view as usize * ENTRIES..].as_ptr()
    }

    #[inline(always)]
    fn entry(&self, view: View, linear: u64) -> &Entry {
        &self.table(view).entries[self.index(view, linear)]
    }

    /// Where `size` bytes at `linear` lie, for a load. `None` also where they cross into the next page.
    #[inline(always)]
    pub fn read(&self, view: View, linear: u64, size: u64) -> Option<Offset> {
        let entry = self.entry(view, linear);
        let within = linear ^ entry.read;
        (within <= 4096 - size).then(|| entry.page.wrapping_sub(self.ram) + within)
    }

    /// The same for a store.
    #[inline(always)]
    pub fn write(&self, view: View, linear: u64, size: u64) -> Option<Offset> {
        let entry = self.entry(view, linear);
        let within = linear ^ entry.write;
        (within <= 4096 - size).then(|| entry.page.wrapping_sub(self.ram) + within)
    }

    /// The same for an instruction fetch of one byte.
    #[inline(always)]
    pub fn fetch(&self, view: View, linear: u64) -> Option<Offset> {
        let entry = self.entry(view, linear);
        let within = linear ^ entry.fetch;
        (within <= 4095).then(|| entry.page.wrapping_sub(self.ram) + within)
    }

    /// Sets the host address of the RAM, for translated code. Drops everything.
    pub fn set_ram(&mut self, host: u64) {
        self.flush_all();
        self.ram = host;
    }

    /// How often a page was entered, after a look at the page tables.
    pub fn fills(&self) -> u64 {
        self.fills
    }

    /// Remembers where the page of `linear` lies.
    pub fn insert(&mut self, view: View, linear: u64, mapping: Mapping) {
        self.fills += 1;
        let (tag, page, allowed) = (linear & PAGE, mapping.offset & PAGE, mapping.allowed);
        let host = self.ram.wrapping_add(page);
        let index = self.index(view, linear);
        if !mapping.global && self.of_view[view as usize % VIEWS] == SHARED {
            self.note_private(index, allowed.fetch);
        }
        let number = self.of_view[view as usize % VIEWS];
        let table = &mut self.tables[number];
        let entry = &mut table.entries[index];
        if [entry.read, entry.write, entry.fetch].iter().all(|&t| t != tag) || entry.page != host {
            self.conflicts += u64::from(entry.page != 0);
            *entry = Entry { page: host, ..empty(index) };
            if table.log.len() < LOG {
                table.log.push(index as u16);
            }
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
        self.keys |= 1 << (mapping.key & 15);
        if mapping.key != 0 && table.keyed.len() < LOG {
            table.keyed.push(index as u16);
        }
        if allowed.write {
            self.note_store(page, number, index);
        }
        self.note_size(linear, mapping.size_bits);
    }

    /// A page that is not global comes into the shared table.
    fn note_private(&mut self, index: usize, fetch: bool) {
        if self.private.len() < MOST_PRIVATE {
            self.private.push(index as u16);
            self.private_fetch |= fetch;
            return;
        }
        self.shares = false;
        self.drop_private();
        self.clear(SHARED);
        self.of_view[View::Supervisor as usize] = self.current;
        self.publish();
    }

    /// Drops what is not global from the shared table.
    fn drop_private(&mut self) {
        for index in std::mem::take(&mut self.private) {
            self.tables[SHARED].entries[usize::from(index) % SIZE] = empty(index.into());
        }
        if std::mem::take(&mut self.private_fetch) {
            self.rename_fetches(SHARED);
        }
    }

    /// Makes a space's table the present one.
    fn enter(&mut self, table: usize) {
        self.drop_private();
        self.current = table;
        self.of_view = [if self.shares { SHARED } else { table }, table, table, table];
        self.publish();
    }

    fn note_size(&mut self, linear: u64, size_bits: u8) {
        match size_bits {
            12 => {}
            30 => {
                self.huge.insert(linear >> 30);
            }
            // Both halves of a 4-MiB page.
            _ => {
                for half in 0..1 << (size_bits.max(21) - 21) {
                    self.large.insert(linear >> size_bits << (size_bits - 21) | half);
                }
            }
        }
    }

    /// The rights of some protection keys changed, one bit for each: drops what allows loads and stores of their pages.
    /// Fetches do not depend on them.
    pub fn drop_keys(&mut self, changed: u16) {
        if self.keys & changed == 0 {
            return;
        }
        // Pages with key 0 are not told apart.
        let all = changed & 1 != 0;
        self.tables.iter_mut().for_each(|table| table.drop_data(all));
        self.keys &= if all { 0 } else { 1 };
    }

    fn note_store(&mut self, page: Offset, table: usize, index: usize) {
        let number = (page >> 12) as usize;
        if self.stored.len() <= number {
            self.stored.resize(number + 1, Stored::default());
        }
        let here = Some((table as u8, index as u16));
        let Stored::At(mut places) = self.stored[number] else { return };
        if places.contains(&here) {
            return;
        }
        let host = self.ram.wrapping_add(page);
        let is_gone = |place: &Option<(u8, u16)>| {
            place.is_none_or(|(table, index)| {
                let entry = &self.tables[usize::from(table)].entries[usize::from(index)];
                entry.page != host || entry.write == no_page(index.into())
            })
        };
        self.stored[number] = match places.iter().position(is_gone) {
            Some(free) => {
                places[free] = here;
                Stored::At(places)
            }
            None => Stored::Anywhere,
        };
    }

    /// Drops what allows stores to the page at an offset, in every view and address space. Gives whether there was any.
    pub fn drop_writes(&mut self, offset: Offset) -> bool {
        let page = offset & PAGE;
        let host = self.ram.wrapping_add(page);
        let drop = |index: usize, entry: &mut Entry| {
            let found = entry.page == host && entry.write != no_page(index);
            if found {
                entry.write = no_page(index);
            }
            found
        };
        let Some(stored) = self.stored.get_mut((page >> 12) as usize) else { return false };
        match std::mem::take(stored) {
            Stored::At(places) => places.into_iter().flatten().fold(false, |found, (table, index)| {
                let entry = &mut self.tables[usize::from(table)].entries[usize::from(index)];
                drop(index.into(), entry) | found
            }),
            Stored::Anywhere => {
                let mut found = false;
                for table in self.tables.iter_mut() {
                    each_filled(&mut table.entries, &table.log, |index, entry| found |= drop(index, entry));
                }
                found
            }
        }
    }

    /// INVLPG: drops the page of `linear` in every view and address space, with the whole of the large page where it
    /// is part of one.
    pub fn invalidate_page(&mut self, linear: u64) {
        if self.fetched.may_have(linear >> 12) {
            self.fetched.clear();
            (0..=SHARED).for_each(|table| self.rename_fetches(table));
        }
        if self.large.may_have(linear >> 21) || self.huge.may_have(linear >> 30) {
            self.flush_all();
            return;
        }
        let indices = VIEW.map(|view| self.index(view, linear));
        for table in self.tables.iter_mut() {
            for index in indices {
                let entry = &mut table.entries[index];
                let tags = [entry.read, entry.write, entry.fetch];
                if tags.iter().any(|&tag| (tag ^ linear) & PAGE == 0) {
                    *entry = empty(index);
                }
            }
        }
    }

    /// Drops everything.
    pub fn flush_all(&mut self) {
        self.large.clear();
        self.huge.clear();
        self.fetched.clear();
        self.keys = 0;
        self.shares = true;
        self.enter(self.current);
        for table in 0..=SHARED {
            if table != self.current {
                self.tables[table].pcid = None;
            }
            self.clear(table);
        }
    }

    fn clear(&mut self, table: usize) {
        self.tables[table].clear();
        self.rename_fetches(table);
    }

    fn find(&self, pcid: u16) -> Option<usize> {
        self.tables.iter().position(|table| table.pcid == Some(pcid))
    }

    /// Drops the translations of one PCID, but for global ones.
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.drop_private();
        if let Some(table) = self.find(pcid) {
            self.clear(table);
        }
    }

    /// Makes the address space of a PCID the present one; keeps what is cached of it where asked to.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        match self.find(pcid) {
            Some(table) => {
                self.enter(table);
                if !keep {
                    self.clear(table);
                }
            }
            None => {
                let table = self.next % SPACES;
                self.next += 1;
                self.clear(table);
                self.tables[table].pcid = Some(pcid);
                self.enter(table);
            }
        }
    }

    /// For tests: whether translated code may change to a view.
    #[cfg(test)]
    pub fn knows_targets(&self, view: View) -> bool {
        self.states[view as usize % VIEWS].mode != ViewState::NO_MODE
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

    /// A page of 4 KiB that may be used for everything.
    fn small(offset: Offset) -> Mapping {
        let allowed = Allowed { read: true, write: true, fetch: true };
        Mapping { offset, allowed, size_bits: 12, key: 0, global: false }
    }

    #[test]
    fn an_access_that_crosses_into_the_next_page_is_a_miss() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, small(0x5000));
        tlb.insert(View::User, 0x2000, small(0x6000));
        assert_eq!(tlb.read(View::User, 0x1ff8, 8), Some(0x5ff8));
        assert_eq!(tlb.read(View::User, 0x1ff9, 8), None);
        assert_eq!(tlb.read(View::Supervisor, 0x1000, 1), None);
    }

    #[test]
    fn a_kept_address_space_keeps_its_translations() {
        let mut tlb = Tlb::new();
        tlb.switch(1, false);
        tlb.insert(View::User, 0x1000, small(0x5000));
        tlb.switch(2, true);
        assert!(!tlb.holds(View::User, 0x1000, Access::Read));
        tlb.switch(1, true);
        assert!(tlb.holds(View::User, 0x1000, Access::Read));
        tlb.switch(1, false);
        assert!(!tlb.holds(View::User, 0x1000, Access::Read));
    }

    #[test]
    fn global_pages_of_the_supervisor_outlive_a_change_of_the_address_space_and_others_do_not() {
        let mut tlb = Tlb::new();
        tlb.switch(1, false);
        let fetched = tlb.fetch_regime(View::Supervisor);
        tlb.insert(View::Supervisor, 0x1000, Mapping { global: true, ..small(0x5000) });
        tlb.insert(View::User, 0x1000, Mapping { global: true, ..small(0x5000) });
        tlb.switch(2, false);
        assert!(tlb.holds(View::Supervisor, 0x1000, Access::Write));
        assert!(!tlb.holds(View::User, 0x1000, Access::Write));
        assert_eq!(tlb.fetch_regime(View::Supervisor), fetched);
        tlb.insert(View::Supervisor, 0x2000, small(0x6000));
        tlb.switch(1, true);
        assert!(!tlb.holds(View::Supervisor, 0x2000, Access::Read));
        assert_ne!(tlb.fetch_regime(View::Supervisor), fetched, "its code may have been remembered");
        tlb.flush_pcid(1);
        assert!(tlb.holds(View::Supervisor, 0x1000, Access::Fetch));
        tlb.invalidate_page(0x1000);
        assert!(!tlb.holds(View::Supervisor, 0x1000, Access::Fetch));
    }

    #[test]
    fn where_the_supervisor_has_many_pages_that_are_not_global_each_space_keeps_its_own() {
        let mut tlb = Tlb::new();
        tlb.switch(1, false);
        let pages = || (0..2 * MOST_PRIVATE as u64).map(|page| page << 12);
        let fill = |tlb: &mut Tlb| {
            pages().for_each(|page| tlb.insert(View::Supervisor, page, small(page)));
        };
        fill(&mut tlb);
        fill(&mut tlb);
        tlb.switch(2, false);
        assert!(pages().all(|page| !tlb.holds(View::Supervisor, page, Access::Read)));
        tlb.switch(1, true);
        assert!(pages().all(|page| tlb.holds(View::Supervisor, page, Access::Read)));
        tlb.flush_all();
        tlb.insert(View::Supervisor, 0x1000, Mapping { global: true, ..small(0x5000) });
        tlb.switch(2, false);
        assert!(tlb.holds(View::Supervisor, 0x1000, Access::Read), "shared again");
    }

    #[test]
    fn invalidating_part_of_a_large_page_drops_all_of_it() {
        for (size_bits, other) in [(21, 0x20_3000), (22, 0x3000), (22, 0x3f_f000), (30, 0x3fff_f000)] {
            let mut tlb = Tlb::new();
            for (linear, offset) in [(0x20_1000, 0x5000), (0x20_2000, 0x6000)] {
                tlb.insert(View::User, linear, Mapping { size_bits, ..small(offset) });
            }
            tlb.invalidate_page(1 << size_bits << 1 | other);
            assert!(tlb.holds(View::User, 0x20_1000, Access::Read), "another page of 2^{size_bits} bytes");
            tlb.invalidate_page(other);
            assert!(!tlb.holds(View::User, 0x20_1000, Access::Read), "2^{size_bits} bytes");
            assert!(!tlb.holds(View::User, 0x20_2000, Access::Fetch), "2^{size_bits} bytes");
        }
    }

    #[test]
    fn new_rights_of_a_key_drop_its_pages_for_data_in_every_address_space() {
        let mut tlb = Tlb::new();
        for (pcid, linear, key) in [(1, 0x1000, 3), (1, 0x2000, 0), (2, 0x3000, 3)] {
            tlb.switch(pcid, true);
            tlb.insert(View::User, linear, Mapping { key, ..small(0x5000) });
        }
        tlb.drop_keys(!(1 << 3 | 1));
        assert!(tlb.holds(View::User, 0x3000, Access::Write), "other keys");
        tlb.drop_keys(1 << 3);
        let held = |tlb: &Tlb, linear| {
            [Access::Read, Access::Write, Access::Fetch].map(|access| tlb.holds(View::User, linear, access))
        };
        assert_eq!(held(&tlb, 0x3000), [false, false, true]);
        tlb.switch(1, true);
        assert_eq!((held(&tlb, 0x1000), held(&tlb, 0x2000)), ([false, false, true], [true; 3]));
        tlb.drop_keys(1);
        assert_eq!(held(&tlb, 0x2000), [false, false, true]);
    }

    #[test]
    fn more_pages_with_keys_than_are_remembered_are_dropped_all_the_same() {
        let mut tlb = Tlb::new();
        let pages = || (0..2 * LOG as u64).map(|page| page << 12);
        pages().for_each(|page| tlb.insert(View::User, page, Mapping { key: 1, ..small(page) }));
        tlb.drop_keys(2);
        assert!(pages().all(|page| !tlb.holds(View::User, page, Access::Read)));
    }

    #[test]
    fn no_flush_revives_old_translations() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, small(0x5000));
        for _ in 0..10_000 {
            tlb.flush_all();
            assert!(!tlb.holds(View::User, 0x1000, Access::Read));
        }
    }

    #[test]
    fn arrays_at_the_distance_of_the_table_have_entries_of_their_own_once_they_took_each_others_places_often()
    {
        let arrays = || (0..4).flat_map(|array| (0..64).map(move |page| array << 26 | page << 12));
        let insert = |tlb: &mut Tlb| arrays().for_each(|page| tlb.insert(View::User, page, small(page)));
        let held = |tlb: &Tlb| arrays().filter(|&page| tlb.holds(View::User, page, Access::Read)).count();
        let mut tlb = Tlb::new();
        insert(&mut tlb);
        assert_eq!((held(&tlb), tlb.wants_fold()), (64, false));
        while !tlb.wants_fold() {
            insert(&mut tlb);
        }
        tlb.fold();
        assert_eq!((held(&tlb), tlb.wants_fold()), (0, false));
        insert(&mut tlb);
        assert_eq!(held(&tlb), 256);
        assert_eq!(tlb.read(View::User, 1 << 26 | 0x1008, 8), Some(1 << 26 | 0x1008));
        tlb.invalidate_page(1 << 26 | 0x1000);
        assert_eq!(held(&tlb), 255);
        assert!(tlb.drop_writes(2 << 26) && tlb.write(View::User, 2 << 26, 1).is_none());
    }

    #[test]
    fn dropping_writes_leaves_loads() {
        let mut tlb = Tlb::new();
        tlb.insert(View::User, 0x1000, small(0x5000));
        assert!(tlb.drop_writes(0x5123) && !tlb.drop_writes(0x5123));
        assert_eq!(tlb.write(View::User, 0x1000, 1), None);
        assert_eq!(tlb.read(View::User, 0x1000, 1), Some(0x5000));
    }
}
