//! From RIP to translated code: for each regime a direct-mapped table, which translated code looks into itself.

use std::alloc::{Layout, handle_alloc_error};

use zerocopy::FromZeros;

use super::assembler::{ADDRESS, Assembler, Jump, RSP, SCRATCH};
use super::frame::slot;
use crate::block::Regime;

/// Entries of a table, a power of two; and of a large one.
const ENTRIES: usize = 8192;
const LARGE: usize = 65536;
/// RIPs that took another's place, after which the tables are large.
const MOST_CONFLICTS: u64 = 1 << 16;
/// Tables, at most: address spaces times privileges, with room for those that come and go.
const TABLES: usize = 16;
/// Fills of a table that are remembered one by one; after more, all of it is emptied.
const LOG: usize = 1024;

/// Spreads a RIP over the entries: a multiplication, and the bits of the product from [`SHIFT`] on.
const FACTOR: i32 = 0x9e37_79b1_u32 as i32;
const SHIFT: u8 = 28;
/// Offset of an entry's code.
const CODE: i32 = std::mem::offset_of!(Target, code) as i32;

/// Where the code for a RIP is. No code: no RIP finds it, for its own belongs to another entry.
#[derive(Clone, Copy, FromZeros)]
#[repr(C)]
struct Target {
    rip: u64,
    code: u64,
}

/// How large the tables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    is_large: bool,
}

impl Size {
    fn entries(self) -> usize {
        if self.is_large { LARGE } else { ENTRIES }
    }

    /// Masks the product to an entry's offset in bytes.
    fn mask(self) -> i32 {
        ((self.entries() - 1) * size_of::<Target>()) as i32
    }

    /// Where the entry for a RIP stands, in bytes.
    fn offset(self, rip: u64) -> i32 {
        let product = rip.wrapping_mul(i64::from(FACTOR) as u64);
        (product >> SHIFT) as i32 & self.mask()
    }

    fn index(self, rip: u64) -> usize {
        self.offset(rip) as usize / size_of::<Target>()
    }
}

/// An entry that no RIP finds. It is zero but for the one that RIP 0 looks at, which is the first.
fn nothing(index: usize) -> Target {
    Target { rip: u64::from(index == 0), code: 0 }
}

/// One regime's targets.
struct Table {
    regime: Option<Regime>,
    entries: Box<[Target]>,
    /// The entries that were filled.
    log: Vec<u32>,
    /// When it was looked for last.
    used: u64,
}

impl Table {
    fn new(size: Size) -> Self {
        // Entries that are never used take no memory of the host's.
        let layout = || Layout::array::<Target>(size.entries()).unwrap_or(Layout::new::<Target>());
        let mut entries = <[Target]>::new_box_zeroed_with_elems(size.entries())
            .unwrap_or_else(|_| handle_alloc_error(layout()));
        entries[0] = nothing(0);
        Self { regime: None, entries, log: Vec::with_capacity(LOG), used: 0 }
    }

    fn clear(&mut self) {
        if self.log.len() < LOG {
            for &at in &self.log {
                self.entries[at as usize] = nothing(at as usize);
            }
        } else {
            self.entries.iter_mut().enumerate().for_each(|(at, entry)| *entry = nothing(at));
        }
        self.log.clear();
        self.regime = None;
    }
}

/// The tables.
#[derive(Default)]
pub struct Targets {
    tables: Vec<Table>,
    current: usize,
    clock: u64,
    size: Size,
    /// How often a RIP took another's place.
    conflicts: u64,
}

impl Targets {
    /// A regime's table. Whether another regime's had to be given up for it, comes with it.
    pub fn table(&mut self, regime: Regime) -> (u64, bool) {
        let mut given_up = false;
        if self.tables.get(self.current).is_none_or(|table| table.regime != Some(regime)) {
            (self.current, given_up) = self.find(regime);
            self.clock += 1;
            self.tables[self.current].used = self.clock;
        }
        (self.tables[self.current].entries.as_ptr() as u64, given_up)
    }

    fn find(&mut self, regime: Regime) -> (usize, bool) {
        if let Some(found) = self.tables.iter().position(|table| table.regime == Some(regime)) {
            return (found, false);
        }
        if self.tables.len() < TABLES {
            self.tables.push(Table::new(self.size));
        }
        // A new one, or the one that has not been looked for longest.
        let oldest =
            (0..self.tables.len()).min_by_key(|&at| (self.tables[at].regime.is_some(), self.tables[at].used));
        let oldest = oldest.unwrap_or(0);
        let given_up = self.tables[oldest].regime.is_some();
        self.tables[oldest].clear();
        self.tables[oldest].regime = Some(regime);
        (oldest, given_up)
    }

    /// Remembers where the code for a RIP is, in the regime whose table was asked for last.
    pub fn remember(&mut self, rip: u64, regime: Regime, code: u64) {
        let Some(table) = self.tables.get_mut(self.current).filter(|table| table.regime == Some(regime))
        else {
            return;
        };
        let at = self.size.index(rip);
        let entry = &mut table.entries[at];
        self.conflicts += u64::from(entry.code != 0 && entry.rip != rip);
        if table.log.len() < LOG && entry.code == 0 {
            table.log.push(at as u32);
        }
        *entry = Target { rip, code };
    }

