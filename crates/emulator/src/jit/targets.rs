//! From RIP to translated code: for each regime a direct-mapped table, which translated code looks into itself.

use std::alloc::{Layout, handle_alloc_error};

use zerocopy::FromZeros;

use super::assembler::{ADDRESS, Assembler, Jump, RSP, SCRATCH};
use super::frame::slot;
use crate::block::Regime;
use crate::native::code_memory::CodeMemory;

/// Entries of a table, a power of two; and of a large one.
const ENTRIES: usize = 8192;
const LARGE: usize = 65536;
/// RIPs that took another's place, after which the tables are large.
const MOST_CONFLICTS: u64 = 1 << 16;
/// Tables, at most: address spaces times privileges, with room for those that come and go.
const TABLES: usize = 16;
/// Fills of a table that are remembered one by one; after more, all of it is emptied.
const LOG: usize = 1024;

/// A table was used lately until so many changes of the table have passed.
const LATELY: u64 = 64;

/// Spreads a RIP over the entries: a multiplication, and the bits of the product from [`SHIFT`] on.
const FACTOR: i32 = 0x9e37_79b1_u32 as i32;
const SHIFT: u8 = 28;
/// Offset of an entry's code.
const CODE: i32 = std::mem::offset_of!(Target, code) as i32;
/// Offset of a table's name from its first entry: it stands before it.
const NAME: i32 = -(size_of::<Target>() as i32);

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

    /// Which of [`Table::entries`] that is.
    fn index(self, rip: u64) -> usize {
        FIRST + self.offset(rip) as usize / size_of::<Target>()
    }
}

/// The first entry; what is before it has the table's name in the place of a RIP.
const FIRST: usize = 1;

/// An entry that no RIP finds. It is zero but for the one that RIP 0 looks at, which is the first.
fn nothing(index: usize) -> Target {
    Target { rip: u64::from(index == FIRST), code: 0 }
}

/// Names a table while it is one regime's. 0: no code may rely on the name.
pub type Name = u32;

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
        let len = FIRST + size.entries();
        let layout = || Layout::array::<Target>(len).unwrap_or(Layout::new::<Target>());
        let mut entries =
            <[Target]>::new_box_zeroed_with_elems(len).unwrap_or_else(|_| handle_alloc_error(layout()));
        entries[FIRST] = nothing(FIRST);
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
        (self.regime, self.entries[0].rip) = (None, 0);
    }

    fn name(&self) -> Name {
        self.entries[0].rip as Name
    }

    /// Where translated code finds it.
    fn address(&self) -> u64 {
        self.entries[FIRST..].as_ptr() as u64
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
    /// The last name that was given.
    last_name: Name,
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
        (self.tables[self.current].address(), given_up)
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
        // Where the names are used up, the table has none, until everything is forgotten.
        self.last_name = self.last_name.saturating_add(1);
        self.tables[oldest].entries[0].rip = u64::from(self.last_name % Name::MAX);
        (oldest, given_up)
    }

    /// Whether a table has this name, and was used lately.
    pub fn is_in_use(&self, name: Name) -> bool {
        self.tables.iter().any(|table| table.name() == name && self.clock - table.used < LATELY)
    }

    /// Where the present table says that a RIP's code is, and the table's name.
    pub fn known(&self, rip: u64) -> Option<(Name, u64)> {
        let table = self.tables.get(self.current)?;
        let entry = table.entries[self.size.index(rip)];
        (entry.rip == rip && entry.code != 0 && table.name() != 0).then_some((table.name(), entry.code))
    }

    /// Remembers where the code for a RIP is, in the regime whose table was asked for last. Gives the table's name where it
    /// did not say so before.
    pub fn remember(&mut self, rip: u64, regime: Regime, code: u64) -> Option<Name> {
        let table = self.tables.get_mut(self.current).filter(|table| table.regime == Some(regime))?;
        let at = self.size.index(rip);
        let name = table.name();
        let entry = &mut table.entries[at];
        if (entry.rip, entry.code) == (rip, code) {
            return None;
        }
        self.conflicts += u64::from(entry.code != 0 && entry.rip != rip);
        if table.log.len() < LOG && entry.code == 0 {
            table.log.push(at as u32);
        }
        *entry = Target { rip, code };
        Some(name)
    }

    /// The same where that takes no other RIP's place.
    pub fn suggest(&mut self, rip: u64, regime: Regime, code: u64) -> Option<Name> {
        let at = self.size.index(rip);
        let free = self.tables.get(self.current).is_some_and(|table| table.entries[at].code == 0);
        if free { self.remember(rip, regime, code) } else { None }
    }

    /// How large the tables are.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Whether [`Targets::grow`] is due: too many conflicts, or no more names.
    pub fn want_growth(&self) -> bool {
        self.conflicts >= MOST_CONFLICTS && !self.size.is_large || self.last_name == Name::MAX
    }

    /// From now on the tables are large where they had many conflicts, and there are names again. All code has to look in
    /// other places from now on.
    pub fn grow(&mut self) {
        self.size.is_large |= self.conflicts >= MOST_CONFLICTS;
        self.last_name = 0;
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

    /// Goes to code that is known for one table, by that table's name: both are filled in later, by [`FarExit`]. The table's
    /// address is in [`SCRATCH`] then. The first jump is taken where it is another table; the second one is the one to be filled
    /// in.
    pub fn jump_under_name(&mut self) -> (FarExit, [Jump; 2]) {
        self.load(SCRATCH, RSP, slot::TARGETS);
        self.memory(false, &[0x81], 7, SCRATCH, NAME);
        let exit = FarExit(self.here());
        self.bytes.extend_from_slice(&[0; size_of::<Name>()]);
        let another = self.jump_if(5);
        (exit, [another, self.jump()])
    }

    /// Goes to the code for a known RIP, which stays in [`ADDRESS`], by the table at [`SCRATCH`]. The jump is taken where it
    /// is not at hand.
    pub fn jump_to_known_target(&mut self, rip: u64, tables: Size) -> Jump {
        self.mov_immediate(ADDRESS, rip);
        self.memory(true, &[0x3b], ADDRESS, SCRATCH, tables.offset(rip));
        let another = self.jump_if(5);
        self.memory(false, &[0xff], 4, SCRATCH, tables.offset(rip) + CODE);
        another
    }
}