    /// The same where that takes no other RIP's place.
    pub fn suggest(&mut self, rip: u64, regime: Regime, code: u64) {
        let at = self.size.index(rip);
        if self.tables.get(self.current).is_some_and(|table| table.entries[at].code == 0) {
            self.remember(rip, regime, code);
        }
    }

    /// How large the tables are.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Whether [`Targets::grow`] is due.
    pub fn want_growth(&self) -> bool {
        self.conflicts >= MOST_CONFLICTS && !self.size.is_large
    }

    /// From now on the tables are large. All code has to look in other places from now on.
    pub fn grow(&mut self) {
        self.size.is_large = true;
        self.tables.clear();
    }

    /// Forgets all code.
    pub fn clear(&mut self) {
        self.tables.iter_mut().for_each(Table::clear);
    }
}

impl Assembler {
    /// Looks for the RIP in [`ADDRESS`]: its entry's address, to [`SCRATCH`]. The jump is taken where it is another's.
    pub fn find_target(&mut self, tables: Size) -> Jump {
        // imul r15, r14, FACTOR
        self.registers(true, &[0x69], SCRATCH, ADDRESS);
        self.bytes.extend_from_slice(&FACTOR.to_le_bytes());
        self.shift(5, SCRATCH, SHIFT);
        self.alu_immediate(false, 4, SCRATCH, tables.mask());
        self.memory(true, &[0x03], SCRATCH, RSP, slot::TARGETS);
        self.memory(true, &[0x3b], ADDRESS, SCRATCH, 0);
        self.jump_if(5)
    }

    /// Goes to the code of the entry at [`SCRATCH`].
    pub fn jump_to_target(&mut self) {
        self.memory(false, &[0xff], 4, SCRATCH, CODE);
    }

    /// Goes to the code for a known RIP, which stays in [`ADDRESS`]. The jump is taken where it is not at hand.
    pub fn jump_to_known_target(&mut self, rip: u64, tables: Size) -> Jump {
        self.mov_immediate(ADDRESS, rip);
        self.load(SCRATCH, RSP, slot::TARGETS);
        self.memory(true, &[0x3b], ADDRESS, SCRATCH, tables.offset(rip));
        let another = self.jump_if(5);
        self.memory(false, &[0xff], 4, SCRATCH, tables.offset(rip) + CODE);
        another
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What translated code would find.
    fn found(targets: &mut Targets, regime: Regime, rip: u64) -> Option<u64> {
        targets.table(regime);
        let entry = targets.tables[targets.current].entries[targets.size.index(rip)];
        (entry.rip == rip).then_some(entry.code)
    }

    #[test]
    fn nothing_is_found_where_nothing_was_remembered() {
        let mut targets = Targets::default();
        assert_ne!(Size::default().index(0), Size::default().index(1));
        for rip in (0..100_000).chain([u64::MAX, 1 << 63, 1 << 47]) {
            assert_eq!(found(&mut targets, 1, rip), None, "{rip:#x}");
        }
    }

    #[test]
    fn each_regime_has_its_own_targets() {
        let mut targets = Targets::default();
        for regime in 0..TABLES as u64 {
            targets.table(regime);
            targets.remember(0x1000, regime, 0x100 + regime);
            targets.remember(0, regime, 0x200 + regime);
            targets.remember(0x2000, regime + 1, 0x300);
        }
        for regime in 0..TABLES as u64 {
            assert_eq!(found(&mut targets, regime, 0x1000), Some(0x100 + regime));
            assert_eq!(found(&mut targets, regime, 0), Some(0x200 + regime));
            assert_eq!(found(&mut targets, regime, 0x2000), None, "another regime's");
        }
        assert!(!targets.table(0).1);
        assert!(targets.table(77).1, "one is given up");
        assert_eq!(found(&mut targets, 77, 0x1000), None);
        assert_eq!(found(&mut targets, 0, 0x1000), Some(0x100));
        assert_eq!(found(&mut targets, 1, 0x1000), None, "the one that was not used longest");
        targets.clear();
        assert_eq!(found(&mut targets, 0, 0x1000), None);
    }

    #[test]
    fn tables_in_which_many_took_anothers_place_become_large() {
        let mut targets = Targets::default();
        let rips = || (0..LARGE as u64).map(|n| n * 16);
        let fill = |targets: &mut Targets| {
            targets.table(1);
            rips().for_each(|rip| targets.remember(rip, 1, 5));
            rips().filter(|&rip| found(targets, 1, rip).is_some()).count()
        };
        assert!(fill(&mut targets) <= ENTRIES && !targets.want_growth());
        while !targets.want_growth() {
            fill(&mut targets);
        }
        targets.grow();
        assert!(!targets.want_growth());
        assert!(rips().all(|rip| found(&mut targets, 1, rip).is_none()));
        assert!(fill(&mut targets) > 3 * ENTRIES);
        assert!(!targets.want_growth(), "they grow once");
    }

    #[test]
    fn more_targets_than_are_remembered_one_by_one_are_forgotten_all_the_same() {
        let mut targets = Targets::default();
        targets.table(1);
        let rips = || (0..4 * LOG as u64).map(|n| n * 48);
        rips().for_each(|rip| targets.remember(rip, 1, 5));
        targets.clear();
        assert!(rips().all(|rip| found(&mut targets, 1, rip).is_none()));
    }
}