/// Where the name stands that an exit to another page compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarExit(pub usize);

impl FarExit {
    /// From the name to the displacement of the jump behind the conditional one.
    const JUMP: usize = size_of::<Name>() + 6 + 1;

    /// Makes it go to `target`, an offset in code memory, while the table has this name.
    pub fn lead(self, memory: &mut CodeMemory, name: Name, target: usize) {
        memory.patch(self.0, &name.to_le_bytes());
        let at = self.0 + Self::JUMP;
        let disp = (target as i64 - (at as i64 + 4)) as i32;
        memory.patch(at, &disp.to_le_bytes());
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
    fn a_name_is_one_regimes() {
        let mut targets = Targets::default();
        let name = |targets: &mut Targets, regime| {
            targets.table(regime);
            let name = targets.remember(8, regime, 5);
            assert_eq!(targets.remember(8, regime, 5), None, "it says so already");
            name.or(targets.known(8).map(|(name, _)| name)).unwrap()
        };
        let names: Vec<_> = (0..TABLES as u64).map(|regime| name(&mut targets, regime)).collect();
        assert!((1..TABLES).all(|at| names[at] != names[at - 1]) && !names.contains(&0));
        assert_eq!(name(&mut targets, 3), names[3]);
        assert!(names.iter().all(|&name| targets.is_in_use(name)));
        let new = name(&mut targets, 77);
        assert!(!names.contains(&new) && targets.is_in_use(new));
        assert!(!targets.is_in_use(names[0]), "its table was given up");
        (0..LATELY).for_each(|n| assert_ne!(name(&mut targets, 3 + n % 2), 0));
        assert!(!targets.is_in_use(names[5]) && targets.is_in_use(names[4]), "not lately");
        targets.clear();
        assert!(!targets.is_in_use(new));
        targets.last_name = Name::MAX - 1;
        assert!(!targets.want_growth());
        targets.table(1);
        assert!(targets.want_growth(), "no name is left");
        targets.remember(8, 1, 5);
        assert_eq!(targets.known(8), None, "code must not rely on it");
        targets.grow();
        assert_eq!(name(&mut targets, 1), 1);
        assert!(!targets.size().is_large && !targets.want_growth());
    }

    #[test]
    fn tables_in_which_many_took_anothers_place_become_large() {
        let mut targets = Targets::default();
        let rips = || (0..LARGE as u64).map(|n| n * 16);
        let fill = |targets: &mut Targets| {
            targets.table(1);
            rips().for_each(|rip| assert!(targets.remember(rip, 1, 5).is_some()));
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
        rips().for_each(|rip| assert!(targets.remember(rip, 1, 5).is_some()));
        targets.clear();
        assert!(rips().all(|rip| found(&mut targets, 1, rip).is_none()));
    }
}
